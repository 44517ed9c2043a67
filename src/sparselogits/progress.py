"""Define the type of the callbacks to which long-running functions report progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Callback that receives the number of finished units and their total; the unit (windows, shards,
bytes, passes) is documented by the function that calls the callback."""
