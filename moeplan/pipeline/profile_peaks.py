"""What a machine can do at most, by its profile, and how long a row takes at that: the roofline of its pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.number_formats import WEIGHT_BYTES
from moeplan.costs.roofline import matmul_flops
from moeplan.errors import UnknownNameError
from moeplan.specs.clusters import find_accelerator
from moeplan.units import format_quantity

__all__ = ["peaks", "roofline_us"]


def peaks(profile: HardwareProfile) -> tuple[float, dict[str, float], str]:
    """(bytes per second of the best copy, operations per second of the best product by type, where these are from).

    Where the profile has no copy or no product of a type, the accelerator registry's figure stands in.
    """
    copies = profile.select("memory", op="device_copy")
    moved = 2 * copies["message_size_bytes"].to_numpy() / copies["latency_us"].to_numpy() * 1e6
    products = profile.select("gemm", direction="forward")
    best: dict[str, float] = {}
    if products.num_rows:
        batch, m, n, k, us = (products[c].to_numpy().astype(float) for c in ("batch", "m", "n", "k", "latency_us"))
        for dtype, rate in zip(products["dtype"].to_pylist(), 2 * batch * m * n * k / us * 1e6, strict=True):
            best[dtype] = max(best.get(dtype, 0.0), float(rate))
    # The largest copies do not fit into caches.
    large = moved[np.argsort(copies["message_size_bytes"].to_numpy())[-2:]]
    bandwidth = float(large.max()) if len(large) else 0.0
    own = [f"copy {_short(bandwidth, 'bytes per second')}"] if bandwidth else []
    for dtype, rate in sorted(best.items()):
        own.append(f"{dtype} product {_short(rate, 'floating-point operations per second')}")
    said = [f"best {', '.join(own)} of this profile"] if own else []
    try:
        sheet = find_accelerator(profile.meta.accelerator)
    except UnknownNameError:
        return bandwidth, best, "; ".join(said)
    listed = {name: matmul_flops(sheet, _LIKE.get(name, name)) for name in WEIGHT_BYTES}
    if not bandwidth or listed.keys() - best.keys():
        said.append(f"otherwise the accelerator registry's {sheet.name}")
    return bandwidth or sheet.memory_bandwidth, listed | best, "; ".join(said)


def _short(value: float, dimension: str) -> str:
    return format_quantity(float(f"{value:.3g}"), dimension)


_LIKE: dict[str, Any] = {"fp8_block": "fp8", "w4a8_mxfp4_mxfp8": "fp8", "nvfp4": "fp4", "int8_wo": "bf16"}


_MOVED: dict[str, Callable[[dict[str, Any]], int]] = {  # numbers read and written for a token
    "router": lambda row: int(row["num_experts"]),
    **dict.fromkeys(("permute", "unpermute"), lambda row: int(row["hidden"] * (1 + row["top_k"]))),
    **dict.fromkeys(("norm", "embedding"), lambda row: int(2 * row["hidden"])),
    "activation": lambda row: int(3 * row["hidden"]),
    "optimizer": lambda row: int(7 * row["hidden"]),
}


def roofline_us(name: str, row: dict[str, Any], bandwidth: float, peak: dict[str, float]) -> float:
    """max(bytes / bandwidth, operations / peak) of a row; nan where the profile does not tell."""
    rate = peak.get(row.get("dtype", ""), 0.0)
    if not (bandwidth and row.get("dtype") in WEIGHT_BYTES and row.get("direction") == "forward"):
        return float("nan")
    each = WEIGHT_BYTES[row["dtype"]]
    if name == "elementwise" and row["op"] in _MOVED:
        return float(row["tokens"] * _MOVED[row["op"]](row) * each / bandwidth * 1e6)
    if not rate:
        return float("nan")
    if name == "experts" and row["active_experts"] > 0:
        weights = 3 * row["hidden"] * row["inter"] / row["tp"]
        moved, work = row["active_experts"] * weights * each, 2 * row["rank_pairs"] * weights
    elif name == "gemm":
        m, n, k = row["m"], row["n"], row["k"]
        moved, work = row["batch"] * (m * k + k * n + m * n) * each, 2 * row["batch"] * m * n * k
    elif name == "attention" and (row["kind"], row["scope"]) == ("gqa", "kernel") and row["kv_dtype"] in WEIGHT_BYTES:
        queries, context = row["query_tokens"], row["context_tokens"]
        window = row["window"] or context
        seen = min(context - (queries - 1) / 2, window)  # keys of a query, on average: it sees none after its own
        read = 2 * row["kv_heads"] * min(context, window + queries - 1) * WEIGHT_BYTES[row["kv_dtype"]]
        moved = row["batch"] * row["head_dim"] * (read + 2 * row["heads"] * queries * each)
        work = 4 * row["batch"] * row["head_dim"] * row["heads"] * queries * seen
    else:
        return float("nan")
    return float(max(moved / bandwidth, work / rate) * 1e6)
