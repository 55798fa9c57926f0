"""What a simulation predicts: headlines with intervals, what lies behind them, and what they rest on.

Written as ``result.json`` beside ``events.parquet``, the :class:`moeplan.artifacts.event_log.EventLog` of its first
seed. Two results of any kind are compared by their headlines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moeplan.errors import InputError
from moeplan.files import canonical_json, read_json, sha256_bytes, write_text
from moeplan.specs.base import refused

__all__ = [
    "Assumption",
    "Headline",
    "MemoryTrack",
    "RankBytes",
    "RankTimes",
    "Replays",
    "SimulationResult",
    "Timeline",
    "TrafficMatrix",
]

_MOST_RANKS = 160  # of a traffic matrix; beyond, nodes


class _Paper(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Headline(_Paper):
    """One figure with its interval: the costs' residuals carried through the simulation, and the spread of seeds.

    ``exact``: why it has none; its ends are its value.
    """

    value: float = Field(description="mean over seeds")
    low: float = Field(description="lower end")
    high: float = Field(description="upper end")
    unit: str = Field(description="s, tokens/s, requests/s, USD, or a share (1)")
    better: Literal["lower", "higher"] = Field(description="which way is good")
    exact: str = Field("", description="no measured time enters it: what it is counted from")


class Assumption(_Paper):
    """Something the prediction rests on."""

    name: str
    value: str
    source: str = Field(description="measured, interpolated, modelled, extrapolated or given, and from what")


class Replays(_Paper):
    """Figures of every run behind the intervals, by which two results are compared run by run."""

    costs_sha256: str = Field(
        description="of all that says which costs are taken: model, cluster, profile, dtypes, technique, version; equal"
        " where two runs are off by the same errors"
    )
    parts: tuple[str, ...] = Field(description="of the costs, that may be off apart")
    seeds: dict[str, tuple[float, ...]] = Field(description="by headline: its value with each of the seeds")
    ends: dict[str, tuple[tuple[float, float], ...]] = Field(
        description="by headline: its value, first seed, at the low and at the high end of the costs' interval: all"
        " parts together, then each of parts alone"
    )


class RankTimes(_Paper):
    """Where each rank's time goes, as parts of the run after its warm-up that add up to 1; ranks of all instances in
    order."""

    compute: tuple[float, ...] = Field(description="attention, dense parts and experts")
    exchange: tuple[float, ...] = Field(description="dispatch and combine that no compute hides")
    bubble: tuple[float, ...] = Field(description="in a step, waiting for busier ranks or for the host")
    idle: tuple[float, ...] = Field(description="no step runs")


class RankBytes(_Paper):
    """Where the memory of each rank goes, in bytes; ranks of one stage of one instance of each pool in order."""

    limit: tuple[float, ...] = Field(description="memory of the rank")
    experts: tuple[float, ...]
    other_weights: tuple[float, ...]
    workspace: tuple[float, ...]
    kv_cache: tuple[float, ...] = Field(description="all that its group may fill")


class Timeline(_Paper):
    """The run in equal stretches of time, all instances together."""

    time_s: tuple[float, ...] = Field(description="middle of each stretch")
    tokens_per_s: tuple[float, ...] = Field(description="worked on, prefill and decode")
    running: tuple[float, ...] = Field(description="requests in batches")
    waiting: tuple[float, ...] = Field(description="requests in queues")
    cache: tuple[float, ...] = Field(description="part of the KV cache in use")


class MemoryTrack(_Paper):
    """Memory of one rank of a pipeline stage over the last step: state always, activations from each time on."""

    stage: int = Field(ge=0)
    limit_bytes: float = Field(description="memory of the smallest rank")
    state_bytes: float = Field(description="weights, gradients and optimizer state")
    time_s: tuple[float, ...]
    activation_bytes: tuple[float, ...]


class TrafficMatrix(_Paper):
    """Bytes from place to place in the mean step of a run, dispatch and combine; a row for each place they leave."""

    name: str = Field(description="whose: a pool, an expert-parallel group, all ranks")
    places: Literal["rank", "node"] = Field(description="nodes where ranks are very many")
    per_node: int = Field(gt=0, description="places of one node")
    steps: int = Field(gt=0)
    sent: tuple[tuple[float, ...], ...] = Field(description="as it was; what a rank keeps to itself is not counted")
    unchanged: tuple[tuple[float, ...], ...] | None = Field(
        None, description="the same tokens, had the run kept its first placement; where it did not"
    )
    source: str = Field(description="counted or expected, on what")

    @classmethod
    def of(
        cls,
        name: str,
        sent_RR: NDArray[np.float64],
        unchanged_RR: NDArray[np.float64] | None,
        steps: int,
        ranks_per_node: int,
        source: str,
    ) -> Self:
        """From bytes per step between ranks, to whole bytes; between nodes where ranks are more than 160 on several."""
        by_node = len(sent_RR) > _MOST_RANKS and ranks_per_node < len(sent_RR)

        def rows(matrix_RR: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
            if by_node:
                nodes = len(matrix_RR) // ranks_per_node
                matrix_RR = matrix_RR.reshape(nodes, ranks_per_node, nodes, ranks_per_node).sum((1, 3))
            return tuple(tuple(row) for row in np.rint(matrix_RR).tolist())

        return cls(
            name=name,
            places="node" if by_node else "rank",
            per_node=1 if by_node else ranks_per_node,
            steps=steps,
            sent=rows(sent_RR),
            unchanged=None if unchanged_RR is None else rows(unchanged_RR),
            source=source,
        )


class SimulationResult(_Paper):
    """A prediction of serving or of training."""

    schema_version: Literal[1] = 1
    kind: Literal["serving", "training"] = "serving"
    case: dict[str, Any] = Field(default_factory=dict, description="values of the sweep's fields")
    model: str
    cluster: str
    num_ranks: int = Field(gt=0, description="of all instances")
    num_nodes: int = Field(gt=0)
    seeds: tuple[int, ...]
    simulated_s: float = Field(ge=0, description="simulated time, first seed")
    headlines: dict[str, Headline]
    replays: Replays | None = Field(None, description="left out of results of older versions")
    counts: dict[str, float] = Field(default_factory=dict, description="requests, tokens and bytes of the first seed")
    distributions: dict[str, tuple[float, ...]] = Field(
        default_factory=dict, description="101 quantiles, from 0 to 100 %, in seconds, of the first seed"
    )
    ranks: RankTimes | None = None
    timeline: Timeline | None = None
    memory: tuple[MemoryTrack, ...] = Field((), description="training: one rank of each pipeline stage")
    rank_memory: RankBytes | None = Field(None, description="serving")
    traffic: tuple[TrafficMatrix, ...] = Field((), description="of a run whose log was kept")
    assumptions: tuple[Assumption, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: dict[str, str] = Field(default_factory=dict, description="versions and hashes of what it is made from")

    @property
    def sha256(self) -> str:
        """Digest of everything in it."""
        return sha256_bytes(canonical_json(self.model_dump(mode="json")).encode())

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(path, json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``result.json``, or the one in a directory.

        Raises:
            InputError: no such file, no result, or of another schema version.
        """
        place = path / "result.json" if path.is_dir() else path
        if not place.is_file():
            raise InputError(f"{path} has no result.json: it is no simulation; moeplan simulate writes one with --out")
        document = read_json(place)
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != 1:
            raise InputError(f"{place}: schema_version ({version}) is not 1; simulate again with this moeplan")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise refused(InputError, str(place), error) from error
