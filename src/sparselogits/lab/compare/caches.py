"""The setting of a comparison: text, teacher, and the caches that its methods need.

One pass of the teacher writes all caches. Methods with equal samplers share one; methods without
cached targets read the text from the smallest. If a sampler cannot be fitted to its budget, the
methods that need it fail, and the others do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from sparselogits.errors import IdentityMismatchError, SparseLogitsError
from sparselogits.lab.compare.finished import FinishedWork, fingerprint
from sparselogits.lab.compare.recipe import LABELS_ONLY, CompareRecipe, MethodSpec, slug
from sparselogits.lab.compare.students import make_students
from sparselogits.samplers import Sampler, from_parameters
from sparselogits.teacher import TransformersTeacher, load_teacher
from sparselogits.teacher.loading import keep_tokenizer, load_tokenizer
from sparselogits.teacher.vocabulary import vocabulary_size
from sparselogits.train.recipe import Student

WINDOWS_PER_SHARD = 64

OpenStage = Callable[..., AbstractContextManager[Update]]
"""Such as `console.stage`."""


@contextmanager
def silent_stage(what: str, unit: str, *, per_unit: float = 1.0) -> Iterator[Update]:
    """Return a stage that shows nothing."""
    yield lambda *_: None


@dataclass(frozen=True)
class Draw:
    """The content of a cache.

    Args:
        parameters: name and parameters of the sampler, as in the recipe.
        budget: mean entries per position, from which a missing parameter is computed.
        seed: random seed for sampling, if each seed of a comparison has its own; None for that of
            the recipe.
    """

    parameters: dict[str, Any]
    budget: float | None = None
    seed: int | None = None

    @classmethod
    def of(cls, method: MethodSpec, recipe: CompareRecipe, seed: int) -> Draw:
        """Return the cache that a method trains on; the smallest for a method without targets.

        Args:
            method: the method.
            recipe: the comparison, which says whether caches vary with the seed.
            seed: seed of the run.
        """
        if method.sampler is None:
            return cls({"name": LABELS_ONLY.name, **LABELS_ONLY.parameters()})
        random = method.sampler.sampler().is_random
        own = recipe.draw_seed + seed if recipe.vary_draws and random else None
        return cls(method.sampler.parameters(), method.budget, own)

    @property
    def fit_key(self) -> str:
        """Key of what caches of all seeds share: their sampler."""
        return replace(self, seed=None).key

    @property
    def key(self) -> str:
        """Name of the folder: readable, and different for different caches."""
        described = {**self.parameters, "budget": self.budget}
        if self.seed is not None:
            described["draw"] = self.seed
        words = [str(v) for n, v in described.items() if v is not None and n != "student"]
        return f"{slug(' '.join(words))}-{fingerprint(described)[:6]}"


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison share.

    Args:
        corpus: training and held-out windows.
        teacher: the loaded teacher.
        tokenizer: tokenizer of the teacher.
        caches: folders of the caches, by key.
        failures: why a cache could not be built, by key.
        students: students as training takes them, by name.
        work: finished work of the comparison.
    """

    corpus: PackedCorpus
    teacher: TransformersTeacher
    tokenizer: Any
    caches: dict[str, Path]
    failures: dict[str, str]
    students: dict[str, Student]
    work: FinishedWork


def prepare(
    recipe: CompareRecipe,
    work: FinishedWork,
    *,
    device: str = "cpu",
    stage: OpenStage = silent_stage,
) -> Setting:
    """Pack the text, load the teacher, and build the missing caches.

    Args:
        recipe: the comparison.
        work: finished work of the comparison.
        device: device of the teacher.
        stage: shows the progress of a stage, see `console.stage`.

    Raises:
        SparseLogitsError: a teacher or a text cannot be used, or the directory holds a comparison
            with others.
    """
    source = open_source(
        recipe.data, text_field=recipe.text_field, completion_only=recipe.completion_only
    )
    tokenizer = load_tokenizer(recipe.teacher)
    split = packing_for(
        tokenizer,
        window_length=recipe.window,
        separator_id=recipe.separator_id,
        holdout=recipe.holdout,
    )
    load = partial(
        load_teacher, recipe.teacher, tokenizer=tokenizer, dtype=recipe.teacher_dtype, device=device
    )
    # what needs no weights comes first
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
            f"has {teacher.vocab_size}. Delete that folder to pack the text again, or choose "
            "another out"
        )
    all_draws = [
        Draw.of(method, recipe, seed) for method in recipe.methods for seed in recipe.seeds
    ]
    draws = {draw.key: draw for draw in all_draws}
    fitted, unfit = _fitted(
        work,
        {draw.fit_key: draw for draw in all_draws},
        teacher,
        corpus,
    )
    failures = {key: unfit[own.fit_key] for key, own in draws.items() if own.fit_key in unfit}
    caches = {key: recipe.out / "caches" / key for key in draws if key not in failures}
    with stage(f"writing {len(caches)} caches", "tokens", per_unit=recipe.window) as update:
        build_caches(
            teacher,
            corpus,
            [
                CacheRequest(
                    folder,
                    fitted[draws[key].fit_key],
                    seed=recipe.draw_seed if (own := draws[key].seed) is None else own,
                )
                for key, folder in caches.items()
            ],
            tokenizer_hash=tokenizer_fingerprint(tokenizer),
            batch=recipe.cache_batch,
            windows_per_shard=WINDOWS_PER_SHARD,
            progress=update,
        )
    for cache in caches.values():
        keep_tokenizer(tokenizer, cache)  # each student is saved with it
    students = make_students(recipe, corpus, teacher, tokenizer)
    return Setting(corpus, teacher, tokenizer, caches, failures, students, work)


def _fitted(
    work: FinishedWork,
    draws: dict[str, Draw],
    teacher: TransformersTeacher,
    corpus: PackedCorpus,
) -> tuple[dict[str, Sampler], dict[str, str]]:
    """Fit the samplers; return them, and why others could not be fitted, by the key of a draw."""
    samplers: dict[str, Sampler] = {}
    failures: dict[str, str] = {}
    pilot: list[Window] = []
    for key, draw in draws.items():
        determined = fingerprint([teacher.identity["weights"], key])
        try:
            parameters = work.value("samplers", determined)
            if parameters is not None:
                samplers[key] = from_parameters(parameters).ready()
                continue
            pilot = pilot or pilot_windows(corpus)
            samplers[key] = own = _fit(draw, teacher, pilot)
            work.keep("samplers", determined, {"name": own.name, **own.parameters()})
        except SparseLogitsError as error:
            failures[key] = str(error)
    return samplers, failures


def _fit(draw: Draw, teacher: TransformersTeacher, pilot: Sequence[Window]) -> Sampler:
    sampler = from_parameters(draw.parameters).ready()
    how = {"temperature": 1.0, "reset_attention": False}
    return resolve_budget(teacher, pilot, sampler, draw.budget, **how)
