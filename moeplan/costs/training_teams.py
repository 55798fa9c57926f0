"""Which ranks of a training job hold each other up, and what layers take them.

- A *team*: neighbours of a stage that do every layer together, whole groups of those that split sequences (``tp x cp``)
  and of those that exchange tokens (``ep x expert_tp``), as few as that takes. Where gradients are reduced in every
  micro-batch, from ZeRO stage 2 on, it is the whole stage.
- A *replica*: the teams at the same places of all stages. They hand micro-batches on to each other and to nobody else.
  Replicas wait for each other where gradients are reduced (Narayanan et al. 2021, arXiv 2104.04473, section 2), for
  the norm that clips them all of the job.

A slow rank holds up its team in every layer, its replica as the schedule has it, and others once a step. Teams and
replicas of the same speeds are costed once.

``p`` stages, ``B`` ranks of a team, ``G`` sorts of groups in it, ``L`` MoE layers, ``K`` layers, ``W`` windows of load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moeplan.costs.step import BatchParts, StepModel
from moeplan.costs.technique import expert_groups
from moeplan.costs.training_layers import BothWays, TrainingLayers
from moeplan.costs.work import Work, in_turn, link_speeds, speeds
from moeplan.errors import InputError, SpecError
from moeplan.specs.cluster import ClusterSpec, RankSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.training import TrainingSpec

__all__ = ["Replica", "Team", "at_paces", "expert_group", "placement_groups", "replicas_of"]

Floats = NDArray[np.float64]


def expert_group(cluster: ClusterSpec, ep: int, expert_tp: int = 1) -> ClusterSpec:
    """``ep x expert_tp`` neighbours of a cluster: one expert-parallel group, at usual speeds.

    Raises:
        SpecError: they do not fill nodes evenly. InputError: a rank of the cluster has failed.
    """
    ranks = ep * expert_tp
    for rank, spec in cluster.ranks.items():
        if spec.failed:
            raise InputError(
                f"cluster.ranks.{rank}.failed (true), but a training job needs every rank; leave it out of the cluster"
                " (ranks, nodes), or failed out"
            )
    per_node = min(ranks, cluster.ranks_per_node)
    if ranks % per_node or ranks > cluster.num_ranks or cluster.topology == "explicit":
        names = "training.ep" + " x expert_tp" * (expert_tp > 1)
        raise SpecError(
            f"{names} ({ranks}) does not fill nodes of cluster.ranks_per_node ({cluster.ranks_per_node}) evenly,"
            " or the cluster has explicit links; choose a divisor or a multiple, and a preset topology"
        )
    return cluster.resized(ranks // per_node, per_node)


def placement_groups(model: ModelSpec, cluster: ClusterSpec, spec: TrainingSpec) -> ClusterSpec:
    """:func:`expert_group` as a placement sees it: neighbours that split experts are one rank.

    Raises:
        InputError, SpecError: the degrees do not fit the cluster or the experts.
    """
    group = expert_group(cluster, spec.ep, spec.expert_tp)
    return expert_groups(model, group, spec.expert_tp, "training.expert_tp")


def at_paces(group: ClusterSpec, paces_2B: Floats) -> ClusterSpec:
    """An expert-parallel group for all of a team, each rank with the least speed and link speed at its place in any."""
    slowest_2R = paces_2B.reshape(2, -1, group.num_ranks).min(1)
    ranks = {
        rank: RankSpec(speed=speed, link_speed=link)
        for rank, (speed, link) in enumerate(slowest_2R.T.tolist())
        if (speed, link) != (1.0, 1.0)
    }
    return group.model_copy(update={"ranks": ranks})


@dataclass(frozen=True, slots=True)
class Replica:
    """One sort of replica: ``first`` of them in a stage begins at that rank of it, ``share`` of all are so;
    ``teams``: which sort of team each stage has, ``links_p`` the slowest link of each."""

    teams: tuple[int, ...]
    links_p: Floats
    share: float
    first: int


def replicas_of(cluster: ClusterSpec, spec: TrainingSpec) -> tuple[list[Floats], list[Replica]]:
    """(speed and link speed ``[2, B]`` of the ranks of each sort of team, sorts of replicas) of a job."""
    p = spec.pp
    count = 1 if spec.zero >= 2 else cluster.num_ranks // p // math.lcm(spec.tp * spec.cp, spec.ep * spec.expert_tp)
    paces_2pnB = np.stack([speeds(cluster), link_speeds(cluster)]).reshape(2, p, count, -1)
    sorts, team = np.unique(paces_2pnB.transpose(1, 2, 0, 3).reshape(p * count, -1), axis=0, return_inverse=True)
    rows, first, times = np.unique(team.reshape(p, count).T, axis=0, return_index=True, return_counts=True)
    size = paces_2pnB.shape[3]
    replicas = [
        Replica(tuple(row.tolist()), paces_2pnB[1, :, number].min(1), n / count, int(number) * size)
        for row, number, n in zip(rows, first, times.tolist(), strict=True)
    ]
    return list(sorts.reshape(len(sorts), 2, -1)), replicas


class Team:
    """One sort of team with speeds ``paces_2B``: ``step`` costs its expert-parallel group (:func:`at_paces`),
    ``batches_W`` are its layers' experts and exchanges. ``parameters``: of a dense layer on a rank, and of a MoE layer.
    """

    def __init__(
        self,
        model: ModelSpec,
        spec: TrainingSpec,
        step: StepModel,
        batches_W: list[BatchParts],
        layers: TrainingLayers,
        parameters: tuple[float, float],
        paces_2B: Floats,
    ) -> None:
        self.model, self.spec, self.step, self.batches_W = model, spec, step, batches_W
        self._layers, self._parameters = layers, parameters
        self.speeds = float(step.speed_R.min()), float(step.link_R.min())
        self._paces_2G = np.unique(paces_2B.reshape(2, -1, spec.tp * spec.cp).min(2), axis=1)

    def _on_groups(self, part: BothWays) -> Floats:
        """Seconds ``[2, G]``, forward and backward, on each sort of group of ranks that split sequences and layers."""
        return np.array(part.at(*self._paces_2G))

    @cached_property
    def _moe(self) -> Floats:
        """``[forward and backward, attention and shared experts]`` of a MoE layer; gradients of all its weights are
        added up in backward."""
        attention = self._layers.attention + self._layers.added(self._parameters[1])
        parts_22G = np.stack([self._on_groups(attention), self._on_groups(self._layers.shared)], 1)
        return np.stack([in_turn(parts_2G.T) for parts_2G in parts_22G])

    @property
    def attention_s(self) -> Floats:
        """Forward and backward of a MoE layer without its experts and exchanges."""
        return self._moe[:, 0]

    @property
    def shared_s(self) -> Floats:
        """What its shared experts add to them."""
        return self._moe[:, 1]

    def layers_s(self, kinds: list[bool], rows: NDArray[np.int64]) -> Floats:
        """Seconds ``[K, 3, W]`` of layers of ``kinds`` (MoE or not) with loads of ``rows``: forward, backward, exchange
        of one direction."""
        spec, layers = self.spec, self._layers
        attention, shared = self.attention_s, self.shared_s
        expert_WL = np.stack([batch.expert_s_LR.max(1) for batch in self.batches_W])
        exchange_WL = np.stack([batch.exchange_s_L for batch in self.batches_W])
        back_WL = layers.experts_back * expert_WL + (exchange_WL if spec.recompute == "full" else 0.0)
        back_WL += Work(layers.activation_again_s).at(*self.speeds)
        open_WL = np.maximum(0.0, exchange_WL - (shared[0] if spec.overlap == "shared_expert" else 0.0))
        both = attention + shared
        moe_3WL = np.stack([both[0] + expert_WL, both[1] + back_WL, open_WL])
        dense = layers.attention + layers.dense_block + layers.added(self._parameters[0])

        def column(part: BothWays) -> Floats:
            slowest: Floats = self._on_groups(part).max(1, keepdims=True)
            return slowest

        answer = moe_3WL[:, :, rows].transpose(2, 0, 1)
        plain = ~np.array(kinds)
        answer[plain, :2], answer[plain, 2] = column(dense), 0.0
        answer[self.model.num_layers - 1 :, :2] += column(layers.head)
        answer[self.model.num_layers :, :2] += column(layers.joining)
        answer[:, :2] += spec.host_per_layer * np.array([[1 / 3], [2 / 3]])  # a third of the launches are forward's
        return answer
