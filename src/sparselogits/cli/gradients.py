"""Define `sparselogits gradients`, which compares the gradients of targets with full KD's."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import typer
from rich.box import SIMPLE
from rich.table import Table

from sparselogits.cli.models import load_student
from sparselogits.cli.options import (
    DATA,
    MODEL,
    OUTPUT,
    TARGETS,
    Allow,
    Device,
    Dtype,
    JoinRows,
    Json,
    MaskRate,
    MaskSpan,
    MaskUnits,
    SeparatorId,
    Teacher,
    TokenizedBy,
    given_words,
    masked_objective,
    optional_tokenizer,
    print_json,
    print_next,
)
from sparselogits.console import messages, results, stage
from sparselogits.devices import resolve_device
from sparselogits.errors import InvalidArgumentError
from sparselogits.files import require_file_or_nothing, write_whole

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparselogits.data import TextDataset
    from sparselogits.evaluate import Estimate
    from sparselogits.lab.gradients import GradientFidelity
    from sparselogits.samplers import Sampler
    from sparselogits.teacher import Engine

PILOT_WINDOWS = 4
"""Largest number of windows on which samplers are fitted to the budget."""

PILOT_STRIDE = 4
"""Number of labelled positions of a pilot window per used one, unless the input is corrupted."""


Rule = StrEnum("Rule", ["drop", "renormalise", "smooth", "ghost", "ground_truth"])
"""Rules for the probability mass that Top-K targets lack."""


def gradients(
    context: typer.Context,
    students: list[str] = typer.Argument(
        help="Students to compute gradients for: folders of runs, model folders or hub names.",
        metavar="STUDENT...",
    ),
    *,
    teacher: Teacher,
    dtype: Dtype = "auto",
    device: Device = "auto",
    fresh: bool = MODEL(
        "Also measure a copy of the first student with random weights.", False, "--fresh"
    ),
    data: str = DATA(
        "Text on which neither teacher nor student was trained, as for `sparselogits cache "
        "--data`.",
        ...,
    ),
    window: int = DATA("Tokens per window.", 512),
    batch: list[int] | None = DATA(
        "Tokens per batch. May be repeated.", shown="1, 4 and 16 windows"
    ),
    batches: int = DATA("Number of batches of the largest size.", 2),
    tokenized_by: TokenizedBy = None,
    join_rows: JoinRows = False,
    separator_id: SeparatorId = None,
    budget: float = TARGETS("Mean number of entries per token of the unbiased targets.", 12.0),
    top_k: list[int] | None = TARGETS(
        "K of the Top-K targets to compare with. May be repeated.", shown="12, 50 and 300"
    ),
    missing_mass: list[Rule] | None = TARGETS(
        "Rule for the probability that Top-K targets omit. May be repeated.", shown="drop"
    ),
    adaptive: str | None = TARGETS(
        "Student whose learning signal controls the adaptive sampler.", shown="no adaptive sampler"
    ),
    mask_rate: MaskRate = None,
    mask_units: MaskUnits = None,
    mask_span: MaskSpan = None,
    draws: int = TARGETS("Number of draws of each random target per batch.", 4),
    seed: int = TARGETS("Random seed for sampling, for masking and for --fresh.", 0),
    out: Path | None = OUTPUT("JSON file to write the results to.", shown="no file"),
    as_json: Json = False,
    allow: Allow = None,
) -> None:
    """Compare the gradient of each target with that of full KD: angle, norm, bias and noise."""
    from sparselogits.corpus import open_source, pack, packing_for
    from sparselogits.corruption import Corruption, TokenKinds
    from sparselogits.data import TextDataset
    from sparselogits.lab.gradients import measure_gradients, standard_targets
    from sparselogits.lab.gradients.compared import PUBLISHED
    from sparselogits.samplers import Systematic
    from sparselogits.teacher import load_teacher
    from sparselogits.teacher.loading import load_tokenizer, names_masked_model
    from sparselogits.teacher.vocabulary import vocabulary_size

    if out is not None:
        require_file_or_nothing(out)
    Systematic().left_open(budget)  # validates the budget before the teacher runs
    sizes = batch or [window, 4 * window, 16 * window]
    source = open_source(data, tokenized_by=optional_tokenizer(tokenized_by), join_rows=join_rows)
    tokenizer = load_tokenizer(teacher)
    packing = packing_for(
        tokenizer,
        window_length=window,
        separator_id=separator_id,
        reset_attention=tokenized_by is not None and not join_rows,  # a row may have several texts
    )
    _require_students(students, fresh)
    masked = names_masked_model(teacher)
    hides = masked_objective(
        tokenizer, masked=masked, rate=mask_rate, units=mask_units, span=mask_span, seed=seed
    )
    with tempfile.TemporaryDirectory() as folder:
        corpus = pack(
            source,
            tokenizer,
            packing,
            Path(folder) / "corpus",
            vocab_size=vocabulary_size(teacher) or max(tokenizer.get_vocab().values()) + 1,
        )
        corruption = None
        if hides is not None:
            corruption = Corruption(hides, TokenKinds.of(tokenizer, corpus.vocab_size))
        limit = batches * max(sizes) // window
        windows = TextDataset(corpus, holdout=False, limit=limit, corruption=corruption)
        if len(windows) * window < max(sizes):
            raise InvalidArgumentError(
                f"the text fills {len(windows)} windows of {window} tokens; expected at least one "
                f"batch of {max(sizes)} tokens. Give more text, or smaller batches (--batch)"
            )
        messages.print(f"loading the teacher {teacher}")
        device = resolve_device(device)
        learners = _load_students(students, fresh, seed, device)
        engine = load_teacher(teacher, tokenizer=tokenizer, dtype=dtype, device=device)
        pilot = _pilot(engine, windows)
        targets = standard_targets(
            [own.logits for own in pilot],
            budget=budget,
            top_k=top_k or (12, 50, 300),
            missing_mass=[rule.value for rule in missing_mass or (Rule.drop,)],  # type: ignore[misc]
            adaptive=None if adaptive is None else _adaptive(adaptive, pilot, budget),
        )
        with stage("comparing gradients", "tokens", per_unit=window) as update:
            rows = measure_gradients(
                learners,
                windows,
                engine,
                targets,
                batch_tokens=sizes,
                draws=draws,
                seed=seed,
                against=PUBLISHED,
                progress=update,
            )
        result: dict[str, Any] = {
            "conditions": {
                **_conditions(data, source.fingerprint, engine, learners),
                "window": window,
                **({} if hides is None else {"objective": hides.to_json()}),
                "tokens": len(windows) // (max(sizes) // window) * max(sizes),
                "draws": draws,
                "seed": seed,
                "targets": {
                    target.name: None
                    if target.sampler is None
                    else {"name": target.sampler.name, **target.sampler.parameters()}
                    for target in targets
                },
            },
            "rows": [row.to_json() for row in rows],
        }
    if out is not None:  # one row of the table per line
        lines = ",\n".join(json.dumps(row) for row in result["rows"])
        head = json.dumps(result["conditions"], indent=1)
        write_whole(out, f'{{"conditions": {head},\n"rows": [\n{lines}\n]}}\n')
    if as_json:
        print_json(result)
        return
    for name in learners:
        _print_table(name, rows)
    results().print("±: half a 95 % t interval over batches; bias, noise: relative to |full KD|")
    given = ("--teacher", teacher, "--data", "TEXT", "--out", "my-cache", "--budget", f"{budget:g}")
    same = ("window", "mask_rate", "mask_units", "mask_span", "dtype", "allow")
    print_next("cache", *given, *given_words(context, *same))


def _require_students(names: Sequence[str], fresh: bool) -> None:
    """Check that students given as paths exist, and that the last parts of the names differ.

    With `fresh`, the name "fresh" is that of the copy with random weights.
    """
    from sparselogits.teacher.loading import locate_model

    for name in names:
        locate_model(name)
    if fresh and "fresh" in (Path(name).name for name in names):
        raise InvalidArgumentError(
            "a student's folder is named fresh, which is the name of the copy with random weights "
            "(--fresh); rename the folder"
        )
    if len({Path(name).name for name in names}) < len(names):
        raise InvalidArgumentError(
            f"two students have the same folder name, found {names}; rename one of the folders"
        )


def _load_students(
    names: Sequence[str], fresh: bool, seed: int, device: str
) -> dict[str, nn.Module]:
    """Load the students in float32 and, with `fresh`, add one with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    from sparselogits.language_model import predicts_masked

    learners = {Path(name).name: load_student(name, device, dtype="float32") for name in names}
    if fresh:
        torch.manual_seed(seed)
        first: Any = next(iter(learners.values()))
        kind: Any = AutoModelForMaskedLM if predicts_masked(first) else AutoModelForCausalLM
        learners["fresh"] = kind.from_config(first.config, dtype=torch.float32).to(device)
    return learners


