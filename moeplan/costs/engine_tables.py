"""One worker of a serving engine, and its measured tables, read once for all engines of one machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.dense import DenseCosts
from moeplan.costs.fastest import FastestTable
from moeplan.specs.cluster import AcceleratorSpec
from moeplan.specs.model import Dtype, ModelSpec

__all__ = ["EngineSetup", "EngineTables", "Exchange"]

T = TypeVar("T")
# ``gathered``; ``sent``, in decode by low-latency kernels, or ``sent_normal`` by the others too; ``fastest``: the
# engine takes the one that its tables say is faster. See engine_links.
Exchange = Literal["gathered", "sent", "sent_normal", "fastest"]


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """One worker. ``tp`` x ``dp`` ranks: ``dp`` attention groups of ``tp``; experts over ``ep`` x ``expert_tp``.

    ``expert_dtype`` of the routed experts, ``dense_dtype`` of other products, ``kv_dtype`` of the cache;
    ``draft_tokens`` proposed per step by multi-token prediction, 0: none. ``gather_dtype`` of tokens on the way to
    experts when gathered. ``distribution`` of choices over experts, as the tables name it. ``expert_kernels``: the
    library that the engine was told to take for routed experts (``trtllm``, ``deepgemm``, ``cutlass``, ...), "": the
    fastest.
    """

    model: ModelSpec
    accelerator: AcceleratorSpec
    backend: str
    tp: int = 1
    dp: int = 1
    ep: int = 1
    expert_dtype: Dtype = "fp8"
    dense_dtype: Dtype = "fp8"
    attention_dtype: Dtype = "fp8"
    kv_dtype: Dtype = "bf16"
    draft_tokens: int = 0
    exchange: Exchange = "gathered"
    gather_dtype: Dtype = "bf16"
    distribution: str = "power_law_1.01"
    expert_kernels: str = ""

    @property
    def ranks(self) -> int:
        """All ranks of the worker."""
        return self.tp * self.dp

    @property
    def expert_tp(self) -> int:
        """Ranks that share one expert."""
        return max(1, self.ranks // self.ep)


class EngineTables:
    """Tables of a profile as one :class:`EngineSetup` reads them; built when first asked for, kept in ``shared``."""

    def __init__(self, setup: EngineSetup, profile: HardwareProfile, shared: dict[Any, Any] | None) -> None:
        self.setup, self.profile = setup, profile
        self._shared = {} if shared is None else shared

    def cached(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What ``make`` makes, made once for all engines that share."""
        key = (self.profile.meta.name, *key)
        if key not in self._shared:
            self._shared[key] = make()
        found: T = self._shared[key]
        return found

    def kernels(self, table: str, **names: Any) -> list[str]:
        """Kernels that a table has under these names."""
        return self.cached(
            ("kernels", table, *sorted(names.items())),
            lambda: sorted(set(self.profile.select(table, **names)["kernel"].to_pylist())),
        )

    def dense(self, dtype: Dtype) -> DenseCosts:
        """Products of the own framework, where it has timed kernels."""
        backend, device = self.setup.backend, self.setup.accelerator
        return self.cached(("gemm", backend, dtype), lambda: DenseCosts(device, dtype, self.profile, backend))

    def table(
        self,
        table: str,
        axes: tuple[str, ...],
        names: dict[str, Any],
        law: Any,
        choices: tuple[dict[str, Any], ...] | None = None,
    ) -> FastestTable:
        """The table of the own framework, else of any."""
        tries = choices or ({"backend": self.setup.backend}, {})
        key = (table, str(tries), *sorted((k, str(v)) for k, v in names.items()))
        device = self.setup.accelerator.name
        rows = self._slice(table, names)
        return self.cached(key, lambda: FastestTable(rows, table, axes, names, law, device, tries))

    def _slice(self, table: str, names: dict[str, Any]) -> HardwareProfile:
        """The part of a large table that one model's rows are in: selecting from it is quick."""
        where = {k: names[k] for k in ("hidden", "num_experts", "distribution", "kind", "phase", "op") if k in names}

        def make() -> HardwareProfile:
            return HardwareProfile(self.profile.meta, {table: self.profile.select(table, **where)})

        return self.cached(("slice", table, *sorted(where.items())), make)
