"""What pipeline stages of a service send on: hidden states and residuals in 16 bits of the tokens of the group that
takes longest, each rank of the group a part of them, gathered where they arrive, as SGLang and vLLM send them.

A slow link holds up the hop that comes in over it and the one that goes on.

``B`` grid points, ``D`` attention data-parallel groups.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.group_kernel import row_at
from moeplan.costs.tables import Seconds
from moeplan.costs.technique import Technique
from moeplan.costs.token_grid import Curve
from moeplan.costs.work import Work
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import DTYPE_BYTES, ModelSpec

__all__ = ["StageTransfers"]

Floats = NDArray[np.float64]


class StageTransfers:
    """Through all of ``stages``, with ``ranks`` in each, tabled over ``tokens`` per rank. ``parts_B``: those of a hop,
    by name."""

    def __init__(
        self,
        model: ModelSpec,
        stages: ClusterSpec,
        ranks: int,
        profile: HardwareProfile | None,
        how: Technique,
        tokens: Curve,
    ) -> None:
        links, hops = CollectiveCosts(stages, profile, how.backend), stages.num_ranks // ranks - 1
        self.parts_B: list[dict[str, Seconds]] = []
        self._tokens, rows_B3 = tokens, []
        for each in tokens.points.tolist():
            size = each * 2 * model.hidden_size * DTYPE_BYTES["bf16"]
            parts = {"transfers between stages": links.seconds("p2p", 2, size, ranks)}
            late_s = 2 * Work.of(parts.values()).wire_s
            if how.tp > 1:
                gathered = links.seconds("all_gather", how.tp, size * how.tp)
                parts["gathers between stages"] = gathered
                late_s += Work.of([gathered]).wire_s
            seconds = sum(part.total for part in parts.values())
            error = sum(part.total * part.relative_error for part in parts.values()) / seconds
            self.parts_B.append(parts)
            rows_B3.append((hops * seconds, hops * late_s, error))
        # Of all hops: seconds, what they take longer at half the links' speed, relative error.
        self._seconds_B, self._late_B, self._error_B = np.array(rows_B3).T

    def at(self, tokens_D: Floats, link_D: Floats) -> tuple[float, float, set[int]]:
        """Seconds with so many tokens on each rank of the groups and their links' speeds, at the group that takes
        longest; their relative error; and the grid points that tell it."""
        taken_D = tokens_D
        if (late_D := 1 / link_D - 1).any():
            of_D = [np.interp(tokens_D, self._tokens.points, rows_B) for rows_B in (self._seconds_B, self._late_B)]
            taken_D = of_D[0] + late_D * of_D[1]
        d = int(taken_D.argmax())
        b, w = self._tokens.place(float(tokens_D[d]))
        seconds = row_at(self._seconds_B, b, w) + late_D[d] * row_at(self._late_B, b, w)
        return float(seconds), float(row_at(self._error_B, b, w)), {b, b + (w > 0)}
