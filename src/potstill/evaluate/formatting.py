"""Format numbers for reports, model cards and tables."""

from __future__ import annotations

import math

NOT_FINITE = "not a number"


def nats(value: float) -> str:
    return f"{value:z.3f}" if math.isfinite(value) else NOT_FINITE


def percent(share: float, digits: int = 0) -> str:
    if 0 < abs(share) < 0.01:
        digits = max(digits, 1)
    return minus(f"{100 * share:z.{digits}f}%")


def count(number: float) -> str:
    """Format a number of things.

    >>> count(800), count(200_000), count(5_270_784), count(999_960)
    ('800', '200K', '5.3M', '1.0M')
    """
    return _scaled(number, ("", "K", "M", "B", "T"))


def size(number: float) -> str:
    """Format a number of bytes in powers of 1000.

    >>> size(10541568)
    '10.5 MB'
    """
    return _scaled(number, (" bytes", " kB", " MB", " GB", " TB"))


def flops(number: float) -> str:
    """Format a number of floating-point operations.

    >>> flops(1.85e18)
    '1.9 EFLOPs'
    """
    return _scaled(number, (" FLOPs", " kFLOPs", " MFLOPs", " GFLOPs", " TFLOPs", " PFLOPs", " EFLOPs", " ZFLOPs"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    for unit in units:
        if abs(number) < 999.95 or unit == units[-1]:
            break
        number /= 1000
    return f"{number:.0f}{unit}" if unit == units[0] or abs(number) >= 99.95 else f"{number:.1f}{unit}"


def milliseconds(value: float) -> str:
    if value >= 999.5:
        return f"{value / 1000:.1f} s"
    return f"{value:.2g} ms" if value < 1 else f"{value:.1f} ms" if value < 99.95 else f"{value:.0f} ms"


def duration(seconds: float) -> str:
    """Format a duration.

    >>> duration(40.1), duration(85), duration(7384)
    ('40 s', '1 min 25 s', '2 h 3 min')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def perplexity(value: float) -> str:
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def minus(text: str) -> str:
    """Replace hyphens with minus signs."""
    return text.replace("-", "\N{MINUS SIGN}")


def times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:,.0f}"