class _Pilot(NamedTuple):
    """Positions of one pilot window, and the teacher's logits there.

    Args:
        tokens: input of the window, int64 [L].
        positions: used positions, each of which has a label, int64 [P].
        logits: logits of the teacher at these positions, float32 [P, V].
    """

    tokens: Tensor
    positions: Tensor
    logits: Tensor


def _pilot(engine: Engine, windows: TextDataset) -> list[_Pilot]:
    """Return positions of the pilot windows, with the teacher's logits."""
    import torch

    from sparselogits.evaluate.passes import labelled_positions, teacher_slices, without_padding
    from sparselogits.store.ranges import spread

    # few positions of a corrupted window have a label
    stride = PILOT_STRIDE if windows.corruption is None else 1
    found = []
    for index in spread(len(windows), PILOT_WINDOWS):
        item = without_padding(windows[index])
        labels = item["shift_labels"]
        wanted = torch.zeros(len(labels), dtype=torch.bool)
        positions = labelled_positions(labels, slice(0, len(labels)))[::stride]
        wanted[positions] = True
        pieces = [own for _, own in teacher_slices(engine, item, wanted) if own is not None]
        found.append(_Pilot(item["input_ids"], positions, torch.cat(pieces)))
    return found


def _adaptive(student: str, pilot: Sequence[_Pilot], budget: float) -> Sampler:
    """Create an adaptive sampler whose rounds at the mean signal are those of the default sampler.

    The default sampler is fitted to the budget, and the signal averaged, on the pilot windows.
    """
    from sparselogits.samplers import Adaptive, NamedSignal, StudentSignal, Systematic, fit_budget

    rounds = fit_budget(Systematic(), [own.logits for own in pilot], budget).rounds
    assert rounds is not None  # the default draws rounds
    signal = StudentSignal.load(NamedSignal(student))
    means = []
    for tokens, positions, logits in pilot:
        if len(positions):
            here = signal.at(tokens, positions)
            means.append(float(here.strength(logits).mean()))
    return Adaptive(signal, rounds, reference=sum(means) / len(means))


