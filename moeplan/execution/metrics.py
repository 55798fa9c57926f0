"""Metrics of a run while it runs: one JSON line per step, and a Prometheus endpoint on this machine."""

from __future__ import annotations

import json
from io import FileIO
from pathlib import Path
from typing import Any

from moeplan.errors import InputError, MissingExtraError, RunError
from moeplan.execution.train import StepMetrics

__all__ = ["MetricsSink"]


class MetricsSink:
    """Writes each step's metrics to ``path`` and shows the latest at ``http://127.0.0.1:port/metrics``.

    ``go_on``: behind what is in the file, for a run that was started again.

    Raises:
        InputError: the file cannot be written. RunError: the port is taken. MissingExtraError: no prometheus_client.
    """

    def __init__(self, path: Path | None, port: int | None, *, go_on: bool = False) -> None:
        self._path = path
        self._file: FileIO | None = None
        self._server: Any = None
        self._gauges: dict[str, Any] = {}
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("ab" if go_on else "wb", buffering=0)  # a line is there once it is written
            except OSError as error:
                raise InputError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
        if port is not None:
            self._serve(port)

    def _serve(self, port: int) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise MissingExtraError("a Prometheus endpoint", "torch") from error
        registry = prometheus_client.CollectorRegistry()
        try:
            self._server, _ = prometheus_client.start_http_server(port, addr="127.0.0.1", registry=registry)
        except (OSError, OverflowError) as error:
            raise RunError(f"prometheus port ({port}) cannot be used: {error}; choose another") from error

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> None:
            self._gauges[name] = prometheus_client.Gauge(f"moeplan_{name}", text, labels, registry=registry)

        gauge("step", "steps done")
        gauge("loss", "training loss, nats per byte")
        gauge("step_seconds", "time of the latest step, slowest rank")
        gauge("tokens_per_second", "of the latest step, all ranks")
        gauge("imbalance", "most (token, expert) pairs of a rank over the mean")
        gauge("expert_seconds", "experts of the latest step, forward and backward", ("rank",))
        gauge("alltoall_seconds", "exchanges of the latest step, waiting included", ("rank",))
        gauge("exposed_seconds", "part of the exchanges in which a rank computes nothing", ("rank",))

    def add(self, metrics: StepMetrics) -> None:
        """One step.

        Raises:
            InputError: the file cannot be written any more.
        """
        if self._file is not None:
            try:
                self._file.write((json.dumps(metrics.to_json()) + "\n").encode())
            except OSError as error:
                raise InputError(f"cannot write {self._path}: {error.strerror or error}; make room there") from error
        if self._gauges:
            for name, value in (
                ("step", metrics.step + 1),
                ("loss", metrics.loss),
                ("step_seconds", metrics.step_s),
                ("tokens_per_second", metrics.tokens_per_s),
                ("imbalance", metrics.imbalance),
            ):
                self._gauges[name].set(value)
            for name, values in (
                ("expert_seconds", metrics.expert_R),
                ("alltoall_seconds", metrics.alltoall_R),
                ("exposed_seconds", metrics.exposed_R),
            ):
                for rank, value in enumerate(values):
                    self._gauges[name].labels(rank=rank).set(value)

    def close(self) -> None:
        """End the endpoint and the file."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        if self._file is not None:
            self._file.close()
