"""What a trace looks like in numbers: skew, drift, co-activation, dependency between layers.

``W`` windows, ``T`` tokens, ``L`` layers, ``E`` experts, ``R`` ranks, ``K`` top-k. Information is in bits.

Pairs are *all* pairs: a token with experts {a, b} in one layer and {c, d} in the next adds ac, ad, bc and
bd. The mutual information and the top-share are those of a random pair of a random token; they are lower
than for the top-1 expert alone, and unlike that depend on all traffic. The shuffled control pairs each
token's experts with another token's: what is left there is skew (top-share) and sampling (mutual
information), not dependency.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.progress import Progress, no_progress
from moeplan.routing.loads import expert_load
from moeplan.routing.pairs import coactivation_pairs, transition_pairs

__all__ = [
    "Statistics",
    "coactivation_bits",
    "coactivation_lift",
    "contiguous_imbalance",
    "cosine_drift",
    "describe",
    "entropy",
    "gini",
    "max_over_mean",
    "mutual_information",
    "quasi_independent",
    "top_share",
    "transitions",
    "variation_drift",
]

Floats = NDArray[np.float64]
BEST_SHARE = 0.125
"""Share of the next layer's experts whose mass the top-share adds up: one rank of eight."""


def max_over_mean(load_LE: NDArray[Any]) -> Floats:
    """Load of the busiest expert over the mean, per layer."""
    result: Floats = load_LE.max(axis=-1) / load_LE.mean(axis=-1)
    return result


def gini(load_LE: NDArray[Any]) -> Floats:
    """Gini coefficient per layer: 0 for equal loads, towards 1 for one expert taking all."""
    ordered = np.sort(load_LE, axis=-1)
    E = ordered.shape[-1]
    weights_E = 2 * np.arange(1, E + 1) - E - 1
    result: Floats = (ordered * weights_E).sum(axis=-1) / (E * ordered.sum(axis=-1))
    return result


def entropy(load_LE: NDArray[Any]) -> Floats:
    """Shannon entropy of the load per layer, in bits; log2(E) for equal loads."""
    share = load_LE / load_LE.sum(axis=-1, keepdims=True)
    result: Floats = -(share * np.log2(np.where(share > 0, share, 1.0))).sum(axis=-1)
    return result


def contiguous_imbalance(load_LE: NDArray[Any], num_ranks: int) -> Floats:
    """Max over mean load of ranks that hold contiguous blocks of experts, equal to within one expert."""
    blocks = np.array_split(np.arange(load_LE.shape[-1]), num_ranks)
    load_LR = np.stack([load_LE[..., block].sum(axis=-1) for block in blocks], axis=-1)
    return max_over_mean(load_LR)


def cosine_drift(load_WLE: NDArray[Any]) -> Floats:
    """Cosine similarity of two windows' loads, mean over layers, [W, W]; 1 means no drift."""
    unit = load_WLE / np.maximum(np.linalg.norm(load_WLE, axis=-1, keepdims=True), 1e-300)
    result: Floats = np.einsum("vle,wle->vw", unit, unit) / load_WLE.shape[1]
    return result


def variation_drift(load_WLE: NDArray[Any]) -> Floats:
    """Total variation of two windows' load shares (half the summed differences), mean over layers, [W, W]."""
    share = load_WLE / np.maximum(load_WLE.sum(axis=-1, keepdims=True), 1e-300)
    return np.stack([np.abs(share - row).sum(axis=-1).mean(axis=-1) / 2 for row in share])


def transitions(trace: RoutingTrace) -> NDArray[np.int64]:
    """Pair counts of neighbouring layers, [L-1, E, E]."""
    E = trace.num_experts
    layers = [np.ascontiguousarray(trace.experts_TLK[:, layer]) for layer in range(trace.num_layers)]
    pairs = [transition_pairs(a, b, E) for a, b in pairwise(layers)]
    return np.stack(pairs) if pairs else np.zeros((0, E, E), np.int64)


def mutual_information(counts_EE: NDArray[Any]) -> float:
    """Mutual information of row and column of a table of counts, in bits (plug-in estimate)."""
    joint = counts_EE / max(counts_EE.sum(), 1)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / independent[there])).sum())


def top_share(counts_EE: NDArray[Any], best: float = BEST_SHARE) -> float:
    """Mass that goes to the ``best`` share of columns, each row choosing its own."""
    columns = max(1, round(counts_EE.shape[1] * best))
    return float(np.sort(counts_EE, axis=1)[:, -columns:].sum() / max(counts_EE.sum(), 1))


def quasi_independent(margin_E: NDArray[Any]) -> Floats:
    """Pair shares [E, E] of experts that are drawn together by chance only, with ``margin_E`` as row sums.

    An expert cannot be paired with itself, so the plain product of margins does not fit; this is the
    quasi-independence model for tables with an empty diagonal (L. A. Goodman, J. Am. Stat. Assoc. 63,
    1968), w_e * w_f for e != f, fitted by iterative scaling.
    """
    share_E = margin_E / margin_E.sum()
    w_E = np.sqrt(share_E)
    for _ in range(200):
        rest_E = w_E.sum() - w_E
        new_E = np.sqrt(w_E * np.divide(share_E, rest_E, out=np.zeros_like(share_E), where=rest_E > 0))
        if np.allclose(new_E, w_E, rtol=1e-10, atol=0):
            break
        w_E = new_E
    table = np.outer(w_E, w_E)
    np.fill_diagonal(table, 0.0)
    result: Floats = table / table.sum()
    return result


