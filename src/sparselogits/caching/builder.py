"""Build caches from a packed corpus; one forward pass of the teacher serves any number of caches.

A build that was interrupted at any moment continues with the first missing shard; a shard that
exists is complete. Finished shards must come from the same text: their fingerprints are compared
with the corpus before any work is done (`job.CHECKED_SHARDS`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparselogits.caching.job import Job
from sparselogits.caching.pilot import check_teacher_on_text, pilot_windows, resolve_budget
from sparselogits.caching.plan import WHOLE, Share, shard_ranges, windows_in
from sparselogits.caching.text import require_room
from sparselogits.caching.work import DrawSettings
from sparselogits.caching.writer import Writer
from sparselogits.corpus import PackedCorpus, Packing
from sparselogits.corpus.tokenizer_identity import TokenizerFingerprint
from sparselogits.errors import IdentityMismatchError
from sparselogits.identity import Identity
from sparselogits.language_model import require_predicting
from sparselogits.progress import Progress
from sparselogits.samplers import Sampler
from sparselogits.store import Cache, Location, codec_for
from sparselogits.store.ranges import Range
from sparselogits.teacher import Engine

WINDOWS_PER_SHARD = 512


@dataclass(frozen=True)
class CacheRequest:
    """One cache to build.

    Args:
        root: directory or URL of the cache.
        sampler: how entries are chosen.
        budget: mean number of entries per position, which sets the sampler's budget parameter
            (rounds, k, tau) by pilot windows; None keeps the sampler as it is.
        seed: random seed of the uniforms.
        temperature: temperature by which the teacher's logits are divided.
        exact_weights: whether real-valued weights are stored as float32 numbers; see `codec_for`.
            None rounds the weights of a new cache, and continues a cache as it was begun.
    """

    root: Location
    sampler: Sampler
    budget: float | None = None
    seed: int = 0
    temperature: float = 1.0
    exact_weights: bool | None = None


@dataclass(frozen=True)
class BuildReport:
    """The result of a build.

    Args:
        caches: the opened caches.
        windows_built: number of windows that were computed.
        windows_found: number of windows in shards that were finished before.
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
    share: Share = WHOLE,
    progress: Progress | None = None,
) -> BuildReport:
    """Build one cache per request, or continue an interrupted build.

    Args:
        engine: the teacher.
        corpus: text, packed with the teacher's tokenizer.
        requests: the caches to build.
        tokenizer_hash: `corpus.tokenizer_fingerprint` of the teacher's tokenizer.
        batch: number of windows per forward pass.
        windows_per_shard: number of windows per shard.
        only: range of windows to build, for builds that are divided manually; None for all.
        first_window: number of the corpus' first window in the caches; above 0 for appended text
            (see `caching.text`).
        share: which of the ranges this process builds, where several processes divide them.
        progress: called after every batch with windows done and their total.

    Raises:
        IdentityMismatchError: a directory holds a cache with other settings, or from other text.
        TeacherError: the teacher is worse than guessing on the text.
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
    request: CacheRequest, packing: Packing, tokenizer_hash: str, windows_per_shard: int
) -> None:
    """Validate what can be validated of a request without its teacher and its text.

    Raises:
        CacheError: the path is a file, or a folder that holds something else.
        IdentityMismatchError: the existing cache was begun with other settings.
    """
    there = _existing(request)
    if there is None:
        require_room(request.root)
        return
    sampler = _sampler_of_existing(request, there)
    packed = packing.to_json()
    here = replace(
        there,
        tokenizer=str(tokenizer_hash),
        window_length=packed.pop("window_length"),
        windows_per_shard=windows_per_shard,
        packing=packed,
        sampler=_described(request, sampler),
        seed=request.seed,
        temperature=request.temperature,
        codec=_codec(request, sampler, there),
    )
    here.require_equal(there, here="this build", there=f"the cache at {request.root}")


def begin_job(
    engine: Engine,
    corpus: PackedCorpus,
    requests: Sequence[CacheRequest],
    *,
    tokenizer_hash: str,
    batch: int,
    windows_per_shard: int,
    first_window: int = 0,
) -> Job:
    """Choose the samplers' parameters and create the caches, or open the existing ones.

    Arguments and errors are those of `build_caches`.
    """
    model = getattr(engine, "model", None)
    if model is not None:
        require_predicting(model, masked=False, whose="the teacher", of="this cache")
    caches, samplers = _open_caches(engine, corpus, requests, tokenizer_hash, windows_per_shard)
    draws = [
        DrawSettings(sampler, request.seed, request.temperature)
        for sampler, request in zip(samplers, requests, strict=True)
    ]
    told = tokenizer_hash.record() if isinstance(tokenizer_hash, TokenizerFingerprint) else None
    return Job(corpus, first_window, caches, draws, batch, told)


def _open_caches(
    engine: Engine,
    corpus: PackedCorpus,
    requests: Sequence[CacheRequest],
    tokenizer_hash: str,
    windows_per_shard: int,
) -> tuple[list[Cache], list[Sampler]]:
    reset = corpus.packing.reset_attention
    caches, samplers = [], []
    pilot = None
    for request in requests:
        there = _existing(request)
        if there is not None:
            sampler = _sampler_of_existing(request, there)
        else:
            if pilot is None:
                pilot = pilot_windows(corpus)
                check_teacher_on_text(engine, pilot, reset_attention=reset)
            sampler = resolve_budget(
                engine,
                pilot,
                request.sampler,
                request.budget,
                temperature=request.temperature,
                reset_attention=reset,
            )
        codec = _codec(request, sampler, there)
        identity = _identity(
            engine, corpus, request, sampler, codec, tokenizer_hash, windows_per_shard
        )
        caches.append(Cache.create(request.root, identity))
        samplers.append(sampler)
    return caches, samplers


def _existing(request: CacheRequest) -> Identity | None:
    """Return the identity of the cache that a request continues; None for a new cache."""
    return Cache.open(request.root).identity if Cache.exists(request.root) else None


def _sampler_of_existing(request: CacheRequest, there: Identity) -> Sampler:
    """Return the sampler that a build settled on when it was begun, for the same request.

    It is the request's own, with the fields set that pilot windows settled, so that a sampler with
    a student in memory keeps it.
    """
    found = dict(there.sampler)
    budget = found.pop("budget", None)
    if budget != request.budget:
        wanted = {"name": request.sampler.name, **request.sampler.parameters()}
        was, now = _in_words(budget, found), _in_words(request.budget, wanted)
        raise IdentityMismatchError(
            f"the cache at {request.root} was started with {was}, this build has {now}; use the "
            "same settings, or choose another output directory"
        )
    settled = {n: found[n] for n in request.sampler.left_open(budget) if n in found}
    return replace(request.sampler, **settled) if settled else request.sampler  # type: ignore[type-var]


def _in_words(budget: float | None, parameters: dict[str, Any]) -> str:
    if budget is not None:
        return f"a budget of {budget:g}"
    return " and ".join(f"{name} {value}" for name, value in parameters.items())


def _identity(
    engine: Engine,
    corpus: PackedCorpus,
    request: CacheRequest,
    sampler: Sampler,
    codec: dict[str, Any],
    tokenizer_hash: str,
    windows_per_shard: int,
) -> Identity:
    packing = corpus.packing.to_json()
    return Identity(
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
        codec=codec,
    )


def _codec(request: CacheRequest, sampler: Sampler, there: Identity | None) -> dict[str, Any]:
    """Return the codec, whose choice of rounding is that of an existing cache unless given."""
    exact = request.exact_weights
    if exact is None:
        exact = there is not None and "rounding" not in there.codec
    return codec_for(sampler, exact_weights=exact)


def _described(request: CacheRequest, sampler: Sampler) -> dict[str, Any]:
    described: dict[str, Any] = {"name": sampler.name, **sampler.parameters()}
    if request.budget is not None:
        described["budget"] = float(request.budget)
    return described


def _mask_fingerprint(engine: Engine) -> str:
    import hashlib

    import numpy as np

    mask = engine.token_mask.cpu().numpy()
    if mask.all():
        return "all"
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()
