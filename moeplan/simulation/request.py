"""One request on its way through a service: plain slots, written by the engine that holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from moeplan.simulation.instance import Kept

__all__ = ["NEVER", "Request"]

NEVER = -1


class Request:
    """Times in nanoseconds, :data:`NEVER` until they come.

    ``generated`` tokens are out; ``cached`` are in the KV cache. ``to_prefill`` are still to be computed before the
    next token. ``join_step`` is the step of its group at which it began to decode, with ``join_cached`` tokens.
    ``path``: tokens after each step since it joined, where steps bring several. ``held``: ids of its prompt's prefix
    that it shares. ``epoch`` counts its placements: what an engine noted of an older one no longer holds. ``saved``:
    tokens of its cache kept elsewhere (host memory, or a prefill instance, which is ``kept`` then).
    """

    __slots__ = (
        "admit_ns", "arrival_ns", "chain", "epoch", "finish_ns", "first_ns", "generated", "group", "held", "hit_tokens",
        "input", "instance", "join_cached", "join_step", "kept", "last_token_ns", "number", "output", "path",
        "preemptions", "saved", "swap_tokens", "to_prefill",
    )  # fmt: skip

    def __init__(
        self, number: int, arrival_ns: int, input_tokens: int, output_tokens: int, chain: tuple[int, ...]
    ) -> None:
        self.number, self.arrival_ns = number, arrival_ns
        self.input, self.output, self.chain = input_tokens, output_tokens, chain
        self.generated = self.to_prefill = self.join_cached = self.join_step = 0
        self.epoch = self.preemptions = self.hit_tokens = self.swap_tokens = 0
        self.admit_ns = self.first_ns = self.finish_ns = self.last_token_ns = NEVER
        self.instance = self.group = NEVER
        self.held: tuple[int, ...] = ()
        self.path: NDArray[np.int64] | None = None
        self.saved = 0
        self.kept: Kept | None = None

    @property
    def context(self) -> int:
        """Tokens that must be in the cache, or be computed, before the next one."""
        return self.input + self.generated
