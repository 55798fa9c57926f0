"""Has the load of experts changed? A permutation test over stretches of time.

``B`` and ``C`` blocks of two windows, ``L`` layers, ``E`` experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.errors import TraceError

__all__ = ["Drift", "drift_between"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Drift:
    """``distance``: part of a layer's tokens that would have to choose another expert (total variation, mean over
    layers); ``by_chance``: what two windows of the same traffic would show; ``p_value``: how often they would show as
    much.
    """

    distance: float
    by_chance: float
    p_value: float

    def found(self, significance: float = 0.01, least: float = 0.02) -> bool:
        """Whether the change is neither chance nor smaller than ``least``, a part of the tokens."""
        return self.p_value <= significance and self.distance - self.by_chance >= least


def drift_between(
    before_BLE: NDArray[np.integer], now_CLE: NDArray[np.integer], seed: int = 0, permutations: int = 499
) -> Drift:
    """Compare two windows by their blocks, each a stretch of time of its own.

    Tokens of a stretch are alike, so that tests that count tokens as independent see drift everywhere. Blocks are
    what is exchanged here: had nothing changed, any other split of all blocks into two windows would be as likely
    (Good 2005, Permutation, Parametric and Bootstrap Tests of Hypotheses, ch. 3).

    Raises:
        TraceError: windows of different models, or without tokens.
    """
    if before_BLE.shape[1:] != now_CLE.shape[1:]:
        raise TraceError(f"windows of {before_BLE.shape[1:]} and {now_CLE.shape[1:]} layers and experts do not compare")
    for name, window in (("earlier", before_BLE), ("later", now_CLE)):
        if not window.sum(axis=(0, 2)).all():
            raise TraceError(f"the {name} window has a layer without tokens; watch more steps")
    blocks = np.concatenate([before_BLE, now_CLE]).astype(np.float64)
    first = len(before_BLE)
    chosen = np.zeros((permutations + 1, len(blocks)))
    chosen[0, :first] = 1
    rng = np.random.default_rng(seed)
    for row in chosen[1:]:
        row[rng.permutation(len(blocks))[:first]] = 1
    distance = _distances(blocks, chosen)
    return Drift(
        distance=float(distance[0]),
        by_chance=float(distance[1:].mean()),
        p_value=float((distance >= distance[0] - 1e-12).sum() / len(distance)),
    )


def _distances(blocks_BLE: Floats, chosen_NB: Floats) -> Floats:
    """Total variation between the blocks chosen and the others, mean over layers, for each choice."""
    flat = blocks_BLE.reshape(len(blocks_BLE), -1)
    sides = [(part @ flat).reshape(len(chosen_NB), *blocks_BLE.shape[1:]) for part in (chosen_NB, 1 - chosen_NB)]
    shares = [side / np.maximum(side.sum(2, keepdims=True), 1e-300) for side in sides]
    distance: Floats = 0.5 * np.abs(shares[0] - shares[1]).sum(2).mean(1)
    return distance
