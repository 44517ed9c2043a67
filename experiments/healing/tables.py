"""Print the tables of the healing experiments, or write them into the pages.

    python experiments/healing/tables.py            print every table
    python experiments/healing/tables.py --write    write them into the pages of PAGES

A page marks a table by the lines `<!-- table: NAME -->` and `<!-- end of table -->`, where NAME is
a file of experiments/results without its suffix, such as healing_layers24.
tests/lab/compare/test_healing.py compares the pages with the stored results.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparselogits.evaluate.intervals import Estimate, paired_interval, ratio, t_interval
from sparselogits.lab.compare import MethodRow, Results, read_results
from sparselogits.lab.compare.results import Ends

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "compress.md", ROOT / "docs" / "results.md")
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
RIVAL = "Top-12 ghost"
HEAD = (
    *("method", "entries", "bytes", "loss", "KL", "acceptance %", "ECE %"),
    *("of full KD's recovery %", f"KL less {RIVAL}'s", "tokens/s"),
)


def rows_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def number(value: float | None, digits: int, scale: float = 1) -> str:
    """Format a number, times a scale; "-" for None."""
    return "-" if value is None else f"{scale * value:.{digits}f}"


def with_ends(mean: float, ends: Ends | Estimate, digits: int) -> str:
    """Format a mean with its interval, if it has one."""
    if ends.low is None or ends.high is None:
        return number(mean, digits)
    return f"{mean:.{digits}f} ({ends.low:.{digits}f} to {ends.high:.{digits}f})"


def less_rival(results: Results, row: MethodRow) -> str:
    """Return the difference in KL to Top-12 with the ghost token, paired, with Student's t."""
    kl = {
        (run.method, run.seed): run.figures["kl"]
        for run in results.runs
        if run.student == row.student and run.status == "done"
    }
    both = [seed for seed in row.seeds_done if (RIVAL, seed) in kl]
    if row.method == RIVAL or row.family == "none" or not both:
        return "-"
    found = t_interval([kl[row.method, seed] - kl[RIVAL, seed] for seed in both])
    return with_ends(found.mean, found, 3)


def cells(results: Results, row: MethodRow) -> list[str]:
    """Return the cells of a method in the table of a comparison."""

    def metric(name: str, digits: int, scale: float = 1) -> str:
        own = row.figures.get(name)
        return number(own and own.mean, digits, scale)

    share = "-"
    if row.recovered is not None and row.family not in ("none", "full"):
        share = with_ends(row.recovered.mean, row.recovered.seeds, 1)
    return [
        row.method,
        number(row.entries, 1),
        number(row.bytes_per_token, 1),
        metric("loss", 3),
        metric("kl", 3),
        metric("acceptance", 1, 100),
        metric("ece", 1, 100),
        share,
        less_rival(results, row),
        number(row.tokens_per_cpu_second or None, 0),
    ]


def comparison_table(results: Results) -> list[str]:
    """Return the table of all methods of a setting, over the finished seeds."""
    rows = [cells(results, row) for row in results.methods if row.seeds_done]
    if results.teacher is not None:
        own = results.teacher.figures
        known = {3: number(own["loss"], 3), 6: number(own["ece"], 1, 100)}
        rows.append(["(the teacher)", *(known.get(i, "-") for i in range(1, len(HEAD)))])
    done = [row for row in results.methods if row.seeds_done and row.family != "none"]
    counts = sorted({len(row.seeds_done) for row in done})
    corpus = results.settings["corpus"]
    note = (
        f"{corpus['training_tokens']:,} tokens to train on, {corpus['heldout_windows']} held-out "
        f"windows, seeds: {' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))}. In "
        "brackets: 95 % intervals over seeds (Student's t; Fieller's for shares) on fixed held-out "
        "text. Tokens per second of processor time of training, on a machine with other work; the "
        "teacher's pass that fills a cache is not counted, that of full KD is."
    )
    return [*rows_of(HEAD, rows), "", note]


def rates_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Return the table of the held-out KL at every learning rate, on tuning text."""
    lines = []
    for setting, methods in found.items():
        rates = list(next(iter(methods.values())))
        rows = []
        for name, own in methods.items():
            best = min(own, key=lambda rate: own[rate])
            rows.append([name, *(f"{own[r]:.3f}" + " *" * (r == best) for r in rates)])
        lines += ["", *rows_of([setting, *rates], rows)]
    note = (
        "Held-out KL by learning rate, one seed; `*` marks the rate that is used. RS-KD uses the "
        "rate of systematic rounds. If `*` is at an edge, a rate outside the range may be better."
    )
    return [*lines[1:], "", note]


def over_seeds_or_windows(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], metric: str
) -> tuple[Estimate, str]:
    """Return the difference of two arms with its interval, and what the interval is over.

    Args:
        first: rows of an arm, one per seed.
        second: rows of the arm that is subtracted.
        metric: "kl" or "reverse_kl_of_a_sequence".
    """
    seeds = [row["seed"] for row in first if row["seed"] in {other["seed"] for other in second}]
    by_seed = [{row["seed"]: row for row in arm} for arm in (first, second)]
    if len(seeds) > 1:
        return t_interval([by_seed[0][s][metric] - by_seed[1][s][metric] for s in seeds]), "seeds"
    sums = []
    for own in (rows[seeds[0]] for rows in by_seed):
        if metric == "kl":
            pairs = [[nats, 1] for nats in own["kl_by_window"]]
        else:
            pairs = [[nats, own["prompts_per_window"]] for nats in own["own_text"]["reverse_kl"]]
        sums.append(torch.tensor(pairs, dtype=torch.float64))
    return paired_interval(sums[0], sums[1], ratio), "held-out windows"


PAIRS = (
    ("healed, then on-policy", "healed for longer"),
    ("healed, then on-policy", "on-policy for longer"),
    ("healed, then on-policy", "full KD"),
    ("healed for longer", "full KD"),
)


def mean_over_seeds(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the mean of a measurement over the rows of an arm, or None if the arm has none."""
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else None


