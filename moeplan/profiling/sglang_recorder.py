"""Recording routing from a running SGLang server through its expert-distribution endpoints.

``POST /start_expert_distribution_record``, ``/stop_...``, ``/dump_...``: the dump is written by the server
into its ``SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR``, which must be readable from here.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeplan.errors import SpecError, TraceError

__all__ = ["SglangServer"]


class SglangServer:
    """A server at ``url``; ``dump_dir`` is where it writes its dumps.

    Raises:
        SpecError: the URL is not http(s), or the directory is not there.
    """

    def __init__(self, url: str, dump_dir: Path, timeout_s: float = 60.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise SpecError(f"sglang ({url}) must be a URL such as http://127.0.0.1:30000")
        if not dump_dir.is_dir():
            raise SpecError(
                f"dump_dir ({dump_dir}) is not a directory; name the server's SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"
            )
        self.url, self.dump_dir, self.timeout_s = url.rstrip("/"), dump_dir, timeout_s

    def _post(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = json.dumps(body or {}).encode()
        request = urllib.request.Request(
            f"{self.url}{path}", data=data, method="POST", headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read(300).decode(errors="replace").split()) or "nothing more"
            if path.endswith("_expert_distribution_record"):
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

    def record(self, drive: Callable[[], object]) -> tuple[list[Path], TraceError | None]:
        """Record while ``drive`` runs; the new dump files, and the error if the recorder did not stop.

        Raises:
            TraceError: the server refuses or cannot be reached, or wrote no dump.
        """
        before = set(self.dump_dir.glob("*.pt"))
        refused = None
        self._post("/start_expert_distribution_record")
        try:
            drive()
        finally:
            try:
                self._post("/stop_expert_distribution_record")
            except TraceError as error:  # what it recorded can be dumped all the same
                refused = error
        self._post("/dump_expert_distribution_record")
        until = time.monotonic() + 10.0  # ranks write on their own; the endpoint may answer earlier
        new: set[Path] = set()
        while time.monotonic() < until:
            found = set(self.dump_dir.glob("*.pt")) - before
            if found and found == new:
                break
            new = found
            time.sleep(0.2)
        if not new:
            raise TraceError(
                f"{self.dump_dir} got no dump; does it belong to this server, and is the recorder's mode per_token?"
            )
        return sorted(new), refused
