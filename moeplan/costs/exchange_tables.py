"""Measured exchanges as curves over tokens: the one nearest to what is asked for, and by how much it may miss.

Of a curve's own places it misses what straight lines miss of its points, each told from the others. Of another machine
size, or another shape, it misses what curves of its kernel miss of each other, told from the nearest in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.specs.model import DTYPE_BYTES, Dtype, ModelSpec, activations_beside

__all__ = ["FLAT", "LIKE_MACHINES", "TWO_LEVEL", "UNKNOWN", "Copies", "Curve", "curve_error", "dispatch_and_combine"]

Floats = NDArray[np.float64]
Copies = Callable[[int, int, int], float]
"""Copies per token at (top-k, ranks, nodes), choices falling evenly."""

# What `moeplan profile collectives` measures: one copy per (token, expert); one per node, passed on inside it.
FLAT, TWO_LEVEL = "flat", "two_level"
LIKE_MACHINES = 0.135  # what the tables miss of DeepEP's publication at most, EP16-64 (`moeplan validate kernels`)
UNKNOWN = 0.3  # too few curves to tell: where they are many, nine of ten points of another shape miss by 0.1 to 0.35
_ENOUGH = 8


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """One measured phase: seconds by tokens per rank, and where. ``bytes_factor``: bytes of a copy, or of a token's
    copies together, wanted over measured."""

    tokens: Floats
    seconds: Floats
    mode: str
    backend: str
    kernel: str
    source: str
    sms: int
    dtype: str
    nodes: int
    ranks: int
    hidden: int
    top_k: int
    num_experts: int
    copied: bool = False
    bytes_factor: float = 1.0

    @property
    def name(self) -> str:
        """Source and kernel, and whether the numbers are another system's too."""
        number = f", {self.sms} SMs" if self.sms else ", two-level" * (self.mode == TWO_LEVEL)
        return f"{self.source} ({self.kernel}{number})" + " copied from another system" * self.copied

    @property
    def wire(self) -> Dtype:
        """The type that it sends in."""
        return "fp4" if self.dtype == "nvfp4" else self.dtype  # type: ignore[return-value]

    @property
    def fixed_s(self) -> float:
        """``t0``: least relative squares over the smaller half of the sizes, within 0 and the smallest time."""
        half = max(3, len(self.tokens) // 2)
        weight = 1 / self.seconds[:half]
        design = np.stack([weight, self.tokens[:half] * weight], 1)
        start = np.linalg.lstsq(design, np.ones(len(weight)), rcond=None)[0][0]
        return float(np.clip(start, 0, self.seconds.min()))

    @property
    def place(self) -> tuple[int, int]:
        """Nodes and ranks."""
        return self.nodes, self.ranks

    @property
    def shape(self) -> tuple[int, int, int]:
        """Hidden, top-k and experts."""
        return self.hidden, self.top_k, self.num_experts


def _apart(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return round(sum(abs(float(np.log(x / y))) for x, y in zip(a, b, strict=True)), 9)


@lru_cache(maxsize=64)
def _curves(profile: HardwareProfile, mode: str, phase: str) -> tuple[Curve, ...]:
    """Every curve of evenly falling choices with three sizes or more."""
    rows = profile.select("alltoall", mode=mode, phase=phase, dtype=[*DTYPE_BYTES, "nvfp4"], distribution="balanced")
    names_of = [f.name for f in fields(Curve)][2:-2]
    points: dict[tuple[Any, ...], dict[float, float]] = {}
    copied: set[tuple[Any, ...]] = set()
    each = (rows[c].to_pylist() for c in (*names_of, "mark", "tokens_per_rank", "latency_us"))
    for *listed, mark, tokens, us in zip(*each, strict=True):
        names = tuple(listed)
        points.setdefault(names, {}).setdefault(float(tokens), 1e-6 * us)
        if mark == "copied":
            copied.add(names)
    return tuple(
        Curve(*np.array(sorted(of.items())).T, *(*names, names in copied))
        for names, of in sorted(points.items())
        if len(of) >= 3
    )


def _nearest(
    curves: tuple[Curve, ...], model: ModelSpec, nodes: int, ranks: int, dtype: str, kernel: tuple[str, str] | None
) -> Curve | None:
    """On one node where there is one, over several where there are several; of a kernel measured in several types the
    one in ``dtype``, or else in that of most nearly its bytes."""
    found = [c for c in curves if kernel in (None, (c.backend, c.kernel))]
    if found and not found[0].mode.startswith("nvlink"):
        found = [c for c in found if (c.nodes > 1) == (nodes > 1)]
    if not found:
        return None
    nvlink = found[0].mode.startswith("nvlink")

    def far(curve: Curve) -> float:
        return _apart((curve.ranks,), (ranks,)) if nvlink else _apart(curve.place, (nodes, ranks))

    shape = model.routed_hidden_size, model.top_k, model.num_experts
    least = min(map(far, found))
    found = [c for c in found if far(c) == least]
    least = min(_apart(c.shape, shape) for c in found)
    found = [c for c in found if _apart(c.shape, shape) == least]
    width = roofline.token_bytes(model.routed_hidden_size, "fp4" if dtype == "nvfp4" else dtype)  # type: ignore[arg-type]

    def wider(curve: Curve) -> float:
        return width / roofline.token_bytes(model.routed_hidden_size, curve.wire)

    of_kernel: dict[str, Curve] = {}
    for c in sorted(found, key=lambda c: (c.name, c.dtype != dtype, abs(np.log(wider(c))))):
        of_kernel.setdefault(c.name, c)
    # Of several numbers of SMs and versions the one that brings most tokens of the wanted width at its largest size.
    best = min(of_kernel.values(), key=lambda c: c.seconds[-1] / c.tokens[-1] * wider(c))
    return replace(best, bytes_factor=model.routed_hidden_size / best.hidden)


@lru_cache(maxsize=64)
def dispatch_and_combine(
    profile: HardwareProfile, modes: tuple[str, ...], model: ModelSpec, nodes: int, ranks: int, activation: Dtype
) -> tuple[Curve, Curve] | None:
    """The nearest measured exchange of one library of the first of ``modes`` that has any, the dispatch brought to the
    type on the wire; None where there is none, or its combine is missing."""
    for mode in modes:
        wanted = "nvfp4" if activation == "fp4" else activation
        out = _nearest(_curves(profile, mode, "dispatch"), model, nodes, ranks, wanted, None)
        if out is not None:
            break
    else:
        return None
    kernel, rest = (out.backend, out.kernel), modes[modes.index(out.mode) :]
    back = next(
        filter(None, (_nearest(_curves(profile, m, "combine"), model, nodes, ranks, out.dtype, kernel) for m in rest)),
        None,
    )
    if back is None:
        return None

    def sent_in(curve: Curve, dtype: Dtype) -> Curve:
        wide, measured = (roofline.token_bytes(model.routed_hidden_size, of) for of in (dtype, out.wire))
        return replace(curve, bytes_factor=curve.bytes_factor * wide / measured)

    if out.mode in (FLAT, TWO_LEVEL):  # measured in one type both ways; tokens come back in 16 bits or more
        back = sent_in(back, activations_beside(activation))
    return sent_in(out, activation), back


# ---------------------------------------------------------------------- how far off


def curve_error(profile: HardwareProfile, curve: Curve, phase: str, here: bool, copies: Copies) -> float:
    """Relative error of nine of ten times that ``curve`` tells; ``here``: where it was measured. See the module."""
    missed = [_transfer_error(profile, curve, phase, "place", copies)] if not here else []
    missed += [_transfer_error(profile, curve, phase, "shape", copies)] if abs(curve.bytes_factor - 1) > 1e-9 else []
    missed += [UNKNOWN] if curve.copied else []
    return float(np.hypot(max(missed) if missed else _line_error(curve), LIKE_MACHINES))


def _line_error(curve: Curve) -> float:
    inner = range(1, len(curve.tokens) - 1)
    told = [
        np.interp(curve.tokens[i], np.delete(curve.tokens, i), np.delete(curve.seconds, i)) / curve.seconds[i] - 1
        for i in inner
    ]
    return float(np.quantile(np.abs(told), 0.9))


def _transfer_error(
    profile: HardwareProfile, curve: Curve, phase: str, kind: Literal["place", "shape"], copies: Copies
) -> float:
    """What curves of one kernel miss of those of another place, or of another shape at their own."""
    of = (curve.backend, curve.name, curve.dtype, curve.nodes > 1)
    every = _curves(profile, curve.mode, phase)
    same = [c for c in every if (c.backend, c.name, c.dtype, c.nodes > 1) == of]
    off: list[Floats] = []
    for c in same:
        if kind == "place":
            others = [(_apart(o.place, c.place), o) for o in same if o.place != c.place and o.shape == c.shape]
        else:
            others = [(_apart(o.shape, c.shape), o) for o in same if o.shape != c.shape and o.place == c.place]
        if not others:
            continue
        near = min(others, key=lambda each: each[0])[1]
        more = copies(c.top_k, near.ranks, near.nodes) / copies(near.top_k, near.ranks, near.nodes)
        tokens = c.tokens * (c.hidden / near.hidden * more)
        within = (tokens >= near.tokens[0]) & (tokens <= near.tokens[-1])
        told = np.interp(tokens, near.tokens, near.seconds)
        sent, known = copies(c.top_k, c.ranks, c.nodes), copies(near.top_k, near.ranks, near.nodes)
        if kind == "place" and known:
            told = near.fixed_s + (told - near.fixed_s) * sent / known
        off.append(np.abs(told[within] / c.seconds[within] - 1))
    missed = np.concatenate(off) if off else np.empty(0)
    return float(np.quantile(missed, 0.9)) if len(missed) >= _ENOUGH else UNKNOWN
