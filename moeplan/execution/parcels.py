"""Rows of tensors as messages between ranks: bytes with a checksum behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moeplan.execution.groups import Axis

__all__ = ["Message", "Send", "message_bytes", "pack", "send_batch", "unpack"]

def _checksum(payload: torch.Tensor) -> torch.Tensor:
    """Two 64-bit sums over the 32-bit words of ``payload`` (bytes, a multiple of 4), one weighted by position."""
    words = payload.view(torch.int32).long()
    place = torch.arange(len(words), device=words.device) % 65_521 + 1
    return torch.stack([words.sum(), (words * place).sum()])


def pack(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows as bytes, padded to whole 32-bit words, and their checksum behind them."""
    parts = [row.contiguous().view(torch.uint8).flatten() for row in rows]
    size = sum(len(part) for part in parts)
    payload = torch.cat([*parts, parts[0].new_zeros(-size % 8)])
    return torch.cat([payload, _checksum(payload).view(torch.uint8)])


def unpack(message: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """The rows of a message, or None where its checksum is wrong."""
    payload, check = message[:-16], message[-16:]
    if not torch.equal(_checksum(payload).view(torch.uint8), check):
        return None
    rows, begin = [], 0
    for row in like:
        size = row.numel() * row.element_size()
        rows.append(payload[begin : begin + size].clone().view(row.dtype).view(row.shape))
        begin += size
    return rows


def message_bytes(like: Sequence[torch.Tensor]) -> int:
    """Length of the message that holds such rows."""
    size: int = sum(row.numel() * row.element_size() for row in like)
    return size + -size % 8 + 16


@dataclass(slots=True)
class Message:
    """Bytes between this rank and ``peer`` of the axis."""

    peer: int
    data: torch.Tensor


Send = Callable[[list[Message], list[Message], Axis], None]
"""Sends the first messages and fills the second, over an axis; raises RuntimeError or OSError where it cannot."""


def send_batch(out: list[Message], into: list[Message], axis: Axis) -> None:
    """All messages of one step as one batch of point-to-point operations."""
    operations = [dist.P2POp(dist.isend, m.data, axis.ranks[m.peer], axis.group) for m in out]
    operations += [dist.P2POp(dist.irecv, m.data, axis.ranks[m.peer], axis.group) for m in into]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
