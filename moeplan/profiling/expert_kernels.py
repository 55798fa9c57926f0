"""Grouped expert FFN (SwiGLU) by different kernels. ``E`` experts here, ``T`` rows, ``H`` hidden, ``F`` width.

Weights stand as serving engines keep them: ``w13_EGH`` (gate above up, ``G = 2F``) and ``w2_EHF``. Rows are
sorted by expert; experts that are hit come first, so that the active ones are a prefix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from moeplan.errors import SpecError, UnknownNameError
from moeplan.profiling.device import Device

__all__ = [
    "KERNELS",
    "Weights",
    "kernel_gap",
    "make_weights",
    "require_groups",
    "runner",
    "usable_kernels",
    "weight_bytes",
]

KERNELS = ("grouped_mm", "bmm", "loop", "triton")
_GROUP = 128  # numbers per scale of int4 weights


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of one layer's local experts; scales where the type has them."""

    w13_EGH: Any
    w2_EHF: Any
    scale13: Any = None
    scale2: Any = None


def weight_bytes(experts: int, hidden: int, inter: int, dtype: str) -> float:
    """Bytes of the weights, without scales."""
    size = {"fp32": 4.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}.get(dtype, 2.0)
    return 3 * experts * hidden * inter * size


def kernel_gap(kernel: str, dtype: str) -> str:
    """Why ``kernel`` cannot be timed in ``dtype`` here, and what can; empty where it can.

    Raises:
        UnknownNameError: no such kernel.
    """
    if kernel not in KERNELS:
        raise UnknownNameError("kernel", kernel, KERNELS)
    able: tuple[str, ...] = {"fp8": ("grouped_mm",), "int8": ("loop",), "int4": ("loop",)}.get(dtype) or KERNELS
    if find_spec("triton") is None:
        able = tuple(name for name in able if name != "triton")
    if kernel in able:
        return ""
    if kernel == "triton":
        why = "needs Triton, which is not installed (torch brings it on Linux with CUDA)"
        return f"kernel (triton) {why}; choose another of {', '.join(able)}"
    return f"kernel ({kernel}) has no code for dtype ({dtype}); use {', '.join(able)}"


def usable_kernels(dtype: str, wanted: Sequence[str]) -> list[str]:
    """The kernels among ``wanted`` that can be timed in ``dtype`` here.

    Raises:
        UnknownNameError: no such kernel; SpecError: none is left.
    """
    gaps = {name: kernel_gap(name, dtype) for name in wanted}
    found = [name for name, gap in gaps.items() if not gap]
    if not found:
        raise SpecError("; ".join(gaps.values()))
    return found


def require_groups(dtype: str, hidden: int, inter: int) -> None:
    """Refuse sizes that the scales of ``dtype`` do not divide.

    Raises:
        SpecError: the type is int4 and a size does not divide by its group.
    """
    if dtype == "int4" and (hidden % _GROUP or inter % _GROUP):
        raise SpecError(
            f"dtype (int4): hidden ({hidden}) and inter ({inter}) must divide by {_GROUP}; leave int4 out of --dtype,"
            " or choose sizes that do"
        )


def make_weights(device: Device, dtype: str, experts: int, hidden: int, inter: int) -> Weights:
    """Random weights of ``experts`` experts in ``dtype``."""
    torch = device.torch
    shapes = (experts, 2 * inter, hidden), (experts, hidden, inter)
    if dtype in ("fp32", "bf16", "fp16"):
        made = [device.normal(s, device.dtype(dtype), 1 / math.sqrt(s[2])) for s in shapes]
        return Weights(made[0], made[1])
    quantise = {"fp8": _fp8, "int8": _int8, "int4": _int4}[dtype]
    require_groups(dtype, hidden, inter)
    parts = [[quantise(device, s[1:]) for _ in range(experts)] for s in shapes]
    (w13, s13), (w2, s2) = (([w for w, _ in part], [s for _, s in part]) for part in parts)
    if dtype == "fp8":
        return Weights(*(torch.stack(x) for x in (w13, w2, s13, s2)))
    return Weights(w13, w2, s13, s2)


def _fp8(device: Device, shape: tuple[int, int]) -> tuple[Any, Any]:
    """One scale per output row (row-wise recipe)."""
    torch = device.torch
    values = device.normal(shape, torch.bfloat16, 1 / math.sqrt(shape[1]))
    scale = values.abs().amax(1).float() / 448.0  # largest e4m3 number
    return (values.float() / scale[:, None]).to(torch.float8_e4m3fn), scale


def _int8(device: Device, shape: tuple[int, int]) -> tuple[Any, Any]:
    torch = device.torch
    values = torch.randint(-127, 128, shape, dtype=torch.int8, device=device.kind)
    return values, device.normal(shape[:1], torch.bfloat16).abs() / (64 * math.sqrt(shape[1]))


