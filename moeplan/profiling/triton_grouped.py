"""A grouped product in Triton: rows sorted by expert times each expert's own matrix.

One program computes a block of rows of one expert by a block of columns; which expert and which rows a block has
is worked out on the host, where the vector of tokens is known. Imported only where Triton is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from moeplan.profiling.device import Device

__all__ = ["grouped_product"]

_ROWS, _COLUMNS, _INNER = 64, 128, 64


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _kernel(x, w, y, expert_ptr, start_ptr, stop_ptr, G, H, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    block = tl.program_id(0)
    expert = tl.load(expert_ptr + block).to(tl.int64)
    rows = tl.load(start_ptr + block) + tl.arange(0, ROWS)
    row_ok = rows < tl.load(stop_ptr + block)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = columns < G
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    row_start = rows.to(tl.int64)[:, None] * H
    column_start = expert * G * H + columns.to(tl.int64)[None, :] * H
    for at in range(0, H, INNER):
        inner = at + tl.arange(0, INNER)
        inner_ok = inner < H
        a = tl.load(x + row_start + inner[None, :], mask=row_ok[:, None] & inner_ok[None, :], other=0.0)
        b = tl.load(w + column_start + inner[:, None], mask=column_ok[None, :] & inner_ok[:, None], other=0.0)
        total += tl.dot(a, b)
    at = rows.to(tl.int64)[:, None] * G + columns[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


def grouped_product(device: Device, counts: Sequence[int]) -> Callable[[Any, Any], Any]:
    """``product(x_TH, w_EGH) -> y_TG`` for ``counts`` rows per expert; both inputs contiguous."""
    torch = device.torch
    experts, starts, stops, row = [], [], [], 0
    for expert, count in enumerate(counts):
        for start in range(row, row + count, _ROWS):
            experts.append(expert)
            starts.append(start)
            stops.append(row + count)
        row += count
    table = torch.tensor([experts, starts, stops], dtype=torch.int32, device=device.kind)

    def product(x_TH: Any, w_EGH: Any) -> Any:
        columns, inner = w_EGH.shape[1:]
        y_TG = torch.empty((row, columns), dtype=x_TH.dtype, device=x_TH.device)
        grid = (len(experts), triton.cdiv(columns, _COLUMNS))
        _kernel[grid](x_TH, w_EGH, y_TG, table[0], table[1], table[2], columns, inner, _ROWS, _COLUMNS, _INNER)
        return y_TG

    return product
