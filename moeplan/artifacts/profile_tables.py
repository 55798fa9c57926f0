"""Columns of the tables of a hardware profile: names with units, types, meaning. The published schema.

Every table also has the :data:`COMMON` columns. ``E`` experts, ``R`` ranks of the group. A column with a
default may be missing from a file; the others may not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeplan.specs.model import DTYPE_BYTES

__all__ = ["COMMON", "MEASURED", "TABLES", "Column", "columns_of", "measure_command", "schema_document"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column. ``kind`` is ``str``, ``int`` or ``float``; ``default`` None: the column must be there.

    ``words`` are all that a ``str`` may hold, where not any; ``A`` in them stands for a number, ``HASH`` for a digest.
    """

    kind: str
    meaning: str
    default: str | int | float | None = None
    words: tuple[str, ...] = ()

    @property
    def least(self) -> int | None:
        """Smallest value of an ``int``: of a size 1, of others the default, which says that there is none."""
        return None if self.kind != "int" else int(self.default) if self.default is not None else 1

    @property
    def pattern(self) -> str:
        """Regular expression of the words."""
        return f"^({'|'.join(self.words)})$".replace("HASH", "[0-9a-f]+").replace("A", r"\d+(\.\d+)?")

    def holds(self, value: Any) -> bool:
        """Whether a ``str`` or ``int`` column may hold ``value``."""
        if self.least is not None:
            return type(value) is int and value >= self.least
        return isinstance(value, str) and (not self.words or re.search(self.pattern, value) is not None)


def _s(meaning: str, default: str | None = None, words: tuple[str, ...] = ()) -> Column:
    return Column("str", meaning, default, words)


def _i(meaning: str, default: int | None = None) -> Column:
    return Column("int", meaning, default)


_NAN = float("nan")
_DTYPE = "fp32, bf16, fp16, fp8, fp8_block, int8, int4, fp4, or a format's own name such as w4a8_mxfp4_mxfp8"

MISMEASURED = ("not_sharded", "regrouped", "too_fast", "host_bound")
"""Marks of rows that timed something else than they say: not the rank's own work, fewer weights, or the host's."""

DIRECTIONS = ("forward", "backward")
MEASURED = ("latency_us", "spread", "min_us", "p20_us", "samples")  # all other columns say what was measured

_MARKS = ("non_monotone", "skew_faster", "outlier", *MISMEASURED, "copied")
_CHOICES = ("balanced", "power_law_A", "power_law_A_eplb", "power_law_sampled_A", "explicit")

COMMON: dict[str, Column] = {
    "backend": _s("framework whose code ran: moeplan, sglang, trtllm, vllm, nccl, gloo, deepep"),
    "kernel": _s("kernel or library call that was timed"),
    "latency_us": Column("float", "median of the measured times"),
    "spread": Column(
        "float", "(90th - 10th percentile) / median of the measured times; nan: one sample, or not published", _NAN
    ),
    "min_us": Column("float", "shortest of the measured times; nan: not published", _NAN),
    "p20_us": Column("float", "20th percentile of the measured times; nan: not published", _NAN),
    "samples": Column("int", "measured times; 0: not published", 0),
    "source": _s("key into sources of profile.json: where this number is from"),
    "mark": _s(
        f"empty: usable; else why the sanity pass set it aside: {', '.join(_MARKS)}",
        "",
        ("", *_MARKS),
    ),
}

