"""DeepSeek EPLB's answer ``(phy2log [L, P], log2phy [L, E, max copies] padded with -1, logcnt [L, E])``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.plan import Plan
from moeplan.errors import PlanError, SpecError
from moeplan.exports.base import (
    ExportContext,
    ImportContext,
    ImportedPlacement,
    expert_map,
    moe_rows,
    moe_rows_refusals,
    require_expressible,
    uniform_refusals,
)
from moeplan.exports.documents import write_npz, write_torch

__all__ = ["exporter", "inverse_map"]

_KEYS = ("phy2log", "log2phy", "logcnt")


def inverse_map(map_LP: NDArray[np.int64], num_experts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``log2phy`` [L, E, max copies], slots rising and padded with -1, and ``logcnt`` [L, E] of a map."""
    count_LE = np.stack([np.bincount(row, minlength=num_experts) for row in map_LP])
    slots_LEC = np.full((*count_LE.shape, int(count_LE.max())), -1, dtype=np.int64)
    for layer, row in enumerate(map_LP):
        order = np.argsort(row, kind="stable")
        first = np.cumsum(count_LE[layer]) - count_LE[layer]
        slots_LEC[layer, row[order], np.arange(len(row)) - first[row[order]]] = order
    return slots_LEC, count_LE.astype(np.int64)


class EplbExporter:
    """A dict of the three int64 arrays, ``.npz`` or a torch file by suffix."""

    name = "eplb"
    description = "EPLB triple phy2log, log2phy, logcnt as .pt or .npz"
    variants: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = (".pt", ".npz")
    options = frozenset({"model"})

    def refusals(self, plan: Plan, context: ExportContext) -> list[str]:
        """Equal, full slots, even shares, every MoE layer."""
        return uniform_refusals(plan) + moe_rows_refusals(plan, context)

    def export(self, plan: Plan, out: Path, context: ExportContext) -> list[Path]:
        """Write the triple.

        Raises:
            ExportError: the plan cannot be expressed. SpecError: ``out`` ends neither in .npz nor in .pt.
        """
        require_expressible(self.name, self.refusals(plan, context))
        map_LP = np.asarray(plan.physical_to_logical_map, dtype=np.int64)
        triple = dict(zip(_KEYS, (map_LP, *inverse_map(map_LP, plan.num_experts)), strict=True))
        if out.suffix == ".npz":
            write_npz(out, triple)
        elif out.suffix in (".pt", ".pth"):
            write_torch(out, triple)
        else:
            raise SpecError(
                f"--out ({out}) must end in .npz or .pt: the suffix chooses the form of the EPLB triple"
            )
        return [out]

    def recognises(self, document: Any) -> bool:
        """Three integer arrays of 2, 3 and 2 axes, under their names or as the tuple that EPLB returns."""
        if isinstance(document, dict) and set(document) == set(_KEYS):
            document = [document[key] for key in _KEYS]
        if not isinstance(document, list) or not all(isinstance(item, np.ndarray) for item in document):
            return False
        return [(item.ndim, item.dtype.kind) for item in document] == [(2, "i"), (3, "i"), (2, "i")]

    def load(self, document: Any, where: str, context: ImportContext) -> ImportedPlacement:
        """One row per MoE layer, by position; the two inverse arrays must agree with ``phy2log``.

        Raises:
            PlanError: not this format, not this model's layers or width, or the three disagree.
        """
        if not self.recognises(document):
            raise PlanError(f"{where} is not an EPLB triple; it needs {', '.join(_KEYS)}")
        phy2log, log2phy, logcnt = (
            (document[key] for key in _KEYS) if isinstance(document, dict) else document
        )
        map_LP = expert_map(phy2log, f"{where}: phy2log", context.model.num_experts)
        found = moe_rows(map_LP, where, context)
        slots_LEC, count_LE = inverse_map(map_LP.astype(np.int64), context.model.num_experts)
        if not np.array_equal(logcnt, count_LE):
            raise PlanError(f"{where}: logcnt does not count the copies in phy2log; the file is damaged")
        if log2phy.shape[:2] != count_LE.shape or not np.array_equal(_sorted(log2phy), _sorted(slots_LEC)):
            raise PlanError(f"{where}: log2phy is not the inverse of phy2log; the file is damaged")
        return found


def _sorted(slots_LEC: NDArray[np.int64]) -> NDArray[np.int64]:
    """Copies in rising order without the padding that all experts share."""
    ordered = -np.sort(-slots_LEC, axis=2)
    return ordered[:, :, : int((ordered >= 0).any(axis=(0, 1)).sum())]


exporter = EplbExporter()
