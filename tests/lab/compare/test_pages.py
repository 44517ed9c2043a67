"""Test that docs/results.md and its appendix agree with the stored results."""

import json
import math
import re
import statistics

import pytest
from experiments.compare.pages import BY_FILE, DOCS, HEALING, RESULTS, SETTINGS, healed, pages
from experiments.pushforward_bias import AHEAD, means, pairs, rows_of

from sparselogits.lab.compare import read_results
from sparselogits.lab.compare.windows import differences, read_windows

T_THREE = 4.302653  # 97.5 % of Student's t with two degrees of freedom
NUMBERS = re.compile(r"(-?[\d.]+) \((-?[\d.]+) to (-?[\d.]+)\)")
WINDOWS = sorted(RESULTS.glob("compare_*_windows.npz")) + sorted(
    RESULTS.glob("healing_*_windows.npz")
)


def test_the_pages_are_what_the_stored_results_say():
    for path, text in pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run experiments/compare/pages.py"


def test_every_stored_comparison_has_its_page():
    shown = {f"compare_{own.file}.json" for own in SETTINGS}
    assert shown == {path.name for path in RESULTS.glob("compare_*.json")}


BELOW, ABOVE, AROUND = -1, 1, 0  # position of an interval relative to zero

CLAIMS = [
    ("both remain behind full KD", "layers24", "systematic 12", "full KD", ABOVE),
    ("both remain behind full KD", "layers24", "RS-KD 12", "full KD", ABOVE),
    ("less than either sampler with five", "layers24", "systematic 5", "Top-12 ghost", BELOW),
    ("less than either sampler with five", "layers24", "RS-KD 5", "Top-12 ghost", BELOW),
    ("less than cross-entropy to the labels", "layers24", "Top-12", "CE", ABOVE),
    ("Top-100 with the ghost token is not", "layers24", "Top-100 ghost", "systematic 12", AROUND),
    ("Systematic and independent rounds are", "layers24", "systematic 12", "RS-KD 12", AROUND),
    ("Systematic and independent rounds are", "layers24", "systematic 5", "RS-KD 5", AROUND),
    ("slightly less than cross-entropy", "layers18", "Top-12", "CE", ABOVE),
    ("are ahead of the ghost token by", "layers18", "systematic 12", "Top-12 ghost", BELOW),
    ("more than cross-entropy here", "greedy", "Top-12", "CE", BELOW),
    ("rounds at 12 entries are not", "greedy", "systematic 12", "Top-12 ghost", AROUND),
    ("they are ahead of Top-12 without it", "greedy", "systematic 12", "Top-12", BELOW),
    ("over the ghost token is not there", "drawn", "systematic 12", "Top-12 ghost", AROUND),
    ("even Top-100 is behind Top-100 with it", "drawn", "Top-100", "Top-100 ghost", ABOVE),
    ("are not distinguishable from full KD", "bits3", "systematic 12", "full KD", AROUND),
    ("nor from the ghost token", "bits3", "systematic 12", "Top-12 ghost", AROUND),
    ("only Top-12 without it is behind", "bits3", "Top-12", "Top-12 ghost", ABOVE),
    ("only Top-12 without it is behind", "bits3", "CE", "Top-12 ghost", AROUND),
    ("lead of systematic rounds over", "bits4a8", "systematic 12", "Top-12 ghost", BELOW),
    ("full KD remains ahead", "bits4a8", "systematic 12", "full KD", ABOVE),
    ("K = 5, +0.734", "small_teacher", "Top-K 12", "CE", ABOVE),
    ("after six passes at +1.605", "small_teacher_converged", "Top-K 12", "CE", ABOVE),
    ("not distinguishable from CE in loss", "smollm2", "Top-K 12", "CE", AROUND),
    ("excludes zero after six passes", "small_teacher_converged", "RS-KD 12", "full KD", ABOVE),
    ("two larger students", "small_teacher_larger", "RS-KD 12", "full KD", ABOVE),
    ("the interval contains zero", "smollm2", "RS-KD 12", "full KD", AROUND),
    ("the ghost token at K = 50", "small_teacher", "Top-K 50, ghost", "Top-K 50", AROUND),
    ("Twelve uniform entries end", "small_teacher", "uniform 12", "CE", ABOVE),
    ("Reverse KL is not", "small_teacher", "reverse KL", "CE", AROUND),
    ("A threshold target is not", "small_teacher", "threshold 5", "systematic 5", AROUND),
    ("Adaptive rounds show", "small_teacher_adaptive", "adaptive 12", "systematic 12", AROUND),
]
"""Words of docs/results.md, results, two methods, and where their difference is from zero.

The difference is in KL in the settings of healed students and in loss in all others.
"""


@pytest.mark.parametrize(("words", "file", "method", "other", "expected"), CLAIMS)
def test_a_comparison_in_words_is_that_of_the_interval(words, file, method, other, expected):
    assert words in " ".join((DOCS / "results.md").read_text(encoding="utf-8").split())
    if file in HEALING:
        found = healed(file).less(method, other, "kl")
    else:
        found = BY_FILE[file].seeds().less(method, other)
    assert (found.low > 0) - (found.high < 0) == expected


@pytest.mark.parametrize("k", [5, 12, 50, 100])
@pytest.mark.parametrize("rule", ["ghost", "smooth", "ground truth"])
def test_each_rule_for_the_missing_mass_lowers_the_loss(k, rule):
    found = BY_FILE["small_teacher"].seeds().less(f"Top-K {k}, {rule}", f"Top-K {k}")
    assert (found.high < 0) == ((rule, k) != ("ghost", 50))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda own: own.file)
