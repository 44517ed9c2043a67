"""Measure how often 95 % intervals over three seeds contain the truth.

    python experiments/interval_coverage.py        (about two minutes)

Draws experiments whose truth is known: the difference of two methods is measured for three seeds on
the same 96 windows, and is mu + a_seed + b_window + c_seed,window with normal a, b and c. Writes
results/interval_coverage.json: by the ratio of the seeds' standard deviation to that of the mean of
the windows, the share of experiments in which mu lies inside

- `bootstrap`: percentile bootstrap over windows and seeds, both resampled, as in earlier versions
  of `sparselogits compare`,
- `seeds` and `both`: intervals of `sparselogits.evaluate.over_seeds`. For `seeds` the text is
  fixed, so the truth is mu plus the mean of b over the windows.

Without noise of the windows the bootstrap's interval is the range of the three values: a resample
consists of one value alone with probability 1/27, which is more than 2.5 %. All three lie on the
same side of mu with probability 1/4, so it contains mu in 75 % of experiments.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from sparselogits.evaluate import over_seeds
from sparselogits.evaluate.intervals import SeedEstimate

SEEDS, WINDOWS, EXPERIMENTS, RESAMPLES = 3, 96, 1000, 1000
OWN_NOISE = 0.5
"""Standard deviation of c, relative to that of b."""
RATIOS = (math.inf, 8.0, 4.0, 2.0, 1.0)
RESULT = Path(__file__).parent / "results" / "interval_coverage.json"


def bootstrap(values: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """Return the interval of a bootstrap over seeds and windows of values [S, W]."""

    def weights(count: int) -> Tensor:
        chosen = torch.randint(count, (RESAMPLES, count), generator=generator)
        times = torch.zeros(RESAMPLES, count, dtype=torch.float64)
        return times.scatter_add_(1, chosen, torch.ones_like(times)) / count

    means = (weights(SEEDS) @ values * weights(WINDOWS)).sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def coverage(ratio: float) -> dict[str, float]:
    """Return the share of experiments whose interval contains the truth, by kind of interval."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inside = {"bootstrap": 0, "seeds": 0, "both": 0}
    of_windows = 0.0 if math.isinf(ratio) else math.sqrt(WINDOWS) / ratio
    for _ in range(EXPERIMENTS):
        b = of_windows * normal(WINDOWS)
        values = normal(SEEDS, 1) + b + OWN_NOISE * of_windows * normal(SEEDS, WINDOWS)
        low, high = bootstrap(values, generator)
        inside["bootstrap"] += low <= 0 <= high
        units = torch.stack([values, torch.ones_like(values)], 2)
        found: SeedEstimate = over_seeds(units, resamples=RESAMPLES)
        for name, truth in (("seeds", float(b.mean())), ("both", 0.0)):
            own = getattr(found, name)
            inside[name] += own.low <= truth <= own.high
    return {name: count / EXPERIMENTS for name, count in inside.items()}


def main() -> None:
    found = {
        "seeds": SEEDS,
        "windows": WINDOWS,
        "experiments": EXPERIMENTS,
        "resamples": RESAMPLES,
        "torch": torch.__version__,
        "coverage": {str(ratio): coverage(ratio) for ratio in RATIOS},
    }
    print(json.dumps(found, indent=1))
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