def _conditions(
    data: str, fingerprint: str, engine: Engine, learners: dict[str, nn.Module]
) -> dict[str, Any]:
    """Describe teacher, text, students and torch version, for the conditions of the results."""
    import torch

    from sparselogits.teacher.loading import module_fingerprint

    path = Path(data)
    digest = f"samples {fingerprint}"
    if path.is_file():
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "teacher": engine.identity,
        "text": path.name if path.exists() else data,
        "text_sha256": digest,
        "students": {
            name: {
                "architecture": type(model).__name__,
                "parameters": sum(p.numel() for p in model.parameters()),
                "weights": module_fingerprint(model),
            }
            for name, model in learners.items()
        },
        "torch": torch.__version__,
    }


def _print_table(student: str, rows: Sequence[GradientFidelity]) -> None:
    """Print a student's tables of gradients, one per batch size and one per space of gradients.

    Gradients of all parameters are shown at each batch size, those of the other spaces (`Space`) at
    the largest batch size.
    """
    from sparselogits.lab.gradients.student_gradients import Space

    own = [row for row in rows if row.student == student]
    sizes = sorted({row.batch_tokens for row in own})
    views = [("parameters", size) for size in sizes]
    views += [(space, sizes[-1]) for space in get_args(Space) if space != "parameters"]
    for space, size in views:
        shown = [row for row in own if (row.space, row.batch_tokens) == (space, size)]
        first = shown[0]
        label = "all parameters" if space == "parameters" else space
        count = f"{first.angle.units} batch" + ("es" if first.angle.units > 1 else "")
        heads = ("target", "entries", "angle", "/ RS-KD's", "norm", "bias", "noise")
        title = f"{student}: {label}, {count} of {size:,} tokens"
        table = Table(*heads, title=title, title_justify="left", box=SIMPLE, show_edge=False)
        table.pad_edge, table.collapse_padding = False, True
        for column in table.columns:
            column.no_wrap = True
            column.justify = "left" if column is table.columns[0] else "right"
        for row in shown:
            table.add_row(
                row.target,
                f"{row.entries:.1f}",
                _plus_minus(row.angle, 1) + "°",
                "-" if row.relative_angle is None else _plus_minus(row.relative_angle, 2),
                _plus_minus(row.norm_ratio, 2),
                f"<{row.bias_below:.3f}" if row.bias is None else f"{row.bias:.3f}",
                f"{row.noise:.3f}",
            )
        results().print(table)


def _plus_minus(estimate: Estimate, digits: int) -> str:
    """Format the mean of an estimate, with ± half the width of its interval if it has one."""
    if estimate.high is None:
        return f"{estimate.mean:.{digits}f}"
    return f"{estimate.mean:.{digits}f}±{estimate.high - estimate.mean:.{digits}f}"
