"""Write docs/results.md and its appendix, docs/results/SETTING.md, from the stored results.

    python experiments/compare/pages.py            write the pages
    python experiments/compare/pages.py --check    exit with 1 if a page would change

The text of docs/results.md is in findings.md.jinja next to this script; every number there is an
expression over experiments/results/*.json. The text of its first section is
experiments/healing/findings.md, which that template includes; it may mark tables of
experiments/healing/tables.py. The table of docs/index.md is updated too.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
from experiments.compare.tables import (  # noqa: E402
    Seeds,
    of_student,
    order_of_acceptance,
    said,
    tables_of,
)
from experiments.healing.tables import filled as in_places  # noqa: E402
from experiments.healing.tables import mean_over_seeds, over_seeds_or_windows  # noqa: E402
from experiments.planned import less  # noqa: E402

from sparselogits.evaluate import Estimate, t_interval  # noqa: E402
from sparselogits.evaluate.intervals import fieller_interval, two_sided_p  # noqa: E402
from sparselogits.lab.compare import Results, read_results  # noqa: E402
from sparselogits.train.recipe import with_new_names  # noqa: E402

RESULTS, DOCS = ROOT / "experiments" / "results", ROOT / "docs"
INDEX = re.compile(r"(?m)^\| setting \|.*\n(?:\|.*\n)+")
SPACE = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Setting:
    """Stored comparison and the text of its page.

    Args:
        file: name of the results without `compare_` and suffix; also the name of the page.
        title: heading of the page.
        overview: name in the table of all settings; empty if the setting is not in the table.
        about: paragraph on teacher, student and text.
        pictures: paths under docs/figures and their descriptions.
    """

    file: str
    title: str
    overview: str
    about: str
    pictures: tuple[tuple[str, str], ...] = ()

    @cached_property
    def results(self) -> Results:
        """Return the stored comparison."""
        return read_results(RESULTS / f"compare_{self.file}.json")

    def seeds(self, student: str | None = None) -> Seeds:
        """Return the runs of one student, by default of the first one."""
        names = list(dict.fromkeys(row.student for row in self.results.methods))
        found = [name for name in names if student is None or name.startswith(student)]
        return Seeds(self.results, found[0])


SETTINGS = (
    Setting(
        "small_teacher",
        "Small teacher, one pass",
        "5 M teacher, one pass",
        "Teacher: three epochs over 1.0 M tokens of Shakespeare, inaugural addresses and State of "
        "the Union addresses. A quarter of a training token per student parameter, so all students "
        "are far from converged. Hyperparameters were not tuned per method.",
        (
            (
                "storage_against_loss.png#only-light",
                "Held-out loss against bytes per token (`experiments/compare/figure.py`)",
            ),
            (
                "storage_against_loss_dark.png#only-dark",
                "Held-out loss against bytes per token (`experiments/compare/figure.py`)",
            ),
            ("small_teacher/loss-0.png", "Held-out loss against entries per token"),
            ("small_teacher/calibration-0.png", "Calibration of eight methods"),
            (
                "small_teacher/gradient-0.png",
                "Angle to full KD's gradient against entries per token",
            ),
            ("small_teacher/training-0.png", "Training curves of eight methods"),
        ),
    ),
    Setting(
        "small_teacher_adaptive",
        "Small teacher, one pass, adaptive rounds",
        "",
        "Text, seeds and reference runs are those of the first setting. Adaptive rounds follow the "
        "student that CE trained with seed 0: more rounds where its distribution differs from the "
        "teacher's. Their weights are not counts, which is why they need more bytes.",
    ),
    Setting(
        "small_teacher_epochs",
        "Small teacher, four epochs over little text",
        "",
        "Each token is read four times, with all twelve entries or thinned to four: with fresh "
        "noise in each epoch, or with the same draws in all of them.",
    ),
    Setting(
        "small_teacher_longer",
        "Small teacher, three times the text",
        "the same, three times the text",
        "Half of what the teacher read, each token once.",
    ),
    Setting(
        "small_teacher_larger",
        "Small teacher, a larger student",
        "the same, a larger student",
        "The text of the first setting, a student of a third of the teacher's parameters.",
    ),
    Setting(
        "small_teacher_converged",
        "Better small teacher, six passes",
        "better 5 M teacher, six passes",
        "The teacher has the first one's shape and text, and four times its steps. The student "
        "reads a third of that text six times, with the same draws in every pass.",
        (
            ("converged/training-0.png", "Training curves of five methods"),
            ("converged/calibration-0.png", "Calibration of five methods"),
        ),
    ),
    Setting(
        "small_teacher_convergence",
        "Better small teacher, twelve passes of cross-entropy",
        "",
        "As the setting with six passes, with twice as many passes, one seed and only CE.",
    ),
    Setting(
        "smollm2",
        "SmolLM2-135M, two students",
        "SmolLM2-135M, one pass",
        "Teacher: SmolLM2-135M-Instruct, 4-bit weights dequantised to bfloat16. Most of the "
        "students' parameters are embeddings; they read a hundredth of a token per parameter.",
    ),
)
BY_FILE = {own.file: own for own in SETTINGS}
OVERVIEW = ("CE", "full KD", "systematic 12", "RS-KD 12", "Top-K 12")


def number(value: float) -> str:
    """Format a count with spaces between thousands."""
    return f"{value:,.0f}".replace(",", SPACE)


def percent(found: Estimate | None) -> str:
    """Format a share with its interval, for example "82 % (53 to 120)"."""
    return re.sub(r"^-?[\d.]+", lambda mean: f"{mean[0]}{SPACE}%", said(found, 0))


def difference(own: Mapping[str, Any]) -> str:
    """Format a stored difference with its interval, for example "-0.0152 (-0.0169 to -0.0136)"."""
    return said(Estimate(own["mean"], own["low"], own["high"], own["units"]), 4, 1, "+")


def share_of_lead(kl: Mapping[str, Sequence[float]], method: str) -> str:
    """Format the share of full KD's lead over CE in KL that a method keeps, in per cent."""
    share = fieller_interval(less(kl, "CE", method), less(kl, "CE", "full KD"))
    ends = (None if end is None else 100 * end for end in (share.low, share.high))
    return percent(Estimate(100 * share.mean, *ends, share.units))


