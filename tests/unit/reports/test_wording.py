from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.reports.wording import format_bytes, format_number, format_percent, format_seconds


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (4.2e-7, "420 ns"),
        (9.996e-4, "1.00 ms"),
        (0.0673, "67.3 ms"),
        (61, "61.0 s"),
        (119, "119 s"),
        (120, "2.00 min"),
        (7100, "118 min"),
        (7200, "2.00 h"),
        (3 * 86400, "3.00 d"),
        (-0.5, "-500 ms"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert plain(format_seconds(value)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1.00 kB"), (2.6e11, "260 GB"), (4.4e7, "44.0 MB")],
)
def test_bytes(value: float, text: str) -> None:
    assert plain(format_bytes(value)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00 %"),
        (0.0055, "0.55 %"),
        (0.4023, "40.2 %"),
        (0.01, "1.0 %"),
        (-0.004, "-0.40 %"),
        (-1e-9, "0.00 %"),
    ],
)
def test_percent(value: float, text: str) -> None:
    assert plain(format_percent(value)) == text


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-9, 1e12))
def test_numbers_keep_three_digits(value: float) -> None:
    read = float(format_number(value).replace(",", ""))
    assert abs(read - value) <= 0.00501 * value
    assert "e" not in format_number(value)