def on_policy_table(stored: Mapping[str, Any]) -> list[str]:
    """Return the table of the arms of on_policy.py, means over seeds, and its endpoints."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in stored["arms"]:
        arms.setdefault(row["arm"], []).append(row)

    def mean(rows: Sequence[Mapping[str, Any]], name: str, digits: int, scale: float = 1) -> str:
        return number(mean_over_seeds(rows, name), digits, scale)

    head = (
        *("arm", "seeds", "seconds in all", "steps", "loss", "KL", "acceptance %", "ECE %"),
        *("reverse KL per token", "reverse KL per sequence", "entropy", "own acceptance %"),
    )
    rows = [
        [
            name,
            str(len(own)),
            mean(own, "total_seconds", 0),
            mean(own, "steps", 0),
            mean(own, "loss", 3),
            mean(own, "kl", 3),
            mean(own, "acceptance", 1, 100),
            mean(own, "ece", 1, 100),
            mean(own, "reverse_kl", 3),
            mean(own, "reverse_kl_of_a_sequence", 1),
            mean(own, "own_entropy", 2),
            mean(own, "own_acceptance", 1, 100),
        ]
        for name, own in arms.items()
    ]
    lines = [
        *rows_of(head, rows),
        "",
        "Loss to ECE: given held-out text. The last four columns: the student's own completions of "
        "held-out prompts.",
    ]
    for first, second in PAIRS:
        if first in arms and second in arms:
            name = "reverse_kl_of_a_sequence"
            found, over = over_seeds_or_windows(arms[first], arms[second], name)
            said = with_ends(found.mean, found, 2)
            lines.append(f"Reverse KL per sequence, {first} less {second}: {said}, over {over}.")
    return lines


NAMES_OF_ARMS = {
    "full KD": ("full KD (Hinton et al., 2015)", "online"),
    "healed for longer": ("systematic 12, cached", "one pass, before training"),
    "on-policy for longer": ("on-policy reverse KL (GKD, by TRL)", "online"),
    "healed, then on-policy": ("systematic 12, cached, then on-policy", "one pass, then online"),
}
"""Name of the method and use of the teacher in the README's table, by arm of on_policy.py."""


def methods_table(stored: Mapping[str, Any]) -> list[str]:
    """Return the table of methods trained for equal time, with means over seeds."""
    head = (
        *("method", "teacher", "seconds", "tokens", "KL", "accepted %"),
        "reverse KL on its own text",
    )
    rows = []
    for name, words in NAMES_OF_ARMS.items():
        mean = partial(mean_over_seeds, [row for row in stored["arms"] if row["arm"] == name])
        rows.append(
            [
                *words,
                number(mean("total_seconds"), 0),
                f"{mean('tokens'):,.0f}",
                number(mean("kl"), 3),
                number(mean("acceptance"), 1, 100),
                number(mean("reverse_kl"), 3),
            ]
        )
    masked = RESULTS / "masked.json"
    own, note = _masked_rows(json.loads(masked.read_text()) if masked.exists() else None)
    return [*rows_of(head, [*rows, *own]), "", note]


NAMES_OF_MASKED = {
    "full KD": ("full KD of a masked teacher (DistilBERT, Sanh et al., 2019) \N{DAGGER}", "online"),
    "RS-KD 12": ("RS-KD 12 of a masked teacher, cached \N{DAGGER}", "one pass, before training"),
}
"""Name and use of the teacher in the README's table, by method of experiments/masked."""


