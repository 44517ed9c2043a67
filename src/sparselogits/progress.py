"""Define how long-running functions report progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called repeatedly with the number of units done and their total; the function that takes it names
the unit (windows, shards, bytes, passes)."""
