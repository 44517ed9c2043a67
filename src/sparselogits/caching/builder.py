"""Build one or more caches from a packed corpus; all caches share the teacher's forward passes.

A resumed build computes only the ranges of windows whose shard is missing in at least one cache,
because an existing shard is always complete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparselogits.caching.job import Job
from sparselogits.caching.pilot import check_teacher_on_text, pilot_windows, resolve_budget
from sparselogits.caching.plan import WHOLE, Share, shard_ranges, windows_in
from sparselogits.caching.text import require_room
from sparselogits.caching.work import DrawSettings
from sparselogits.caching.writer import Writer
from sparselogits.corpus import PackedCorpus, Packing
from sparselogits.corpus.tokenizer_identity import TokenizerFingerprint
from sparselogits.corruption import Corruption
from sparselogits.errors import (
    IdentityMismatchError,
    InvalidArgumentError,
    python_number,
    require_whole,
)
from sparselogits.identity import Identity
from sparselogits.language_model import require_predicting
from sparselogits.objectives import Masked
from sparselogits.progress import Progress
from sparselogits.samplers import Sampler
from sparselogits.store import Cache, Location, codec_for
from sparselogits.store.bounds import LARGEST_TEMPERATURE, LEAST_TEMPERATURE
from sparselogits.store.ranges import Range
from sparselogits.teacher import Engine
from sparselogits.teacher.engine import require_token_mask
from sparselogits.untrusted import shown

WINDOWS_PER_SHARD = 512
"""Default number of windows per shard."""


@dataclass(frozen=True)
class CacheRequest:
    """Location and settings of a cache to build.

    Args:
        root: directory or URL of the cache.
        sampler: sampler of the targets.
        budget: mean number of entries per position, to which the sampler's budget parameter
            (such as rounds, k or tau) is fitted on pilot windows; None to use the sampler's value.
        seed: random seed for sampling.
        temperature: divisor of the teacher's logits.
        exact_weights: whether to store real-valued weights as float32; see `codec_for`. None for
            the setting of the existing cache; a new cache then rounds weights.

    Raises:
        InvalidArgumentError: the budget is invalid (see `Sampler.left_open`), the seed is not in
            [0, 2**64), or the temperature is out of range.
    """

    root: Location
    sampler: Sampler
    budget: float | None = None
    seed: int = 0
    temperature: float = 1.0
    exact_weights: bool | None = None

    def __post_init__(self) -> None:
        self.sampler.left_open(self.budget)
        seed = require_whole("seed", self.seed, 0, (1 << 64) - 1)
        object.__setattr__(self, "seed", seed)
        if not LEAST_TEMPERATURE <= self.temperature <= LARGEST_TEMPERATURE:  # NaN is False
            raise InvalidArgumentError(
                f"the temperature is {shown(self.temperature)}; give a number from "
                f"{LEAST_TEMPERATURE:g} to {LARGEST_TEMPERATURE:g} (--temperature)"
            )
        object.__setattr__(self, "temperature", python_number(self.temperature))


@dataclass(frozen=True)
class BuildReport:
    """Result of a build.

    Args:
        caches: open caches, one per request.
        windows_built: number of windows that this process computed.
        windows_found: number of windows in this process's share that all caches contained before
            the build.
    """

    caches: list[Cache]
    windows_built: int
    windows_found: int


def build_caches(
    engine: Engine,
    corpus: PackedCorpus,
    requests: Sequence[CacheRequest],
    *,
    tokenizer_hash: str,
    batch: int = 8,
    windows_per_shard: int = WINDOWS_PER_SHARD,
    only: Range | None = None,
    first_window: int = 0,
    corruption: Corruption | None = None,
    share: Share = WHOLE,
    progress: Progress | None = None,
) -> BuildReport:
    """Build one cache per request, or resume an interrupted build.

    Args:
        engine: engine that runs the teacher.
        corpus: text, packed with the teacher's tokenizer.
        requests: caches to build.
        tokenizer_hash: `corpus.tokenizer_fingerprint` of the teacher's tokenizer.
        batch: number of windows per forward pass.
        windows_per_shard: number of windows per shard.
        only: range of windows to build, for builds that are divided manually; None for all.
        first_window: index of the corpus's first window in the caches; above 0 for appended text
            (see `caching.text`).
        corruption: corruption of the windows for a teacher that is a masked language model; None
            for a causal teacher.
        share: share of the ranges that this process builds, if several processes divide them.
        progress: called at the start and after each batch with the numbers of windows done and in
            total.

    Raises:
        IdentityMismatchError: an existing cache has other settings, or was built from other text.
        TeacherError: the teacher's loss on the text is clearly worse than that of uniform guessing,
            the logits are not finite, or the teacher's token mask is invalid.
        InvalidArgumentError: a budget cannot be met, `batch` or `windows_per_shard` is below 1,
            `first_window` is negative, the range of windows is invalid, the teacher does not
            support the windows, or the kind of the teacher (masked or causal) does not match
            `corruption`.
        CacheError: an existing shard overlaps a range without being equal to it, or an existing
            cache is damaged.
        CorpusError: the corpus is damaged.
        StorageError: a cache cannot be reached or written.
    """
    ranges = shard_ranges(corpus.windows, windows_per_shard, only, first_window=first_window)
    job = begin_job(
        engine,
        corpus,
        requests,
        tokenizer_hash=tokenizer_hash,
        batch=batch,
        windows_per_shard=windows_per_shard,
        first_window=first_window,
        corruption=corruption,
    )
    ranges = share.of(ranges)
    missing = job.missing(ranges)
    total = windows_in(ranges)
    done = found = total - windows_in(missing)

    def advance(windows: int) -> None:
        nonlocal done
        done += windows
        if progress is not None:
            progress(done, total)

    advance(0)
    with Writer(job.caches) as writer:
        for span in missing:
            writer.write(span, *job.compute(engine, span, advance))
    return BuildReport(job.caches, total - found, found)


def check_request(
    request: CacheRequest,
    packing: Packing,
    tokenizer_hash: str,
    windows_per_shard: int,
    objective: Masked | None = None,
) -> None:
    """Validate a request, without teacher and text, against what exists at the cache's path.

    Args:
        request: the cache to build.
        packing: packing of the text.
        tokenizer_hash: see `build_caches`.
        windows_per_shard: see `build_caches`.
        objective: objective of a masked teacher; None for a causal teacher.

    Raises:
        CacheError: the path is a file, a folder with other content, or a damaged cache.
        IdentityMismatchError: the existing cache has other settings.
        StorageError: the folder or URL cannot be reached.
    """
    existing = _existing(request)
    if existing is None:
        require_room(request.root)
        return
    sampler = _sampler_of_existing(request, existing)
    packed = packing.to_json()
    requested = replace(
        existing,
        tokenizer=str(tokenizer_hash),
        window_length=packed.pop("window_length"),
        windows_per_shard=windows_per_shard,
        packing=packed,
        sampler=_described(request, sampler),
        seed=request.seed,
        temperature=request.temperature,
        codec=_codec(request, sampler, existing),
        objective=None if objective is None else objective.to_json(),
    )
    requested.require_equal(existing, here="this build", there=f"the cache at {request.root}")


def begin_job(
    engine: Engine,
    corpus: PackedCorpus,
    requests: Sequence[CacheRequest],
    *,
    tokenizer_hash: str,
    batch: int,
    windows_per_shard: int,
    first_window: int = 0,
    corruption: Corruption | None = None,
) -> Job:
    """Fit the samplers' parameters, create or open the caches, and return the job of the build.

    See `build_caches` for arguments and errors.
    """
    batch = require_whole("batch", batch, 1)
    windows_per_shard = require_whole("windows_per_shard", windows_per_shard, 1)
    first_window = require_whole("first_window", first_window, 0)
    require_token_mask(engine)
    model = getattr(engine, "model", None)
    if model is not None:
        masked = corruption is not None
        require_predicting(model, masked=masked, whose="the teacher", of="this cache")
    if corruption is not None and corpus.pads_rows and not corpus.packing.of_documents:
        raise InvalidArgumentError(
            "rows of token ids are padded, and a masked language model would read the padding as "
            "text; pack them with an attention mask (--packing documents, kind='documents'), or "
            "join them (--join-rows)"
        )
    how: dict[str, Any] = {
        "reset_attention": corpus.packing.reset_attention,
        "corruption": corruption,
    }
    caches, draws = [], []
    pilot = None
    for request in requests:
        existing = _existing(request)
        if existing is not None:
            sampler = _sampler_of_existing(request, existing)
        else:
            if pilot is None:
                pilot = pilot_windows(corpus)
                check_teacher_on_text(engine, pilot, **how)
            temperature = request.temperature
            sampler = resolve_budget(
                engine, pilot, request.sampler, request.budget, temperature=temperature, **how
            )
        packing = corpus.packing.to_json()
        identity = Identity(
            teacher=engine.identity,
            tokenizer=str(tokenizer_hash),
            vocab_size=engine.vocab_size,
            token_mask=_mask_fingerprint(engine),
            window_length=packing.pop("window_length"),
            windows_per_shard=windows_per_shard,
            packing=packing,
            sampler=_described(request, sampler),
            seed=request.seed,
            temperature=request.temperature,
            codec=_codec(request, sampler, existing),
            objective=None if corruption is None else corruption.objective.to_json(),
        )
        caches.append(Cache.create(request.root, identity))
        draws.append(DrawSettings(sampler, request.seed, request.temperature))
    record = tokenizer_hash.record() if isinstance(tokenizer_hash, TokenizerFingerprint) else None
    return Job(corpus, first_window, caches, draws, batch, corruption, record)


def _existing(request: CacheRequest) -> Identity | None:
    """Return the identity of a request's existing cache; None if there is no cache."""
    return Cache.open(request.root).identity if Cache.exists(request.root) else None