def overview() -> list[str]:
    """Return the table of all settings: loss, and closed share of the gap with its interval."""
    head = ["setting", "student", "tokens of text", *OVERVIEW]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for setting in SETTINGS:
        if not setting.overview:
            continue
        facts = setting.results.settings
        for student, parameters in facts["student_parameters"].items():
            seeds = setting.seeds(student)
            cells = [setting.overview, f"{parameters / 1e6:.1f}{SPACE}M"]
            cells.append(number(facts["corpus"]["training_tokens"]))
            for method in OVERVIEW:
                mean, gap = seeds.mean(method), seeds.gap(method)
                assert mean is not None
                cell = f"{mean.mean:.3f}"
                if method not in ("CE", "full KD") and gap is not None:
                    cell += f", {percent(gap)}"
                cells.append(cell)
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def appendix(setting: Setting) -> str:
    """Return the page of one setting."""
    results = setting.results
    facts, recipe = results.settings, results.settings["recipe"]
    steps = next(run.steps for run in results.runs if run.status == "done")
    students = ", ".join(
        f"{k} ({number(v)} parameters)" for k, v in facts["student_parameters"].items()
    )
    seeds = max(len(row.seeds_done) for row in results.methods)
    batch = with_new_names(recipe["training"])["per_device_train_batch_size"]
    lines = [
        f"# {setting.title}",
        "",
        "Written by `experiments/compare/pages.py` from "
        f"`experiments/results/compare_{setting.file}.json`; the words and intervals are explained "
        "in [Results](../results.md#words-and-intervals).",
        "",
        setting.about,
        "",
        f"- Recipe and commands: `experiments/compare/{setting.file}.yaml`.",
        f"- Teacher: {number(facts['teacher']['parameters'])} parameters, vocabulary "
        f"{number(facts['teacher']['vocabulary'])}, {facts['teacher']['dtype']}.",
        f"- Student: {students}.",
        f"- Text: {number(facts['corpus']['training_tokens'])} tokens, {steps} steps of "
        f"{batch} windows of {recipe['window']} tokens; "
        f"{facts['corpus']['heldout_windows']} held-out windows.",
        f"- Seeds: {seeds}, which set the initial weights and the order of the text. Draws are the "
        "same for all seeds.",
        "",
        *tables_of(results),
        "",
    ]
    for path, words in setting.pictures:
        lines += [f"![{words}](../figures/{path})", ""]
    return "\n".join(lines).rstrip() + "\n"


