"""The setting of a comparison: text, teacher, and a cache for every draw that a method needs.

One pass of the teacher writes all caches. Methods that draw alike share one; methods without cached
targets read the text from the smallest of all. A sampler that cannot be fitted to its budget fails
the methods that need it, not the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
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
from sparselogits.files import write_whole
from sparselogits.identity import canonical_json
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
    """A stage that nobody watches."""
    yield lambda *_: None


@dataclass(frozen=True)
class Draw:
    """What a cache holds.

    Args:
        parameters: of the sampler with its name, as in the recipe.
        budget: that sets what the parameters leave open.
        seed: of the draws, where each seed of a comparison has its own; None for the recipe's.
    """

    parameters: dict[str, Any]
    budget: float | None = None
    seed: int | None = None

    @classmethod
    def of(cls, method: MethodSpec, recipe: CompareRecipe, seed: int) -> Draw:
        """The draw a method trains on; that of the labels alone for one without cached targets.

        Args:
            method: the method.
            recipe: the comparison, which says whether draws vary with the seed.
            seed: of the run.
        """
        if method.sampler is None:
            return cls({"name": LABELS_ONLY.name, **LABELS_ONLY.parameters()})
        random = method.sampler.sampler().is_random
        own = recipe.draw_seed + seed if recipe.vary_draws and random else None
        return cls(method.sampler.parameters(), method.budget, own)

    @property
    def fit_key(self) -> str:
        """What it shares with draws of other seeds: their samplers are the same."""
        return replace(self, seed=None).key

    @property
    def key(self) -> str:
        """A folder's name: readable, and different for different draws."""
        described = {**self.parameters, "budget": self.budget}
        if self.seed is not None:
            described["draw"] = self.seed
        words = [str(v) for n, v in described.items() if v is not None and n != "student"]
        digest = hashlib.sha256(canonical_json(described)).hexdigest()
        return f"{slug(' '.join(words))}-{digest[:6]}"


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison have in common.

    Args:
        corpus: training and held-out windows.
        teacher: loaded.
        tokenizer: the teacher's.
        caches: by the key of a draw.
        failures: by the key of a draw, why there is no cache.
        students: by name, as training takes them.
    """

    corpus: PackedCorpus
    teacher: TransformersTeacher
    tokenizer: Any
    caches: dict[str, Path]
    failures: dict[str, str]
    students: dict[str, Student]


def prepare(
    recipe: CompareRecipe,
    *,
    device: str = "cpu",
    stage: OpenStage = silent_stage,
) -> Setting:
    """Pack the text, load the teacher, and build what caches are not there yet.

    Args:
        recipe: the comparison.
        device: of the teacher.
        stage: shows progress of a piece of work, see `console.stage`.

    Raises:
        SparseLogitsError: for a teacher or text that cannot be used, or a directory that holds a
            comparison of others.
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
            f"has {teacher.vocab_size}: it is another teacher, or its configuration names another "
            "size. Delete that folder to pack the text again, or choose another out"
        )
    all_draws = [
        Draw.of(method, recipe, seed) for method in recipe.methods for seed in recipe.seeds
    ]
    draws = {draw.key: draw for draw in all_draws}
    fitted, unfit = _fitted(
        recipe.out / "draws.json",
        {draw.fit_key: replace(draw, seed=None) for draw in all_draws},
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
    return Setting(corpus, teacher, tokenizer, caches, failures, students)


def _fitted(
    file: Path, draws: dict[str, Draw], teacher: TransformersTeacher, corpus: PackedCorpus
) -> tuple[dict[str, Sampler], dict[str, str]]:
    """Samplers, and why others are not; what a budget came to is kept in the file."""
    weights = teacher.identity["weights"]
    kept: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # absent; or empty, of a version that wrote it in place
        kept = json.loads(file.read_text())
    if kept.get("teacher") != weights:
        kept = {"teacher": weights, "parameters": {}}
    samplers: dict[str, Sampler] = {}
    failures: dict[str, str] = {}
    pilot: list[Window] = []
    for key, draw in draws.items():
        try:
            if key in kept["parameters"]:
                samplers[key] = from_parameters(kept["parameters"][key]).ready()
                continue
            pilot = pilot or pilot_windows(corpus)
            samplers[key] = _fit(draw, teacher, pilot)
        except SparseLogitsError as error:
            failures[key] = str(error)
            continue
        kept["parameters"][key] = {"name": samplers[key].name, **samplers[key].parameters()}
    write_whole(file, json.dumps(kept, indent=1) + "\n")
    return samplers, failures


def _fit(draw: Draw, teacher: TransformersTeacher, pilot: Sequence[Window]) -> Sampler:
    sampler = from_parameters(draw.parameters).ready()
    how = {"temperature": 1.0, "reset_attention": False}
    return resolve_budget(teacher, pilot, sampler, draw.budget, **how)
