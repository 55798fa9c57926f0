"""From the public measured tables to profile directories."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from moeplan.artifacts.profile import PROFILE_PLACE, HardwareProfile, ProfileMeta, Source
from moeplan.artifacts.profile_tables import MISMEASURED
from moeplan.errors import UnknownNameError
from moeplan.files import require_place
from moeplan.pipeline.profile_request import MAIN_MODELS
from moeplan.profiling import aic
from moeplan.profiling.sanity import group_ids, mark_host_bound, mark_rows, too_fast
from moeplan.progress import Progress, no_progress
from moeplan.specs.clusters import find_accelerator
from moeplan.specs.model import ModelSpec
from moeplan.specs.models import find_model

__all__ = ["MAIN_SYSTEMS", "full_profile", "import_aic", "read_system"]

MAIN_SYSTEMS = ("a100_sxm", "b200_sxm", "gb200", "h100_sxm", "h200_sxm")
# Rows of activations that the shipped GEMM tables keep, two fifths of all: powers of two, one and a half times them
# where all kernels were measured (not 384), and one row more, where another tile begins.
_GEMM_M = tuple(
    sorted({2**i for i in range(16)} | {3 * 2**i for i in (4, 5, 6, 8, 9, 10)} | {2**i + 1 for i in range(5, 13)})
)


def _copies(root: Path) -> dict[Path, str]:
    """File -> the first system that has the same numbers, for files of the other systems."""
    first: dict[tuple[str, str], str] = {}
    copies = {}
    for system in aic.systems(root):
        for file in aic.files_of(root, system):
            owner = first.setdefault((file.kind, aic.fingerprint(aic.read_rows(file))), system)
            if owner != system:
                copies[file.path] = owner
    return copies


def _merge_repeats(table: pa.Table) -> tuple[pa.Table, int]:
    """One row per point: the median of repeated ones, their range as the spread."""
    ids = group_ids(table, [name for name in table.column_names if name not in ("latency_us", "spread")])
    counts = np.bincount(ids)
    if counts.max(initial=1) == 1:
        return table, 0
    order = np.argsort(ids, kind="stable")
    latency = table["latency_us"].to_numpy().copy()
    spread = np.full(len(latency), np.nan)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    for start, count in zip(starts[counts > 1], counts[counts > 1], strict=True):
        rows = order[start : start + count]
        middle = np.median(latency[rows])
        spread[rows[0]] = np.ptp(latency[rows]) / middle
        latency[rows[0]] = middle
    kept = np.sort(order[starts])
    merged = table.set_column(table.column_names.index("latency_us"), "latency_us", pa.array(latency))
    return merged.append_column("spread", pa.array(spread)).take(pa.array(kept)), len(ids) - len(counts)


def _version_key(version: str) -> list[int]:
    """Numbers of a version such as 1.3.0rc20 in order; a release candidate comes before the next number."""
    return [int(number) for number in re.findall(r"\d+", version)]


def _newest(files: Iterable[aic.AicFile]) -> list[aic.AicFile]:
    """Of each kind the newest version of a framework; of DeepEP and MoE all: they cover different shapes."""
    best: dict[tuple[str, str], aic.AicFile] = {}
    several = []
    for file in files:
        if file.kind.startswith("wideep_deepep") or file.kind == "moe":
            several.append(file)
            continue
        key = (file.framework, file.kind)
        if key not in best or _version_key(file.version) > _version_key(best[key].version):
            best[key] = file
    return [*best.values(), *several]


def _subset(name: str, table: pa.Table, models: list[ModelSpec]) -> pa.Table:
    """Rows the main models need."""
    if name == "experts":
        keys = {(m.routed_hidden_size, m.expert_intermediate_size, m.num_experts, m.top_k) for m in models}
        shape = zip(*(table[c].to_pylist() for c in ("hidden", "inter", "num_experts", "top_k")), strict=True)
        return table.filter(pa.array([key in keys for key in shape], pa.bool_()))
    if name == "attention":
        heads = {
            (
                "mla" if a.is_mla else "gqa",
                a.num_heads // tp,
                1 if a.is_mla else max(1, a.num_kv_heads // tp),
                a.head_dim,
            )
            for a in (m.attention for m in models if m.attention)
            for tp in (1, 2, 4, 8)
        }
        shape = zip(*(table[c].to_pylist() for c in ("kind", "heads", "kv_heads", "head_dim")), strict=True)
        return table.filter(pa.array([key in heads or key[0] not in ("gqa", "mla") for key in shape], pa.bool_()))
    if name == "gemm":
        return table.filter(pc.is_in(table["m"], value_set=pa.array(_GEMM_M, type=table.schema.field("m").type)))
    return table


def _newest_per_shape(table: pa.Table, sources: dict[str, Source]) -> pa.Table:
    """Rows of the newest version that measured a shape and not something else, per framework and kind of file."""
    columns = ("backend", "scope", "hidden", "inter", "num_experts", "dtype", "source")
    rows = list(zip(*(table[column].to_pylist() for column in columns), strict=True))
    keys = [(*row[:-1], row[-1].rsplit("/", 1)[1]) for row in rows]
    newest: dict[Any, tuple[bool, list[int]]] = {}
    for key, row, mark in zip(keys, rows, table["mark"].to_pylist(), strict=True):
        this = mark not in MISMEASURED, _version_key(sources[row[-1]].version)
        newest[key] = max(newest.get(key, (False, [])), this)
    keep = [newest[key][1] == _version_key(sources[row[-1]].version) for key, row in zip(keys, rows, strict=True)]
    return table.filter(pa.array(keep))


def read_system(
    root: Path, system: str, copies: dict[Path, str], models: Sequence[ModelSpec] = (), hybrid: bool = False
) -> tuple[dict[str, pa.Table], dict[str, Source], dict[str, dict[str, int]]]:
    """(tables with marks, their sources, table -> reason -> rows set aside) of one system.

    ``models``: only the rows that these need; ``hybrid``: linear and sparse attention too.
    """
    subset = bool(models)
    pieces: dict[str, list[pa.Table]] = {}
    sources: dict[str, Source] = {}
    rejected: dict[str, Counter[str]] = {}
    files = list(aic.files_of(root, system, hybrid))
    bandwidth = float(_machine(root, system)["memory_bandwidth_bytes_per_s"])
    for file in _newest(files) if subset else files:
        rows = aic.read_rows(file)
        device = str(rows["device"][0].as_py()) if "device" in rows.column_names else ""
        owner = copies.get(file.path)
        note = f"same numbers as in {owner}: one of the two was not measured" if owner else ""
        sources[file.source_id] = file.source(device, note)
        for name, table in aic.convert(rows, file):
            count = rejected.setdefault(name, Counter())
            count["no_latency"] += rows.num_rows - table.num_rows
            if subset:
                table = _subset(name, table, list(models))
            table, repeats = _merge_repeats(table)
            count["repeated"] += repeats
            marked = HardwareProfile(_bare(system), {name: table}).table(name)
            marks = mark_rows(name, marked)
            if name in ("experts", "attention"):
                marks = np.where(too_fast(name, marked, bandwidth), "too_fast", marks)
            if name == "experts":
                marks = np.where(aic.regrouped(marked, file), "regrouped", marks)
            marks = np.where(marks == "", "copied" if owner else "", marks)
            index = marked.column_names.index("mark")
            pieces.setdefault(name, []).append(marked.set_column(index, "mark", pa.array(marks, pa.string())))
    tables = {name: pa.concat_tables(parts, promote_options="permissive") for name, parts in pieces.items()}
    if "gemm" in tables:
        tables["gemm"] = mark_host_bound(tables["gemm"])
    for name, table in tables.items():
        rejected[name].update(mark for mark in table["mark"].to_pylist() if mark)
    if subset:
        tables["experts"] = _newest_per_shape(tables["experts"], sources)
    return tables, sources, {name: {k: n for k, n in c.items() if n} for name, c in rejected.items()}


def _bare(name: str) -> ProfileMeta:
    return ProfileMeta(name=name, accelerator=name, date="", command="")


def _profile_name(system: str) -> str:
    return system.replace("_", "-")


def _machine(root: Path, system: str) -> dict[str, float | str]:
    """Facts of the machine that the package states beside its tables."""
    document = yaml.safe_load((root / f"{system}.yaml").read_text(encoding="utf-8"))
    gpu, node = document["gpu"], document["node"]
    return {
        "memory_bandwidth_bytes_per_s": float(gpu["mem_bw"]),
        "bf16_flops_per_s": float(gpu.get("bfloat16_tc_flops", 0)),
        "ranks_per_node": float(node["num_gpus_per_node"]),
        "nic_bandwidth_bytes_per_s": float(node["inter_node_bw"]),
        "scale_up_bandwidth_bytes_per_s": float(node["intra_node_bw"]),
    }


def full_profile(system: str) -> HardwareProfile:
    """All public rows of one system, in memory.

    Raises:
        MissingExtraError: the package is not installed; UnknownNameError: no such system.
    """
    root = aic.systems_root()
    name = aic.find_system(root, system)
    tables, sources, rejected = read_system(root, name, {})
    meta = _bare(_profile_name(name)).model_copy(update={"sources": sources, "rejected": rejected})
    return HardwareProfile(meta, tables)


def import_aic(
    systems: list[str],
    out: Path,
    subset: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write one profile directory per system under ``out``; all systems where none is named.

    Raises:
        MissingExtraError: the package is not installed; UnknownNameError: no such system; InputError: a directory
            there holds something else.
    """
    root = aic.systems_root()
    names = [aic.find_system(root, name) for name in systems] or aic.systems(root)
    for name in names:
        require_place(out / _profile_name(name), *PROFILE_PLACE)
    progress("look for copied tables", 0.0)
    copies = _copies(root)
    models = [find_model(name) for name in MAIN_MODELS] if subset else []
    answer = []
    for number, system in enumerate(names):
        progress("import", number / len(names))
        tables, sources, rejected = read_system(root, system, copies, models)
        name = _profile_name(system)
        options = f"--systems {system} --out DIR" + " --subset" * subset
        meta = ProfileMeta(
            name=name,
            accelerator=_accelerator(name),
            device=next((s.device for s in sources.values() if s.device), ""),
            libraries={"aiconfigurator-core": aic.VERSION},
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            command=f"moeplan profile import-aic {options}",
            licence=aic.LICENCE,
            note="Measured by others; imported with unit normalisation and a sanity pass. See sources.",
            sources=sources,
            system=_machine(root, system),
            rejected=rejected,
        )
        profile = HardwareProfile(meta, tables).save(out / name)
        rows = {table: entry.rows for table, entry in profile.meta.tables.items()}
        answer.append({"name": name, "path": str(out / name), "rows": rows, "rejected": rejected})
    progress("import", 1.0)
    return {"package": f"aiconfigurator-core {aic.VERSION}", "licence": aic.LICENCE, "systems": answer}


def _accelerator(name: str) -> str:
    """The registry's name of the accelerator, or the system's own."""
    for candidate in (name, name.split("-")[0], name.removesuffix("-server")):
        try:
            return find_accelerator(candidate).name
        except UnknownNameError:
            continue
    return name
