"""Build caches from a packed corpus: one forward pass of the teacher serves any number of them.

Interrupted at any moment, a build goes on with the first shard that is not there; a shard that is
there is complete. What is already on disk must come from the same text: every finished shard's
fingerprint is compared with the corpus before any work is done.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import transformers

from sparselogits.build.pilot import check_teacher_on_text, pilot_windows, resolve_budget
from sparselogits.build.plan import Range, shard_ranges
from sparselogits.build.text import read_windows
from sparselogits.build.work import Draw, compute_range
from sparselogits.build.writer import Writer
from sparselogits.corpus import PackedCorpus, fingerprint
from sparselogits.errors import CacheError, IdentityMismatchError
from sparselogits.identity import Identity
from sparselogits.samplers import Sampler, budget_parameter, from_parameters
from sparselogits.store import Cache, Place, codec_for
from sparselogits.teacher import Engine

WINDOWS_PER_SHARD = 512

Progress = Callable[[int, int], None]
"""Called with windows done and windows in all."""


@dataclass(frozen=True)
class CacheRequest:
    """One cache to build.

    Args:
        root: its directory or URL.
        sampler: how entries are chosen.
        budget: mean entries a position; sets the sampler's rounds (k, tau) from pilot windows.
            None keeps the sampler as it is.
        seed: of the uniforms.
        temperature: the teacher's logits are divided by it.
    """

    root: Place
    sampler: Sampler
    budget: float | None = None
    seed: int = 0
    temperature: float = 1.0


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Args:
        caches: the caches, open.
        windows_built: windows computed now.
        windows_found: windows that finished shards already covered.
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
    progress: Progress | None = None,
) -> BuildReport:
    """Build, or go on building, one cache for each request.

    Args:
        engine: the teacher.
        corpus: packed with the teacher's tokenizer.
        requests: the caches.
        tokenizer_hash: `corpus.tokenizer_fingerprint` of the teacher's tokenizer.
        batch: windows a forward pass.
        windows_per_shard: windows a shard covers.
        only: a range of windows to build, for builds divided by hand.
        first_window: number of the corpus' first window in the caches, where it is appended to
            text that is there already (see `build.text`).
        progress: called after every batch.

    Raises:
        IdentityMismatchError: when a directory holds a cache made otherwise, or from other text.
        TeacherError: when the teacher is worse than guessing on the text.
    """
    ranges = shard_ranges(corpus.windows, windows_per_shard, only, first_window=first_window)
    caches, samplers = _open_caches(engine, corpus, requests, tokenizer_hash, windows_per_shard)
    missing = _missing(caches, ranges, corpus, first_window)
    total = sum(stop - start for start, stop in ranges)
    done = found = total - sum(stop - start for start, stop in missing)

    def advance(windows: int) -> None:
        nonlocal done
        done += windows
        if progress is not None:
            progress(done, total)

    advance(0)
    draws = [
        Draw(sampler, request.seed, request.temperature)
        for sampler, request in zip(samplers, requests, strict=True)
    ]
    reset = corpus.packing.reset_attention
    with Writer(caches) as writer:
        for start, stop in missing:
            windows = read_windows(corpus, first_window, start, stop)
            provenance = {"corpus": fingerprint(windows), **_provenance(engine, batch)}
            made = compute_range(
                engine, windows, draws, batch=batch, reset_attention=reset, progress=advance
            )
            writer.write((start, stop), made, provenance)
    return BuildReport(caches, total - found, found)


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
        sampler = _sampler_of_existing(request)
        if sampler is None:
            if pilot is None:
                pilot = pilot_windows(corpus)
                check_teacher_on_text(engine, pilot, reset_attention=reset)
            sampler = request.sampler
            if request.budget is not None:
                sampler = resolve_budget(
                    engine,
                    pilot,
                    sampler,
                    request.budget,
                    temperature=request.temperature,
                    reset_attention=reset,
                )
        identity = _identity(engine, corpus, request, sampler, tokenizer_hash, windows_per_shard)
        caches.append(
            Cache.create(request.root, identity, token_frequencies=corpus.token_frequencies)
        )
        samplers.append(sampler)
    return caches, samplers


def _sampler_of_existing(request: CacheRequest) -> Sampler | None:
    """The sampler a started build settled on, if it was asked for in the same words."""
    if not Cache.exists(request.root):
        return None
    found = dict(Cache.open(request.root).identity.sampler)
    wanted: dict[str, Any] = {"name": request.sampler.name, **request.sampler.parameters()}
    budget = found.pop("budget", None)
    if budget != request.budget:
        was, now = _in_words(budget, found), _in_words(request.budget, wanted)
        raise IdentityMismatchError(
            f"the cache at {request.root} was started with {was}, now {now} is asked for; ask for "
            "the same, or choose another output directory"
        )
    if request.budget is not None:
        settled = budget_parameter(request.sampler)
        wanted[settled] = found.get(settled)
    return from_parameters(wanted)


def _in_words(budget: float | None, parameters: dict[str, Any]) -> str:
    if budget is not None:
        return f"a budget of {budget:g}"
    return " and ".join(f"{name} {value}" for name, value in parameters.items())


def _identity(
    engine: Engine,
    corpus: PackedCorpus,
    request: CacheRequest,
    sampler: Sampler,
    tokenizer_hash: str,
    windows_per_shard: int,
) -> Identity:
    described: dict[str, Any] = {"name": sampler.name, **sampler.parameters()}
    if request.budget is not None:
        described["budget"] = request.budget
    packing = corpus.packing.to_json()
    return Identity(
        teacher=engine.identity,
        tokenizer=tokenizer_hash,
        vocab_size=engine.vocab_size,
        token_mask=_mask_fingerprint(engine),
        window_length=packing.pop("window_length"),
        windows_per_shard=windows_per_shard,
        packing=packing,
        sampler=described,
        seed=request.seed,
        temperature=request.temperature,
        codec=codec_for(sampler),
    )


def _mask_fingerprint(engine: Engine) -> str:
    import hashlib

    import numpy as np

    mask = engine.token_mask.cpu().numpy()
    if mask.all():
        return "all"
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()


def _missing(
    caches: Sequence[Cache], ranges: Sequence[Range], corpus: PackedCorpus, first_window: int
) -> list[Range]:
    """Ranges that at least one cache lacks; the others must come from this very text."""
    finished = [set(cache.finished()) for cache in caches]
    wanted = set(ranges)
    for cache, have in zip(caches, finished, strict=True):
        for start, stop in sorted(have):
            if (start, stop) not in wanted and any(a < stop and start < b for a, b in ranges):
                raise CacheError(
                    f"{cache.root} holds windows {start}:{stop}, which do not match the shards of "
                    "this corpus; was text added or removed? Build into another directory"
                )
    for start, stop in ranges:
        holders = [c for c, have in zip(caches, finished, strict=True) if (start, stop) in have]
        if not holders:
            continue
        expected = fingerprint(read_windows(corpus, first_window, start, stop))
        for cache in holders:
            found = cache.provenance(start).get("corpus")
            if found != expected:
                raise IdentityMismatchError(
                    f"windows {start}:{stop} of {cache.root} were made from other text than the "
                    "corpus given now; use the same text, or choose another output directory"
                )
    return [r for r in ranges if any(r not in have for have in finished)]


def _provenance(engine: Engine, batch: int) -> dict[str, Any]:
    device = getattr(engine, "device", torch.device("cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "sparselogits": version("sparselogits"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": f"{device.type} {name}",
        "threads": torch.get_num_threads(),
        "batch": batch,
    }