TABLES: dict[str, dict[str, Column]] = {
    "experts": {
        "hidden": _i("H"),
        "inter": _i("F of one expert before it is cut by tp"),
        "num_experts": _i("logical experts E of the layer, over all ranks"),
        "num_slots": _i("slots P over all ranks; 0: equal to num_experts", 0),
        "top_k": _i("K"),
        "ep": _i("ranks the experts are spread over"),
        "tp": _i("ranks that share one expert"),
        "dtype": _s(f"of the weights: {_DTYPE}"),
        "distribution": _s(f"of choices: {', '.join(_CHOICES)} (see vector)", None, _CHOICES),
        "tokens": _i("entering the layer over all ranks of the ep group"),
        "rank_pairs": _i("(token, expert) pairs on the measured rank; -1: not published", -1),
        "active_experts": _i("distinct experts hit on the measured rank; -1: not published", -1),
        "rank_tokens": _i("distinct tokens on the measured rank; -1: not published", -1),
        "vector": _s("tokens per local expert of the measured rank, separated by spaces; empty: not published", ""),
        "direction": _s("forward or backward", "forward", DIRECTIONS),
        "scope": _s("experts (grouped FFN of one rank) or fused (dispatch and combine inside the kernel)", "experts"),
    },
    "alltoall": {
        "mode": _s("low_latency, normal, nvlink_one_sided, nvlink_two_sided, flat or two_level"),
        "phase": _s("dispatch, combine or prepare"),
        "nodes": _i("N"),
        "ranks": _i("R"),
        "hidden": _i("H"),
        "top_k": _i("K"),
        "num_experts": _i("E"),
        "dtype": _s("of tokens on the wire"),
        "tokens_per_rank": _i("tokens that one rank sends (dispatch) or gets back (combine)"),
        "sms": _i("streaming multiprocessors given to the exchange; 0: the library's choice", 0),
        "distribution": _s(
            "of choices over experts: balanced, power_law_A, explicit (the profiler's own skewed matrix of what rank"
            " sends to rank) or trace:HASH (a trace's matrix)",
            "balanced",
            ("balanced", "power_law_A", "explicit", "trace:HASH"),
        ),
    },
    "collectives": {
        "op": _s("all_reduce, all_gather, reduce_scatter, alltoall or p2p"),
        "dtype": _s("of the elements"),
        "ranks": _i("R"),
        "nodes": _i("N", 1),
        "message_size_bytes": _i(
            "all_reduce and alltoall: buffer of one rank; all_gather: what a rank holds afterwards;"
            " reduce_scatter: what it holds before; p2p: what is sent"
        ),
        "algorithm": _s("flat or two_level", "flat"),
        "distribution": _s(
            "of an alltoall's splits: even, uneven (the profiler's own skewed matrix of what rank sends to rank) or"
            " trace:HASH (a trace's matrix)",
            "even",
            ("even", "uneven", "trace:HASH"),
        ),
    },
    "attention": {
        "kind": _s("gqa or mla"),
        "phase": _s("prefill or decode"),
        "scope": _s("kernel (attention alone) or module (with its projections)", "kernel"),
        "batch": _i("sequences"),
        "query_tokens": _i("new tokens per sequence"),
        "context_tokens": _i("tokens per sequence that keys and values cover, the new ones included"),
        "heads": _i("query heads on this rank"),
        "kv_heads": _i("key-value heads on this rank"),
        "head_dim": _i("per head; mla: of the value heads"),
        "window": _i("sliding window in tokens; 0: none", 0),
        "dtype": _s("of the arithmetic"),
        "kv_dtype": _s("of the KV cache"),
        "gemm_dtype": _s("module: of the projections' weights", ""),
        "direction": _s("forward or backward", "forward", DIRECTIONS),
    },
    "gemm": {
        "m": _i("rows of the activations: tokens"),
        "n": _i("columns of the weights"),
        "k": _i("inner size"),
        "batch": _i("independent products in one call", 1),
        "dtype": _s(_DTYPE),
        "direction": _s("forward or backward", "forward", DIRECTIONS),
    },
    "elementwise": {
        "op": _s("router, permute, unpermute, norm, embedding, head, activation, optimizer or empty_launch"),
        "tokens": _i("T on this rank; of an optimizer step: rows of H parameters"),
        "hidden": _i("H"),
        "num_experts": _i("E; 0: does not apply", 0),
        "top_k": _i("K; 0: does not apply", 0),
        "dtype": _s(_DTYPE),
        "direction": _s("forward or backward", "forward", DIRECTIONS),
    },
    "memory": {
        "op": _s("device_copy, host_to_device, device_to_host or allocate"),
        "host_memory": _s("pinned, pageable, or empty for copies inside the device", ""),
        "message_size_bytes": _i("bytes moved or allocated"),
        "overlapped": _i("1: while compute ran beside it", 0),
    },
}


