"""Which group of a pool a request goes to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np

from moeplan.errors import InfeasibleError
from moeplan.simulation.clock import Clock
from moeplan.simulation.instance import Instance
from moeplan.simulation.request import Request
from moeplan.specs.serving import RouterPolicy

__all__ = ["Router"]

_FULL = np.iinfo(np.int64).max
_SLACK_RATIO, _SLACK = 1.5, 8  # prefix-aware: a group may hold this times the mean load, and so many more requests


class Router:
    """Over the instances of each pool; those groups that are alive."""

    def __init__(self, policy: RouterPolicy, clock: Clock, stages: Sequence[Sequence[Instance]]) -> None:
        self._policy, self._clock, self._stages = policy, clock, stages
        self._rounds = [cycle([(i, d) for i in stage for d in range(i.groups)]) for stage in stages]

    def choose(self, request: Request, place: int) -> tuple[Instance, int]:
        """Instance and group.

        Raises:
            InfeasibleError: every group has lost a rank.
        """
        stage = self._stages[place]
        if not any(instance.alive_D.any() for instance in stage):
            now_s = self._clock.now_s
            raise InfeasibleError(f"faults: at {now_s:g} s every group has lost a rank; none is left to serve")
        if self._policy == "round-robin":
            return next((instance, d) for instance, d in self._rounds[place] if instance.alive_D[d])
        if self._policy == "prefix-aware" and request.chain and place == 0:
            found = self._best_prefix(request, stage)
            if found is not None:
                return found
        return self._least_loaded(stage)

    def _least_loaded(self, stage: Sequence[Instance]) -> tuple[Instance, int]:
        best: tuple[int, Instance, int] | None = None
        for instance in stage:
            load_D = np.where(instance.alive_D, instance.load_D, _FULL)
            d = int(load_D.argmin())
            if instance.alive_D[d] and (best is None or int(load_D[d]) < best[0]):
                best = int(load_D[d]), instance, d
        assert best is not None  # some group is alive
        return best[1], best[2]

    def _best_prefix(self, request: Request, stage: Sequence[Instance]) -> tuple[Instance, int] | None:
        """The group that holds most of the prompt among those not much busier than the mean; None if none holds any."""
        loads = [int(i.load_D[d]) for i in stage for d in range(i.groups) if i.alive_D[d]]
        limit = _SLACK_RATIO * sum(loads) / len(loads) + _SLACK
        best: tuple[int, int, Instance, int] | None = None
        for instance in stage:
            for d, pool in enumerate(instance.pools):
                load = int(instance.load_D[d])
                if not instance.alive_D[d] or load > limit:
                    continue
                matched = pool.matched(request.chain)
                if matched and (best is None or (matched, -load) > (best[0], -best[1])):
                    best = matched, load, instance, d
        return None if best is None else (best[2], best[3])
