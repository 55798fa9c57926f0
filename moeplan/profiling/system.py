"""What the machine says of itself: device, driver, clocks, power, links, versions; and what a launch costs."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from moeplan.errors import UnknownNameError
from moeplan.profiling.device import Device
from moeplan.profiling.journal import Journal
from moeplan.profiling.memory import largest_allocation_bytes
from moeplan.specs.clusters import find_accelerator

__all__ = [
    "CpuClock",
    "accelerator_name",
    "device_name",
    "driver_version",
    "libraries",
    "measure_launch",
    "system_facts",
]

_QUERY = {
    "clocks.sm": "clock_mhz",
    "clocks.max.sm": "clock_max_mhz",
    "clocks.mem": "memory_clock_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    "pcie.link.gen.current": "pcie_generation",
    "pcie.link.width.current": "pcie_lanes",
}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _nvidia_smi(*options: str) -> str:
    """Output of nvidia-smi; empty where it is not there or fails."""
    try:
        done = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _index(device: Device) -> str:
    return str(device.torch.cuda.get_device_properties(device.torch.cuda.current_device()).uuid)


def _smi_index(device: Device) -> str:
    uuid = _index(device)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


def device_name(device: Device) -> str:
    """As the device names itself."""
    if device.is_cuda:
        return str(device.torch.cuda.get_device_name())
    cpu = _read(Path("/proc/cpuinfo"))
    fields = {
        key: value.group(1).strip()
        for key in ("model name", "cpu family", "model", "stepping")
        if (value := re.search(rf"^{key}\s*: (.*)$", cpu, re.M))
    }
    if "model name" not in fields:
        return platform.machine()
    return f"{fields.pop('model name')}" + (
        f" (family {fields['cpu family']}, model {fields['model']})" if len(fields) == 3 else ""
    )


def accelerator_name(device: Device) -> str:
    """Name in the accelerator registry; ``cpu``, or the device's own where the registry lacks it."""
    if not device.is_cuda:
        return "cpu"
    name = device_name(device)
    words = re.findall(r"[a-z]+\d+[a-z]*", name.lower())
    for candidate in (name.removeprefix("NVIDIA "), *words):
        try:
            return find_accelerator(candidate).name
        except UnknownNameError:
            continue
    return name


def driver_version(device: Device) -> str:
    """The GPU driver's version, or the kernel's for a CPU."""
    if not device.is_cuda:
        return f"Linux {platform.release()}"
    return _nvidia_smi("-i", _smi_index(device), "--query-gpu=driver_version", "--format=csv,noheader").strip()


def libraries(device: Device) -> dict[str, str]:
    """Versions of what does the work."""
    torch = device.torch
    found = {"torch": str(torch.__version__), "python": platform.python_version()}
    if device.is_cuda:
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
        if torch.distributed.is_nccl_available():
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    elif torch.backends.mkl.is_available():
        match = re.search(r"Math Kernel Library Version ([\d.]+)", torch.__config__.show())
        found["mkl"] = match.group(1) if match else "yes"
    return found


def system_facts(device: Device) -> dict[str, float | str]:
    """Facts of the machine, the unit in the key; what cannot be read is left out."""
    torch = device.torch
    facts: dict[str, float | str] = {"largest_allocation_bytes": float(largest_allocation_bytes(device))}
    facts.update(_links())
    if not device.is_cuda:
        if cores := os.cpu_count():  # the machine's: this process is pinned to some of them
            facts["cores"] = float(cores)
        facts["cache_bytes"] = float(device.cache_bytes)
        facts["instruction_set"] = str(torch.backends.cpu.get_cpu_capability())
        if match := re.search(r"^cpu MHz\s*: ([\d.]+)$", _read(Path("/proc/cpuinfo")), re.M):
            facts["clock_mhz"] = float(match.group(1))
        if match := re.search(r"^MemTotal:\s*(\d+) kB", _read(Path("/proc/meminfo")), re.M):
            facts["memory_bytes"] = float(match.group(1)) * 1024
        return facts
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts["memory_bytes"] = float(properties.total_memory)
    facts["cache_bytes"] = float(device.cache_bytes)
    facts["multiprocessors"] = float(properties.multi_processor_count)
    facts["compute_capability"] = f"{properties.major}.{properties.minor}"
    facts["devices"] = float(torch.cuda.device_count())
    values = _nvidia_smi("-i", _smi_index(device), f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
    for key, value in zip(_QUERY.values(), values.strip().split(","), strict=False):
        if re.fullmatch(r"\s*[\d.]+\s*", value):
            facts[key] = float(value)
    links = re.findall(r"Link \d+: ([\d.]+) GB/s", _nvidia_smi("nvlink", "--status", "-i", _smi_index(device)))
    if links:
        facts["nvlinks"] = float(len(links))
        facts["nvlink_bandwidth_bytes_per_s"] = sum(map(float, links)) * 1e9
    if topology := _nvidia_smi("topo", "-m"):
        facts["topology"] = re.sub(r"\x1b\[[\d;]*m", "", topology.split("Legend")[0]).strip()[:4000]
    return facts


def _links() -> dict[str, float | str]:
    """Network cards as sysfs lists them: InfiniBand and RoCE ports, else Ethernet with a speed."""
    cards = []
    for port in sorted(Path("/sys/class/infiniband").glob("*/ports/*")):
        if rate := _read(port / "rate"):
            cards.append(f"{port.parent.parent.name} {rate}")
    for card in sorted(Path("/sys/class/net").glob("*/device")) if not cards else []:
        speed = _read(card.parent / "speed")
        if speed.isdigit():
            cards.append(f"{card.parent.name} {int(speed) / 1000:g} Gb/s")
    return {"nics": "; ".join(cards)} if cards else {}


def measure_launch(device: Device, journal: Journal, launches: int = 200) -> dict[str, float | str]:
    """Cost of one smallest kernel: microseconds the host is busy, and until the result is there.

    The latter goes to the table ``elementwise`` as ``empty_launch``; on a CPU both are the call itself.
    """
    torch = device.torch
    x = device.normal((1,), torch.float32)
    busy, done = [], []
    for _ in range(launches):
        device.synchronize()
        start = time.perf_counter_ns()
        x.mul_(1.0)
        busy.append((time.perf_counter_ns() - start) / 1e3)
        device.synchronize()
        done.append((time.perf_counter_ns() - start) / 1e3)
    row: dict[str, Any] = {
        "backend": "moeplan",
        "kernel": "mul_",
        "op": "empty_launch",
        "tokens": 1,
        "hidden": 1,
        "num_experts": 0,
        "top_k": 0,
        "dtype": "fp32",
        "direction": "forward",
    }
    warm = launches // 10
    if not journal.samples("elementwise", row):
        journal.add("elementwise", row, done[warm:])
    middle = sorted(busy[warm:])[len(busy[warm:]) // 2], sorted(done[warm:])[len(done[warm:]) // 2]
    return {"launch_enqueue_us": round(middle[0], 3), "launch_latency_us": round(middle[1], 3)}


_LEAST_TICKS = 100


class CpuClock:
    """How busy the machine was with others while we measured."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = [int(n) for n in _read(Path("/proc/stat")).split("\n")[0].split()[1:9]]
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return sum(fields) - fields[3] - fields[4], sum(fields), own * os.sysconf("SC_CLK_TCK")

    def foreign_share(self) -> float | None:
        """Share of all cores' time that went to other programs since the start, 0..1.

        None where fewer than 100 ticks of all cores passed: they do not resolve a share.
        """
        busy, total, own = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return max(0.0, min(1.0, (busy - own) / total)) if total >= _LEAST_TICKS else None
