"""A stretch of a live run: what its routers chose, what its steps cost, where its experts were.

``B`` blocks of a window, ``L`` MoE layers, ``E`` experts, ``T`` tokens, ``K`` choices.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import InputError
from moeplan.files import atomic_path

__all__ = ["LoadWindow", "WindowCosts"]

SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True)
class WindowCosts:
    """Medians over a window's steps. ``expert_s``: the busiest rank's; ``exchange_s``: of the rank that waited least,
    so that waiting for slower ranks is left out. ``tokens`` enter a layer in a step, all ranks together. ``moving``:
    experts moved meanwhile, so that the window measures no one placement; ``moved_experts`` in ``stall_s``;
    ``failure``: why they stopped on the way.
    """

    step_s: float
    expert_s: float
    exchange_s: float
    tokens: int
    moving: bool = False
    moved_experts: int = 0
    stall_s: float = 0.0
    failure: str | None = None
    steps_left: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LoadWindow:
    """``load_BLE`` counts the selections of all ranks, blocks being equal stretches in the order of time; ``trace``
    samples tokens, in the order of time and with their home ranks, and is None on all ranks but the first.
    ``placement`` was in force at its end.
    """

    first_step: int
    steps: int
    load_BLE: NDArray[np.int64]
    trace: RoutingTrace | None
    placement: Placement | None = None
    costs: WindowCosts | None = None

    def write(self, path: Path) -> None:
        """Write as ``.npz``, whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        head: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "first_step": self.first_step, "steps": self.steps}
        arrays: dict[str, NDArray[Any]] = {"load": self.load_BLE}
        if self.costs is not None:
            head["costs"] = asdict(self.costs)
        if self.placement is not None:
            where = self.placement
            head["placement"] = {k: getattr(where, k) for k in ("num_experts", "num_ranks", "ranks_per_node")}
            arrays |= {"slots": where.physical_to_logical_LP, "ranks": where.rank_of_slot_P}
            if where.share_LP is not None:
                arrays["shares"] = where.share_LP
        if self.trace is not None:
            arrays["experts"] = self.trace.experts_TLK
            if self.trace.source_rank_T is not None:
                arrays["source_rank"] = self.trace.source_rank_T
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, head=np.array(json.dumps(head)), **arrays)  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path) -> LoadWindow:
        """Read what :meth:`write` wrote.

        Raises:
            InputError: no such file, or not a window.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            head = json.loads(str(arrays["head"]))
            version = head["schema_version"]
            if version == SCHEMA_VERSION:
                return cls._of(head, arrays)
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} cannot be read as a window of a live run: {error}") from error
        raise InputError(f"{path}: schema_version ({version}) is not {SCHEMA_VERSION}; use the run's moeplan")

    @classmethod
    def _of(cls, head: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> LoadWindow:
        load, trace, placement = arrays["load"], None, None
        if "experts" in arrays:
            ids = tuple(range(load.shape[1]))
            trace = RoutingTrace(arrays["experts"], load.shape[2], ids, source_rank_T=arrays.get("source_rank"))
        if "slots" in arrays:
            placement = Placement(arrays["slots"], arrays["ranks"], share_LP=arrays.get("shares"), **head["placement"])
        costs = WindowCosts(**head["costs"]) if "costs" in head else None
        return cls(head["first_step"], head["steps"], load, trace, placement, costs)