def _sampler_of_existing(request: CacheRequest, existing: Identity) -> Sampler:
    """Return the request's sampler with the fields that were fitted when the cache was created.

    Raises IdentityMismatchError if the cache was created for another budget.
    """
    parameters = dict(existing.sampler)
    budget = parameters.pop("budget", None)
    if budget != request.budget:
        requested = {"name": request.sampler.name, **request.sampler.parameters()}
        was, now = _in_words(budget, parameters), _in_words(request.budget, requested)
        raise IdentityMismatchError(
            f"the cache at {request.root} was started with {was}, this build has {now}; use the "
            "same settings, or choose another output directory"
        )
    fitted = {n: parameters[n] for n in request.sampler.left_open(budget) if n in parameters}
    return replace(request.sampler, **fitted) if fitted else request.sampler  # type: ignore[type-var]


def _in_words(budget: float | None, parameters: dict[str, Any]) -> str:
    """Return a phrase that states the budget, or the sampler's parameters if there is no budget."""
    if budget is not None:
        return f"a budget of {budget:g}"
    return " and ".join(f"{name} {value}" for name, value in parameters.items())


def _codec(request: CacheRequest, sampler: Sampler, existing: Identity | None) -> dict[str, Any]:
    """Return the codec; `exact_weights=None` selects the existing cache's setting, if any."""
    exact = request.exact_weights
    if exact is None:
        exact = existing is not None and "rounding" not in existing.codec
    return codec_for(sampler, exact_weights=exact)


def _described(request: CacheRequest, sampler: Sampler) -> dict[str, Any]:
    """Return the `sampler` field of the identity, with the budget if there is one."""
    described: dict[str, Any] = {"name": sampler.name, **sampler.parameters()}
    if request.budget is not None:
        described["budget"] = float(request.budget)
    return described


def _mask_fingerprint(engine: Engine) -> str:
    """Return the sha256, in hex, of the mask of valid token ids; "all" if all ids are valid."""
    mask = engine.token_mask.cpu().numpy()
    if mask.all():
        return "all"
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()
