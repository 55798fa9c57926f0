"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

__all__ = ["format_bytes", "format_number", "format_percent", "format_seconds"]

# From 120 s on in minutes, from 120 min in hours, from 48 h in days.
_SECONDS = (
    (86400.0, "d"),
    (3600.0, "h"),
    (60.0, "min"),
    (1.0, "s"),
    (1e-3, "ms"),
    (1e-6, "µs"),
    (1e-9, "ns"),
)
_BYTES = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_MINUS = "\N{MINUS SIGN}"
_SPACE = "\N{NO-BREAK SPACE}"


def format_number(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, never in exponent form; thousands apart."""
    if value == 0:
        return "0"
    size = abs(value)
    decimals = max(0, digits - 1 - _exponent(size, digits))
    return (_MINUS if value < 0 else "") + f"{size:,.{decimals}f}"


def _exponent(size: float, digits: int) -> int:
    """Decimal exponent of ``size`` after rounding to ``digits`` digits (999.6 has 3, not 2)."""
    return int(f"{size:.{digits - 1}e}".partition("e")[2])


def _with_unit(value: float, units: tuple[tuple[float, str], ...], base: str) -> str:
    if value == 0:
        return f"0{_SPACE}{base}"
    for factor, unit in units:
        if float(f"{abs(value) / factor:.2e}") >= (2 if unit in ("min", "h", "d") else 1):
            return f"{format_number(value / factor)}{_SPACE}{unit}"
    factor, unit = units[-1]
    return f"{format_number(value / factor)}{_SPACE}{unit}"


def format_seconds(value: float) -> str:
    """A time in the unit that fits, from ns to days."""
    return _with_unit(value, _SECONDS, "s")


def format_bytes(value: float) -> str:
    """A size in decimal units, as network and memory bandwidths are."""
    return _with_unit(value, _BYTES, "B")


def format_percent(value: float) -> str:
    """A fraction in per cent, to 0.1 (to 0.01 below 1 %)."""
    percent = abs(value) * 100
    text = f"{percent:.2f}" if round(percent, 2) < 1 else f"{percent:.1f}"
    sign = _MINUS if value < 0 and float(text) else ""
    return f"{sign}{text}{_SPACE}%"
