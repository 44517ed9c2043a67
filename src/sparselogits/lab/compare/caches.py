"""Prepare a comparison: pack the text, load the teacher, create the students, build the caches.

One pass of the teacher over the text writes all caches. Methods with equal samplers and budgets
share a cache; methods without cached targets read the text from a Top-1 cache. If a sampler cannot
be fitted to its budget, only the methods that use the sampler fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sparselogits.caching import CacheRequest, build_caches
from sparselogits.caching.pilot import pilot_windows, resolve_budget
from sparselogits.console import Update
from sparselogits.corpus import (
    PackedCorpus,
    Window,
    open_source,
    pack,
    packing_for,
    tokenizer_fingerprint,
)
from sparselogits.corpus.packed import recorded_vocabulary
from sparselogits.corruption import Corruption, TokenKinds, objective_as_given
from sparselogits.data import TextDataset
from sparselogits.errors import IdentityMismatchError, InvalidArgumentError, SparseLogitsError
from sparselogits.lab.compare.finished import FinishedWork, fingerprint
from sparselogits.lab.compare.recipe import (
    LABELS_ONLY,
    CompareRecipe,
    FromTeacher,
    MethodSpec,
    slug,
)
from sparselogits.lab.compare.students import make_students, require_students_fit
from sparselogits.samplers import Sampler, from_parameters
from sparselogits.teacher import TransformersTeacher, load_teacher
from sparselogits.teacher.loading import keep_tokenizer, load_tokenizer, names_masked_model
from sparselogits.teacher.vocabulary import vocabulary_size
from sparselogits.train.recipe import Student

WINDOWS_PER_SHARD = 64
"""Number of windows per shard in the caches of a comparison."""

OpenStage = Callable[..., AbstractContextManager[Update]]
"""Function that shows the progress of a stage in a `with` block, such as `console.stage`."""


@contextmanager
def silent_stage(what: str, unit: str, *, per_unit: float = 1.0) -> Iterator[Update]:
    """Yield a function that shows no progress; arguments are those of `console.stage`."""
    yield lambda *_: None


@dataclass(frozen=True)
class Draw:
    """Sampler settings and random seed, in which the caches of a comparison differ.

    Args:
        parameters: name and parameters of the sampler, as in the recipe.
        budget: mean entries per position, from which the missing parameter is computed; None if
            no parameter is missing.
        seed: random seed for sampling; None for `draw_seed` of the recipe.
    """

    parameters: dict[str, Any]
    budget: float | None = None
    seed: int | None = None

    @classmethod
    def of(cls, method: MethodSpec, recipe: CompareRecipe, seed: int) -> Draw:
        """Return the settings of the cache that the run of a method with a seed reads."""
        if method.sampler is None:
            return cls({"name": LABELS_ONLY.name, **LABELS_ONLY.parameters()})
        random = method.sampler.sampler().is_random
        draw_seed = recipe.draw_seed + seed if recipe.vary_draws and random else None
        return cls(method.sampler.parameters(), method.budget, draw_seed)

    @property
    def fit_key(self) -> str:
        """Key of the fitted sampler, which does not depend on the seed."""
        return replace(self, seed=None).key

    @property
    def key(self) -> str:
        """Name of the cache's folder: the settings' values, and the first digits of their hash."""
        described = {**self.parameters, "budget": self.budget}
        if self.seed is not None:
            described["draw"] = self.seed
        words = [str(v) for n, v in described.items() if v is not None and n != "student"]
        return f"{slug(' '.join(words))}-{fingerprint(described)[:6]}"


@dataclass(frozen=True)
class Setting:
    """Objects that all methods of a comparison share.

    Args:
        corpus: training and held-out windows.
        teacher: the loaded teacher.
        tokenizer: tokenizer of the teacher.
        caches: folders of the caches, by `Draw.key`.
        failures: reasons why caches could not be built, by `Draw.key`.
        students: value of the setting `student` in training recipes, by name of the student.
        work: finished work of the comparison.
        corruption: corruption of the windows for a masked teacher; None for a causal teacher.
    """

    corpus: PackedCorpus
    teacher: TransformersTeacher
    tokenizer: Any
    caches: dict[str, Path]
    failures: dict[str, str]
    students: dict[str, Student]
    work: FinishedWork
    corruption: Corruption | None = None

    def heldout(self, limit: int | None) -> TextDataset:
        """Return the held-out windows, corrupted for a masked teacher.

        Args:
            limit: largest number of windows; None for all.
        """
        return TextDataset(self.corpus, limit=limit, corruption=self.corruption)


def key_of(corruption: Corruption | None, *inputs: Any) -> str:
    """Return the fingerprint of inputs and, for a masked teacher, of the objective."""
    masked = [] if corruption is None else [corruption.objective.to_json()]
    return fingerprint([*inputs, *masked])


def prepare(
    recipe: CompareRecipe,
    work: FinishedWork,
    *,
    device: str = "cpu",
    stage: OpenStage = silent_stage,
) -> Setting:
    """Pack the text, load the teacher, create students from the teacher, and build missing caches.

    Args:
        recipe: the comparison.
        work: finished work of the comparison.
        device: device of the teacher.
        stage: function that shows the progress of a stage, such as `console.stage`.

    Raises:
        SparseLogitsError: If the teacher, the text or a student cannot be used, or the directory
            contains text or caches with other settings. A sampler that cannot be fitted to its
            budget is recorded in `Setting.failures`.
    """
    source = open_source(
        recipe.data,
        text_field=recipe.text_field,
        completion_only=recipe.completion_only,
        tokenized_by=None if recipe.tokenized_by is None else load_tokenizer(recipe.tokenized_by),
        join_rows=recipe.join_rows,
    )
    masked = names_masked_model(recipe.teacher)
    _require_for_teacher(recipe, masked=masked)
    tokenizer = load_tokenizer(recipe.teacher)
    split = packing_for(
        tokenizer,
        window_length=recipe.window,
        separator_id=recipe.separator_id,
        holdout=recipe.holdout,
        kind=recipe.packing,
    )
    load = partial(
        load_teacher, recipe.teacher, tokenizer=tokenizer, dtype=recipe.teacher_dtype, device=device
    )
    # packing needs only the size of the vocabulary, so the weights are loaded afterwards
    folder, teacher = recipe.out / "corpus", None
    vocab_size = recorded_vocabulary(folder) or vocabulary_size(recipe.teacher)
    if vocab_size is None:
        teacher = load()
        vocab_size = teacher.vocab_size
    with stage("packing text", "MB", per_unit=1e-6) as update:
        corpus = pack(source, tokenizer, split, folder, vocab_size=vocab_size, progress=update)
    teacher = teacher or load()
    if teacher.vocab_size != corpus.vocab_size:
        raise IdentityMismatchError(
            f"the text in {folder} was packed for {corpus.vocab_size} token ids, but the teacher "
            f"has {teacher.vocab_size}. Delete the folder to pack the text again, or choose "
            "another folder with --out"
        )
    corruption = None
    if masked:
        objective = objective_as_given(tokenizer, seed=recipe.draw_seed, **recipe.masking)
        corruption = Corruption(objective, TokenKinds.of(tokenizer, teacher.vocab_size))
    # before the caches, because a student that cannot be made must not cost them
    students = make_students(recipe, corpus, teacher, tokenizer, corruption)
    require_students_fit(recipe, students, corpus, teacher.model)
    all_draws = [
        Draw.of(method, recipe, seed) for method in recipe.methods for seed in recipe.seeds
    ]
    draws = {draw.key: draw for draw in all_draws}
    to_fit = {draw.fit_key: draw for draw in all_draws}
    fitted, unfit = _fit_samplers(work, to_fit, teacher, corpus, corruption)
    failures = {key: unfit[draw.fit_key] for key, draw in draws.items() if draw.fit_key in unfit}
    caches = {key: recipe.out / "caches" / key for key in draws if key not in failures}
    with stage(f"writing {len(caches)} caches", "tokens", per_unit=recipe.window) as update:
        build_caches(
            teacher,
            corpus,
            [
                CacheRequest(
                    folder,
                    fitted[draws[key].fit_key],
                    seed=recipe.draw_seed if (seed := draws[key].seed) is None else seed,
                )
                for key, folder in caches.items()
            ],
            tokenizer_hash=tokenizer_fingerprint(tokenizer),
            batch=recipe.cache_batch,
            windows_per_shard=WINDOWS_PER_SHARD,
            corruption=corruption,
            progress=update,
        )
    for cache in caches.values():
        keep_tokenizer(tokenizer, cache)  # training saves it with each student
    return Setting(corpus, teacher, tokenizer, caches, failures, students, work, corruption)


def _require_for_teacher(recipe: CompareRecipe, *, masked: bool) -> None:
    """Check that a recipe has no settings for the other kind of teacher, masked or causal."""
    if not masked and recipe.masking:
        raise InvalidArgumentError(
            f"{next(iter(recipe.masking))} is for a masked language model, but the teacher "
            f"{recipe.teacher} is a causal one; leave the key out, or name another teacher"
        )
    causal = {"tasks": recipe.tasks, "draft": recipe.draft}
    given = [name for name, value in causal.items() if value]
    if masked and given:
        raise InvalidArgumentError(
            f"{' and '.join(given)}: measured for causal language models only, but the teacher "
            f"{recipe.teacher} is a masked one; leave the keys out, or name another teacher"
        )
    for name, student in recipe.students.items():
        if not masked or not isinstance(student, FromTeacher) or student.layers is None:
            continue
        if student.layer_score == "loss":
            raise InvalidArgumentError(
                f"students.{name}: layer_score is loss, which is the loss of next tokens, but the "
                f"teacher {recipe.teacher} is a masked language model; choose influence or spaced"
            )


def _fit_samplers(
    work: FinishedWork,
    draws: dict[str, Draw],
    teacher: TransformersTeacher,
    corpus: PackedCorpus,
    corruption: Corruption | None,
) -> tuple[dict[str, Sampler], dict[str, str]]:
    """Load stored samplers, and fit and store the others.

    Returns:
        Samplers, and the reasons why others could not be fitted, both by `Draw.fit_key`.
    """
    samplers: dict[str, Sampler] = {}
    failures: dict[str, str] = {}
    pilot: list[Window] = []
    for key, draw in draws.items():
        stored_under = key_of(corruption, teacher.identity["weights"], key)
        try:
            parameters = work.value("samplers", stored_under)
            if parameters is not None:
                samplers[key] = from_parameters(parameters).ready()
                continue
            pilot = pilot or pilot_windows(corpus)
            open_sampler = from_parameters(draw.parameters).ready()
            how = {"temperature": 1.0, "reset_attention": False, "corruption": corruption}
            samplers[key] = sampler = resolve_budget(
                teacher, pilot, open_sampler, draw.budget, **how
            )
            work.store("samplers", stored_under, {"name": sampler.name, **sampler.parameters()})
        except SparseLogitsError as error:
            failures[key] = str(error)
    return samplers, failures
