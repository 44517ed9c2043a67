"""A span: a contiguous run of one source file that can be read by itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Part of one file of a source, in the units of its kind.

    Bytes for text and JSON lines, row groups for Parquet, record batches for Arrow.
    """

    file: int
    """Number of the file within the source."""
    start: int
    stop: int
    size: int
    """Bytes that it stands for, for progress and for making portions of equal work."""
    document: int = 0
    """Where the document that covers `start` begins (text only)."""
