"""A lane whose sequences check drafts, so that a step brings each of them one token or several.

What a request's steps bring is drawn as it begins to decode. From then on it is known which of them brings how many
tokens and needs how many blocks, and steps stay a few array operations over groups: per group there is a ring of the
steps to come, into which a request's are added, and taken away where it is preempted.

``D`` groups, ``B`` steps of the ring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moeplan.simulation.acceptance import Acceptance, Ints
from moeplan.simulation.lane import Lane
from moeplan.simulation.request import Request

if TYPE_CHECKING:
    from moeplan.simulation.instance import Instance

__all__ = ["DraftingLane"]


class DraftingLane(Lane):
    """See the module. Slots of drafts that are not accepted are not counted in the cache: fewer than a block each."""

    def __init__(self, instance: Instance, acceptance: Acceptance) -> None:
        super().__init__(instance)
        self._acceptance = acceptance
        self.growth_DB = np.zeros((instance.groups, acceptance.longest), np.int64)
        self.coming_DB = np.zeros((instance.groups, acceptance.longest), np.int64)  # tokens

    def first_tokens(self, request: Request) -> int:
        """Tokens that the first step of decoding brings a request."""
        return int(self._path(request)[1])

    def _path(self, request: Request) -> Ints:
        if request.path is None:
            left = request.output - request.generated
            request.path = self._acceptance.tokens_after(request.number, request.generated, left)
        return request.path

    def _place(self, step: Any) -> Any:
        return step % self._acceptance.longest

    def _taken_D(self, decoding_D: Any) -> Any:
        place_D = self._place(self.step_D)
        taken_D = self.coming_DB[self._every_D, place_D] * decoding_D
        for ring_DB in (self.growth_DB, self.coming_DB):
            ring_DB[self._every_D, place_D] *= ~decoding_D
        return taken_D

    def _decoded(self, request: Request, d: int) -> int:
        return int(self._path(request)[int(self.step_D[d]) - request.join_step])

    def _enter(self, request: Request, d: int) -> int:
        self._add(request, d, 1)
        return len(self._path(request)) - 1

    def _withdraw(self, request: Request, d: int) -> None:
        self._add(request, d, -1)
        request.path = None

    def _add(self, request: Request, d: int, sign: int) -> None:
        """What a request's steps from now on bring and need."""
        step = int(self.step_D[d])
        out = self._path(request)[step - request.join_step :]
        blocks = -(-(request.join_cached + out) // self.inst.block)
        places = self._place(step + np.arange(len(out) - 1))
        self.coming_DB[d, places] += sign * np.diff(out)
        self.growth_DB[d, places] += sign * np.diff(blocks)
