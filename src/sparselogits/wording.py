"""Format counts, rates and durations for display: "1 shard", "1,230 tokens/s", "2.5 s"."""

from __future__ import annotations

_IRREGULAR = {"batch": "batches", "entry": "entries", "index": "indices"}


def counted(number: int, one: str) -> str:
    """Return a count followed by its noun, which is given in the singular.

    Examples:
        >>> counted(1, "shard"), counted(1024, "window"), counted(0, "entry")
        ('1 shard', '1,024 windows', '0 entries')
    """
    return f"{number:,} {one if number == 1 else _IRREGULAR.get(one, f'{one}s')}"


def significant(value: float) -> str:
    """Format a number with up to three significant digits, or as a whole number from 100 on.

    Examples:
        >>> significant(48123.4), significant(12.34), significant(0.05), significant(2)
        ('48,123', '12.3', '0.05', '2')
    """
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{float(f'{value:.3g}'):.10f}".rstrip("0").rstrip(".")


def rate(per_second: float, unit: str) -> str:
    """Format a positive rate with up to three digits, or as time per unit if below 0.1 per second.

    Examples:
        >>> rate(1234.5, "tokens"), rate(0.02, "steps")
        ('1,230 tokens/s', '50 s per step')
    """
    if per_second < 0.1:
        return f"{duration(1 / per_second)} per {unit.removesuffix('s')}"
    if per_second >= 1000:
        per_second = float(f"{per_second:.3g}")
    return f"{significant(per_second)} {unit}/s"


def duration(seconds: float) -> str:
    """Format a number of seconds as seconds, minutes or hours.

    Examples:
        >>> duration(0.31), duration(42.4), duration(600), duration(8100)
        ('0.3 s', '42 s', '10 min', '2.2 h')
    """
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def abbreviated(count: int) -> str:
    """Format a count, from 100,000 on in millions and from a billion on in billions.

    Examples:
        >>> abbreviated(66_672), abbreviated(134_515_008), abbreviated(8_030_261_248)
        ('66,672', '134.5 M', '8.03 B')
    """
    if count >= 1e9:
        return f"{count / 1e9:,.2f} B"
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"


def parameters(count: int) -> str:
    """Format a number of parameters: "66,672 parameters", "134.5 M parameters"."""
    return f"{abbreviated(count)} parameters"
