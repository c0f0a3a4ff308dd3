"""Formatting of costs, sizes and times, with decimal prefixes."""

from __future__ import annotations

__all__ = ["budget_name", "change", "count", "duration", "file_size", "percent"]

_COUNTS = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))
_SIZES = ((1e9, " GB"), (1e6, " MB"), (1e3, " kB"))


_BUDGETS = {"macs": "MACs", "params": "parameters"}


def budget_name(kind: str) -> str:
    """Return the name of a budget for messages.

    >>> budget_name("params"), budget_name("latency")
    ('parameters', 'latency')
    """
    return _BUDGETS.get(kind, kind)


def count(value: float) -> str:
    """Format a number of MACs or parameters with three significant digits.

    >>> count(17_563_000_000), count(86_192_640), count(640)
    ('17.6 G', '86.2 M', '640')
    """
    return _prefixed(value, _COUNTS, "")


def file_size(value: float) -> str:
    """Format a number of bytes with three significant digits.

    >>> file_size(12_345_678), file_size(96)
    ('12.3 MB', '96 B')
    """
    return _prefixed(value, _SIZES, " B")


def percent(fraction: float, digits: int = 1) -> str:
    """Format a fraction in [0, 1] as a percentage.

    >>> percent(0.4987)
    '49.9%'
    """
    return f"{100 * fraction:.{digits}f}%"


def change(before: float, after: float) -> str:
    """Format the relative change from ``before`` to ``after``.

    >>> change(200, 100), change(100, 110), change(100, 100)
    ('-50.0%', '+10.0%', '0.0%')
    """
    if not before:
        return "n/a"
    relative = (after - before) / before
    # A smaller change would be printed as +0.0% or -0.0%.
    return f"{100 * relative:+.1f}%" if abs(relative) >= 5e-4 else "0.0%"


def duration(seconds: float) -> str:
    """Format seconds in ms, s or min.

    >>> duration(0.0123), duration(4.56), duration(125)
    ('12.3 ms', '4.6 s', '2 min 05 s')
    """
    if seconds < 1:
        return f"{_digits(1000 * seconds)} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    # Rounded first: 119.7 s are 2 min 00 s, not 1 min 60 s.
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _prefixed(value: float, scales: tuple[tuple[float, str], ...], unit: str) -> str:
    for scale, suffix in scales:
        # 999.6 k would be printed as 1000 k; use the next prefix from 999.5 on.
        if abs(value) >= 0.9995 * scale:
            return _digits(value / scale) + suffix
    return f"{value:.0f}{unit}"


def _digits(value: float) -> str:
    """Format with three significant digits, without an exponent."""
    size = abs(value)
    # From 99.95 on, one decimal would be a fourth digit: 100.0.
    if size >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"
