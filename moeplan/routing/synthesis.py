"""Traces made to measure: skew, co-activation, dependency of layers, domains, drift, groups, source ranks.

The model behind them. Each token has a topic in each layer. Experts of a layer are dealt to topics so
that every topic carries about the same load; a token draws its top-k without replacement, experts of its
topic weighing ``boost`` times as much. Passing to the next layer it keeps its topic with a probability
(``stickiness``), else draws a new one. Within a sequence the next token keeps the first layer's topic
with probability ``persistence``. The free parameters are fitted layer by layer to what was asked, on the
drawn tokens themselves: expert weights to the loads, ``boost`` to the co-activation, ``stickiness`` to
the mutual information. Where full stickiness does not reach the information asked for, ``boost`` is
raised further, and co-activation comes out higher than asked.

Generated tokens are drawn as those of prompts are: what a real model chooses otherwise in decode is not in them. They
differ in where they stand, as recorders of forward passes write them: prompts whole, generated tokens in steps of one
token per sequence.

``T`` tokens, ``S`` segments (domain x window), ``L`` layers, ``E`` experts, ``K`` top-k, ``M`` = L - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.routing_trace import PHASES, RoutingTrace
from moeplan.errors import SpecError
from moeplan.progress import Progress, no_progress
from moeplan.routing.choice import choose, fit_weights
from moeplan.routing.pairs import coactivation_pairs, transition_pairs
from moeplan.routing.popularity import solve
from moeplan.routing.readers.base import compact_ids
from moeplan.routing.statistics import coactivation_bits, mutual_information
from moeplan.routing.targets import SynthSpec, SynthTargets, targets_of

__all__ = ["synthesise"]

Floats = NDArray[np.float64]
_FIT_SELECTIONS = 2**20  # tokens x experts that weights are fitted on; more tokens are drawn with the fitted weights
_MAX_LOG_BOOST = 9.0


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Where each token stands: its sequence, segment (domain x window), source rank and domain."""

    seq_lens_S: NDArray[np.int64]
    segment_T: NDArray[np.int64]
    domain_T: NDArray[np.int32]
    rank_T: NDArray[np.int64]
    starts_T: NDArray[np.bool_]


