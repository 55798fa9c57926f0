"""Measured tables of ``aiconfigurator-core`` (PyPI, Apache-2.0, extra ``aic``) as hardware profiles.

Only its parquet files are read; the package itself is never imported. What is normalised here:

- units: its all-to-all files are in microseconds, the others in milliseconds; ours are in microseconds;
- NCCL message sizes are elements (half takes twice int8's time at one size); ours are bytes;
- ``num_tokens`` is per ep group in the MoE files and per rank in the DeepEP files;
- fp8 dispatch and bf16 combine in the DeepEP files, which name no type (their bandwidth column says so);
- experts without a gate where a collector timed them so without saying.

What a collector did otherwise than its rows say is known from its source, and :func:`regrouped` names these rows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moeplan.artifacts.profile import Source
from moeplan.errors import MissingExtraError, ProfileError, UnknownNameError
from moeplan.specs.models import find_model, model_names

__all__ = [
    "LICENCE",
    "VERSION",
    "AicFile",
    "convert",
    "files_of",
    "find_system",
    "fingerprint",
    "read_rows",
    "regrouped",
    "systems",
    "systems_root",
]

VERSION = "0.12.0"
LICENCE = "Apache-2.0, Copyright (c) NVIDIA CORPORATION & AFFILIATES"

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "int4_wo": "int4", "float32": "fp32"}
_ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "int8": 1, "fp8": 1}


# From these releases on the collectors time a layer as the model's server builds it: routed among groups of experts
# where the model is, without a gate where its experts have none.
_AS_SERVED = {"sglang": (0, 5, 14), "vllm": (0, 24, 0)}
# TensorRT-LLM's low-latency kernels are timed under DeepSeek-V3's groups, whatever the model.
_ALWAYS_GROUPED = "moe_torch_flow_min_latency"
_FEW = 256  # tokens up to which the weights of the experts hit take the time
_SHAPE = ("hidden", "inter", "num_experts", "top_k")


def _as_served(file: AicFile) -> bool:
    numbers = tuple(int(number) for number in re.findall(r"\d+", file.version)[:3])
    return file.kind == "moe" and numbers >= _AS_SERVED.get(file.framework, (np.inf,))


@cache
def _shapes(ungated: bool) -> frozenset[tuple[int, ...]]:
    """Shapes of built-in models without gates, or that route among groups of experts."""
    models = [find_model(name) for name in model_names()]
    chosen = [m for m in models if (not m.gated_ffn if ungated else (m.n_group or 1) > 1)]
    return frozenset(
        (m.routed_hidden_size, m.expert_intermediate_size, m.num_experts, m.top_k) for m in chosen
    )


def _among(table: dict[str, Any], shapes: frozenset[tuple[int, ...]]) -> Any:
    columns = (np.asarray(table[name]).tolist() for name in _SHAPE)
    return np.array([shape in shapes for shape in zip(*columns, strict=True)], bool)


def regrouped(table: pa.Table, file: AicFile) -> Any:
    """Rows of experts whose load is not what they say.

    Their collector hands choices as scores to a router that keeps half of the groups of experts, and takes the rest
    from the first ones. Even choices are one in each group, so half of the experts get all of them: one rank with all
    experts takes as long at EP 1 as at EP 2, and would read weights at 1.7 times the bandwidth of its memory. Skewed
    ones hit all experts. Of a group of ranks the one that is timed gets too many tokens, but hits its experts as it
    should: that shows where tokens and not weights take the time.
    """
    always = np.array([_ALWAYS_GROUPED in kernel for kernel in table["kernel"].to_pylist()], bool)
    grouped = always | (_as_served(file) & _among({name: table[name] for name in _SHAPE}, _shapes(ungated=False)))
    even = np.array(table["distribution"].to_pylist()) == "balanced"
    alone = table["ep"].to_numpy() == 1
    return grouped & np.where(alone, even, table["tokens"].to_numpy() > _FEW)


def systems_root() -> Path:
    """The ``systems`` directory of the installed package.

    Raises:
        MissingExtraError: the package is not installed; ProfileError: it is another version.
    """
    try:
        distribution = metadata.distribution("aiconfigurator-core")
    except metadata.PackageNotFoundError as error:
        raise MissingExtraError("reading the public measured tables", "aic") from error
    if distribution.version != VERSION:
        raise ProfileError(
            f"aiconfigurator-core ({distribution.version}) is not the version that is understood ({VERSION});"
            f" pip install aiconfigurator-core=={VERSION}"
        )
    return Path(str(distribution.locate_file("aiconfigurator_core/systems")))


def systems(root: Path) -> list[str]:
    """Systems with measured data, as the package names them."""
    return sorted(path.name for path in (root / "data").iterdir() if any(path.rglob("*.parquet")))


def find_system(root: Path, name: str) -> str:
    """The package's name of a system: exact, with other separators, or its first word (``h100``).

    Raises:
        UnknownNameError: no or several systems match.
    """
    known = systems(root)
    wanted = name.lower().replace("-", "_")
    hits = [s for s in known if s == wanted] or [s for s in known if s.split("_")[0] == wanted]
    if len(hits) != 1:
        raise UnknownNameError("system", name, known)
    return hits[0]


@dataclass(frozen=True, slots=True)
class AicFile:
    """One table file of the package."""

    system: str
    family: str
    framework: str
    version: str
    path: Path

    @property
    def kind(self) -> str:
        """File name without its ending: what the rows are."""
        return self.path.name.removesuffix("_perf.parquet")

    @property
    def source_id(self) -> str:
        """Key of its source in ``profile.json``."""
        return f"aic-{VERSION}/{self.system}/{self.framework}-{self.version}/{self.kind}"

    def source(self, device: str, note: str = "") -> Source:
        """Its entry in ``profile.json``."""
        title = f"aiconfigurator-core {VERSION}, systems/data/{'/'.join(self.path.parts[-5:])}"
        return Source(kind="imported", title=title, version=self.version, device=device, licence=LICENCE, note=note)


def files_of(root: Path, system: str, hybrid: bool = False) -> Iterator[AicFile]:
    """Table files of a system that :func:`convert` understands; ``hybrid``: linear and sparse attention too."""
    for path in sorted((root / "data" / system).rglob("*_perf.parquet")):
        family, framework, version = path.parts[-4:-1]
        file = AicFile(system, family, framework, version, path)
        if file.kind in _CONVERTERS and (hybrid or file.kind not in _HYBRID):
            yield file


def read_rows(file: AicFile) -> pa.Table:
    """The file's rows as published.

    Raises:
        ProfileError: the file cannot be read.
    """
    try:
        return pq.ParquetFile(file.path).read()
    except (OSError, pa.ArrowException) as error:
        raise ProfileError(f"cannot read {file.path}: {error}; reinstall the package") from error


def fingerprint(rows: pa.Table) -> str:
    """Digest of all numbers: equal digests are one measurement under two names."""
    digest = hashlib.sha256()
    for name in sorted(rows.column_names):
        if pa.types.is_integer(rows[name].type) or pa.types.is_floating(rows[name].type):
            digest.update(name.encode())
            digest.update(rows[name].to_numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------- conversion

_Columns = dict[str, Any]
_Converted = Iterable[tuple[str, _Columns]]


def _ints(rows: pa.Table, name: str) -> Any:
    return rows[name].to_numpy().astype(np.int64)


def _text(rows: pa.Table, name: str) -> Any:
    return pc.cast(rows[name], pa.string()).combine_chunks()


def _dtype(rows: pa.Table, name: str) -> Any:
    encoded = _text(rows, name).dictionary_encode()
    names = pa.array([_DTYPES.get(value, value) for value in encoded.dictionary.to_pylist()], pa.string())
    return pc.take(names, encoded.indices)


def _us(rows: pa.Table, name: str, scale: float = 1e3) -> Any:
    return rows[name].to_numpy().astype(float) * scale


def _same(value: Any, rows: pa.Table) -> Any:
    return pa.repeat(value, rows.num_rows)


def _moe(rows: pa.Table, file: AicFile) -> _Converted:
    tokens, top_k = _ints(rows, "num_tokens"), _ints(rows, "topk")
    ep, experts = _ints(rows, "moe_ep_size"), _ints(rows, "num_experts")
    slots = _ints(rows, "num_slots") if "num_slots" in rows.column_names else 0 * experts
    distribution = pc.replace_substring_regex(_text(rows, "distribution"), "^uniform$", "balanced")
    even = pc.equal(distribution, "balanced").to_numpy(zero_copy_only=False)
    pairs = -(-tokens * top_k // ep)  # balanced choices go round the experts, so the count is known
    local = np.maximum(1, np.where(slots > 0, slots, experts) // ep)
    kernel = _text(rows, "kernel_source")
    if "moe_kernel" in rows.column_names:
        kernel = pc.binary_join_element_wise(kernel, _text(rows, "moe_kernel"), "/")
    if file.kind in ("wideep_context_moe", "wideep_generation_moe"):
        kernel = pc.binary_join_element_wise(kernel, file.kind.split("_")[1], "/")
    shape = dict(zip(_SHAPE, (rows["hidden_size"], rows["inter_size"], experts, top_k), strict=True))
    if _as_served(file):
        plain = pa.array(_among(shape, _shapes(ungated=True)))
        kernel = pc.if_else(plain, pc.binary_join_element_wise(kernel, "nongated", "/"), kernel)
    yield (
        "experts",
        {
            "hidden": rows["hidden_size"],
            "inter": rows["inter_size"],
            "num_experts": experts,
            "num_slots": slots,
            "top_k": top_k,
            "ep": ep,
            "tp": rows["moe_tp_size"],
            "dtype": _dtype(rows, "moe_dtype"),
            "distribution": distribution,
            "tokens": tokens,
            "rank_pairs": np.where(even, pairs, -1),
            "active_experts": np.where(even, np.minimum(pairs, local), -1),
            "rank_tokens": rows["rank0_num_tokens"] if "rank0_num_tokens" in rows.column_names else 0 * ep - 1,
            "scope": _same("fused" if "megamoe" in file.kind else "experts", rows),
            "kernel": kernel,
            "latency_us": _us(rows, "latency"),
        },
    )


def _per_node(file: AicFile) -> int:
    return 4 if file.system.startswith("gb") else 8


def _deepep(rows: pa.Table, file: AicFile) -> _Converted:
    normal = file.kind.endswith("normal")
    for phase in ("dispatch", "combine"):
        latency = _us(rows, f"{phase}_transmit_us" if normal else f"{phase}_avg_t_us", 1.0)
        yield (
            "alltoall",
            {
                "mode": _same("normal" if normal else "low_latency", rows),
                "phase": _same(phase, rows),
                "nodes": rows["node_num"],
                "ranks": _ints(rows, "node_num") * _per_node(file),
                "hidden": rows["hidden_size"],
                "top_k": rows["num_topk"],
                "num_experts": rows["num_experts"],
                "dtype": _same("fp8" if phase == "dispatch" else "bf16", rows),
                "tokens_per_rank": rows["num_token"],
                "sms": rows[f"{phase}_sms"] if normal else _same(0, rows),
                "kernel": _same("deepep", rows),
                "latency_us": latency + _us(rows, f"{phase}_notify_us", 1.0) if normal else latency,
            },
        )


def _a2a(rows: pa.Table, file: AicFile) -> _Converted:
    names = _text(rows, "comm_backend").to_pylist()
    yield (
        "alltoall",
        {
            "mode": ["low_latency" if name.endswith(("_ll", "_generation")) else "normal" for name in names],
            "phase": rows["phase"],
            "nodes": rows["node_num"],
            "ranks": rows["ep_size"],
            "hidden": rows["hidden_size"],
            "top_k": rows["topk"],
            "num_experts": rows["num_experts"],
            "dtype": _dtype(rows, "comm_dtype"),
            "tokens_per_rank": rows["num_tokens"],
            "sms": rows["sms"],
            "kernel": names,
            "latency_us": _us(rows, "latency", 1.0),
        },
    )


def _trtllm_alltoall(rows: pa.Table, file: AicFile) -> _Converted:
    kernels, ops = _text(rows, "kernel_source").to_pylist(), _text(rows, "op_name").to_pylist()
    dtypes = _dtype(rows, "moe_dtype").to_pylist()
    ranks = _ints(rows, "moe_ep_size")
    yield (
        "alltoall",
        {
            "mode": ["nvlink_one_sided" if "One" in kernel else "nvlink_two_sided" for kernel in kernels],
            "phase": [op.split("_")[1] for op in ops],
            "nodes": -(-ranks // _per_node(file)),
            "ranks": ranks,
            "hidden": rows["hidden_size"],
            "top_k": rows["topk"],
            "num_experts": rows["num_experts"],
            # Combine returns bf16 unless it is the low-precision one.
            "dtype": ["bf16" if op.endswith("combine") else dtype for op, dtype in zip(ops, dtypes, strict=True)],
            "tokens_per_rank": rows["num_tokens"],
            "kernel": [
                f"{kernel}/{dtype}{'/low_precision' * op.endswith('low_precision')}"
                for kernel, dtype, op in zip(kernels, dtypes, ops, strict=True)
            ],
            "latency_us": _us(rows, "latency"),
        },
    )


def _collective(rows: pa.Table, file: AicFile) -> _Converted:
    dtype = _dtype(rows, "nccl_dtype" if "nccl_dtype" in rows.column_names else "allreduce_dtype")
    width = np.array([_ELEMENT_BYTES[name] for name in dtype.to_pylist()])
    yield (
        "collectives",
        {
            "op": rows["op_name"],
            "dtype": dtype,
            "ranks": rows["num_gpus"],
            "message_size_bytes": _ints(rows, "message_size") * width,
            "kernel": rows["kernel_source"],
            "latency_us": _us(rows, "latency"),
        },
    )


def _attention(rows: pa.Table, file: AicFile) -> _Converted:
    mla, decode = "mla" in file.kind, "generation" in file.kind
    module = "module" in file.kind or file.kind.startswith("wideep")
    inputs, step = _ints(rows, "isl"), _ints(rows, "step")
    # Decode files hold the cache in step and 1 in isl; the wide-EP ones hold it in isl and 0 in step.
    context = inputs + step if (step > 0).any() or not decode else inputs
    names = rows.column_names
    precision = "mla_dtype" if mla else "attn_dtype"
    weights = "gemm_type" if "gemm_type" in names else precision
    yield (
        "attention",
        {
            "kind": _same("mla" if mla else "gqa", rows),
            "phase": _same("decode" if decode else "prefill", rows),
            "scope": _same("module" if module else "kernel", rows),
            "batch": rows["batch_size"],
            "query_tokens": _same(1, rows) if decode else inputs,
            "context_tokens": context,
            "heads": rows["num_heads"],
            "kv_heads": _same(1, rows) if mla else rows["num_key_value_heads"],
            "head_dim": _same(128, rows) if mla else rows["head_dim"],
            "window": rows["window_size"] if "window_size" in names else _same(0, rows),
            "dtype": _dtype(rows, precision),
            "kv_dtype": _dtype(rows, "kv_cache_dtype"),
            "gemm_dtype": _dtype(rows, weights) if module else _same("", rows),
            "kernel": pc.binary_join_element_wise(_text(rows, "kernel_source"), file.kind, "/"),
            "latency_us": _us(rows, "latency"),
        },
    )


def _gemm(rows: pa.Table, file: AicFile) -> _Converted:
    yield (
        "gemm",
        {
            **{axis: rows[axis] for axis in "mnk"},
            "dtype": _dtype(rows, "gemm_dtype"),
            "kernel": rows["kernel_source"],
            "latency_us": _us(rows, "latency"),
        },
    )


def _bmm(rows: pa.Table, file: AicFile) -> _Converted:
    # Absorbed MLA projections per head (DeepSeek-V2, section 2.1): 128 -> 512 before, 512 -> 128 after.
    before = pc.equal(_text(rows, "op_name"), "mla_gen_pre").to_numpy(zero_copy_only=False)
    yield (
        "gemm",
        {
            "m": rows["num_tokens"],
            "n": np.where(before, 512, 128),
            "k": np.where(before, 128, 512),
            "batch": rows["num_heads"],
            "dtype": _dtype(rows, "bmm_dtype"),
            "kernel": pc.binary_join_element_wise("mla_bmm", _text(rows, "kernel_source"), "/"),
            "latency_us": _us(rows, "latency"),
        },
    )


def _gated_delta(rows: pa.Table, file: AicFile) -> _Converted:
    """Gated DeltaNet layers: a convolution and a recurrence, two rows of one layer."""
    names = _text(rows, "phase").to_pylist()
    decode = np.array([name == "generation" for name in names])
    length = np.where(decode, 1, _ints(rows, "seq_len"))
    yield (
        "attention",
        {
            "kind": _same("gated_delta", rows),
            "phase": np.where(decode, "decode", "prefill").tolist(),
            "batch": rows["batch_size"],
            "query_tokens": length,
            "context_tokens": length,
            "heads": rows["num_v_heads"],
            "kv_heads": rows["num_k_heads"],
            "head_dim": rows["head_v_dim"],
            "dtype": _same("bf16", rows),
            "kv_dtype": _same("bf16", rows),
            "kernel": rows["kernel_source"],
            "latency_us": _us(rows, "latency"),
        },
    )


def _sparse_mla(rows: pa.Table, file: AicFile) -> _Converted:
    """DeepSeek sparse attention with its indexer and projections; prefill without a cached prefix only."""
    decode = "generation" in file.kind
    inputs, step = _ints(rows, "isl"), _ints(rows, "step")
    partial = pc.match_substring(_text(rows, "op_name"), "skip").to_numpy(zero_copy_only=False)
    left_out = partial if decode else partial | (step > 0)
    glm = pc.starts_with(_text(rows, "architecture"), "Glm").to_numpy(zero_copy_only=False)
    yield (
        "attention",
        {
            "kind": _same("sparse_mla", rows),
            "phase": _same("decode" if decode else "prefill", rows),
            "scope": _same("module", rows),
            "batch": rows["batch_size"],
            "query_tokens": inputs,
            "context_tokens": inputs + step,
            "heads": rows["num_heads"],
            "kv_heads": _same(1, rows),
            "head_dim": np.where(glm, 256, 128),  # value heads of GLM-5 and of DeepSeek-V3.2
            "dtype": _dtype(rows, "mla_dtype"),
            "kv_dtype": _dtype(rows, "kv_cache_dtype"),
            "gemm_dtype": _dtype(rows, "gemm_type"),
            "kernel": pc.binary_join_element_wise(_text(rows, "kernel_source"), file.kind, "/"),
            "latency_us": np.where(left_out, 0.0, _us(rows, "latency")),
        },
    )


_HYBRID = frozenset(["gdn", "dsa_context_module", "dsa_generation_module"])

_CONVERTERS: dict[str, Callable[[pa.Table, AicFile], _Converted]] = {
    **dict.fromkeys(["moe", "wideep_moe", "wideep_context_moe", "wideep_generation_moe", "dsv4_megamoe_module"], _moe),
    **dict.fromkeys(["wideep_deepep_ll", "wideep_deepep_normal"], _deepep),
    **dict.fromkeys(["nccl", "custom_allreduce"], _collective),
    **{f"{phase}_{kind}": _attention for phase in ("context", "generation") for kind in ("attention", "mla")},
    **{f"wideep_{phase}_mla": _attention for phase in ("context", "generation")},
    **{f"mla_{phase}_module": _attention for phase in ("context", "generation")},
    "moe_a2a": _a2a,
    "trtllm_alltoall": _trtllm_alltoall,
    "gemm": _gemm,
    "mla_bmm": _bmm,
    "gdn": _gated_delta,
    **{f"dsa_{phase}_module": _sparse_mla for phase in ("context", "generation")},
}


def convert(rows: pa.Table, file: AicFile) -> list[tuple[str, pa.Table]]:
    """(table name, rows in our columns and units) of one file; rows without a latency are left out."""
    answer = []
    for table, columns in _CONVERTERS[file.kind](rows, file):
        common = {"backend": _same(file.framework, rows), "source": _same(file.source_id, rows)}
        columns["latency_us"] = np.round(columns["latency_us"], 3)  # clocks do not resolve a nanosecond
        result = pa.table({**columns, **common})
        answer.append((table, result.filter(pc.greater(result["latency_us"], 0))))
    return answer