def test_a_reader_who_redoes_the_intervals_gets_the_printed_ones(setting):
    """From the JSON and the page alone: two columns of the table, all methods with three seeds."""
    stored = json.loads((RESULTS / f"compare_{setting.file}.json").read_text())
    losses: dict[tuple[str, str], list[float]] = {}
    for run in stored["runs"]:
        losses.setdefault((run["student"], run["method"]), []).append(run["figures"]["loss"])
    page = (DOCS / "results" / f"{setting.file.replace('_', '-')}.md").read_text(encoding="utf-8")
    lines = [line.split(" | ") for line in page.splitlines() if line.count(" | ") == 12]
    lines = [cells for cells in lines if cells[1] == "3"]
    students = list(dict.fromkeys(run["student"] for run in stored["runs"]))
    count = len(lines) // len(students)
    checked = 0
    for at, cells in enumerate(lines):
        student = students[at // count]
        own, ce, full = (
            losses[student, method] for method in (cells[0].removeprefix("| "), "CE", "full KD")
        )
        if found := NUMBERS.fullmatch(cells[6]):
            less = [x - y for x, y in zip(own, ce, strict=True)]
            half = T_THREE * statistics.stdev(less) / math.sqrt(3)
            mean = statistics.fmean(less)
            for printed, value in zip(
                found.groups(), (mean, mean - half, mean + half), strict=True
            ):
                assert float(printed) == pytest.approx(value, abs=6e-4)
            checked += 1
        if found := NUMBERS.fullmatch(cells[7]):
            gain = [x - y for x, y in zip(ce, own, strict=True)]
            gap = [x - y for x, y in zip(ce, full, strict=True)]
            assert float(found[1]) == pytest.approx(100 * sum(gain) / sum(gap), abs=0.51)
            for end, sign in ((float(found[2]), 1), (float(found[3]), -1)):
                # a t test of "gain = end * gap" just rejects: from half a unit on either side of it
                tests = []
                for share in (end - 0.51, end + 0.51):
                    left = [x - share / 100 * y for x, y in zip(gain, gap, strict=True)]
                    error = statistics.stdev(left) / math.sqrt(3)
                    tests.append(sign * statistics.fmean(left) / error)
                assert min(tests) <= T_THREE <= max(tests)
            checked += 1
    assert checked >= len(lines) - 2 * len(students) or setting.file.endswith("convergence")


@pytest.mark.parametrize("file", WINDOWS, ids=lambda path: path.stem)
def test_intervals_are_recomputed_from_the_sums_of_windows(file):
    results = read_results(file.with_name(f"{file.stem.removesuffix('_windows')}.json"))
    assert differences(results, read_windows(file)) == []


def test_the_variants_of_theory_are_the_measured_ones():
    columns = []
    for name in ("english-web", "shakespeare", "small-teacher"):
        stored = json.loads((RESULTS / f"samplers_at_equal_bytes_{name}.json").read_text())
        rows = {own["sampler"]: own for own in stored["rows"] if own["budget"] == 11}
        columns.append(rows)
    page = (DOCS / "theory.md").read_text(encoding="utf-8")
    lines = page.split("| variant |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(lines) == 6
    for text in lines:
        variant, *cells = (cell.strip() for cell in text.strip("|").split("|"))
        for cell, rows in zip(cells, columns, strict=True):
            own, default = (rows[key]["error_x_entries"] for key in (variant, "systematic"))
            assert cell == f"{own / default:.2f}"
    one, other = (rows["top-k (biased)"]["error"] for rows in (columns[0], columns[2]))
    assert f"{one:.1e}, {other:.1e}" == "6.7e-03, 3.3e-02"
    for sampler, low, high in (("systematic", 1.5, 2.4), ("multinomial", 0.6, 1.5)):
        ratios = [rows["top-k (biased)"]["error"] / rows[sampler]["error"] for rows in columns]
        assert f"{min(ratios):.1f} to {max(ratios):.1f}" == f"{low} to {high}"


def test_the_bias_of_retokenized_targets_is_the_measured_one():
    """The table of theory.md, from the rows of each pair, two of which are measured again."""
    stored = json.loads((RESULTS / "pushforward_bias.json").read_text())
    rows = stored["rows"]
    for seed, pair in enumerate(pairs(count=2)):
        again = rows_of(seed, pair)
        for old, new in zip((row for row in rows if row["pair"] == seed), again, strict=True):
            assert new == pytest.approx(old, abs=1e-12)
    page = (DOCS / "theory.md").read_text(encoding="utf-8")
    lines = page.split("| D | total variation | bound |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(lines) == 4
    for followed, line in enumerate(lines):
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found = means(rows, followed)
        assert found == pytest.approx(stored["means"][str(followed)], abs=1e-12)
        assert first.split(",")[0] == str(followed)
        digits = {"bias": 3, "bound": 3, "mean_bytes": 2, "true_bytes": 2}
        assert cells == [f"{found[name]:.{places}f}" for name, places in digits.items()]
    positions = sum(row["positions"] for row in rows if row["followed"] == 0)
    count = len({row["pair"] for row in rows})
    said = " ".join(page.split())
    assert f"{count} random pairs of a Markov teacher" in said
    assert f"{positions} shared boundaries, continuations of {AHEAD} tokens enumerated" in said
