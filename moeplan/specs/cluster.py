"""The cluster: accelerators, nodes and what joins them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from moeplan.specs.base import Spec
from moeplan.units import Bytes, BytesPerSecond, FlopsPerSecond, Seconds, Watts

__all__ = ["AcceleratorSpec", "ClusterSpec", "LinkSpec", "RankSpec", "TopologyPreset"]

TopologyPreset = Literal["flat", "two-level", "rail-optimised", "nvl72", "explicit"]


class AcceleratorSpec(Spec):
    """One accelerator, by its data sheet; bandwidths are unidirectional."""

    name: str
    memory: Bytes
    memory_bandwidth: BytesPerSecond
    bf16: FlopsPerSecond = Field(description="dense, no sparsity")
    fp8: FlopsPerSecond | None = None
    fp4: FlopsPerSecond | None = None
    int8: FlopsPerSecond | None = None
    scale_up_bandwidth: BytesPerSecond = Field(description="per rank inside its NVLink-like domain, one way")
    scale_up_domain: int = Field(gt=0, description="ranks in one domain")
    nic_bandwidth: BytesPerSecond = Field(description="per rank between nodes, one way")
    ranks_per_node: int = Field(8, gt=0, description="accelerators of one box as it is usually built")
    pcie_bandwidth: BytesPerSecond | None = Field(
        None,
        description="per rank to its host, one way; joins the ranks of a node that share no scale-up domain",
    )
    multiprocessors: int | None = Field(
        None, gt=0, description="how many tiles of a product run at once; unknown: products in between are less sure"
    )
    tile_rows: int = Field(
        16, gt=0, description="tokens that one matrix instruction takes: an expert with fewer computes as many"
    )
    tdp: Watts | None = None
    source: str = ""


class RankSpec(Spec):
    """How one rank departs from the others."""

    speed: float = Field(1.0, gt=0, description="1.0: as the accelerator; 0.7: takes 1/0.7 of the time")
    link_speed: float = Field(1.0, gt=0, description="part of the links' usual bandwidth that this rank has")
    memory: Bytes | None = Field(None, description="instead of the accelerator's")
    slots: int | None = Field(None, gt=0, description="expert slots per layer, where ranks differ")
    failed: bool = False


_USUAL = RankSpec()


class LinkSpec(Spec):
    """One directed link of an explicit topology; ends are ``rank0``, ``node0`` or any switch name."""

    source: str
    target: str
    bandwidth: BytesPerSecond
    latency: Seconds
    duplex: bool = Field(True, description="whether the reverse link exists too")


class ClusterSpec(Spec):
    """Ranks in nodes. Rank ``r`` is in node ``r // ranks_per_node``."""

    name: str = "cluster"
    accelerator: AcceleratorSpec
    num_nodes: int = Field(gt=0, le=2**17)
    ranks_per_node: int = Field(gt=0, le=2**12)
    topology: TopologyPreset = "two-level"
    links: tuple[LinkSpec, ...] = Field((), description="for topology: explicit")
    nics_per_node: int | None = Field(
        None,
        gt=0,
        description="usually one a rank; fewer are shared by neighbours, each as wide as nic_bandwidth of all of them,"
        " and as slow as the slowest link_speed among them",
    )
    scale_up_latency: Seconds = "3 us"  # type: ignore[assignment]
    nic_latency: Seconds = "8 us"  # type: ignore[assignment]
    ranks: dict[int, RankSpec] = Field(default_factory=dict, description="departures, by rank number")

    @model_validator(mode="after")
    def _consistent(self) -> ClusterSpec:
        for rank in self.ranks:
            if not 0 <= rank < self.num_ranks:
                raise ValueError(
                    f"ranks.{rank} is outside 0..{self.num_ranks - 1} (num_nodes x ranks_per_node)"
                )
        if (self.topology == "explicit") != bool(self.links):
            raise ValueError("links and topology: explicit go together; give both or neither")
        if self.nics_per_node is not None and self.topology == "explicit":
            raise ValueError(f"nics_per_node ({self.nics_per_node}) has no place beside explicit links; leave it out")
        if self.ranks_per_node % (self.nics_per_node or 1):
            raise ValueError(
                f"nics_per_node ({self.nics_per_node}) does not divide ranks_per_node ({self.ranks_per_node}); choose a"
                " divisor"
            )
        if all(self.rank(r).failed for r in range(self.num_ranks)):
            raise ValueError("every rank is failed; leave at least one")
        return self

    @property
    def num_ranks(self) -> int:
        """``R``, failed ranks included."""
        return self.num_nodes * self.ranks_per_node

    @property
    def ranks_per_nic(self) -> int:
        """Neighbours that share a NIC; all of a node where explicit links join the nodes."""
        nics = 1 if self.topology == "explicit" else self.nics_per_node or self.ranks_per_node
        return self.ranks_per_node // nics

    def resized(
        self, num_nodes: int, ranks_per_node: int, ranks: Mapping[int, RankSpec] | None = None
    ) -> ClusterSpec:
        """Other nodes of these ranks and NICs; as many ranks share one as before, if they divide a node."""
        nics = self.nics_per_node and ranks_per_node // math.gcd(self.ranks_per_nic, ranks_per_node)
        sizes = {"num_nodes": num_nodes, "ranks_per_node": ranks_per_node, "nics_per_node": nics}
        return self.model_copy(update={**sizes, "ranks": dict(ranks or {})})

    def rank(self, number: int) -> RankSpec:
        """What is special about a rank (the default where nothing is)."""
        return self.ranks.get(number, _USUAL)

    def rank_memory_bytes(self, number: int) -> float:
        """Device memory of a rank in bytes."""
        memory = self.rank(number).memory
        return self.accelerator.memory if memory is None else memory