def _int4(device: Device, shape: tuple[int, int]) -> tuple[Any, Any]:
    torch = device.torch
    scales = device.normal((shape[1] // _GROUP, shape[0], 2), torch.bfloat16, 1 / (8 * math.sqrt(shape[1])))
    if device.is_cuda:
        halves = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, device=device.kind)
        return torch._convert_weight_to_int4pack(halves, 8), scales
    values = torch.randint(0, 16, shape, dtype=torch.int32)
    return torch._convert_weight_to_int4pack_for_cpu(values, 1), scales


Run = Callable[[Any, Weights], Any]


def runner(device: Device, kernel: str, dtype: str, counts: Sequence[int], first: int = 0) -> Run:
    """``run(x_TH, weights) -> y_TH`` for ``counts`` rows per expert, falling.

    The experts that are hit are those from ``first`` on. ``bmm`` takes rows padded to the largest count.
    """
    active = [count for count in counts if count]
    if dtype in ("int8", "int4"):
        return _weight_only(device, dtype, active, first)
    if kernel == "grouped_mm":
        placed = [0] * first + active + [0] * (len(counts) - first - len(active))
        return (_scaled_grouped if dtype == "fp8" else _grouped)(device, placed)
    if kernel == "triton":
        return _triton(device, [0] * first + active)
    return {"bmm": _batched, "loop": _loop}[kernel](device, active, first)


def _offsets(device: Device, counts: Sequence[int]) -> Any:
    torch = device.torch
    return torch.tensor(counts, device=device.kind).cumsum(0).to(torch.int32)


def _swiglu(torch: Any, h: Any) -> Any:
    gate, up = h.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _grouped(device: Device, counts: Sequence[int]) -> Run:
    torch, offsets = device.torch, _offsets(device, counts)
    mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

    def run(x_TH: Any, weights: Weights) -> Any:
        h_TF = _swiglu(torch, mm(x_TH, weights.w13_EGH.transpose(1, 2), offs=offsets))
        return mm(h_TF, weights.w2_EHF.transpose(1, 2), offs=offsets)

    return run


def _batched(device: Device, active: list[int], first: int) -> Run:
    """Every active expert padded to the largest count."""
    torch, num, last = device.torch, len(active), first + len(active)

    def run(x_TH: Any, weights: Weights) -> Any:
        x_ECH = x_TH.reshape(num, max(active), -1)
        h_ECF = _swiglu(torch, torch.bmm(x_ECH, weights.w13_EGH[first:last].transpose(1, 2)))
        return torch.bmm(h_ECF, weights.w2_EHF[first:last].transpose(1, 2)).flatten(0, 1)

    return run


def _loop(device: Device, active: list[int], first: int) -> Run:
    torch = device.torch
    linear = torch.nn.functional.linear

    def run(x_TH: Any, weights: Weights) -> Any:
        parts = [
            linear(_swiglu(torch, linear(x, weights.w13_EGH[e])), weights.w2_EHF[e])
            for e, x in enumerate(x_TH.split(active), first)
        ]
        return torch.cat(parts)

    return run


def _triton(device: Device, counts: Sequence[int]) -> Run:
    from moeplan.profiling.triton_grouped import grouped_product

    torch, product = device.torch, grouped_product(device, counts)

    def run(x_TH: Any, weights: Weights) -> Any:
        h_TF = _swiglu(torch, product(x_TH, weights.w13_EGH))
        return product(h_TF, weights.w2_EHF)

    return run


def _weight_only(device: Device, dtype: str, active: list[int], first: int) -> Run:
    torch = device.torch
    if dtype == "int8":
        mm = torch._weight_int8pack_mm
    else:
        packed = torch._weight_int4pack_mm if device.is_cuda else torch._weight_int4pack_mm_for_cpu

        def mm(x: Any, w: Any, scale: Any) -> Any:
            return packed(x, w, _GROUP, scale)

    def run(x_TH: Any, weights: Weights) -> Any:
        parts = []
        for e, x in enumerate(x_TH.split(active), first):
            h = _swiglu(torch, mm(x, weights.w13_EGH[e], weights.scale13[e]))
            parts.append(mm(h, weights.w2_EHF[e], weights.scale2[e]))
        return torch.cat(parts)

    return run


def _scaled_grouped(device: Device, counts: Sequence[int]) -> Run:
    """Row-wise fp8; activations are quantised inside, as engines do before each product."""
    torch, offsets = device.torch, _offsets(device, counts)

    def quantise(x: Any) -> tuple[Any, Any]:
        scale = x.abs().amax(1).float().clamp_min(1e-12) / 448.0
        return (x.float() / scale[:, None]).to(torch.float8_e4m3fn), scale

    def mm(x: Any, w: Any, scale: Any) -> Any:
        q, s = quantise(x)
        return torch._scaled_grouped_mm(
            q, w.transpose(1, 2), s, scale, offs=offsets, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def run(x_TH: Any, weights: Weights) -> Any:
        h_TF = _swiglu(torch, mm(x_TH, weights.w13_EGH, weights.scale13))
        return mm(h_TF.contiguous(), weights.w2_EHF, weights.scale2)

    return run
