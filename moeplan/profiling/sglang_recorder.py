"""Recording routing from a running SGLang server through its expert-distribution endpoints.

``POST /start_expert_distribution_record``, ``/stop_...``, ``/dump_...``: the dump is written by the server
into its ``SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR``, which must be readable from here, one file per rank.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.errors import SpecError, TraceError

__all__ = ["Dumps", "SglangServer"]

_OF_ADMINISTRATORS = ("/flush_cache", *(f"/{verb}_expert_distribution_record" for verb in ("start", "stop", "dump")))


@dataclass(frozen=True, slots=True)
class Dumps:
    """What a recording left: whole files, one per rank, how many ranks the server has (None: it does not tell), and
    what went amiss."""

    files: list[Path]
    ranks: int | None
    troubles: list[str]


class SglangServer:
    """A server at ``url``; ``dump_dir`` is where it writes its dumps. Keys are those of ``SGLANG_API_KEY`` and
    ``SGLANG_ADMIN_API_KEY``. Its first request may compile for minutes.

    Dumps are taken once names and sizes have held still for ``quiet_s`` seconds; where a rank's is missing or not
    whole, after ``patience_s`` seconds without a change.

    Raises:
        SpecError: the URL is not http(s), or the directory is not there.
    """

    def __init__(
        self, url: str, dump_dir: Path, timeout_s: float = 600.0, quiet_s: float = 3.0, patience_s: float = 30.0
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise SpecError(f"sglang ({url}) must be a URL such as http://127.0.0.1:30000")
        if not dump_dir.is_dir():
            raise SpecError(
                f"dump_dir ({dump_dir}) is not a directory; name the server's SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"
            )
        self.url, self.dump_dir, self.timeout_s = url.rstrip("/"), dump_dir, timeout_s
        self.quiet_s, self.patience_s = quiet_s, patience_s

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """An open answer: a POST of ``body`` where there is one. Recorder and cache take the administrator's key of a
        server that has one, else its other key."""
        names = ["SGLANG_API_KEY", *(["SGLANG_ADMIN_API_KEY"] if path in _OF_ADMINISTRATORS else [])]
        keys = [os.environ[name] for name in names if os.environ.get(name)]
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {keys[-1]}"} if keys else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers=headers)
        return urllib.request.urlopen(request, timeout=self.timeout_s)

    def _post(self, path: str, body: dict[str, Any] | None = None) -> None:
        try:
            with self._ask(path, body or {}) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read(300).decode(errors="replace").split()) or "nothing more"
            if error.code == 401:
                said += "; set SGLANG_API_KEY to the server's --api-key, SGLANG_ADMIN_API_KEY to its --admin-api-key"
            elif path.endswith("_expert_distribution_record"):
                said += "; start the server with --expert-distribution-recorder-mode per_token"
            raise TraceError(f"{self.url}{path} answered {error.code} {error.reason}: {said}") from error
        except (urllib.error.URLError, OSError) as error:
            raise TraceError(f"{self.url}{path} cannot be reached: {getattr(error, 'reason', error)}") from error

    def generate(self, prompt: str, max_new_tokens: int) -> float:
        """Send one request to an empty cache: cached tokens are not routed again. Seconds until its answer."""
        self._post("/flush_cache")
        start = time.perf_counter()
        sampling = {"max_new_tokens": max_new_tokens, "temperature": 0.0}
        self._post("/generate", {"text": prompt, "sampling_params": sampling})
        return time.perf_counter() - start

    def info(self) -> dict[str, Any]:
        """Arguments that the server was started with; empty where it does not tell."""
        for path in ("/server_info", "/get_server_info"):  # the second name is the older
            try:
                with self._ask(path) as answer:
                    told = json.load(answer)
            except (OSError, ValueError):  # unreachable, or another answer
                continue
            if isinstance(told, dict):
                return told
        return {}

    def require_tokens(self) -> None:
        """See that the server records the experts of its tokens. Without a recorder it dies when told to record; with
        attention parallel over data and no all-to-all, experts are chosen for the gathered tokens of all ranks, and
        each rank records as many of the first of them as it has tokens (seen in 0.5.23).

        Raises:
            TraceError: it says that it does not.
        """
        info = self.info()
        mode = info.get("expert_distribution_recorder_mode", "per_token")
        if mode != "per_token":
            records = "counts only" if mode else "no routing"
            raise TraceError(
                f"{self.url} records {records} (expert_distribution_recorder_mode is {mode or 'not set'}); start the"
                " server with --expert-distribution-recorder-mode per_token"
            )
        if info.get("enable_dp_attention") and info.get("moe_a2a_backend", "") in (None, "none"):
            raise TraceError(
                f"{self.url} records other ranks' tokens (enable_dp_attention with moe_a2a_backend none); start the"
                " server without attention parallel over data, or with --moe-a2a-backend"
            )

    def ranks(self) -> int | None:
        """Ranks of the server, each of which writes a dump; None where it does not tell."""
        info = self.info()
        try:
            # With attention parallel over data its ranks are among tp_size, else each holds a whole replica.
            replicas = 1 if info.get("enable_dp_attention") else int(info.get("dp_size", 1))
            return int(info["tp_size"]) * int(info.get("pp_size", 1)) * replicas
        except (ValueError, KeyError, TypeError):
            return None

    def record(self, drive: Callable[[], object]) -> Dumps:
        """Record while ``drive`` runs; what the ranks dumped.

        Raises:
            TraceError: the server refuses or cannot be reached, or wrote no whole dump.
        """
        before = set(self.dump_dir.glob("*.pt"))
        ranks = self.ranks()
        troubles = []
        self._post("/start_expert_distribution_record")
        try:
            drive()
        finally:
            try:
                self._post("/stop_expert_distribution_record")
            except TraceError as error:  # what it recorded can be dumped all the same
                troubles.append(f"the server may still be recording, tell it again to stop: {error}")
        self._post("/dump_expert_distribution_record")
        found = self._await_dumps(before, ranks or 1)
        files = [path for path in found if _is_whole(path)]
        if not found:
            raise TraceError(
                f"{self.dump_dir} got no dump; does it belong to this server, and is the recorder's mode per_token?"
            )
        if broken := [str(path) for path in found if path not in files]:
            troubles.append(
                f"{', '.join(broken)} ({len(broken)} of {len(found)} dumps) did not become whole; has the server's disk"
                " room, and does it still run?"
            )
        if not files:
            raise TraceError("; ".join(troubles))
        if len(found) < (ranks or 0):
            troubles.append(
                f"{self.dump_dir} got the dumps of {len(found)} of {ranks} ranks; let the ranks of every node write"
                " there, or collect what comes later and read the directory with 'moeplan trace convert'"
            )
        return Dumps(files, ranks, troubles)

    def _await_dumps(self, before: set[Path], count: int) -> list[Path]:
        """The new files; ranks write on their own, and the endpoint may answer earlier."""
        sizes: dict[Path, int] = {}
        changed_s = time.monotonic()
        while True:
            found = {path: path.stat().st_size for path in self.dump_dir.glob("*.pt") if path not in before}
            now_s = time.monotonic()
            if found != sizes:
                sizes, changed_s = found, now_s
            done = len(found) >= count and now_s - changed_s >= self.quiet_s and all(map(_is_whole, found))
            if done or now_s - changed_s >= self.patience_s:
                return sorted(found)
            time.sleep(min(0.2, self.quiet_s / 2))


def _is_whole(path: Path) -> bool:
    """Whether torch.save has ended: the directory of its zip file comes last."""
    try:
        with zipfile.ZipFile(path):
            return True
    except (OSError, zipfile.BadZipFile):
        return False
