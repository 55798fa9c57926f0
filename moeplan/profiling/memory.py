"""Benches of moving bytes: inside the device, between host and device (pinned, pageable, beside compute), and
of allocating them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moeplan.profiling.device import Device
from moeplan.profiling.protocol import Bench, Call, Series, shrunk

__all__ = ["largest_allocation_bytes", "memory_bench"]

_OPS = (
    ("device_copy", "", 0),
    ("allocate", "", 0),
    ("host_to_device", "pinned", 0),
    ("host_to_device", "pageable", 0),
    ("host_to_device", "pinned", 1),
    ("device_to_host", "pinned", 0),
    ("device_to_host", "pageable", 0),
    ("device_to_host", "pinned", 1),
)

_BUSY_BYTES = 2**22  # a link moves more while a GPU does one product of 4,096 x 4,096: the copy has company to its end


def memory_bench(device: Device, max_bytes: int = 2**30) -> Bench:
    """Series over bytes; on a CPU only copies and allocations, since host and device are one there."""
    series, what = [], {}
    high = max(4096, min(max_bytes, device.free_bytes // 8))
    for op, host, overlapped in _OPS:
        if not device.is_cuda and host:
            continue

        def row(size: int, op: str = op, host: str = host, overlapped: int = overlapped) -> Mapping[str, Any]:
            key = {"backend": "moeplan", "kernel": "empty" if op == "allocate" else "copy_", "op": op}
            return {**key, "host_memory": host, "message_size_bytes": size, "overlapped": overlapped}

        label = f"{op}{' ' * bool(host)}{host}{' beside compute' * overlapped}"
        what[label] = op, host, overlapped
        series.append(Series("memory", label, row, 4096, high, 7))
    left_out = shrunk("memory", max_bytes, high, "bytes")
    return Bench("memory", tuple(series), lambda: _open(device, what, high), left_out, "end other programs")


def _open(device: Device, what: Mapping[str, tuple[str, str, int]], high: int) -> Callable[[Series, int], Call]:
    torch = device.torch
    near = [torch.empty(high, dtype=torch.uint8, device=device.kind).random_() for _ in range(2)]
    # Filled from the device: a CPU takes many seconds to draw a gigabyte.
    far = {
        kind: torch.empty(high, dtype=torch.uint8, pin_memory=kind == "pinned").copy_(near[0])
        for kind in ("pinned", "pageable")
        if device.is_cuda
    }
    busy = device.normal((4096, 4096), torch.bfloat16) if device.is_cuda else None
    side = torch.cuda.Stream() if device.is_cuda else None

    def prepare(series: Series, size: int) -> Call:
        op, host, overlapped = what[series.label]
        if op == "allocate":

            def allocate(i: int) -> object:
                if device.is_cuda:  # past the caching allocator: what growing a pool costs
                    pointer = torch.cuda.caching_allocator_alloc(size)
                    torch.cuda.caching_allocator_delete(pointer)
                    torch.cuda.empty_cache()
                    return pointer
                # A page counts as allocated when it is first touched.
                return torch.empty(size, dtype=torch.uint8).fill_(i & 1)

            return allocate
        turns = max(1, min(high // size, 2 * device.cache_bytes // size + 1, 64))
        parts = [slice(turn * size, (turn + 1) * size) for turn in range(turns)]
        target, source = (near[0], near[1]) if not host else (near[0], far[host])
        if op == "device_to_host":
            target, source = source, target

        def copy(i: int) -> object:
            part = parts[i % turns]
            if overlapped and side is not None:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(1 + size // _BUSY_BYTES):
                        torch.mm(busy, busy)
            return target[part].copy_(source[part], non_blocking=True)

        return copy

    return prepare


def largest_allocation_bytes(device: Device) -> int:
    """The largest single block the device gives, to 64 MiB; on a CPU what the system says it could give,
    since a kernel that overcommits would grant more than it has."""
    if not device.is_cuda:
        return device.available_bytes
    torch = device.torch
    torch.cuda.empty_cache()
    low, high = 0, int(torch.cuda.mem_get_info()[0])
    while high - low > 64 * 2**20:
        middle = (low + high + 1) // 2
        try:
            block = torch.empty(middle, dtype=torch.uint8, device="cuda")
            del block
            low = middle
        except torch.OutOfMemoryError:
            high = middle
        torch.cuda.empty_cache()
    return low
