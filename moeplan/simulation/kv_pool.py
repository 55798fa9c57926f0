"""KV-cache blocks of one group: what is free, what running requests hold, what finished prompts left for others.

A prompt's prefix is a chain of ids, one per ``prefix_blocks`` blocks. Finished prompts' chains stay, unheld, until
their room is needed; the longest unused go first. A block is free, private to a request, or resident in the cache.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

__all__ = ["KvPool"]


class KvPool:
    """Counts blocks of group ``d``, ``capacity`` of them; the free ones in ``free_D[d]``, beside those of others."""

    __slots__ = ("_d", "_free_D", "_held", "_unheld", "capacity", "prefix_blocks")

    def __init__(self, free_D: NDArray[np.int64], d: int, capacity: int, prefix_blocks: int = 0) -> None:
        self._free_D, self._d = free_D, d
        self.capacity, self.prefix_blocks = capacity, prefix_blocks
        self.free = capacity
        self._held: dict[int, int] = {}  # id -> requests that hold it
        self._unheld: OrderedDict[int, None] = OrderedDict()  # longest unused first

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return int(self._free_D[self._d])

    @free.setter
    def free(self, blocks: int) -> None:
        self._free_D[self._d] = blocks

    @property
    def available(self) -> int:
        """Blocks that are free or can be made so."""
        return self.free + len(self._unheld) * self.prefix_blocks

    def matched(self, chain: tuple[int, ...]) -> int:
        """Ids at the head of a chain that are resident."""
        found = 0
        for item in chain:
            if item not in self._held and item not in self._unheld:
                break
            found += 1
        return found

    def take(self, blocks: int) -> bool:
        """Make ``blocks`` private; False, and nothing changed, where there is no room."""
        if blocks > self.available:
            return False
        self.make_free(blocks)
        self.free -= blocks
        return True

    def make_free(self, blocks: int) -> bool:
        """Drop the longest unused prefixes until ``blocks`` are free; False where that is not enough."""
        while self.free < blocks and self._unheld:
            self._unheld.popitem(last=False)
            self.free += self.prefix_blocks
        return self.free >= blocks

    def give(self, blocks: int) -> None:
        """Private blocks back."""
        self.free += blocks

    def hold(self, chain: tuple[int, ...]) -> None:
        """Hold resident ids for a request."""
        for item in chain:
            if item in self._unheld:
                del self._unheld[item]
                self._held[item] = 1
            else:
                self._held[item] += 1

    def keep(self, chain: tuple[int, ...]) -> int:
        """Turn a request's private blocks for new ids into resident ones it holds; how many ids were new."""
        new = 0
        for item in chain:
            if item in self._held or item in self._unheld:
                self.hold((item,))
            else:
                self._held[item] = 1
                new += 1
        return new

    def release(self, chain: tuple[int, ...]) -> None:
        """A request no longer holds these ids; what nobody holds stays until its room is needed."""
        for item in reversed(chain):  # the tail of a chain is worth less than its head: it goes first
            self._held[item] -= 1
            if not self._held[item]:
                del self._held[item]
                self._unheld[item] = None

    def clear(self) -> None:
        """Forget everything: the rank was lost."""
        self._held.clear()
        self._unheld.clear()
        self.free = self.capacity
