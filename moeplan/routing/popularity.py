"""How loads of made-up traces come about: profiles of skew, domains, drift. ``L`` layers, ``E`` experts.

A *profile* is a layer's loads in falling order; *scores* say which expert stands where in it. Domains and
windows share the profile and differ in scores, so that skew stays what was asked while loads drift apart.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from moeplan.errors import SpecError
from moeplan.routing.statistics import cosine_drift

__all__ = [
    "angle_for",
    "block_transitions",
    "deal",
    "lognormal_profile",
    "profile_for",
    "solve",
    "turned",
    "zipf_profile",
]

Floats = NDArray[np.float64]


def lognormal_profile(num_experts: int, sigma: float) -> Floats:
    """Quantiles of a lognormal, falling, mean 1."""
    values = np.exp(sigma * ndtri((np.arange(num_experts) + 0.5) / num_experts))[::-1]
    result: Floats = values / values.mean()
    return result


def zipf_profile(num_experts: int, exponent: float) -> Floats:
    """Zipf's law, falling, mean 1."""
    values = np.arange(1, num_experts + 1) ** -float(exponent)
    result: Floats = values / values.mean()
    return result


def solve(
    function: Callable[[float], float],
    low: float,
    high: float,
    target: float,
    close: float,
    guess: float | None = None,
) -> float:
    """``x`` in [low, high] with ``function(x)`` within ``close`` of ``target``; ``function`` rises, roughly.

    Widens a bracket around ``guess`` (the whole range without one), then false position in the Illinois
    variant; the nearer end where the target lies outside.
    """
    left, right = (low, high) if guess is None else (max(low, guess - 0.25), min(high, guess + 0.25))
    f_left = function(left) - target
    while f_left > close and left > low:
        right, left = left, max(low, left - 2 * (right - left))
        f_left = function(left) - target
    if f_left >= -close:
        return left
    f_right = function(right) - target
    while f_right < -close and right < high:
        left, right, f_left = right, min(high, right + 2 * (right - left)), f_right
        f_right = function(right) - target
    if f_right <= close:
        return right
    side = 0
    for _ in range(12):
        x = (left * f_right - right * f_left) / (f_right - f_left)
        value = function(x) - target
        if abs(value) <= close:
            return x
        if value > 0:
            right, f_right = x, value
            f_left = f_left / 2 if side == 1 else f_left
            side = 1
        else:
            left, f_left = x, value
            f_right = f_right / 2 if side == -1 else f_right
            side = -1
    return (left + right) / 2


def profile_for(
    num_experts: int, top_k: int, kind: str, parameter: float | None, max_over_mean: float | None
) -> Floats:
    """The profile of one layer: by its parameter (sigma or exponent), or by its ``max_over_mean``.

    Raises:
        SpecError: the busiest expert would serve a token more than once.
    """
    make = {"lognormal": lognormal_profile, "zipf": zipf_profile}[kind]
    if max_over_mean is not None:
        parameter = solve(lambda x: float(make(num_experts, x)[0]), 0.0, 8.0, max_over_mean, 1e-4 * max_over_mean)
    profile = make(num_experts, parameter or 0.0)
    most = num_experts / top_k
    if profile[0] > most:
        raise SpecError(
            f"load max/mean ({profile[0]:.3g}) is over experts / top_k ({most:.3g}): an expert serves a token"
            " once; ask for less skew"
        )
    return profile


def deal(profile_LE: Floats, scores_LE: Floats) -> Floats:
    """The profile's loads to the experts in the order of their scores."""
    load_LE = np.empty_like(profile_LE)
    np.put_along_axis(load_LE, np.argsort(-scores_LE, axis=1), profile_LE, axis=1)
    return load_LE


def turned(scores_LE: Floats, other_LE: Floats, angle: float) -> Floats:
    """Scores turned towards independent others: correlation cos(angle) with the first."""
    result: Floats = np.cos(angle) * scores_LE + np.sin(angle) * other_LE
    return result


def angle_for(loads: Callable[[float], Floats], cosine: float | None, what: str) -> float:
    """The angle at which the variants of a load [variants, L, E] have this mean cosine with each other.

    Raises:
        SpecError: even independent variants are more alike, because the profile is flat.
    """
    if cosine is None:
        return 0.0

    def similarity(angle: float) -> float:
        table = cosine_drift(loads(angle))
        return float((table.sum() - len(table)) / (len(table) * (len(table) - 1)))

    angle = solve(lambda x: -similarity(x), 0.0, np.pi / 2, -cosine, 1e-3)
    reached = similarity(angle)
    if reached > cosine + 0.02:
        raise SpecError(
            f"{what} ({cosine:g}) is below what loads of this skew reach ({reached:.3f}); ask for more skew"
        )
    return angle


def block_transitions(
    num_layers: int,
    num_experts: int,
    skew: float,
    affinity: float,
    rng: np.random.Generator,
    *,
    kind: str = "lognormal",
    noise: float = 0.5,
    tokens: float = 1.0,
) -> tuple[Floats, Floats]:
    """Loads [L, E] and transition tables [L-1, E, E] with block structure, for planners' benchmarks.

    The generator of this project's feasibility study: popularity p lognormal(``skew``) or Zipf(``skew``)
    in random order; topics are C = E/8 equal blocks (4 for 8 experts or fewer), permuted for each layer;
    ``T_l = p_l p_{l+1}^T ((1 - a) + a C [same topic]) * lognormal(noise)`` with a the ``affinity``; then
    60 Sinkhorn rounds, after which rows and columns sum to the loads. Loads sum to ``tokens`` per layer.

    Raises:
        SpecError: ``affinity`` is not within 0..1, or another ``kind``.
    """
    if not 0 <= affinity <= 1:
        raise SpecError(f"affinity ({affinity}) must lie within 0..1")
    if kind == "lognormal":
        load_LE = rng.lognormal(0.0, skew, (num_layers, num_experts))
    elif kind == "zipf":
        load_LE = np.stack([rng.permutation(zipf_profile(num_experts, skew)) for _ in range(num_layers)])
    else:
        raise SpecError(f"kind ({kind}) must be 'lognormal' or 'zipf'")
    load_LE *= tokens / load_LE.sum(axis=1, keepdims=True)
    topics = num_experts // 8 if num_experts > 8 else min(4, num_experts)
    topic_LE = np.stack([rng.permutation(np.arange(num_experts) * topics // num_experts) for _ in range(num_layers)])
    tables = np.empty((num_layers - 1, num_experts, num_experts))
    for layer in range(num_layers - 1):
        same = topic_LE[layer][:, None] == topic_LE[layer + 1][None, :]
        table = np.outer(load_LE[layer], load_LE[layer + 1]) * (1 - affinity + affinity * topics * same)
        table *= rng.lognormal(0.0, noise, table.shape)
        for _ in range(60):
            table *= (load_LE[layer] / np.maximum(table.sum(axis=1), 1e-300))[:, None]
            table *= load_LE[layer + 1] / np.maximum(table.sum(axis=0), 1e-300)
        tables[layer] = table
    return load_LE, tables
