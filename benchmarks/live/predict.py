"""Predicted seconds of a step from what was calibrated in the same run, by the project's own costs.

The measured tables (balanced experts, balanced exchange) go into a hardware profile; :class:`StepModel` gives each
layer's exchange and each rank's experts under any placement and load, here from the exact tokens of the step. Two
things are of this emulation and not of the model: several ranks share a core, and calls that are timed one by one
wait for the slowest rank each time. So a core takes as long as its ranks together (each was calibrated while the
others ran, so: their mean), and whole balanced layers, timed too, give what the sum of the parts is off by.

``L`` layers, ``R`` ranks, ``E`` experts, ``b`` batch sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from routing import Shape, load_of

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import HardwareProfile, ProfileMeta, Source
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs.step import StepModel
from moeplan.costs.technique import Technique
from moeplan.costs.traffic import counted_traffic
from moeplan.errors import SpecError
from moeplan.specs.cluster import AcceleratorSpec, ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.workload import DispatchKind, Workload

__all__ = ["Calibration", "Machine", "balanced", "cluster_of", "model_of", "predict"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Machine:
    """Ranks in nodes on this machine, and which core each rank has; link in bytes per second, None: no limit."""

    nodes: int
    per_node: int
    core_R: tuple[int, ...]
    link: float | None = None

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rows of profile tables with ``latency_us``, and seconds of a whole balanced layer by tokens per rank."""

    experts: Sequence[Mapping[str, Any]]
    alltoall: Sequence[Mapping[str, Any]]
    layer_s: Mapping[int, float]

    def profile(self) -> HardwareProfile:
        """The hardware profile that these rows make."""
        meta = ProfileMeta(
            name="live", accelerator="core", date=datetime.now(UTC).date().isoformat(),
            command="python benchmarks/live/run.py", sources={"live": Source(kind="measured", title="this run")},
        )  # fmt: skip
        common = {"backend": "moeplan", "source": "live"}
        tables = {"experts": self.experts, "alltoall": self.alltoall}
        return HardwareProfile(meta, {n: pa.Table.from_pylist([{**common, **r} for r in t]) for n, t in tables.items()})


def model_of(shape: Shape) -> ModelSpec:
    return ModelSpec(
        name=shape.name, num_layers=shape.layers, moe_layer_ids=tuple(range(shape.layers)), hidden_size=shape.hidden,
        num_experts=shape.experts, top_k=shape.top_k, expert_intermediate_size=shape.inter, vocab_size=256,
    )  # fmt: skip


def cluster_of(machine: Machine) -> ClusterSpec:
    """This machine as a cluster; its data sheet stands in only where nothing was calibrated: nowhere here."""
    core = AcceleratorSpec(
        name="core", memory="4 GiB", memory_bandwidth="10 GB/s", bf16="50 GFLOPS", scale_up_bandwidth="1 GB/s",
        scale_up_domain=machine.per_node, nic_bandwidth=f"{(machine.link or 1e9) / machine.per_node:.0f} B/s",
    )  # fmt: skip
    return ClusterSpec(accelerator=core, num_nodes=machine.nodes, ranks_per_node=machine.per_node, nics_per_node=1)


def balanced(shape: Shape, ranks: int, tokens_per_rank: int) -> RoutingTrace:
    """Every rank's tokens over all experts alike."""
    rng = np.random.default_rng(0)
    home_T = np.repeat(np.arange(ranks), tokens_per_rank).astype(np.int32)
    rows = []
    for _ in range(shape.layers * ranks):
        first_T = rng.permutation(tokens_per_rank) * shape.top_k
        offset = rng.integers(shape.experts)
        rows.append((first_T[:, None] + np.arange(shape.top_k) + offset) % shape.experts)
    spread = rng.permutation(shape.experts)  # neighbours in number are not neighbours in place
    experts = spread[np.stack(rows)].reshape(shape.layers, ranks * tokens_per_rank, shape.top_k).transpose(1, 0, 2)
    return RoutingTrace(experts.astype(np.int32), shape.experts, tuple(range(shape.layers)), source_rank_T=home_T)


def _parts_s(
    shape: Shape, machine: Machine, profile: HardwareProfile, dispatch: DispatchKind, trace: RoutingTrace,
    placement: Placement,
) -> float:  # fmt: skip
    """Exchange and experts of all layers for the tokens of ``trace``, one step."""
    load, cluster = load_of(trace), cluster_of(machine)
    workload = Workload(
        phase="prefill", batch_per_rank=trace.num_tokens // machine.ranks, weight_dtype="fp32", activation_dtype="fp32"
    )
    step = StepModel(model_of(shape), cluster, workload, Technique(dispatch=dispatch), profile)
    found = step.step(placement, load.load_LE, counted_traffic(load, placement, cluster, dispatch))
    other = {what: source for what, source in found.source.items() if what.startswith("exchange")}
    if odd := [f"{what}: {source}" for what, source in other.items() if not source.startswith("measured")]:
        raise SpecError(f"the exchanges calibrated are not those of {dispatch}: {'; '.join(odd)}")
    cores = np.array(machine.core_R)
    core_LC = np.stack([found.expert_s_LR[:, cores == core].mean(1) for core in np.unique(cores)], 1)
    return float(found.exchange_s_L.sum() + core_LC.max(1).sum())


def predict(
    shape: Shape,
    machine: Machine,
    calibration: Calibration,
    dispatch: DispatchKind,
    cases: Sequence[tuple[RoutingTrace, Placement]],
    even: Placement,
) -> list[float]:
    """Seconds of a step of each case; ``even`` is the placement of the balanced layers that were timed."""
    profile = calibration.profile()
    batches = sorted(calibration.layer_s)
    off_b = [
        calibration.layer_s[b]
        - _parts_s(shape, machine, profile, dispatch, balanced(shape, machine.ranks, b), even) / shape.layers
        for b in batches
    ]
    seconds = []
    for trace, placement in cases:
        off = float(np.interp(trace.num_tokens / machine.ranks, batches, off_b))
        parts = _parts_s(shape, machine, profile, dispatch, trace, placement)
        seconds.append(parts + off * shape.layers)
    return seconds
