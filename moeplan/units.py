"""Quantities that people write with their unit: ``450 GB/s`` -> ``450e9``.

In files and options the value carries the unit and a bare number is refused; in code the
name carries it (``latency_s``, ``memory_bytes``).
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

__all__ = [
    "Bytes",
    "BytesPerSecond",
    "FlopsPerSecond",
    "Fraction",
    "PerSecond",
    "Price",
    "Seconds",
    "Watts",
    "format_quantity",
    "parse_quantity",
]

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}

_UNITS: dict[str, dict[str, float]] = {
    "bytes": {f"{p}B": f for p, f in {**_DECIMAL, **_BINARY}.items()},
    "bytes per second": {f"{p}B/s": f for p, f in {**_DECIMAL, **_BINARY}.items()}
    | {f"{p}bit/s": f / 8 for p, f in _DECIMAL.items()},
    "seconds": {
        "ns": 1e-9,
        "us": 1e-6,
        "µs": 1e-6,
        "ms": 1e-3,
        "s": 1.0,
        "min": 60.0,
        "h": 3600.0,
        "d": 86400.0,
    },
    "floating-point operations per second": {f"{p}FLOPS": f for p, f in _DECIMAL.items()}
    | {f"{p}FLOP/s": f for p, f in _DECIMAL.items()},
    "a fraction": {"%": 0.01},
    "watts": {"W": 1.0, "kW": 1e3},
    "events per second": {"/s": 1.0, "/min": 1 / 60, "/h": 1 / 3600},
    "US dollars per hour": {"USD/h": 1.0},
}
_EXAMPLE = {
    "bytes": "141 GiB",
    "bytes per second": "450 GB/s",
    "seconds": "5 s",
    "floating-point operations per second": "989 TFLOPS",
    "a fraction": "5 %",
    "watts": "700 W",
    "events per second": "12 /s",
    "US dollars per hour": "2 USD/h",
}
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+)\s*(\S*)\s*")


def parse_quantity(text: Any, dimension: str) -> float:
    """Value of ``text`` in the base unit of ``dimension``.

    Raises:
        ValueError: no unit, an unknown unit, or a negative or unreadable number.
    """
    units = _UNITS[dimension]
    if not isinstance(text, bool) and re.match(r"\s*-[0-9.]", str(text)):
        raise ValueError(f"{text!r} must not be negative; write it as in '{_EXAMPLE[dimension]}'")
    match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[2] not in units:
        raise ValueError(
            f"{text!r} is not a quantity in {dimension}; write it with its unit,"
            f" as in '{_EXAMPLE[dimension]}'"
        )
    value = _times(match[1], units[match[2]])
    if math.isinf(value):
        raise ValueError(f"{text!r} is too large")
    return value


def _times(number: str, factor: float) -> float:
    """The float nearest to the product as written: 7 % is 0.07, which 7 * 0.01 is not."""
    return float(Decimal(number) * Decimal(repr(factor)))


def format_quantity(value: float, dimension: str) -> str:
    """Shortest exact text of ``value`` that :func:`parse_quantity` reads back to the same float."""
    fitting = []
    for unit, factor in _UNITS[dimension].items():
        number = repr(value / factor).removesuffix(".0")
        if "e" not in number and _times(number, factor) == value:
            text = f"{number} {unit}"
            fitting.append((value < factor, len(text), -factor, text))  # 900 GB/s rather than 0.9 TB/s
    if fitting:
        return min(fitting)[3]
    unit, factor = min(_UNITS[dimension].items(), key=lambda item: abs(item[1] - 1.0))
    return f"{Decimal(repr(value)) / Decimal(repr(factor))} {unit}"


def _quantity(dimension: str) -> Any:
    return (
        BeforeValidator(lambda text: parse_quantity(text, dimension)),
        PlainSerializer(lambda value: format_quantity(value, dimension), return_type=str),
        WithJsonSchema(
            {"type": "string", "description": f"a quantity in {dimension}", "examples": [_EXAMPLE[dimension]]}
        ),
    )


Bytes = Annotated[float, *_quantity("bytes")]
BytesPerSecond = Annotated[float, *_quantity("bytes per second")]
Seconds = Annotated[float, *_quantity("seconds")]
FlopsPerSecond = Annotated[float, *_quantity("floating-point operations per second")]
Fraction = Annotated[float, *_quantity("a fraction")]
Watts = Annotated[float, *_quantity("watts")]
PerSecond = Annotated[float, *_quantity("events per second")]
Price = Annotated[float, *_quantity("US dollars per hour")]
