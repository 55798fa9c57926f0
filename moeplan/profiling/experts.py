"""Benches of the grouped expert FFN: balanced, few active experts, skewed; forward and backward.

``E`` logical experts of the layer, ``K`` top-k, of which a rank of an ``ep`` x ``tp`` group holds ``E / ep``,
each cut to ``F / tp``. A point is one rank's vector of tokens per local expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.errors import SpecError
from moeplan.profiling.device import Device
from moeplan.profiling.expert_kernels import (
    Weights,
    kernel_gap,
    make_weights,
    require_groups,
    runner,
    usable_kernels,
    weight_bytes,
)
from moeplan.profiling.protocol import Bench, Call, Series, shrunk

__all__ = ["ExpertShape", "balanced_vector", "expert_bench", "skewed_vector"]

_ZIPF = (0.8, 1.2)  # exponents of the skewed vectors
Prepare = Callable[[Series, int], Call]


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """A layer as one rank sees it.

    Raises:
        SpecError: the experts do not divide over ``ep``, or their width over ``tp``.
    """

    hidden: int
    inter: int
    num_experts: int
    top_k: int
    ep: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        if self.num_experts % self.ep:
            raise SpecError(f"num_experts ({self.num_experts}) must divide by ep ({self.ep})")
        if self.inter % self.tp:
            raise SpecError(f"inter ({self.inter}) must divide by tp ({self.tp})")
        if self.top_k > self.num_experts:
            raise SpecError(f"top_k ({self.top_k}) exceeds num_experts ({self.num_experts})")

    @property
    def local_experts(self) -> int:
        """Experts of one rank."""
        return self.num_experts // self.ep

    @property
    def text(self) -> str:
        """As in messages."""
        cut = f" ep{self.ep} tp{self.tp}" if (self.ep, self.tp) != (1, 1) else ""
        return f"H{self.hidden} F{self.inter} E{self.num_experts} K{self.top_k}{cut}"


def balanced_vector(shape: ExpertShape, tokens: int) -> list[int]:
    """Tokens per local expert when ``tokens`` of the group choose evenly: falling, sum ``tokens K / ep``."""
    pairs = max(1, round(tokens * shape.top_k / shape.ep))
    each, more = divmod(pairs, shape.local_experts)
    return [each + 1] * more + [each] * (shape.local_experts - more)


def skewed_vector(shape: ExpertShape, tokens: int, exponent: float, seed: int) -> list[int]:
    """Tokens per local expert of the rank that gets most, from a seeded multinomial draw, falling.

    Experts' popularity falls as ``1 / position^exponent`` in random order over the ranks; no expert gets
    more than every token.
    """
    rng = np.random.default_rng([seed, tokens])
    weight_E = np.arange(1, shape.num_experts + 1) ** -exponent
    count_E = rng.multinomial(tokens * shape.top_k, rng.permutation(weight_E / weight_E.sum()))
    count_RE = np.minimum(count_E, tokens).reshape(shape.ep, shape.local_experts)
    busiest = count_RE[count_RE.sum(1).argmax()]
    return sorted((int(count) for count in busiest), reverse=True)


def expert_bench(
    device: Device,
    shape: ExpertShape,
    dtype: str,
    kernels: Sequence[str],
    directions: Sequence[str] = ("forward",),
    max_tokens: int = 16384,
    seed: int = 0,
) -> Bench:
    """All series of one shape and dtype; what of it cannot be timed stands in ``left_out``.

    Raises:
        SpecError: the device, the memory or the kernels cannot, or the sizes do not suit the type; names what can.
    """
    device.dtype(dtype)
    if "backward" in directions and dtype in ("fp8", "int8", "int4"):
        raise SpecError(f"direction (backward) is not measured for dtype ({dtype}): its kernels have no gradient")
    cut = shape.inter // shape.tp
    require_groups(dtype, shape.hidden, cut)
    able = usable_kernels(dtype, kernels)
    if able == ["triton"] and "forward" not in directions:
        raise SpecError("direction (backward) is not measured for kernel (triton), it has no gradient; use grouped_mm")
    name = f"experts {shape.text} {dtype}"
    gaps = [gap for kernel in kernels if (gap := kernel_gap(kernel, dtype))]
    left_out = [f"{name}: {gap}" for gap in gaps]
    if "triton" in able and "backward" in directions:
        left_out.append(f"{name}: kernel (triton) backward is not measured, it has no gradient")
    backward = "backward" in directions
    per_pair = (3 * shape.hidden + 4 * cut) * 4 * (3 if backward else 1)
    held = (2 if backward else 1) * weight_bytes(shape.local_experts, shape.hidden, cut, dtype)  # and their gradients
    room = device.free_bytes - held
    if room <= 0:
        larger = "--ep or --tp" if shape.local_experts > 1 else "--tp"
        raise SpecError(
            f"{shape.text}: weights{' and gradients' * backward} ({held / 2**30:.1f} GiB) do not fit into the memory"
            f" that buffers may take ({device.free_bytes / 2**30:.1f} GiB); give a larger {larger}"
        )
    most_pairs = max(1, int(room / 2 // per_pair))
    high = max(1, min(max_tokens, int(most_pairs * shape.ep // shape.top_k)))
    series: list[Series] = []
    plan: dict[str, tuple[str, str, Callable[[int], list[int]]]] = {}

    def add(kernel: str, direction: str, kind: str, vector: Callable[[int], list[int]], top: int) -> None:
        def row(size: int) -> Mapping[str, Any]:
            return _row(shape, dtype, kernel, direction, kind, size, vector(size))

        label = f"{name} {kernel} {direction} {kind}"
        plan[label] = kernel, direction, vector
        few = 5 if kind.startswith("zipf") else 8
        series.append(Series("experts", label, row, 1, top, few, refine=kind == "balanced"))

    for kernel in able:
        for direction in directions:
            if kernel == "triton" and direction == "backward":
                continue
            add(kernel, direction, "balanced", lambda tokens: balanced_vector(shape, tokens), high)
            if direction == "forward" and shape.local_experts > 1:
                add(kernel, direction, "one_token_each", lambda n: _one_each(shape, n), shape.local_experts)
            if kernel == "bmm" or shape.local_experts == 1 or direction == "backward":
                continue  # bmm pads to the largest count: a skewed vector is another balanced one
            for exponent in _ZIPF:

                def vector(tokens: int, exponent: float = exponent) -> list[int]:
                    return skewed_vector(shape, tokens, exponent, seed)

                add(kernel, direction, f"zipf{exponent}", vector, high)
    return Bench(
        name,
        tuple(series),
        lambda: _open(device, shape, dtype, plan, high),
        (*left_out, *shrunk(name, max_tokens, high)),
        "give a larger --ep or --tp, or a smaller --max-tokens",
    )


def _one_each(shape: ExpertShape, active: int) -> list[int]:
    return [1] * active + [0] * (shape.local_experts - active)


def _row(
    shape: ExpertShape, dtype: str, kernel: str, direction: str, kind: str, size: int, vector: list[int]
) -> Mapping[str, Any]:
    pairs = sum(vector)
    tokens = -(-pairs * shape.ep // shape.top_k) if kind == "one_token_each" else size
    return {
        "backend": "moeplan",
        "kernel": kernel,
        "hidden": shape.hidden,
        "inter": shape.inter,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "ep": shape.ep,
        "tp": shape.tp,
        "dtype": dtype,
        "distribution": "balanced" if kind == "balanced" else "explicit",
        "tokens": tokens,
        "rank_pairs": pairs,
        "active_experts": sum(count > 0 for count in vector),
        "vector": " ".join(map(str, vector)),
        "direction": direction,
    }


def _open(
    device: Device,
    shape: ExpertShape,
    dtype: str,
    plan: Mapping[str, tuple[str, str, Callable[[int], list[int]]]],
    high: int,
) -> Prepare:
    torch = device.torch
    cut = shape.inter // shape.tp
    each = weight_bytes(shape.local_experts, shape.hidden, cut, dtype)
    weights = [
        make_weights(device, dtype, shape.local_experts, shape.hidden, cut) for _ in range(device.copies(each, most=8))
    ]
    # Room for padding to the largest count, and for the rotation of rows.
    most = max(sum(vector(high)) for _, _, vector in plan.values()) + shape.local_experts
    pool = device.normal((most + 64, shape.hidden), device.dtype(dtype))

    def prepare(series: Series, size: int) -> Call:
        kernel, direction, vector = plan[series.label]
        counts = vector(size)
        active = sum(count > 0 for count in counts)
        rows = active * max(counts) if kernel == "bmm" else sum(counts)
        # Where few experts are hit the next call must hit others, or their weights would be in the cache.
        spare = shape.local_experts - active + 1
        turns = min(64, 1 + int(2 * device.cache_bytes // max(1.0, each / shape.local_experts * active)))
        cases = []
        for turn in range(turns if direction == "forward" else min(2, len(weights))):
            copy, step = turn % len(weights), turn // len(weights)
            x = pool[16 * (turn % 4) : 16 * (turn % 4) + rows]
            cases.append((runner(device, kernel, dtype, counts, step * active % spare), x, weights[copy]))
        if direction == "backward":
            return _backward(device, cases)

        def forward(i: int) -> object:
            run, x, own = cases[i % len(cases)]
            with torch.inference_mode():
                return run(x, own)

        return forward

    return prepare


def _backward(device: Device, cases: list[tuple[Callable[[Any, Weights], Any], Any, Weights]]) -> Call:
    """The gradients of input and weights alone; the graph of each rotation is built beforehand."""
    torch = device.torch
    graphs = []
    for run, x, w in cases:
        leaves = [part.detach().requires_grad_() for part in (x, w.w13_EGH, w.w2_EHF)]
        with torch.enable_grad():
            out = run(leaves[0], Weights(leaves[1], leaves[2]))
        graphs.append((out, leaves, device.normal(out.shape, out.dtype)))

    def backward(i: int) -> object:
        out, leaves, gradient = graphs[i % len(graphs)]
        return torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    return backward