def _against_chance(pairs_EE: NDArray[Any]) -> tuple[Floats, Floats]:
    return pairs_EE / pairs_EE.sum(), quasi_independent(pairs_EE.sum(axis=1).astype(np.float64))


def coactivation_bits(pairs_EE: NDArray[Any]) -> float:
    """How much two experts of one token tell of each other beyond their loads, in bits (0 at top-1)."""
    if not pairs_EE.any():
        return 0.0
    share, chance = _against_chance(pairs_EE)
    there = (share > 0) & (chance > 0)
    return float((share[there] * np.log2(share[there] / chance[there])).sum())


def coactivation_lift(pairs_EE: NDArray[Any]) -> Floats:
    """Observed pairs over pairs by chance, [E, E]; 1 where chance explains it, 0 where there is neither."""
    if not pairs_EE.any():
        return np.zeros(pairs_EE.shape)
    share, chance = _against_chance(pairs_EE)
    return np.divide(share, chance, out=np.zeros_like(share), where=chance > 0)


@dataclass(frozen=True, slots=True)
class Statistics:
    """All of it for one trace or load. ``*_L`` per layer, ``*_M`` per pair of neighbouring layers.

    What needs tokens is None where only counts are known.
    """

    layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int | None
    tokens: int | None
    windows: tuple[str, ...]
    load_LE: Floats
    max_over_mean_L: Floats
    gini_L: Floats
    entropy_L: Floats
    contiguous_ep8_L: Floats | None
    cosine_WW: Floats
    variation_WW: Floats
    coactivation_bits_L: Floats | None = None
    coactivation_lift_L: Floats | None = None
    mutual_information_M: Floats | None = None
    control_information_M: Floats | None = None
    top_share_M: Floats | None = None
    control_share_M: Floats | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; loads are left out."""

        def rounded(value: Floats | None) -> Any:
            return None if value is None else np.round(value, 6).tolist()

        return {
            "layer_ids": list(self.layer_ids),
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "tokens": self.tokens,
            "windows": list(self.windows),
            "max_over_mean": rounded(self.max_over_mean_L),
            "gini": rounded(self.gini_L),
            "entropy_bits": rounded(self.entropy_L),
            "contiguous_ep8_max_over_mean": rounded(self.contiguous_ep8_L),
            "cosine_between_windows": rounded(self.cosine_WW),
            "total_variation_between_windows": rounded(self.variation_WW),
            "coactivation_bits": rounded(self.coactivation_bits_L),
            "coactivation_mean_lift": rounded(self.coactivation_lift_L),
            "mutual_information_bits": rounded(self.mutual_information_M),
            "mutual_information_bits_shuffled": rounded(self.control_information_M),
            "top_share": rounded(self.top_share_M),
            "top_share_shuffled": rounded(self.control_share_M),
        }


def describe(
    source: RoutingTrace | ExpertLoad,
    windows: str | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Statistics:
    """Measure everything.

    ``windows`` as in :func:`moeplan.routing.loads.expert_load`, by default domains, else quarters of time.
    ``seed`` draws the shuffled control.

    Raises:
        TraceError: ``windows`` does not fit the trace.
    """
    if windows is None and isinstance(source, RoutingTrace):
        windows = "domain" if len(source.domains) > 1 else f"time:{min(4, source.num_tokens)}"
    load = expert_load(source, windows or "all")
    trace = source if isinstance(source, RoutingTrace) else load.trace
    load_LE = load.load_LE
    pairs: dict[str, Floats | None] = {}
    if trace is not None:
        pairs = _pair_statistics(trace, seed, progress)
    return Statistics(
        layer_ids=load.layer_ids,
        num_experts=load.num_experts,
        top_k=load.top_k,
        tokens=None if trace is None else trace.num_tokens,
        windows=load.windows,
        load_LE=load_LE,
        max_over_mean_L=max_over_mean(load_LE),
        gini_L=gini(load_LE),
        entropy_L=entropy(load_LE),
        contiguous_ep8_L=contiguous_imbalance(load_LE, 8) if load.num_experts >= 8 else None,
        cosine_WW=cosine_drift(load.load_WLE),
        variation_WW=variation_drift(load.load_WLE),
        **pairs,
    )


def _pair_statistics(trace: RoutingTrace, seed: int, progress: Progress) -> dict[str, Floats | None]:
    E, L = trace.num_experts, trace.num_layers
    rng = np.random.default_rng(seed)
    names = ("mutual_information_M", "control_information_M", "top_share_M", "control_share_M")
    found: dict[str, list[float]] = {name: [] for name in ("coactivation_bits_L", "coactivation_lift_L", *names)}
    previous_TK: NDArray[Any] | None = None
    for layer in range(L):
        experts_TK = np.ascontiguousarray(trace.experts_TLK[:, layer])
        together_EE = coactivation_pairs(experts_TK, E)
        lift_EE = coactivation_lift(together_EE)
        found["coactivation_bits_L"].append(coactivation_bits(together_EE))
        found["coactivation_lift_L"].append(float((lift_EE * together_EE).sum() / max(together_EE.sum(), 1)))
        if previous_TK is not None:
            real_EE = transition_pairs(previous_TK, experts_TK, E)
            control_EE = transition_pairs(previous_TK, experts_TK[rng.permutation(len(experts_TK))], E)
            values = (*map(mutual_information, (real_EE, control_EE)), *map(top_share, (real_EE, control_EE)))
            for name, value in zip(names, values, strict=True):
                found[name].append(value)
        previous_TK = experts_TK
        progress("statistics", (layer + 1) / L)
    return {name: np.array(values) for name, values in found.items()}
