"""Create small results of all kinds, with names that contain markup."""

from pathlib import Path

from sparselogits.lab.compare.results import (
    Ends,
    Gradient,
    GradientSize,
    MethodRow,
    MetricEstimate,
    OfBatches,
    Realised,
    ReliabilityBin,
    Results,
    RunRow,
    TeacherRow,
)
from sparselogits.lab.demo.story import caution, drawings, headline, table
from sparselogits.lab.report import Continuation, Walkthrough

HOSTILE = "<img src=x onerror=document.title=1>"
RECORD = Path(__file__).parents[3] / "experiments" / "results" / "compare_small_teacher.json"


def figure(mean: float) -> MetricEstimate:
    ends = Ends(low=mean - 0.1, high=mean + 0.1)
    return MetricEstimate(mean=mean, windows=ends, seeds=Ends(low=None, high=None), both=ends)


def gradient(entries: float | None, angle: float) -> Gradient:
    def size(tokens: int, mean: float) -> GradientSize:
        over = OfBatches(mean=mean, low=mean - 3.5, high=mean + 3.5)
        return GradientSize(
            batch_tokens=tokens,
            batches=4,
            angle=over,
            norm_ratio=OfBatches(mean=1.0, low=None, high=None),
            bias=None,
            bias_below=0.1,
            noise=0.2,
        )

    return Gradient(
        student_method="CE",
        student_seed=0,
        student_folder="runs/ce",
        entries=entries,
        draws=2,
        sizes=[size(256, 1.6 * angle), size(1024, angle)],
    )


def method(name: str, family: str, loss: float | None, entries: float | None) -> MethodRow:
    budget = {"k": 5} if family == "topk" else {"budget": entries}
    bins = [ReliabilityBin(low=0, high=0.5, confidence=0.3, accuracy=0.2, count=10)]
    bins += [ReliabilityBin(low=0.5, high=1, confidence=0.8, accuracy=0.7, count=10)]
    return MethodRow(
        method=name,
        student="small",
        family=family,
        spec={"sampler": family, **budget},
        sampler=None,
        unbiased=None,
        entries=entries,
        bytes_per_token=None if entries is None else 1.5 * entries,
        seeds_done=[] if loss is None else [0],
        seeds_failed=[],
        seeds_not_run=[],
        figures={} if loss is None else {"loss": figure(loss), "ece_equal_mass": figure(0.2)},
        minus_ce={},
        gap_closed=None,
        reliability=[] if loss is None else bins,
        realised=None,
        tokens_per_second=None,
        tokens_per_cpu_second=7719.4,
    )


def comparison() -> Results:
    rows = [
        method("CE", "ce", 4.321, None),
        method("full KD", "full", 3.987, None),
        method("RS-KD 5", "multinomial", 4.1, 5.0),
        method("RS-KD 12", "multinomial", 4.0, 12.0),
        method(HOSTILE, "topk", 4.5, 5.0),
        method("never run", "systematic", None, 7.0),
    ]
    drafts = Realised(verified=147, accepted=61, acceptance=0.41497, expected=0.46, error=0.04014)
    rows[2] = rows[2].model_copy(update={"realised": drafts})
    runs = [
        RunRow(
            method=row.method,
            student="small",
            seed=0,
            status="done" if row.figures else "not run",
            curve=[(1, 6.0), (2, 5.0)] if row.figures else [],
        )
        for row in rows
    ]
    return Results(
        title=f"a comparison {HOSTILE}",
        complete=False,
        settings={"recipe": {"window": 32}, "teacher": {"name": "t", "parameters": 1234}},
        provenance={"commit": "abc1234"},
        teacher=None,
        methods=rows,
        runs=runs,
    )


def demo_results() -> Results:
    """Return results like those of the demo, with one hostile method name."""
    ways: dict[str, tuple[str, float, float | None, float | None]] = {
        "not healed": ("none", 1.051, 0.0, None),
        "CE": ("ce", 0.981, 15.4, None),
        HOSTILE: ("topk", 0.8, 55.2, 50.3),
        "systematic": ("systematic", 0.601, 98.9, 16.6),
        "full KD": ("full", 0.596, 100.0, None),
    }
    rows = [
        method(name, family, 3.0 + kl, None if size is None else 12.0).model_copy(
            update={
                "figures": {"loss": figure(3.0 + kl), "kl": figure(kl), "acceptance": figure(0.6)},
                "recovered": None if share is None else figure(share),
                "bytes_per_token": size,
            }
        )
        for name, (family, kl, share, size) in ways.items()
    ]
    runs = [
        RunRow(method=name, student="pruned", seed=7, status="done", steps=10, tokens=5120)
        for name in ways
    ]
    found = comparison().model_copy(update={"methods": rows, "runs": runs})
    known = TeacherRow(figures={"loss": 2.8}, reliability=[], positions=100, windows=12)
    return found.model_copy(update={"teacher": known})


def walkthrough() -> Walkthrough:
    """Return the page of a demo with hostile names and texts."""
    results = demo_results()
    return Walkthrough(
        title="sparselogits demo",
        headline=headline(results),
        caution=caution(results),
        table=table(results),
        drawings=drawings(results),
        continuations=[Continuation(HOSTILE, {"the teacher": "word " * 60, "CE": "x" * 300})],
        sampled="Drawn at temperature 0.7.",
        window="window-0.html",
        next_steps=[("See what the cache holds:", "sparselogits info " + "long/" * 60)],
        conditions=[("text", HOSTILE), ("seed", "7")],
    )
