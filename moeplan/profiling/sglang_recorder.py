"""Recording routing from a running SGLang server through its expert-distribution endpoints.

``POST /start_expert_distribution_record``, ``/stop_...``, ``/dump_...``: the dump is written by the server
into its ``SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR``, which must be readable from here.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
            raise TraceError(
                f"{self.url}{path} answered {error.code} {error.reason}; start the server with"
                " --expert-distribution-recorder-mode per_token"
            ) from error
        except (urllib.error.URLError, OSError) as error:
            raise TraceError(f"{self.url}{path} cannot be reached: {getattr(error, 'reason', error)}") from error

    def generate(self, prompt: str, max_new_tokens: int) -> float:
        """Send one request; seconds until its answer."""
        start = time.perf_counter()
        sampling = {"max_new_tokens": max_new_tokens, "temperature": 0.0}
        self._post("/generate", {"text": prompt, "sampling_params": sampling})
        return time.perf_counter() - start

    def _uncached(self, prompt: str, max_new_tokens: int) -> float:
        """Tokens whose keys are cached are not routed again: neither recorded nor timed."""
        self._post("/flush_cache")
        return self.generate(prompt, max_new_tokens)

    def record(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 16,
        drive: Callable[[], object] | None = None,
    ) -> tuple[list[Path], float | None]:
        """Record while ``prompts`` (or ``drive``) run; the new dump files, and the overhead of recording.

        The overhead compares each prompt's time with its time just before, unrecorded; None without prompts.

        Raises:
            TraceError: the server refuses or cannot be reached, or wrote no dump.
        """
        before = set(self.dump_dir.glob("*.pt"))
        plain = [self._uncached(prompt, max_new_tokens) for prompt in prompts]
        self._post("/start_expert_distribution_record")
        try:
            recorded = [self._uncached(prompt, max_new_tokens) for prompt in prompts]
            if drive is not None:
                drive()
        finally:
            self._post("/stop_expert_distribution_record")
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
        overhead = float(np.median(np.asarray(recorded) / np.asarray(plain)) - 1) if prompts else None
        return sorted(new), overhead