class Findings:
    """Functions for the expressions of findings.md.jinja; settings are named by results file."""

    def __init__(self) -> None:
        self.deciding = stored("deciding.json")
        self.small_vocabulary = stored("small_vocabulary.json")
        self.many_epochs = stored("many_epochs.json")
        self.own_tokenizer = stored("own_tokenizer.json")
        self.masked = stored("masked.json")
        self.coverage = stored("interval_coverage.json")["coverage"]
        self.drafting = stored("drafting_small_teacher.json")
        self.healing_table = "\n".join(healing())
        self.on_policy = stored("healing_on_policy.json")

    def mean(
        self, setting: str, method: str, metric: str = "loss", digits: int = 3, scale: float = 1
    ) -> str:
        """Return the mean of a metric with its interval."""
        return said(BY_FILE[setting].seeds().mean(method, metric), digits, scale)

    def point(
        self, setting: str, method: str, metric: str = "loss", digits: int = 3, scale: float = 1
    ) -> str:
        """Return the mean of a metric without its interval."""
        found = BY_FILE[setting].seeds().mean(method, metric)
        assert found is not None
        return f"{scale * found.mean:.{digits}f}"

    def less(self, setting: str, method: str, other: str, metric: str = "loss", **how: Any) -> str:
        """Return a paired difference of two methods with its interval."""
        found = BY_FILE[setting].seeds(how.pop("student", None)).less(method, other, metric)
        return said(found, how.get("digits", 3), how.get("scale", 1), "+")

    def gap(self, setting: str, method: str, student: str | None = None) -> str:
        """Return the closed share of the gap in per cent, with Fieller's interval."""
        return percent(BY_FILE[setting].seeds(student).gap(method))

    def p(self, setting: str, method: str, other: str) -> float:
        """Return the p-value of a paired difference in loss."""
        return two_sided_p(BY_FILE[setting].seeds().differences(method, other))

    def each(self, setting: str, method: str, metric: str = "loss", digits: int = 2) -> str:
        """Return a metric of every seed, separated by commas."""
        (own,) = BY_FILE[setting].seeds().values(method, metric=metric)
        return ", ".join(f"{value:.{digits}f}" for value in own)

    def row(self, setting: str, method: str, student: str | None = None) -> Any:
        """Return the stored row of a method."""
        return BY_FILE[setting].seeds(student).rows[method]

    def noise(self, setting: str, method: str, other: str, student: str | None = None) -> float:
        """Return the ratio of the gradient noise of two methods in the largest batch."""
        seeds = BY_FILE[setting].seeds(student)
        one, another = (seeds.rows[name].gradient.sizes[-1].noise for name in (method, other))
        return one / another

    def angle(self, setting: str, method: str, size: int = -1) -> str:
        """Return the angle between the gradients of a method and of full KD."""
        found = BY_FILE[setting].seeds().rows[method].gradient.sizes[size].angle
        return said(Estimate(found.mean, found.low, found.high, 0), 0) + "°"

    def recovered(self, setting: str, method: str) -> str:
        """Return the share of full KD's recovery in a healing setting, with its interval."""
        return recovery(healed(setting), method)

    def recovered_in_all(self, method: str) -> str:
        """Return the range of the mean recovery over all healing settings."""
        shares = [healed(name).rows[method].recovered.mean for name in HEALING]
        return f"{min(shares):.0f} to {max(shares):.0f}{SPACE}%"

    def healed_bytes_in_all(self, method: str) -> str:
        """Return the range of the bytes per token over the settings with rounded weights."""
        sizes = [healed(name).rows[method].bytes_per_token for name in ROUNDED]
        return f"{min(sizes):.0f} to {max(sizes):.0f}"

    def healed(
        self, setting: str, method: str, other: str = "", metric: str = "kl", scale: float = 1
    ) -> str:
        """Return a metric of a healing setting, or its paired difference to another method."""
        seeds, digits = healed(setting), 3 if scale == 1 else 1
        if other:
            return said(seeds.less(method, other, metric), digits, scale, "+")
        return said(seeds.mean(method, metric), digits, scale)

    def arm(self, name: str, metric: str, digits: int = 3) -> str:
        """Write a metric of an arm of on_policy.py, mean over its seeds."""
        rows = [row for row in self.on_policy["arms"] if row["arm"] == name]
        return f"{mean_over_seeds(rows, metric):,.{digits}f}"

    def steps_of_arms(self) -> str:
        """Return the smallest and largest number of steps of the arms of on_policy.py."""
        steps = [row["steps"] for row in self.on_policy["arms"] if row.get("steps")]
        return f"{min(steps)} to {max(steps)}"

    def arms(self, name: str, other: str, metric: str, digits: int = 3) -> str:
        """Write the difference of two arms of on_policy.py, with its interval."""
        return said(self.less_of_arms(name, other, metric), digits, 1, "+")

    def less_of_arms(self, name: str, other: str, metric: str) -> Estimate:
        """Return the difference of two arms of on_policy.py, paired by seed."""
        both = ([row for row in self.on_policy["arms"] if row["arm"] == n] for n in (name, other))
        return over_seeds_or_windows(*both, metric)[0]

    def masked_share(self, method: str) -> str:
        """Return the share of the way from CE's KL to full KD's that a method covers."""
        return share_of_lead(
            {name: row["kl"] for name, row in self.masked["methods"].items()}, method
        )

    def masked_mean(self, method: str, metric: str, digits: int, scale: float = 1) -> str:
        """Return the mean of a metric of experiments/masked over seeds."""
        found = self.masked["methods"][method][metric]
        return (
            f"{scale * (sum(found) / len(found) if isinstance(found, list) else found):.{digits}f}"
        )

    def bytes(self, setting: str, method: str) -> str:
        """Return the bytes of the cached targets per token."""
        return f"{BY_FILE[setting].seeds().rows[method].bytes_per_token:.0f}"

    def healed_bytes(self, setting: str, method: str) -> str:
        """Return the bytes of the cached targets per token in a healing setting."""
        return f"{healed(setting).rows[method].bytes_per_token:.0f}"

    def teacher(self, setting: str, metric: str, digits: int = 2, scale: float = 1) -> str:
        """Return a metric of the teacher on the held-out text of a healing setting."""
        own = read_results(RESULTS / f"healing_{setting}.json").teacher
        assert own is not None
        return f"{scale * own.figures[metric]:.{digits}f}"

    def healed_row(self, setting: str, method: str) -> Any:
        """Return the stored row of a method in a healing setting."""
        return healed(setting).rows[method]

    def healed_pairs(self) -> int:
        """Count the comparisons of systematic with independent rounds in healing settings.

        The text names the only one whose interval excludes zero, so another one is an error.
        """
        pairs = {
            (name, budget): healed(name).less(f"systematic {budget}", f"RS-KD {budget}", "kl")
            for name in HEALING
            for budget in (5, 12)
        }
        apart = [
            key for key, own in pairs.items() if own and ((own.low or 0) > 0 or (own.high or 0) < 0)
        ]
        assert apart == [("layers18", 5)], apart
        return len(pairs)

    def table(self, rows: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
        """Return the table of the endpoints of a pre-registered experiment, or of its tests."""
        named = list(rows.items()) if isinstance(rows, Mapping) else []
        named = named or [(own["difference"], own) for own in rows]
        corrected = all("p_holm" in own for _, own in named)
        lines = [
            "| difference | nats, paired t over seeds |" + " p, corrected |" * corrected,
            "|---|---|" + "---|" * corrected,
        ]
        for name, own in named:
            cells = [name, difference(own)]
            if corrected:
                p = own["p_holm"]
                cells.append("below 1e-6" if p < 1e-6 else f"{p:.2g}")
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def endpoint(self, name: str) -> str:
        """Return an endpoint of the pre-registered comparison with its interval."""
        return difference(self.deciding["endpoints"][name])

    def stored_bytes(self, arm: str) -> str:
        """Return the bytes per token of an arm of the pre-registered comparison."""
        return f"{self.deciding['bytes_per_token'][arm]:.1f}"

    def more_bytes(self, arm: str, other: str) -> str:
        """Return by how much the bytes of one arm exceed those of another, in per cent."""
        took = self.deciding["bytes_per_token"]
        return f"{100 * (took[arm] / took[other] - 1):.0f}{SPACE}%"

    def kept(self, arm: str) -> str:
        """Return the share of full KD's lead over CE in KL that an arm keeps, in per cent."""
        return share_of_lead(self.deciding["kl"], arm)

    def covered(self, kind: str, least: float) -> str:
        """Return the range of an interval's coverage where seeds differ by at least `least`.

        `least` is the ratio of interval_coverage.py: the seeds' deviation to the windows'.
        """
        found = [100 * own[kind] for ratio, own in self.coverage.items() if float(ratio) >= least]
        return f"{min(found):.0f} to {max(found):.0f}"

    def arms_table(self, found: Mapping[str, Any], reference: str) -> str:
        """Return the table of the arms of a pre-registered experiment: means over seeds, bytes."""
        bytes_per_token = found.get("bytes_per_token")
        sizes = ["bytes per token"] * (bytes_per_token is not None)
        header = ["targets", *sizes, "held-out loss", "KL to the teacher"]
        header.append(f"KL minus {reference}'s")
        lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for name, kl in found["kl"].items():
            cells = [name]
            if bytes_per_token is not None:
                took = bytes_per_token.get(name)
                cells.append("" if took is None else f"{took:.1f}")
            behind = t_interval(less(found["kl"], name, reference))
            cells += [f"{fmean(found['loss'][name]):.4f}", f"{fmean(kl):.4f}"]
            cells.append("" if name == reference else said(behind, 4, 1, "+"))
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def less_of_loss(self, found: Mapping[str, Any], one: str, other: str) -> str:
        """Return the difference in loss of two arms of a pre-registered experiment."""
        return said(t_interval(less(found["loss"], one, other)), 3, 1, "+")

    def drafts(self) -> dict[str, int]:
        """Count the methods of the first setting by their realised and expected acceptance."""
        own = [row.realised for row in BY_FILE["small_teacher"].results.methods if row.realised]
        within = sum(abs(x.acceptance - x.expected) <= 2 * x.error for x in own)
        below = sum(x.acceptance < x.expected for x in own)
        return {"methods": len(own), "within": within, "below": below}

    def largest_draft_error(self) -> float:
        """Return the largest deviation from expected acceptance with 1 024 prefixes, in errors."""
        return max(abs(own["standard_errors"]) for own in self.drafting)

    def orders(self, *settings: str) -> str:
        """Return the rank correlations of acceptance and loss over the methods of each student."""
        found = []
        for results in (BY_FILE[name].results for name in settings):
            for student in results.settings["student_parameters"]:
                found.append(f"{order_of_acceptance(of_student(results, student)):.2f}")
        return f"{', '.join(found[:-1])} and {found[-1]}"

    def steps(self, setting: str) -> int:
        """Return the number of steps of the runs of a setting."""
        (steps,) = {run.steps for run in BY_FILE[setting].results.runs if run.status == "done"}
        return steps

    def share_of_longer_training(self) -> float:
        """Return the part of the gap that six more passes of cross-entropy close, for seed 0."""
        six, twelve = (
            BY_FILE[f"small_teacher_{name}"].seeds() for name in ("converged", "convergence")
        )
        (ce, full), (longer,) = six.values("CE", "full KD"), twelve.values("CE")
        return (ce[0] - longer[0]) / (ce[0] - full[0])

    def largest_miscalibration(self, families: list[str]) -> float:
        """Return the largest difference in overconfidence to full KD with a small teacher.

        Args:
            families: samplers whose methods are compared.
        """
        return 100 * max(
            abs(own.mean)
            for name, setting in BY_FILE.items()
            if name.startswith("small_teacher")
            for method, row in setting.seeds().rows.items()
            if row.family in families
            and (own := setting.seeds().less(method, "full KD", "overconfidence")) is not None
        )

    def span(self, setting: str, metric: str, families: list[str]) -> str:
        """Return the range of a metric over all methods of some families, in per cent."""
        seeds = BY_FILE[setting].seeds()
        found = [
            100 * own.mean
            for method, row in seeds.rows.items()
            if row.family in families and (own := seeds.mean(method, metric)) is not None
        ]
        return f"{min(found):.1f} to {max(found):.1f}{SPACE}%"


HEALING = {
    "layers24": "24 of 30 layers",
    "layers18": "18 of 30 layers",
    "bits3": "weights of 3 bits in groups of 32",
    "bits4": "weights of 4 bits per channel",
    "bits4a8": "4-bit weights, 8-bit activations",
    "greedy": "24 layers, the teacher's greedy answers",
    "drawn": "24 layers, the teacher's drawn answers",
}
"""Descriptions of the settings of experiments/healing/healing.py by name of their results."""


ROUNDED = ("layers18", "bits3", "bits4", "bits4a8", "greedy", "drawn")
"""Healing settings in which the weights of Top-K are rounded, as they are by default."""


def healed(setting: str) -> Seeds:
    """Read the runs of a healing setting."""
    return Seeds(read_results(RESULTS / f"healing_{setting}.json"))


def recovery(seeds: Seeds, method: str) -> str:
    """Return the share of full KD's recovery with its interval, or "-" if it is unknown."""
    own = seeds.rows[method].recovered if method in seeds.rows else None
    if own is None:
        return "-"
    return percent(Estimate(own.mean, own.seeds.low, own.seeds.high, 0))


def healing() -> list[str]:
    """Return the table of healed students: recovery, and the difference to the ghost token."""
    methods = ("systematic 12", "RS-KD 12", "Top-12", "Top-12 ghost")
    head = ["student", "seeds", "KL before", "full KD's KL", *methods, "KL, systematic 12 - ghost"]
    lines = []
    for name, words in HEALING.items():
        seeds = healed(name)
        start, full = (seeds.mean(method, "kl") for method in ("before training", "full KD"))
        count = min(len(seeds.rows[method].seeds_done) for method in methods)
        cells = [words, str(count), *(said(own).split(" ")[0] for own in (start, full))]
        for method in methods:
            cells.append(recovery(seeds, method))
        cells.append(said(seeds.less("systematic 12", "Top-12 ghost", "kl"), sign="+"))
        lines.append(f"| {' | '.join(cells)} |")
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]