def _masked_rows(stored: Mapping[str, Any] | None) -> tuple[list[list[str]], str]:
    """Return the rows of masked language models in the table of methods, and their note.

    Args:
        stored: content of masked.json; None if the experiment has not been run.
    """
    if stored is None:
        rows = [[*words, *["not run"] * 3, "-", "-"] for words in NAMES_OF_MASKED.values()]
        return rows, "\N{DAGGER} Planned in `experiments/masked/masked.py`, not run."
    rows = []
    for name, words in NAMES_OF_MASKED.items():
        own = stored["methods"][name]
        tokens, speed = own["training_tokens"], own["tokens_per_cpu_second"]
        seconds = number(tokens / speed if speed else None, 0)
        rows.append([*words, seconds, f"{tokens:,}", number(_mean(own["kl"]), 3), "-", "-"])
    layers = stored["size"]["layers"]
    return rows, (
        f"\N{DAGGER} Another setting, not comparable with the rows above: masked language models, "
        f"half of {layers} layers, KL on masked tokens of held-out text, mean of "
        f"{stored['seeds']} seeds; seconds of training alone, without the pass that fills the "
        "cache ([the experiment](docs/results.md#masked-language-models))."
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def masked_table(stored: Mapping[str, Any]) -> list[str]:
    """Return the table of all methods of experiments/masked, over the finished seeds."""
    head = (
        *("method", "entries", "bytes", "bytes, causal", "loss", "KL", "ECE %"),
        *("top-1 agreement %", "probe %"),
    )

    def metric(values: Sequence[float], digits: int, scale: float = 1) -> str:
        if not values:
            return "-"
        found = t_interval([scale * value for value in values])
        return with_ends(found.mean, found, digits)

    causal = stored["causal_bytes_per_token"] or {}
    rows = [
        [
            name,
            number(own["entries"], 1),
            number(own["bytes_per_token"], 2),
            number(causal.get(name), 2),
            metric(own["loss"], 3),
            metric(own["kl"], 3),
            metric(own["ece"], 1, 100),
            metric(own["agreement"], 1, 100),
            metric(own["probe"], 1, 100),
        ]
        for name, own in stored["methods"].items()
    ]
    teacher = stored["teacher"]
    last = [number(teacher[name], digits, scale) for name, digits, scale in _OF_TEACHER]
    rows.append(["(the teacher)", "-", "-", "-", last[0], "-", last[1], "-", last[2]])
    corpus = stored["corpus"]
    note = (
        f"{corpus['training_tokens']:,} tokens to train on, {corpus['heldout_windows']} held-out "
        f"windows, {stored['seeds']} seeds. In brackets: 95 % intervals over seeds (Student's t). "
        "Entries per masked token; bytes of the targets per token of text, and those of the same "
        "sampler in a cache of a causal teacher of equal layers and width. Probe: accuracy in "
        f"telling the source of a passage, {len(stored['sources'])} sources."
    )
    return [*rows_of(head, rows), "", note]


_OF_TEACHER = (("loss", 3, 1), ("ece", 1, 100), ("probe", 1, 100))


def in_use_table(stored: Mapping[str, Any]) -> list[str]:
    """Return the table of in_use.py: zero-shot tasks and drafting."""
    tasks = list(dict.fromkeys(name for row in stored.values() for name in row["tasks"]))
    heads = [name.replace("/", " ") + " %" * (not name.endswith("perplexity")) for name in tasks]
    rows = []
    for method, row in stored.items():
        line = [method]
        for name in tasks:
            own = row["tasks"].get(name)
            scale, digits = (1, 2) if name.endswith("perplexity") else (100, 1)
            line.append("-" if own is None else number(own["value"], digits, scale))
            if own and own["stderr"] is not None:
                line[-1] += f" \N{PLUS-MINUS SIGN} {number(own['stderr'], digits, scale)}"
        drafts = row.get("drafting", {})
        line += [number(drafts.get(name), 1, 100) for name in ("acceptance", "expected", "error")]
        rows.append(line)
    head = ("method", *heads, "accepted %", "expected %", "error %")
    note = (
        "After \N{PLUS-MINUS SIGN}: the standard error over samples. Accepted: share of the "
        "verified tokens that the teacher accepted; error: standard error of the accepted share "
        "around the expected one."
    )
    return [*rows_of(head, rows), "", note]


TABLES = {
    "healing_rates": ("healing_rates", rates_table),
    "healing_on_policy": ("healing_on_policy", on_policy_table),
    "healing_methods": ("healing_on_policy", methods_table),
    "healing_in_use": ("healing_in_use", in_use_table),
    "masked": ("masked", masked_table),
}
"""File and function of each table that is not of a comparison, by name of the table."""


def table(name: str) -> list[str]:
    """Return the table of a name, or "Not run." if its file does not exist."""
    stored, make = TABLES.get(name, (name, None))
    file = RESULTS / f"{stored}.json"
    if not file.exists():
        return ["Not run."]
    if make is not None:
        return make(json.loads(file.read_text()))
    return comparison_table(read_results(file))


def filled(page: str) -> str:
    """Return the text of a page with all tables up to date."""
    return PLACE.sub(lambda m: f"{m[1]}\n" + "\n".join(table(m[2])) + f"\n\n{m[3]}", page)


def names_in(page: str) -> Iterator[str]:
    """Yield the names of the tables that a page marks."""
    yield from (place[1] for place in PLACE.findall(page))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the tables into the pages")
    if parser.parse_args().write:
        for page in PAGES:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for file in sorted(RESULTS.glob("healing_*.json")):
        print(f"## {file.stem}\n\n" + "\n".join(table(file.stem)) + "\n")


if __name__ == "__main__":
    main()
