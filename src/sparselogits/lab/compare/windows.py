"""Per-window sums of all runs in one compact file, from which every interval can be recomputed.

    python -m sparselogits.lab.compare.windows RESULTS.json WINDOWS.npz

recomputes the metrics of every method and their intervals, and reports those that differ from
RESULTS.json. The file is a compressed archive of NumPy arrays:

    runs                           int64 [R, 3], index of method and student in names, and seed
    names                          all titles of methods and students
    loss, kl, ...                  float32 [R, W, C], see `HeldOut.sums`
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparselogits.errors import CacheError
from sparselogits.evaluate import METRICS
from sparselogits.lab.compare.results import Figure, MethodRow, Results, read_results
from sparselogits.lab.compare.summary import Lines, Place, Sums, metrics_of

TOLERANCE = 1e-4
"""Relative difference that float32 sums and numbers of six digits may leave."""


def pack_windows(sums: Mapping[Place, Sums]) -> bytes:
    """Pack the per-window sums of runs, by method, student and seed, into one file's bytes."""
    names = list(dict.fromkeys(name for place in sums for name in place[:2]))
    runs = [[names.index(method), names.index(student), seed] for method, student, seed in sums]
    arrays: dict[str, Any] = {
        name: np.array([own[name] for own in sums.values()], np.float32) for name in METRICS
    }
    out = io.BytesIO()
    np.savez_compressed(
        out, runs=np.array(runs, np.int64).reshape(-1, 3), names=np.array(names), **arrays
    )
    return out.getvalue()


def windows_of(out: Path) -> bytes:
    """Pack the per-window sums of the finished runs of a comparison's directory.

    Args:
        out: the directory, with `results.json` and the runs' outcomes; it may be unfinished.

    Raises:
        CacheError: if the directory holds no results, or a run's outcome is missing.
    """
    sums = {}
    for run in read_results(out).runs:
        if run.folder is None or run.status != "done":
            continue
        key = run.folder.rpartition("--")[2]  # the fingerprint's first digits
        kept = [*out.glob(f"finished/runs/{key}*.json"), out / run.folder / "outcome.json"]
        file = kept[0]  # the last is an older version's
        try:
            content = json.loads(file.read_bytes())
            sums[run.method, run.student, run.seed] = content.get("value", content)["sums"]
        except (OSError, ValueError, KeyError) as error:
            raise CacheError(
                f"{file} holds no per-window sums ({error}), although {out / 'results.json'} names "
                "the run as done. Run `sparselogits compare` again"
            ) from error
    return pack_windows(sums)


def read_windows(path: Path) -> dict[Place, Sums]:
    """Read the per-window sums of runs, by method, student and seed.

    Raises:
        CacheError: if the file is missing or is not such an archive.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = stored["names"].tolist()
            columns = {name: stored[name].astype(np.float64) for name in METRICS}
            return {
                (names[method], names[student], seed): {
                    name: column[row] for name, column in columns.items()
                }
                for row, (method, student, seed) in enumerate(stored["runs"].tolist())
            }
    except (OSError, ValueError, KeyError, IndexError, EOFError) as error:
        raise CacheError(
            f"{path} is not a file of per-window sums ({error}). `sparselogits compare` writes one "
            "as windows.npz, beside results.json"
        ) from error


def differences(results: Results, sums: Mapping[Place, Sums]) -> list[str]:
    """Recompute all metrics with their intervals, and describe those that are not as stored."""
    recipe = results.settings["recipe"]
    found = []
    for row in results.methods:
        lines = Lines.of_rows([own for own in results.methods if own.student == row.student])
        own = metrics_of(
            (row.method, row.student),
            sums,
            lines,
            seeds=row.seeds_done,
            first_seed=recipe["seeds"][0],
            resamples=recipe["resamples"],
        )
        for name, stored, again in _pairs(row, own):
            if not _alike(stored, again):
                found.append(f"{row.method}, {row.student}, {name}: {stored} stored, {again} found")
    return found


def _pairs(
    row: MethodRow, own: Mapping[str, Any]
) -> Iterator[tuple[str, Figure | None, Figure | None]]:
    for name, figure in row.figures.items():
        yield name, figure, own["figures"].get(name)
    for name, figure in row.minus_ce.items():
        yield f"{name} minus CE", figure, own["minus_ce"].get(name)
    for name in ("gap_closed", "recovered"):
        yield name, getattr(row, name), own[name]


def _alike(stored: Figure | None, again: Figure | None) -> bool:
    if stored is None or again is None:
        return stored is again
    one, other = _numbers(stored), _numbers(again)
    scale = max(abs(x) for x in one if x is not None)
    return all(
        x is y
        if x is None or y is None
        else math.isclose(x, y, rel_tol=TOLERANCE, abs_tol=TOLERANCE * scale)
        for x, y in zip(one, other, strict=True)
    )


def _numbers(figure: Figure) -> list[float | None]:
    ends = (figure.windows, figure.seeds, figure.both)
    return [figure.mean, *(end for own in ends for end in (own.low, own.high))]


def main() -> None:
    """Report the metrics of stored results that their per-window sums do not give again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("windows", type=Path)
    given = parser.parse_args()
    found = differences(read_results(given.results), read_windows(given.windows))
    print(json.dumps({"differences": found}, indent=1))
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
