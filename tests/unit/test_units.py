from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from moeplan.units import (
    Bytes,
    BytesPerSecond,
    FlopsPerSecond,
    Fraction,
    Seconds,
    Watts,
    format_quantity,
    parse_quantity,
)

DIMENSIONS = [
    "bytes",
    "bytes per second",
    "seconds",
    "floating-point operations per second",
    "a fraction",
    "watts",
]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Bytes, "141 GiB", 141 * 2**30),
        (Bytes, "80GB", 80e9),
        (Bytes, "1.5 KiB", 1536),
        (BytesPerSecond, "450 GB/s", 450e9),
        (BytesPerSecond, "400 Gbit/s", 50e9),
        (Seconds, "5 us", 5e-6),
        (Seconds, "5 µs", 5e-6),
        (Seconds, "2 min", 120),
        (FlopsPerSecond, "989 TFLOPS", 989e12),
        (FlopsPerSecond, "1e3 GFLOP/s", 1e12),
        (Fraction, "5 %", 0.05),
        (Watts, ".7 kW", 700),
    ],
)
def test_quantities_are_read_in_base_units(kind, text, value):
    assert TypeAdapter(kind).validate_python(text) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    "value", ["5", 5, 5.0, "GB", "3 GB/s", "3 gb", "", None, True, "3 GB GB", "nan GB", "1e GB"]
)
def test_what_is_not_a_quantity_is_refused_with_an_example(value):
    with pytest.raises(
        ValidationError, match=r"is not a quantity in bytes; write it with its unit, as in '141 GiB'"
    ):
        TypeAdapter(Bytes).validate_python(value)


@pytest.mark.parametrize("value", ["-3 GB", "-3", " -.5 GB", -3, -0.5])
def test_a_negative_quantity_is_told_its_sign_whatever_its_unit(value):
    with pytest.raises(ValidationError, match=r"must not be negative; write it as in '141 GiB'"):
        TypeAdapter(Bytes).validate_python(value)


@pytest.mark.parametrize("dimension", DIMENSIONS)
@settings(max_examples=50, deadline=None)
@given(value=st.one_of(st.floats(0, 1e18), st.integers(0, 10**16).map(float), st.floats(0, 1e-3)))
@example(value=0.07)
@example(value=5e-324)
@example(value=0.0)
def test_formatting_and_parsing_is_the_identity(dimension, value):
    assert parse_quantity(format_quantity(value, dimension), dimension) == value


@pytest.mark.parametrize(
    ("value", "dimension", "text"),
    [
        (900e9, "bytes per second", "900 GB/s"),
        (141 * 2.0**30, "bytes", "141 GiB"),
        (80e9, "bytes", "80 GB"),
        (8e-6, "seconds", "8 us"),
        (0.05, "a fraction", "5 %"),
    ],
)
def test_the_shortest_text_with_a_whole_part_is_written(value, dimension, text):
    assert format_quantity(value, dimension) == text
