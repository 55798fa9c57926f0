"""What is asked of a made-up trace: the options, and the statistics they (or another trace) stand for.

``D`` domains, ``W`` windows, ``L`` layers, ``E`` experts, ``M`` = L - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import SpecError
from moeplan.routing.loads import expert_load
from moeplan.routing.popularity import angle_for, deal, profile_for, turned
from moeplan.routing.statistics import describe
from moeplan.specs.base import Spec

__all__ = ["SynthSpec", "SynthTargets", "targets_like", "targets_of"]

Floats = NDArray[np.float64]


class SynthSpec(Spec):
    """What is asked of a made-up trace. Skew holds within each domain and window, not for their mixture."""

    tokens: int = Field(4096, gt=1)
    layers: int = Field(26, gt=0)
    experts: int = Field(64, gt=1)
    top_k: int = Field(6, gt=0)
    layer_ids: tuple[int, ...] | None = None
    profile: Literal["lognormal", "zipf"] = "lognormal"
    skew: float | None = Field(None, ge=0, description="sigma of the lognormal or exponent of Zipf's law")
    max_over_mean: float | tuple[float, ...] | None = Field(None, description="load max/mean, for all layers or each")
    hot: float | None = Field(None, gt=1, description="one expert of one layer with this load over mean")
    hot_layer: int = Field(0, ge=0, description="index of the layer with the hot expert")
    coactivation: float | None = Field(
        None, ge=0, description="co-activation in bits; as dependency where only that is given"
    )
    dependency: float | None = Field(None, ge=0, description="mutual information of neighbouring layers in bits")
    topics: int | None = Field(None, gt=1, description="topics; experts / 8 (at least 2) if not given")
    domains: tuple[str, ...] = ()
    domain_cosine: float | None = Field(None, gt=0, le=1, description="cosine between loads of domains")
    windows: int = Field(1, gt=0, description="stretches of time between which loads drift")
    drift_cosine: float | None = Field(None, gt=0, le=1, description="cosine between loads of first and last window")
    n_group: int = Field(1, gt=0)
    topk_group: int = Field(1, gt=0)
    source_ranks: int | None = Field(None, gt=0)
    source_affinity: float = Field(0.0, ge=0, le=1, description="share of topics that belong to the source rank")
    sequence_length: int = Field(128, gt=0, description="mean tokens per sequence")
    persistence: float = Field(0.5, ge=0, lt=1, description="how often the next token keeps the topic")
    phase: Literal["prefill", "decode", "mix"] = Field(
        "prefill", description="prompts, generated tokens, or sequences of which the first half is the prompt"
    )
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_k >= self.experts:
            raise ValueError(f"top_k ({self.top_k}) must be below experts ({self.experts})")
        if self.layer_ids is not None and len(self.layer_ids) != self.layers:
            raise ValueError(f"layer_ids has {len(self.layer_ids)} entries, layers is {self.layers}")
        if isinstance(self.max_over_mean, tuple) and len(self.max_over_mean) != self.layers:
            raise ValueError(f"max_over_mean has {len(self.max_over_mean)} entries, layers is {self.layers}")
        asked = self.max_over_mean if isinstance(self.max_over_mean, tuple) else (self.max_over_mean,)
        if low := [value for value in asked if value is not None and value < 1]:
            raise ValueError(f"max_over_mean ({low[0]:g}) must be at least 1: no load's largest is below its mean")
        if self.skew is not None and self.max_over_mean is not None:
            raise ValueError("skew and max_over_mean are two ways to say one thing; give one")
        if self.experts % self.n_group or not 0 < self.topk_group <= self.n_group:
            raise ValueError(
                f"n_group ({self.n_group}) must divide experts ({self.experts}), and topk_group"
                f" ({self.topk_group}) must lie within 1..n_group"
            )
        if self.topk_group * (self.experts // self.n_group) < self.top_k:
            raise ValueError(f"topk_group ({self.topk_group}) groups hold fewer experts than top_k ({self.top_k})")
        if self.hot is not None and not (self.hot <= 0.98 * self.experts / self.top_k and self.hot_layer < self.layers):
            raise ValueError(
                f"hot ({self.hot}) must be at most 0.98 * experts / top_k"
                f" ({self.experts / self.top_k:.3g}), since an expert serves a token once, and hot_layer"
                f" ({self.hot_layer}) below layers ({self.layers})"
            )
        if self.tokens < max(1, len(self.domains)) * self.windows:
            raise ValueError(f"tokens ({self.tokens}) are fewer than domains x windows")
        return self


@dataclass(frozen=True, slots=True)
class SynthTargets:
    """The statistics to reproduce. ``load_DWLE`` is relative; ``reference_tokens`` were the bits' sample.

    ``tokens_D`` are the domains' shares of tokens.
    """

    load_DWLE: Floats
    tokens_D: Floats
    coactivation_L: Floats | None
    information_M: Floats | None
    reference_tokens: int


def targets_of(spec: SynthSpec) -> SynthTargets:
    """Targets from the options of ``spec``.

    Raises:
        SpecError: skew, hot expert or drift cannot be had with this many experts.
    """
    rng = np.random.default_rng([spec.seed, 1])
    D, W, L, E = max(1, len(spec.domains)), spec.windows, spec.layers, spec.experts
    wanted = spec.max_over_mean if isinstance(spec.max_over_mean, tuple) else (spec.max_over_mean,) * L
    profile_LE = np.stack([profile_for(E, spec.top_k, spec.profile, spec.skew, m) for m in wanted])
    if spec.hot is not None:
        row = profile_LE[spec.hot_layer]
        row[1:] *= (E - spec.hot) / row[1:].sum()
        row[0] = spec.hot
        if row[1] >= row[0]:
            raise SpecError(f"hot ({spec.hot}) is below the next expert's load ({row[1]:.3g}); ask for less skew")
    pinned = (spec.hot_layer, int(rng.integers(E))) if spec.hot is not None else None

    def draw() -> Floats:
        scores_LE = rng.standard_normal((L, E))
        if pinned is not None:
            scores_LE[pinned] = 1e3  # hot in every domain and window
        return scores_LE

    base_LE = draw()
    own_D = [draw() for _ in range(D)]
    drift_D = [draw() for _ in range(D)]

    def domains(angle: float) -> Floats:
        return np.stack([deal(profile_LE, turned(base_LE, own_LE, angle)) for own_LE in own_D])

    def stretch(angle: float) -> Floats:
        return np.stack([deal(profile_LE, turned(scores_D[0], drift_D[0], x)) for x in (0.0, angle)])

    angle = angle_for(domains, spec.domain_cosine if D > 1 else None, "domain_cosine")
    scores_D = [turned(base_LE, own_LE, angle) for own_LE in own_D]
    angles_W = np.linspace(0.0, angle_for(stretch, spec.drift_cosine if W > 1 else None, "drift_cosine"), W)
    both = zip(scores_D, drift_D, strict=True)
    load_DWLE = np.array([[deal(profile_LE, turned(s, d, x)) for x in angles_W] for s, d in both])
    together = spec.dependency if spec.coactivation is None else spec.coactivation
    return SynthTargets(
        load_DWLE=load_DWLE,
        tokens_D=np.full(D, 1.0 / D),
        coactivation_L=None if together is None else np.full(L, together),
        information_M=None if spec.dependency is None else np.full(L - 1, spec.dependency),
        reference_tokens=spec.tokens,
    )


def targets_like(trace: RoutingTrace) -> SynthTargets:
    """The statistics of ``trace``: loads per domain, co-activation and mutual information of each layer."""
    statistics = describe(trace, "all")
    load = expert_load(trace, "domain" if trace.domain_T is not None else "all")
    tokens_D = load.load_WLE[:, 0].sum(axis=1)
    return SynthTargets(
        load_DWLE=load.load_WLE[:, None],
        tokens_D=tokens_D / tokens_D.sum(),
        coactivation_L=statistics.coactivation_bits_L,
        information_M=statistics.mutual_information_M,
        reference_tokens=trace.num_tokens,
    )