def _lay_out(spec: SynthSpec, targets: SynthTargets, rng: np.random.Generator) -> _Tokens:
    """Windows one after the other, in each the domains, in each sequences of random length."""
    W = targets.load_DWLE.shape[1]
    ends_W = np.arange(1, W + 1) * spec.tokens // W
    seq_lens: list[NDArray[np.int64]] = []
    segments: list[int] = []
    for window, tokens in enumerate(np.diff(ends_W, prepend=0)):
        ends_D = np.rint(np.cumsum(targets.tokens_D) * tokens).astype(np.int64)
        for domain, count in enumerate(np.diff(ends_D, prepend=0)):
            if count:
                cuts = rng.choice(
                    count - 1,
                    size=min(count - 1, max(0, round(count / spec.sequence_length) - 1)),
                    replace=False,
                )
                lens = np.diff(np.concatenate(([0], np.sort(cuts) + 1, [count])))
                seq_lens.append(lens)
                segments += [domain * W + window] * len(lens)
    seq_lens_S = np.concatenate(seq_lens).astype(np.int64)
    segment_T = np.repeat(np.array(segments, np.int64), seq_lens_S)
    starts_T = np.zeros(spec.tokens, bool)
    starts_T[np.concatenate(([0], np.cumsum(seq_lens_S)[:-1]))] = True
    rank_T = np.repeat(np.arange(len(seq_lens_S)) % (spec.source_ranks or 1), seq_lens_S)
    return _Tokens(seq_lens_S, segment_T, (segment_T // W).astype(np.int32), rank_T, starts_T)


def _as_recorded(spec: SynthSpec, tokens: _Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
    """In each window and domain the prompts, then step by step a token of every sequence that still generates: order
    ``[T]`` of the tokens, and in this order the lengths of sequences (1 in decode) and phases ``[T]``."""
    lens_S = tokens.seq_lens_S
    prompt_S = {"prefill": lens_S, "decode": 0 * lens_S, "mix": (lens_S + 1) // 2}[spec.phase]
    first_S = np.cumsum(lens_S) - lens_S
    generated_T = np.arange(spec.tokens) - np.repeat(first_S + prompt_S, lens_S)  # below 0 in the prompt
    decode_T = generated_T >= 0
    stretch_T = np.cumsum(np.diff(tokens.segment_T, prepend=tokens.segment_T[0]) != 0)
    order_T = np.lexsort((np.maximum(generated_T, -1), decode_T, stretch_T))
    begins_T = (tokens.starts_T | decode_T)[order_T]
    seq_lens_S = np.diff(np.flatnonzero(begins_T), append=spec.tokens)
    phase_T = np.where(decode_T, PHASES.index("decode"), PHASES.index("prefill")).astype(np.uint8)
    return order_T, seq_lens_S, phase_T[order_T]


def _draw_topics(spec: SynthSpec, tokens: _Tokens, topics: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A topic for each token: with probability ``source_affinity`` one of its source rank's own."""
    topic_T = rng.integers(topics, size=spec.tokens)
    if spec.source_ranks is not None and spec.source_affinity > 0:
        ranks = spec.source_ranks
        own = max(1, topics // ranks)
        own_T = (tokens.rank_T * topics // ranks + rng.integers(own, size=spec.tokens)) % topics
        topic_T = np.where(rng.random(spec.tokens) < spec.source_affinity, own_T, topic_T)
    return topic_T


def _deal_topics(load_E: Floats, topics: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A topic for each expert: by falling load, every ``topics`` experts to all topics in random order."""
    E = len(load_E)
    order = np.argsort(-load_E, kind="stable")
    topic_E = np.empty(E, np.int64)
    for start in range(0, E, topics):
        hand = order[start : start + topics]
        topic_E[hand] = rng.permutation(topics)[: len(hand)]
    return topic_E


def synthesise(
    spec: SynthSpec, targets: SynthTargets | None = None, progress: Progress = no_progress
) -> RoutingTrace:
    """A trace with the statistics of ``targets`` (those of the spec if not given); same seed, same trace.

    Raises:
        SpecError: the targets do not fit the spec's shape, or cannot be had.
    """
    targets = targets or targets_of(spec)
    D, W, L, E = targets.load_DWLE.shape
    if (spec.layers, spec.experts) != (L, E):
        raise SpecError(f"targets have {L} layers x {E} experts, the spec {spec.layers} x {spec.experts}")
    if spec.domains and len(spec.domains) != D:
        raise SpecError(f"domains ({len(spec.domains)}) must be as many as the targets have ({D})")
    rng = np.random.default_rng([spec.seed, 2])
    tokens = _lay_out(spec, targets, rng)
    share_SLE = targets.load_DWLE.reshape(D * W, L, E)
    share_SLE = share_SLE / share_SLE.sum(axis=2, keepdims=True) * spec.top_k
    if share_SLE.max() > 1.0 + 1e-9:
        s, layer, e = (int(i[0]) for i in np.nonzero(share_SLE == share_SLE.max()))
        raise SpecError(
            f"layer {layer} expert {e} would serve a token {share_SLE[s, layer, e]:.2f} times; ask for less skew"
        )
    topics = min(spec.topics or max(2, E // 8), E)
    fitted = min(spec.tokens, max(2048, _FIT_SELECTIONS // E))
    fit_T = np.sort(rng.choice(spec.tokens, size=fitted, replace=False)) if fitted < spec.tokens else np.arange(fitted)
    drawer = _LayerDrawer(spec, targets, tokens, topics, fit_T)
    topic_T = _draw_topics(spec, tokens, topics, rng)
    keep_T = ~tokens.starts_T & (rng.random(spec.tokens) < spec.persistence)
    topic_T = topic_T[np.maximum.accumulate(np.where(keep_T, 0, np.arange(spec.tokens)))]
    experts_TLK = np.empty((spec.tokens, L, spec.top_k), np.int32)
    for layer in range(L):
        layer_rng = np.random.default_rng([spec.seed, 3, layer])
        topic_T, experts_TLK[:, layer] = drawer.layer(layer, share_SLE[:, layer], topic_T, layer_rng)
        progress("synthesis", (layer + 1) / L)
    order_T, seq_lens_S, phase_T = _as_recorded(spec, tokens)
    return RoutingTrace(
        experts_TLK=compact_ids(experts_TLK, E)[order_T],
        num_experts=E,
        layer_ids=spec.layer_ids or tuple(range(L)),
        seq_lens_S=seq_lens_S,
        phase_T=phase_T,
        source_rank_T=None if spec.source_ranks is None else tokens.rank_T[order_T].astype(np.int32),
        domain_T=tokens.domain_T[order_T] if spec.domains else None,
        domains=spec.domains,
        origin={"synthetic": True, "spec": spec.model_dump(mode="json", exclude_defaults=True)},
    )


class _LayerDrawer:
    """Draws one layer after the other, each fitted given the last."""

    def __init__(
        self, spec: SynthSpec, targets: SynthTargets, tokens: _Tokens, topics: int, fit_T: NDArray[np.int64]
    ) -> None:
        self.spec, self.targets, self.tokens, self.topics, self.fit_T = spec, targets, tokens, topics, fit_T
        self.previous_FK: NDArray[Any] | None = None
        self.log_boost: float | None = None  # of the layer before: where to look first
        self.stickiness: float | None = None

    def _unbiased(self, bits: float, pairs_per_token: float) -> float:
        """``bits`` measured on the reference's sample, as the fit's sample would show them.

        The plug-in estimate is high by (E-1)^2 / (2 N ln 2) for N pairs (G. Miller, 1955). Pairs within a
        layer have no order: half the cells, half the pairs; both halves of the E x E table count here.
        """
        bias = (self.spec.experts - 1) ** 2 / (2 * np.log(2) * pairs_per_token)
        return float(bits - bias / self.targets.reference_tokens + bias / len(self.fit_T))

    def layer(
        self, layer: int, share_SE: Floats, topic_T: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Topics [T] and experts [T, K] of ``layer``."""
        spec, fit_T, E, K = self.spec, self.fit_T, self.spec.experts, self.spec.top_k
        topic_of_expert_E = _deal_topics(share_SE.mean(axis=0), self.topics, rng)
        fresh_T, luck_T = _draw_topics(spec, self.tokens, self.topics, rng), rng.random(spec.tokens)
        noise_FE = rng.standard_exponential((len(fit_T), E), dtype=np.float32)
        segment_F = self.tokens.segment_T[fit_T]
        weight_SE = share_SE / np.maximum(1 - share_SE, 1e-3) + 1e-9
        rest: dict[str, Any] = {
            "topic_of_expert_E": topic_of_expert_E,
            "n_group": spec.n_group,
            "topk_group": spec.topk_group,
            "top_k": K,
        }

        def topics_for(stickiness: float) -> NDArray[np.int64]:
            return np.where(luck_T < stickiness, topic_T, fresh_T) if self.previous_FK is not None else topic_T

        def fit(boost: float, stickiness: float, rounds: int) -> NDArray[np.int32]:
            nonlocal weight_SE
            topic_F = topics_for(stickiness)[fit_T]
            weight_SE, chosen_FK = fit_weights(
                noise_FE, weight_SE, share_SE, segment_F, rounds, topic_T=topic_F, boost=boost, **rest
            )
            return chosen_FK

        log_boost, stickiness = 0.0, 1.0
        if self.targets.coactivation_L is not None and K > 1:
            goal = self._unbiased(float(self.targets.coactivation_L[layer]), K * (K - 1))

            def coactivation(x: float) -> float:
                return coactivation_bits(coactivation_pairs(fit(np.exp(x), 1.0, 2), E))

            log_boost = solve(coactivation, 0.0, _MAX_LOG_BOOST, goal, 0.02 * goal, self.log_boost)
        previous_FK = self.previous_FK
        if self.targets.information_M is None:
            stickiness = 0.0
        elif previous_FK is not None:
            goal = self._unbiased(float(self.targets.information_M[layer - 1]), K * K)

            def information(x: float, stickiness: float) -> float:
                return float(mutual_information(transition_pairs(previous_FK, fit(np.exp(x), stickiness, 2), E)))

            reached = information(log_boost, 1.0)
            if reached < 0.98 * goal:
                log_boost = solve(
                    lambda x: information(x, 1.0),
                    log_boost,
                    _MAX_LOG_BOOST,
                    goal,
                    0.02 * goal,
                    log_boost + 0.25,
                )
            elif reached > 1.02 * goal:
                stickiness = solve(lambda x: information(log_boost, x), 0.0, 1.0, goal, 0.02 * goal, self.stickiness)
        self.log_boost, self.stickiness = log_boost, stickiness
        boost = float(np.exp(log_boost))
        chosen_FK = fit(boost, stickiness, 12)
        self.previous_FK = chosen_FK
        topic_T = topics_for(stickiness)
        if len(fit_T) == spec.tokens:
            return topic_T, chosen_FK
        experts_TK = np.empty((spec.tokens, K), np.int32)
        for start in range(0, spec.tokens, len(fit_T)):
            part = slice(start, min(start + len(fit_T), spec.tokens))
            noise = rng.standard_exponential((part.stop - part.start, E), dtype=np.float32)
            experts_TK[part] = choose(
                noise, weight_SE, self.tokens.segment_T[part], topic_T=topic_T[part], boost=boost, **rest
            )
        self.previous_FK = experts_TK[fit_T]
        return topic_T, experts_TK