def columns_of(table: str) -> dict[str, Column]:
    """All columns of a table, its own first."""
    return {**TABLES[table], **COMMON}


_FLAGS: dict[str, tuple[str, dict[str, str]]] = {
    "experts": (
        "experts",
        {
            "hidden": "--hidden",
            "inter": "--inter",
            "num_experts": "--experts",
            "top_k": "--top-k",
            "ep": "--ep",
            "tp": "--tp",
            "dtype": "--dtype",
        },
    ),
    "alltoall": ("collectives", {"hidden": "--hidden", "top_k": "--top-k", "num_experts": "--experts"}),
    "collectives": ("collectives", {"op": "--op", "dtype": "--dtype"}),
    "attention": (
        "attention",
        {"heads": "--heads", "kv_heads": "--kv-heads", "head_dim": "--head-dim", "dtype": "--dtype"},
    ),
    "gemm": ("dense", {"n": "--n", "k": "--k", "dtype": "--dtype"}),
    "elementwise": ("dense", {"hidden": "--hidden", "num_experts": "--experts", "dtype": "--dtype"}),
    "memory": ("memory", {}),
}


def measure_command(table: str, region: Mapping[str, Any]) -> str:
    """The command that measures a region of a table on the machine at hand; of a number format that no kernel here
    has, the import of the public tables.

    ``region`` holds columns, and besides them: ``model``, a name or file in place of sizes; ``ranks_per_node``;
    ``system``, the name of the public tables; ``out``, the profile to add to, and ``threads``, those it was measured
    with. Words in capitals are for the reader to fill in.
    """
    subcommand, flags = _FLAGS[table]
    if "model" in region:
        flags = {"model": "--model", "tp": "--tp", "dtype": "--dtype"}
    given = {column: region[column] for column in flags if column in region}
    if "dtype" in given:
        formats = [given["dtype"]] if isinstance(given["dtype"], str) else list(given["dtype"])
        able = [name for name in formats if name in DTYPE_BYTES and name != "fp4"]
        if not able:
            system = f" --systems {region['system']}" if "system" in region else ""
            return (
                f"no kernel of moeplan profile has {' or '.join(formats)}, import the public tables where they have:"
                f" moeplan profile import-aic{system} --out DIR"
            )
        given["dtype"] = able[0]
    prefix = "moeplan"
    if subcommand == "collectives":
        nodes = region.get("nodes", 1)
        prefix = f"torchrun --nproc-per-node {region.get('ranks_per_node', 'RANKS')} -m moeplan"
        if nodes > 1:  # run on every node; HOST is one of them
            prefix = prefix.replace(" ", f" --nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 ", 1)
    options = [f"{flags[c]} {v}" for c, v in given.items()]
    if "threads" in region and subcommand != "collectives":  # a rank of an exchange has one
        options.append(f"--threads {region['threads']}")
    options.append(f"--out {region.get('out', 'DIR')}")
    return " ".join([prefix, "profile", subcommand, *options])


def schema_document() -> dict[str, Any]:
    """The table schemas as one JSON-able object: what ``docs/reference/profile-tables.json`` holds."""
    return {
        table: {
            name: {
                "type": {"str": "string", "int": "integer", "float": "number"}[column.kind],
                "meaning": column.meaning,
                "required": column.default is None,
                **({} if column.least is None else {"minimum": column.least}),
                **({"pattern": column.pattern} if column.words else {}),
                **({} if column.default is None or column.default != column.default else {"default": column.default}),
            }
            for name, column in columns_of(table).items()
        }
        for table in TABLES
    }
