"""Define the job of a build, with which any worker can compute any range of windows.

A job refers to the text and the caches, and contains the samplers, but not the teacher, so it can
be sent to other machines that have access to the same folders.
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
from sparselogits.corruption import Corruption
from sparselogits.errors import CacheError, IdentityMismatchError
from sparselogits.store import Cache, WindowRecord
from sparselogits.store.ranges import Range, spread
from sparselogits.store.texts import TextSpan, claim_text
from sparselogits.teacher import Engine

CHECKED_SHARDS = 256
"""Largest number of ranges with existing shards whose text is compared when a build resumes.

If there are more ranges, evenly spaced ones are compared, so that a very large build does not read
all of its text again.
"""


@dataclass(frozen=True)
class Job:
    """A build whose caches have been created.

    Args:
        corpus: packed text.
        first_window: index of the corpus's first window in the caches.
        caches: open caches.
        draws: sampling settings of each cache.
        batch: number of windows per forward pass.
        corruption: corruption of the windows for a masked teacher; None for a causal teacher.
        tokenizer: description of the tokenizer for the shards' provenance; see
            `TokenizerFingerprint.record`.
    """

    corpus: PackedCorpus
    first_window: int
    caches: list[Cache]
    draws: list[DrawSettings]
    batch: int
    corruption: Corruption | None = None
    tokenizer: dict[str, Any] | None = None

    @property
    def text(self) -> TextSpan:
        """Text of the build, with the range of the text's windows in the caches."""
        fingerprint = self.corpus.text_fingerprint
        return TextSpan(fingerprint, self.first_window, self.corpus.windows)

    def missing(self, ranges: Sequence[Range]) -> list[Range]:
        """Return the ranges that at least one cache lacks, and record the text in the caches.

        First the text of existing shards is compared, for at most `CHECKED_SHARDS` ranges.

        Raises:
            CacheError: an existing shard overlaps a range without being equal to it, or is damaged.
            IdentityMismatchError: a compared shard or a cache was built from other text.
        """
        finished = [set(cache.finished()) for cache in self.caches]
        wanted = set(ranges)
        for cache, have in zip(self.caches, finished, strict=True):
            for start, stop in sorted(have):
                if (start, stop) not in wanted and any(a < stop and start < b for a, b in ranges):
                    raise CacheError(
                        f"{cache.root} has a shard of windows {start}:{stop}, which overlaps the "
                        "ranges of this corpus without being equal to one, for example because "
                        "text was added or removed. Choose another output directory"
                    )
        end = self.first_window + self.corpus.windows
        existing = sorted(r for r in set().union(*finished) if self.first_window <= r[0] < end)
        for span in (existing[i] for i in spread(len(existing), CHECKED_SHARDS)):
            holders = [c for c, have in zip(self.caches, finished, strict=True) if span in have]
            self._require_same_text(span, holders)
        for cache in self.caches:
            claim_text(cache.storage, self.text)
        return [r for r in ranges if any(r not in have for have in finished)]

    def _require_same_text(self, span: Range, holders: Sequence[Cache]) -> None:
        """Validate that the existing shards of a range were built from the text of the corpus."""
        expected = self._fingerprint(self._windows(span))
        for cache in holders:
            if cache.provenance(span[0]).get("corpus") != expected:
                raise IdentityMismatchError(
                    f"windows {span[0]}:{span[1]} of {cache.root} were built from other text than "
                    "this corpus; use the same text, or another output directory"
                )

    def compute(
        self, engine: Engine, span: Range, progress: Callable[[int], None] | None = None
    ) -> tuple[list[list[WindowRecord]], dict[str, Any]]:
        """Compute and return one list of records per cache, and the provenance of their shards.

        The records are those of the windows in the range `span`, in order. `progress` is called
        after each batch with the batch's number of windows.
        """
        windows = self._windows(span)
        text = {"corpus": self._fingerprint(windows), "text": self.text.to_json()}
        provenance = {**text, **_provenance(engine, self.batch)}
        if self.tokenizer is not None:
            provenance["tokenizer"] = self.tokenizer
        reset = self.corpus.packing.reset_attention
        records = compute_range(
            engine,
            windows,
            self.draws,
            batch=self.batch,
            reset_attention=reset,
            corruption=self.corruption,
            progress=progress,
        )
        return records, provenance

    def _fingerprint(self, windows: Sequence[Window]) -> str:
        """Return the fingerprint of windows, as recorded in their shard's provenance."""
        return fingerprint(windows, masks=self.corruption is None)

    def _windows(self, span: Range) -> list[Window]:
        """Read a range of windows of the corpus."""
        return read_windows(self.corpus, self.first_window, *span)


def _provenance(engine: Engine, batch: int) -> dict[str, Any]:
    """Return the values that may change low-order bits of results, for the shards' provenance."""
    device = getattr(engine, "device", torch.device("cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    ranks = getattr(engine, "ranks", 1)  # sums over ranks have other rounding errors
    return {
        **({"ranks": ranks} if ranks > 1 else {}),
        **getattr(engine, "versions", {}),
        "sparselogits": version("sparselogits"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": f"{device.type} {name}",
        "threads": torch.get_num_threads(),
        "batch": batch,
    }
