"""Measuring a machine: from what is asked to a profile directory."""

from __future__ import annotations

import datetime
import os
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moeplan.artifacts.profile import PROFILE_PLACE, HardwareProfile, ProfileMeta, Source
from moeplan.artifacts.profile_tables import MEASURED, TABLES, columns_of
from moeplan.errors import InputError, ProfileError, SpecError
from moeplan.files import require_place
from moeplan.pipeline.profile_request import PARTS, PRESETS, ProfileRequest, Sizes, profile_request
from moeplan.profiling.journal import Journal, point_key
from moeplan.profiling.protocol import Bench, CpuTimer, CudaTimer, Rig, run_benches, statistics
from moeplan.progress import Progress, no_progress
from moeplan.specs.attention_layers import attention_layers
from moeplan.specs.model import AttentionSpec, ModelSpec
from moeplan.specs.models import find_model

__all__ = ["PARTS", "PRESETS", "ProfileRequest", "Sizes", "measure_profile", "profile_request"]

_PLAIN = ("fp32", "bf16", "fp16")  # types that arithmetic other than products is done in
_OR = "or --model, or a --preset"
_MOST_SENT = 1024  # tokens per rank of an exchange
_PROTOCOL = (
    "Warm-up, then shuffled passes over all cases of a group with rotating buffers of random data; median of"
    " all samples, none dropped; grid refined where interpolation errs. See docs/guides/profiling.md."
)


def _models(request: ProfileRequest) -> list[ModelSpec]:
    """The models named, or one of the explicit sizes."""
    if request.models:
        return [find_model(name) for name in request.models]
    s = request.sizes
    if not (s.hidden or s.heads):
        return []
    attention = {"num_heads": s.heads, "num_kv_heads": s.kv_heads or s.heads, "head_dim": s.head_dim or 128}
    return [
        ModelSpec.parse(
            {
                "name": "sizes",
                "num_layers": 1,
                "moe_layer_ids": [0],
                "hidden_size": s.hidden or s.heads * (s.head_dim or 128),
                "num_experts": s.experts or 1,
                "top_k": s.top_k or 1,
                "expert_intermediate_size": s.inter or 1,
                "vocab_size": 32768,
                "attention": attention if s.heads else None,
            },
            "sizes",
        )
    ]