def stored(name: str) -> Any:
    """Read a result; return None if it does not exist yet."""
    file = RESULTS / name
    return json.loads(file.read_text()) if file.exists() else None


def findings() -> str:
    """Return the text of docs/results.md."""
    environment = Environment(
        loader=FileSystemLoader([HERE, HERE.parent / "healing"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.get_template("findings.md.jinja").render(
        f=Findings(), overview="\n".join(overview()), settings=SETTINGS, said=said, math=math
    )
    blocks = (filled(block) for block in page.strip().split("\n\n") if block.strip())
    return in_places("\n\n".join(blocks) + "\n")


def filled(block: str) -> str:
    """Wrap a paragraph or the items of a list; return tables, headings and pictures unchanged."""
    block = block.strip("\n")
    if block.startswith(("|", "#", "!", "<!--")):
        return block
    items = re.split(r"\n(?=- )", block)
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    how |= {"subsequent_indent": "  "} if block.startswith("- ") else {}
    return "\n".join(textwrap.fill(re.sub(r"\n *", " ", item), 110, **how) for item in items)


def pages() -> dict[Path, str]:
    """Return the text of every page by path."""
    index = DOCS / "index.md"
    table = ("\n".join(overview()) + "\n").replace("\\", r"\\")
    found = {
        DOCS / "results.md": findings(),
        index: INDEX.sub(table, index.read_text(encoding="utf-8")),
    }
    for setting in SETTINGS:
        page = appendix(setting)
        found[DOCS / "results" / f"{setting.file.replace('_', '-')}.md"] = page
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    stale = [
        path
        for path, text in pages().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date' if given.check else 'written'}")
        if not given.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(pages()[path], encoding="utf-8")
    raise SystemExit(given.check and bool(stale))


if __name__ == "__main__":
    main()
