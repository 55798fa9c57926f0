"""The device that is measured: its memory, its types, random data on it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.errors import MissingExtraError, SpecError, UnknownNameError
from moeplan.specs.model import DTYPE_BYTES

__all__ = ["CACHE_BYTES_UNKNOWN", "Device", "find_device", "may_be_realtime", "pinned", "torch_module"]

CACHE_BYTES_UNKNOWN = 64 * 2**20
_MEMORY_SHARE = 0.6  # of the free memory that buffers may take: workspaces and gradients need the rest


def torch_module() -> Any:
    """torch.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("measuring", "torch") from error
    return torch


@dataclass(frozen=True, slots=True)
class Device:
    """``kind`` is cpu or cuda; ``cache_bytes`` is the last-level cache that rotation must exceed."""

    kind: str
    torch: Any
    cache_bytes: int
    capability: tuple[int, int] = (0, 0)

    @property
    def is_cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.kind == "cuda"

    @property
    def free_bytes(self) -> int:
        """Bytes that buffers may take now."""
        return int(self.available_bytes * _MEMORY_SHARE)

    @property
    def available_bytes(self) -> int:
        """Bytes that are free now."""
        if self.is_cuda:
            # What torch keeps for reuse is free too; emptying its cache here would slow every measurement.
            cuda = self.torch.cuda
            return int(cuda.mem_get_info()[0] + cuda.memory_reserved() - cuda.memory_allocated())
        return _memory_available()

    def dtype(self, name: str) -> Any:
        """The torch type of the activations that go with weights in ``name``.

        Raises:
            UnknownNameError: no such type; SpecError: this device cannot.
        """
        if name not in DTYPE_BYTES:
            raise UnknownNameError("dtype", name, DTYPE_BYTES)
        if name == "fp4":
            raise SpecError("dtype (fp4): torch has no fp4 expert kernel that this profiler can run; use fp8")
        if name == "fp8" and not (self.is_cuda and self.capability >= (8, 9)):
            here = f"capability {'.'.join(map(str, self.capability))}" if self.is_cuda else "cpu"
            raise SpecError(
                f"dtype (fp8) needs a GPU of compute capability 8.9 or above, this device is {here};"
                " choose another --dtype"
            )
        if name in ("bf16", "int8", "int4") and self.is_cuda and self.capability < (8, 0):
            raise SpecError(f"dtype ({name}) needs a GPU of compute capability 8.0 or above; use --dtype fp16")
        plain = {"fp32": self.torch.float32, "fp16": self.torch.float16}
        return plain.get(name, self.torch.bfloat16)

    def normal(self, shape: Sequence[int], dtype: Any, scale: float = 1.0) -> Any:
        """Normal random numbers of ``dtype``: filled in place, so that no larger copy is needed."""
        return self.torch.empty(tuple(shape), dtype=dtype, device=self.kind).normal_(0.0, scale)

    def copies(self, bytes_each: float, most: int = 64) -> int:
        """How many buffers to rotate over so that none is in the cache when its turn comes."""
        wanted = 1 + -(-2 * self.cache_bytes // max(1, int(bytes_each)))
        fitting = int(self.free_bytes // max(1, int(bytes_each)))
        return max(1, min(wanted, fitting, most))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            self.torch.cuda.synchronize()


def may_be_realtime() -> bool:
    """Whether this process may take real-time priority: tried, and put back."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return False
    os.sched_setscheduler(0, *before)
    return True


@contextmanager
def pinned(torch: Any, threads: int, realtime: bool) -> Iterator[set[int]]:
    """Run with ``threads`` torch threads, a core each (0: as it is), at real-time priority where asked for.

    Yields the cores there were before; all is put back afterwards.

    Raises:
        SpecError: fewer cores than threads, or no right to a priority.
    """
    cores, before = os.sched_getaffinity(0), torch.get_num_threads()
    if threads > len(cores):
        raise SpecError(f"threads ({threads}) exceed the cores this process may use ({len(cores)})")
    try:
        if realtime:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError as error:
        raise SpecError("realtime needs the right to set a priority (root); leave --realtime out") from error
    try:
        if threads > 0:
            torch.set_num_threads(threads)
            os.sched_setaffinity(0, set(sorted(cores)[:threads]))
        yield cores
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(before)
        if realtime:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _memory_available() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            break
    else:
        raise SpecError("/proc/meminfo names no MemAvailable; this profiler needs Linux")
    limit, used = (_number(Path("/sys/fs/cgroup") / f"memory.{what}") for what in ("max", "current"))
    return free if limit is None or used is None else min(free, limit - used)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _cpu_cache_bytes() -> int:
    """Largest cache of the first core as the kernel tells it."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text[:-1].isdigit() and text[-1:] in "KM":
            sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes) or CACHE_BYTES_UNKNOWN


def find_device(kind: str) -> Device:
    """The device to measure: ``cpu``, or the current GPU for ``cuda``.

    Raises:
        SpecError: no GPU is there, or torch was built without support for it.
    """
    torch = torch_module()
    if kind == "cpu":
        return Device("cpu", torch, _cpu_cache_bytes())
    if kind != "cuda":
        raise UnknownNameError("device", kind, ("cpu", "cuda"))
    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built for CPU only"
        raise SpecError(
            f"device (cuda): torch {torch.__version__} {built} and sees no GPU; use --device cpu, or run this"
            " where nvidia-smi lists a device"
        )
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    cache = int(getattr(properties, "L2_cache_size", 0)) or CACHE_BYTES_UNKNOWN
    return Device("cuda", torch, cache, (properties.major, properties.minor))