def _expert_benches(request: ProfileRequest, device: Any, models: list[ModelSpec], notes: list[str]) -> list[Bench]:
    from moeplan.profiling.expert_kernels import weight_bytes
    from moeplan.profiling.experts import ExpertShape, expert_bench

    made: dict[Any, list[Bench]] = {}
    benches = []
    models = [model for model in models if model.expert_intermediate_size > 1]
    if not models:
        notes.append(f"experts: not measured, they need --hidden, --inter, --experts and --top-k, {_OR}")
        return []
    dtypes = [dtype for dtype in request.dtypes if _made(f"experts in {dtype}", partial(device.dtype, dtype), notes)]
    for model in models:
        if not model.gated_ffn:
            notes.append(f"experts of {model.name}: not gated (SwiGLU), the only form measured here")
            continue
        for dtype in dtypes:
            kernels = request.kernels or (("loop",) if dtype in ("int8", "int4") else ("grouped_mm",))
            own = _directions(request, dtype in _PLAIN)
            held = 1.25 * (2 if "backward" in own else 1)  # weights, their gradients, and room for tokens
            for tp in request.tp:
                for asked in request.ep:
                    ep = asked
                    hidden, inter = model.routed_hidden_size, model.expert_intermediate_size
                    cuts = (("num_experts", model.num_experts, "--ep", ep), ("inter", inter, "--tp", tp))
                    odd = [
                        f"experts of {model.name}: not measured, {what} ({size}) must divide by {option} ({by}); give"
                        f" another {option}"
                        for what, size, option, by in cuts
                        if size % by
                    ]
                    if odd:
                        notes += [note for note in odd if note not in notes]
                        continue
                    while (
                        model.num_experts % (2 * ep) == 0
                        and held * weight_bytes(model.num_experts // ep, hidden, inter // tp, dtype) > device.free_bytes
                    ):
                        ep *= 2
                    shape = ExpertShape(hidden, inter, model.num_experts, model.top_k, ep, tp)
                    if (shape, dtype) not in made:
                        make = partial(
                            expert_bench, device, shape, dtype, kernels, own, request.max_tokens, request.seed
                        )
                        made[shape, dtype] = _made(f"experts of {model.name} in {dtype}", make, notes)
                        benches += made[shape, dtype]
                    if ep != asked and made[shape, dtype]:
                        notes.append(
                            f"experts of {model.name} {dtype}: ep {asked} does not fit into memory, measured at ep {ep}"
                        )
    return benches


def _directions(request: ProfileRequest, differentiable: bool) -> tuple[str, ...]:
    """Those asked for; forward alone where a type has no gradient, unless nothing but backward is asked for."""
    return request.directions if differentiable or "forward" not in request.directions else ("forward",)


def _made(what: str, make: Callable[[], Bench], notes: list[str]) -> list[Bench]:
    """The bench, or none and a note why it cannot be."""
    try:
        return [make()]
    except SpecError as error:
        note = f"{what}: not measured, {error}"
        notes += [note] if note not in notes else []
        return []


def _plain(what: str, request: ProfileRequest, notes: list[str]) -> list[str]:
    """The types asked for that ``what`` is measured in, bf16 where there is none; a note names the others."""
    plain = [dtype for dtype in request.dtypes if dtype in _PLAIN]
    if others := [dtype for dtype in request.dtypes if dtype not in _PLAIN]:
        notes.append(f"{what} in {', '.join(others)}: not measured" + ("" if plain else ", bf16 in their place"))
    return plain or ["bf16"]


def _attention_benches(request: ProfileRequest, device: Any, models: list[ModelSpec], notes: list[str]) -> list[Bench]:
    from moeplan.profiling.attention import attention_bench

    if request.models:
        notes += [f"attention of {m.name}: this form is not measured" for m in models if m.attention is None]
    windows: dict[AttentionSpec, set[int]] = {}  # of the layers of a form; 0: none
    for model in models:
        if form := model.attention:
            own = {part.window for part in attention_layers(model) if part.spec == form}
            windows.setdefault(form, {0, *request.windows}).update(own)
    if not windows:
        if not request.models:
            notes.append(f"attention: not measured, it needs --heads, --kv-heads and --head-dim, {_OR}")
        return []
    plain = _plain("attention", request, notes)
    return [
        bench
        for form, own in windows.items()
        for dtype in plain
        for tp in request.tp
        for bench in _made(
            f"attention of {form.num_heads} heads in {dtype}",
            partial(attention_bench, device, form, dtype, tp, request.directions, request.max_tokens, sorted(own)),
            notes,
        )
    ]


def _dense_benches(request: ProfileRequest, device: Any, models: list[ModelSpec], notes: list[str]) -> list[Bench]:
    from moeplan.profiling.dense import elementwise_bench, gemm_bench, gemm_shapes, optimizer_bench

    sizes = request.sizes
    shapes = [(sizes.n, sizes.k)] if sizes.n and sizes.k else []
    shapes += [shape for m in models for tp in request.tp for shape in gemm_shapes(m, tp)]
    if not shapes:
        notes.append(f"dense: not measured, it needs --n and --k, --hidden, {_OR}")
        return []
    shapes = list(dict.fromkeys(shapes))
    benches = []
    for dtype in request.dtypes:
        own = _directions(request, dtype != "fp8")
        for start in range(0, len(shapes), 8):  # weights of a few shapes at a time, so that they fit
            make = partial(gemm_bench, device, shapes[start : start + 8], dtype, own, request.max_tokens)
            benches += _made(f"dense products in {dtype}", make, notes)
    keys = sorted(
        {(m.hidden_size, m.expert_intermediate_size, m.num_experts, m.top_k, m.routed_hidden_size) for m in models}
    )
    if keys:
        plain = _plain("passes over tokens (router, norms, ...)", request, notes)
        benches += [
            bench
            for key in keys
            for dtype in plain
            for bench in _made(
                f"passes over tokens in {dtype}",
                partial(elementwise_bench, device, *key[:4], dtype, request.max_tokens, request.directions, key[4]),
                notes,
            )
        ]
    if "backward" in request.directions:
        benches += [optimizer_bench(device, hidden) for hidden in sorted({key[0] for key in keys})]
    return benches


def _exchange(request: ProfileRequest, models: list[ModelSpec], world: int, notes: list[str]) -> Any:
    from moeplan.profiling.collectives import OPS, Exchange

    ops = request.ops or OPS
    if request.trace and "alltoall" not in ops:
        raise SpecError(f"trace ({request.trace}) shapes alltoall, which --op ({', '.join(ops)}) leaves out; add it")
    dtype, *others = _plain("collectives", request, notes)
    if others:
        notes.append(f"collectives in {', '.join(others)}: not measured, {dtype} in their place")
    layers = {model.name: (model.routed_hidden_size, model.top_k, model.num_experts) for model in models}
    tokens = tuple(dict.fromkeys(layer for layer in layers.values() if layer[2] > 1)) if "alltoall" in ops else ()
    what = "dispatch and combine of tokens"
    if "alltoall" not in ops and layers:
        notes.append(f"{what}: not measured, they need alltoall in --op")
    elif layers and not tokens:
        notes.append(f"{what}: not measured, they need --hidden, --experts and --top-k, or --model")
    if tokens and request.max_tokens > _MOST_SENT:
        notes.append(f"{what}: tokens per rank from {_MOST_SENT + 1:,} to {request.max_tokens:,} are not measured")
    return Exchange(
        ops=ops,
        dtype=dtype,
        max_bytes=request.max_bytes,
        weight_RR=_traffic(Path(request.trace), world) if request.trace else None,
        tokens=tokens,
        max_tokens=min(request.max_tokens, _MOST_SENT),
    )


def _traffic(path: Path, world: int) -> tuple[tuple[float, ...], ...]:
    """Pairs from rank to rank in a trace's middle layer, experts and tokens in contiguous blocks."""
    from moeplan.artifacts.routing_trace import RoutingTrace
    from moeplan.routing.io import read_trace

    trace = read_trace(path)
    if not isinstance(trace, RoutingTrace):
        raise SpecError(f"trace ({path}) holds counts only; a traffic matrix needs the choice of each token")
    chosen_TK = trace.experts_TLK[:, trace.num_layers // 2]
    home_T = np.arange(len(chosen_TK)) * world // len(chosen_TK)
    weight_RR = np.zeros((world, world))
    valid = chosen_TK >= 0
    np.add.at(
        weight_RR,
        (np.repeat(home_T, chosen_TK.shape[1])[valid.ravel()], chosen_TK[valid] * world // trace.num_experts),
        1.0,
    )
    return tuple(map(tuple, weight_RR.tolist()))


def measure_profile(
    request: ProfileRequest, out: Path, resume: bool = False, progress: Progress = no_progress
) -> dict[str, Any]:
    """Measure and write (or extend) the profile directory ``out``; what was measured, as JSON values.

    Points go to ``<out>.journal.jsonl`` as they are measured; it is removed once they stand in the profile.

    Raises:
        SpecError: the device cannot, sizes are missing, or ``out`` holds something else; InputError: ``out`` cannot
            be replaced; ProfileError: an interrupted run's journal is there and ``resume`` is false, or it is of
            another command (only the budget may differ), ``out`` is corrupt, of another device or of other threads,
            a rank died, nothing was measured, or the profile cannot be written.
        MissingExtraError: torch is not installed.
    """
    from moeplan.profiling import system
    from moeplan.profiling.device import find_device, pinned
    from moeplan.profiling.ranks import under_torchrun

    place = require_place(out, *PROFILE_PLACE)
    device = find_device(request.device)
    first = not under_torchrun() or os.environ["RANK"] == "0"
    facts: dict[str, float | str] = {}
    notes: list[str] = []
    with pinned(device.torch, request.threads, request.realtime) as cores:
        name, versions = system.device_name(device), system.libraries(device)
        threads = device.torch.get_num_threads()
        if not device.is_cuda and set(request.parts) - {"system", "collectives"}:
            facts["threads"] = float(threads)
        _require_extendable(place, name, versions, facts)
        header = {"device": name, "libraries": versions, "threads": threads, "command": request.task}
        journal = Journal(place.with_name(place.name + ".journal.jsonl") if first else None, header, resume)
        clock = system.CpuClock()
        try:
            _measure(request, device, journal, facts, notes, progress, cores)
        except KeyboardInterrupt as stop:
            if not journal.points or journal.path is None:
                raise
            raise KeyboardInterrupt(journal.kept) from stop
        finally:
            journal.close()
        # Under torchrun the other ranks are no children of this process.
        if not under_torchrun() and (share := clock.foreign_share()) is not None:
            facts["foreign_cpu_share"] = round(share, 3)
        facts["realtime"] = float(request.realtime)
    if not first:
        return {}
    try:
        profile = _save(request, place, journal, device, facts, notes)
    except InputError as error:
        raise ProfileError("; ".join(filter(None, (str(error), journal.kept)))) from error
    journal.close(remove=True)
    return {
        "out": str(out),
        "device": name,
        "points": len(journal.points),
        "resumed_points": journal.resumed,
        "rows": {table: entry.rows for table, entry in profile.meta.tables.items()},
        "left_out": notes,
        "warnings": profile.warnings,
        "system": facts,
        "median_spread": _median_spread(journal),
        "single_samples": sum(len(samples) == 1 for _, _, samples in journal.points.values()),
    }


def _measure(
    request: ProfileRequest,
    device: Any,
    journal: Journal,
    facts: dict[str, float | str],
    notes: list[str],
    progress: Progress,
    affinity: set[int],
) -> None:
    from moeplan.profiling import ranks, system
    from moeplan.profiling.memory import memory_bench

    models = _models(request)
    exchange = "collectives" in request.parts
    launched = ranks.under_torchrun()
    world = int(os.environ["WORLD_SIZE"]) if launched else request.ranks
    if launched and request.parts != ("collectives",):
        raise SpecError("under torchrun only 'moeplan profile collectives' makes sense; run the rest as one process")
    if launched and request.ranks not in (0, world):
        raise SpecError(f"ranks ({request.ranks}) is not what torchrun started ({world}); give --ranks {world}")
    if exchange and not launched and world < 2:
        if request.parts == ("collectives",):
            raise SpecError("collectives need --ranks N of at least 2, or torchrun; one rank has nobody to talk to")
        notes.append("collectives: not measured, they need --ranks N or torchrun")
        exchange = False
    # Benches first: what the device cannot do is refused before time is spent.
    benches: list[Bench] = []
    if "memory" in request.parts:
        benches.append(memory_bench(device, 2**30 if device.is_cuda else 2**26))
    layers = (("experts", _expert_benches), ("attention", _attention_benches), ("dense", _dense_benches))
    made = {part: of_part(request, device, models, notes) for part, of_part in layers if part in request.parts}
    # Attention last: fused kernels of a GPU plan every new shape, and the others leave time for that.
    benches += [bench for part in ("experts", "dense", "attention") for bench in made.get(part, ())]
    if not benches and not {"system", "collectives"} & set(request.parts):
        raise SpecError("; ".join(notes))
    if exchange:
        ranks.require_whole_nodes(world, request.ranks_per_node)
    what = _exchange(request, models, world, notes) if exchange else None
    split = 0.75 if exchange and benches else float(bool(benches))  # of the budget: benches, then exchanges
    if "system" in request.parts:
        facts.update(system.system_facts(device))
    if benches or "system" in request.parts:
        timer = CudaTimer() if device.is_cuda else CpuTimer()  # a GPU's clock has risen when its timer is there
    if "system" in request.parts:
        facts.update(system.measure_launch(device, journal))
    if benches:
        rig = Rig(timer, journal, random.Random(request.seed))
        run_benches(benches, rig, split * request.budget_s, lambda what, done: progress(what, split * done))
        notes += rig.left_out
    if what:
        os.sched_setaffinity(0, affinity)  # ranks take all cores in turn
        rest_s = (1 - split) * request.budget_s
        job = ranks.Job(what, request.device, rest_s, request.seed, request.ranks_per_node)

        def report(doing: str, done: float) -> None:
            progress(doing, split + (1 - split) * done)

        if launched:
            notes += ranks.run_torchrun_rank(job, journal, report)
        else:
            notes += ranks.run_local_ranks(job, world, journal, report)


def _median_spread(journal: Journal) -> float | None:
    spreads = [statistics(samples)["spread"] for _, _, samples in journal.points.values() if len(samples) > 1]
    return round(float(np.median(spreads)), 4) if spreads else None


def _require_extendable(out: Path, device: str, versions: dict[str, str], facts: Mapping[str, float | str]) -> None:
    """Before time is spent: a profile that is there can be read whole, and is of the same setup."""
    if not (out / "profile.json").exists():
        return
    old = HardwareProfile.open(out)
    for table in old.table_names:
        old.table(table)
    there: dict[str, Any] = {"device": old.meta.device, "libraries": old.meta.libraries}
    here: dict[str, Any] = {"device": device, "libraries": versions}
    if "threads" in old.meta.system and "threads" in facts:
        there["threads"], here["threads"] = old.meta.system["threads"], facts["threads"]
    for what in there:
        if there[what] != here[what]:
            raise ProfileError(
                f"{out}: {what} ({there[what]}) of the profile there is not this run's ({here[what]}); one profile is"
                " one machine, one set of versions and one number of --threads: choose another --out"
            )


def _rows(table: str, rows: list[dict[str, Any]]) -> pa.Table:
    schema = columns_of(table)
    return pa.table({c: [row.get(c, spec.default) for row in rows] for c, spec in schema.items()})


def _point(table: str, row: dict[str, Any]) -> str:
    return point_key(table, {c: row[c] for c in columns_of(table) if c not in (*MEASURED, "source", "mark")})


def _save(
    request: ProfileRequest,
    out: Path,
    journal: Journal,
    device: Any,
    facts: dict[str, float | str],
    notes: list[str],
) -> HardwareProfile:
    from moeplan.profiling import system

    if not journal.points:
        raise ProfileError(
            f"nothing was measured; {'; '.join(notes) or 'nothing of what was asked applies here'}; change what these"
            " name, or give a larger --budget"
        )
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    versions = system.libraries(device)
    name = system.device_name(device)
    key = f"moeplan-{date}"
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    old = HardwareProfile.open(out) if (out / "profile.json").exists() else None
    for table in old.table_names if old else ():
        for row in old.table(table).to_pylist() if old else ():
            rows.setdefault(table, {})[_point(table, row)] = row
    for table, row, samples in journal.points.values():
        full = {c: row.get(c, spec.default) for c, spec in columns_of(table).items()}
        full |= {**statistics(samples), "source": key, "mark": ""}
        rows.setdefault(table, {})[_point(table, full)] = full
    source = Source(
        kind="measured",
        title="moeplan profile",
        version=f"torch {versions['torch']}",
        device=name,
        date=date,
        note=_PROTOCOL,
    )
    commands = [request.command]
    if old and old.meta.command not in commands:
        commands = [c for c in old.meta.command.split(" && ") if c != request.command] + commands
    facts_before = old.meta.system if old else {}
    shares = [of["foreign_cpu_share"] for of in (facts_before, facts) if "foreign_cpu_share" in of]
    meta = ProfileMeta(
        name=out.name,
        accelerator=system.accelerator_name(device),
        device=name,
        driver=system.driver_version(device),
        libraries=versions,
        date=date,
        command=" && ".join(commands),
        note=old.meta.note if old else "",
        left_out=list(dict.fromkeys([*(old.meta.left_out if old else ()), *notes])),
        sources={**(old.meta.sources if old else {}), key: source},
        system={**facts_before, **facts, **({"foreign_cpu_share": max(shares)} if shares else {})},
    )
    tables = {table: _rows(table, list(rows[table].values())) for table in TABLES if rows.get(table)}
    return HardwareProfile(meta, tables).save(out)
