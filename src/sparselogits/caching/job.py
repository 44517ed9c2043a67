"""Describe a build that has begun: everything but the teacher that a worker needs for any range.

A job holds the paths of the caches, what is drawn for each, and the text. It can be sent to another
process or machine that has access to the same folders.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import transformers

from sparselogits.caching.text import read_windows
from sparselogits.caching.work import DrawSettings, compute_range
from sparselogits.corpus import PackedCorpus, Window, fingerprint
from sparselogits.errors import CacheError, IdentityMismatchError
from sparselogits.store import Cache, WindowRecord
from sparselogits.store.ranges import Range, spread
from sparselogits.store.texts import TextSpan, claim_text
from sparselogits.teacher import Engine

CHECKED_SHARDS = 256
"""Number of finished shards whose text is compared before a build continues. Of more shards, evenly
spaced ones are compared, so that continuing a very large build does not read all of its text."""


@dataclass(frozen=True)
class Job:
    """A build that has begun.

    Args:
        corpus: the text.
        first_window: number of the text's first window in the caches.
        caches: the caches, created with the identity of the build.
        draws: how each cache is drawn.
        batch: number of windows per forward pass.
        tokenizer: what the shards record of the tokenizer, see `TokenizerFingerprint.record`.
    """

    corpus: PackedCorpus
    first_window: int
    caches: list[Cache]
    draws: list[DrawSettings]
    batch: int
    tokenizer: dict[str, Any] | None = None

    @property
    def text(self) -> TextSpan:
        """The text with its window numbers in the caches."""
        fingerprint = self.corpus.text_fingerprint
        return TextSpan(fingerprint, self.first_window, self.corpus.windows)

    def missing(self, ranges: Sequence[Range]) -> list[Range]:
        """Return the ranges that at least one cache lacks, and claim the caches for this text.

        The text of at most `CHECKED_SHARDS` existing shards is compared first.

        Raises:
            CacheError: an existing shard overlaps a range in part.
            IdentityMismatchError: a shard was made from other text, or a cache belongs to other
                text.
        """
        finished = [set(cache.finished()) for cache in self.caches]
        wanted = set(ranges)
        for cache, have in zip(self.caches, finished, strict=True):
            for start, stop in sorted(have):
                if (start, stop) not in wanted and any(a < stop and start < b for a, b in ranges):
                    raise CacheError(
                        f"{cache.root} holds windows {start}:{stop}, which do not match the shards "
                        "of this corpus, as after text was added or removed. Build into another "
                        "directory"
                    )
        end = self.first_window + self.corpus.windows
        there = sorted(r for r in set().union(*finished) if self.first_window <= r[0] < end)
        for place in spread(len(there), CHECKED_SHARDS):
            span = there[place]
            holders = [c for c, have in zip(self.caches, finished, strict=True) if span in have]
            self._require_same_text(span, holders)
        for cache in self.caches:
            claim_text(cache.storage, self.text)
        return [r for r in ranges if any(r not in have for have in finished)]

    def _require_same_text(self, span: Range, holders: Sequence[Cache]) -> None:
        expected = fingerprint(self._windows(span))
        for cache in holders:
            if cache.provenance(span[0]).get("corpus") != expected:
                raise IdentityMismatchError(
                    f"windows {span[0]}:{span[1]} of {cache.root} were made from other text than "
                    "the corpus given now; use the same text, or another output directory"
                )

    def compute(
        self, engine: Engine, span: Range, progress: Callable[[int], None] | None = None
    ) -> tuple[list[list[WindowRecord]], dict[str, Any]]:
        """Return the records of one range for each cache, and the provenance of their shards.

        The text is read once, so the provenance's fingerprint is that of the tokens that the
        teacher read.
        """
        windows = self._windows(span)
        text = {"corpus": fingerprint(windows), "text": self.text.to_json()}
        provenance = {**text, **_provenance(engine, self.batch)}
        if self.tokenizer is not None:
            provenance["tokenizer"] = self.tokenizer
        reset = self.corpus.packing.reset_attention
        made = compute_range(
            engine, windows, self.draws, batch=self.batch, reset_attention=reset, progress=progress
        )
        return made, provenance

    def _windows(self, span: Range) -> list[Window]:
        return read_windows(self.corpus, self.first_window, *span)


def _provenance(engine: Engine, batch: int) -> dict[str, Any]:
    device = getattr(engine, "device", torch.device("cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    together = getattr(engine, "ranks", 1)  # sums over ranks round differently
    return {
        **({"ranks": together} if together > 1 else {}),
        "sparselogits": version("sparselogits"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": f"{device.type} {name}",
        "threads": torch.get_num_threads(),
        "batch": batch,
    }
