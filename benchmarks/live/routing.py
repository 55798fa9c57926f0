"""Routing that live runs replay: made from a seed, or recorded. Two traces each, one to plan on and one to run.

``T`` tokens, ``L`` layers, ``E`` experts, ``K`` choices; every token has a home rank.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.routing_trace import RoutingTrace

__all__ = ["Home", "Recorded", "Shape", "Skew", "load_of", "traces"]

V2_LITE = "deepseek_v2_lite_esft.npz"


@dataclass(frozen=True, slots=True)
class Shape:
    """The MoE layers that run: ``F`` is an expert's FFN size."""

    name: str
    hidden: int
    inter: int
    experts: int
    top_k: int
    layers: int


@dataclass(frozen=True, slots=True)
class Skew:
    """Experts differ in popularity, log-normally; homes do not matter."""

    sigma: float

    @property
    def name(self) -> str:
        return f"skew {self.sigma:g}"


@dataclass(frozen=True, slots=True)
class Home:
    """Synthetic: each node's tokens prefer one half of the experts, by the odds ``bias``; popularity as in Skew."""

    bias: float
    sigma: float = 0.3

    @property
    def name(self) -> str:
        return f"home {self.bias:g}"


@dataclass(frozen=True, slots=True)
class Recorded:
    """DeepSeek-V2-Lite's recorded routing of one task; whole sequences have one home, ranks in turn."""

    task: str

    @property
    def name(self) -> str:
        return f"recorded {self.task}"


def _made(kind: Skew | Home, shape: Shape, ranks: int, nodes: int, tokens: int, seed: int) -> RoutingTrace:
    """The popularity of experts is the same for every ``seed``: other tokens of the same traffic."""
    fixed = np.random.default_rng(7)
    popularity_LE = fixed.normal(0, kind.sigma, (shape.layers, shape.experts))
    half_LE = fixed.permuted(np.tile(np.arange(shape.experts) % nodes, (shape.layers, 1)), axis=1)
    rng = np.random.default_rng((seed, 1))
    home_T = (np.arange(tokens) % ranks).astype(np.int32)
    score_TLE = popularity_LE + rng.gumbel(size=(tokens, shape.layers, shape.experts))
    if isinstance(kind, Home):
        node_T = home_T // (ranks // nodes)
        score_TLE += np.log(kind.bias / (1 - kind.bias)) * (half_LE == node_T[:, None, None])
    experts_TLK = np.argsort(-score_TLE, axis=2)[:, :, : shape.top_k].astype(np.int32)
    return RoutingTrace(experts_TLK, shape.experts, tuple(range(shape.layers)), source_rank_T=home_T)


def _recorded(kind: Recorded, shape: Shape, ranks: int) -> tuple[RoutingTrace, RoutingTrace]:
    with np.load(Path(os.environ["MOEPLAN_DATA"]) / "routing" / V2_LITE) as data:
        experts_TLK, lens_S = data[f"{kind.task}_experts"], data[f"{kind.task}_seq_lens"].astype(np.int64)
    layers = np.linspace(2, experts_TLK.shape[1] - 2, shape.layers).astype(int)
    sequence_T = np.repeat(np.arange(len(lens_S)), lens_S)[: len(experts_TLK)]
    home_T = (sequence_T % ranks).astype(np.int32)
    halves = []
    for part in (sequence_T < len(lens_S) // 2, sequence_T >= len(lens_S) // 2):
        chosen = experts_TLK[part][:, layers].astype(np.int32)
        halves.append(RoutingTrace(chosen, shape.experts, tuple(layers.tolist()), source_rank_T=home_T[part]))
    return halves[0], halves[1]


def traces(
    kind: Skew | Home | Recorded, shape: Shape, ranks: int, nodes: int, tokens_per_rank: int
) -> tuple[RoutingTrace, RoutingTrace]:
    """What to plan on, and ``tokens_per_rank`` other tokens of every rank to run."""
    if isinstance(kind, Recorded):
        plan, held_out = _recorded(kind, shape, ranks)
    else:
        plan = _made(kind, shape, ranks, nodes, 8192, 1)
        held_out = _made(kind, shape, ranks, nodes, tokens_per_rank * ranks, 2)
    assert held_out.source_rank_T is not None
    first = [np.flatnonzero(held_out.source_rank_T == rank)[:tokens_per_rank] for rank in range(ranks)]
    if min(map(len, first)) < tokens_per_rank:
        raise SystemExit(f"error: {kind.name} holds fewer than {tokens_per_rank} tokens per rank")
    return plan, held_out.tokens(np.concatenate(first))


def load_of(trace: RoutingTrace) -> ExpertLoad:
    """Counts of a trace, with its tokens."""
    load_LE = np.stack(
        [np.bincount(trace.experts_TLK[:, l].ravel(), minlength=trace.num_experts) for l in range(trace.num_layers)]
    )
    return ExpertLoad(load_LE[None].astype(float), ("all",), trace.layer_ids, top_k=trace.top_k, trace=trace)
