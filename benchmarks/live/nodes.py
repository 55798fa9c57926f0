"""Ranks on one machine as nodes of a cluster: network namespaces joined by a slow link (root, Linux).

::

    python benchmarks/live/nodes.py --rate "200 Mbit/s" --delay "0.5 ms" -- python my_ranks.py

starts 2 x 2 ranks of ``my_ranks.py`` with the environment of torchrun (RANK, WORLD_SIZE, LOCAL_RANK, GROUP_RANK,
MASTER_ADDR, MASTER_PORT) and of gloo (GLOO_SOCKET_IFNAME). Without a command it checks itself: raw all-to-alls of
gloo inside a node and between the nodes, values compared, times beside what the link should take.

A namespace is held by a process of its own, never by a name, and every process started here dies with its parent
(PR_SET_PDEATHSIG): whatever ends the script, Ctrl-C, ``kill`` or ``kill -9``, nothing is left. The link is a veth pair
under a token bucket (tc tbf). With a delay it is a pair of TUN devices and a forwarder in between, since tc's netem is
not in every kernel.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import heapq
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from moeplan.errors import InputError, MoeplanError, RunError
from moeplan.units import parse_quantity

__all__ = ["Link", "Nodes", "pinned_core"]

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
PORT = 29500  # the namespaces are fresh: every port is free
SEGMENT_BYTES = 16384  # largest packet on the link: the token bucket must hold one
GRACE_S = 3.0
PRIORITY = 10


@dataclass(frozen=True, slots=True)
class Link:
    """What joins the nodes, each way: bytes per second (None: as fast as the kernel copies) and one-way delay."""

    bytes_per_s: float | None = None
    delay_s: float = 0.0


def pinned_core(rank: int) -> int:
    """Core of a rank: the cores this process may use, in turn."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[rank % len(cores)]


def _child(namespace: int | None = None, fresh: bool = False, core: int | None = None) -> Callable[[], None]:
    """What a child does before its programme: die with the parent; enter or make a namespace; take its core."""
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def setup() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        failed = fresh and libc.unshare(CLONE_NEWNET)
        if namespace is not None:
            failed = libc.setns(namespace, CLONE_NEWNET)
        if failed:
            raise OSError(ctypes.get_errno(), "network namespace")
        if core is not None:
            os.sched_setaffinity(0, {core})

    return setup


def _require_tools() -> None:
    missing = [tool for tool in ("ip", "tc", "nsenter") if shutil.which(tool) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} missing: two nodes need iproute2 and util-linux; apt-get install both")
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise InputError("network namespaces need Linux and root; run as root, or without two nodes")


class Nodes(AbstractContextManager["Nodes"]):
    """Nodes of equal size on this machine. One node needs neither root nor Linux: no namespace, no link.

    ``priority``: real-time priority of the ranks (0: none); needs root.

    Raises:
        InputError: tools or rights are missing.
    """

    def __init__(self, num_nodes: int, ranks_per_node: int, link: Link | None = None, priority: int = 0) -> None:
        self.num_nodes, self.ranks_per_node, self.link, self.priority = num_nodes, ranks_per_node, link, priority
        self._processes: list[subprocess.Popen[bytes]] = []
        self._namespaces: list[int] = []
        if num_nodes not in (1, 2):
            raise InputError(f"nodes ({num_nodes}): one or two can be emulated here")

    @property
    def world(self) -> int:
        """Ranks of all nodes."""
        return self.num_nodes * self.ranks_per_node

    def __enter__(self) -> Nodes:
        if self.num_nodes > 1:
            _require_tools()
            try:
                self._join(self.link or Link())
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._namespaces:
            os.close(handle)
        self._namespaces = []
        _end(self._processes)
        self._processes = []

    def _start(self, command: Sequence[str], setup: Callable[[], None], **options: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, preexec_fn=setup, start_new_session=True, **options)
        self._processes.append(process)
        return process

    def _tool(self, node: int, *command: str) -> None:
        done = subprocess.run(
            ["nsenter", f"--net=/proc/{self._processes[node].pid}/ns/net", *command], capture_output=True, text=True
        )
        if done.returncode:
            raise InputError(f"{' '.join(command)}: {done.stderr.strip()}; does the kernel have veth, tbf and tun?")

    def _join(self, link: Link) -> None:
        for _ in range(2):
            holder = self._start(["sleep", "infinity"], _child(fresh=True))
            self._namespaces.append(os.open(f"/proc/{holder.pid}/ns/net", os.O_RDONLY))
        if link.delay_s:
            self._forward(link)
        else:
            self._tool(0, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns",
                       str(self._processes[1].pid))  # fmt: skip
        for node in range(2):
            self._tool(node, "ip", "address", "add", f"{self.address(node)}/24", "dev", "eth0")
            self._tool(node, "ip", "link", "set", "lo", "up")
            if not link.delay_s:
                self._tool(node, "ip", "link", "set", "eth0", "gso_max_size", str(SEGMENT_BYTES))
            self._tool(node, "ip", "link", "set", "eth0", "up", *(["mtu", str(SEGMENT_BYTES)] if link.delay_s else []))
            if link.bytes_per_s and not link.delay_s:
                rate = f"{round(link.bytes_per_s * 8)}bit"
                self._tool(node, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst",
                           str(2 * SEGMENT_BYTES), "limit", "16mb")  # fmt: skip

    def _forward(self, link: Link) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--forward"]
        command += [str(self._processes[0].pid), str(self._processes[1].pid)]
        command += [repr(link.bytes_per_s or 0.0), repr(link.delay_s)]
        process = self._start(command, _child(), stdout=subprocess.PIPE)
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise InputError("the forwarder of the delayed link did not start; does the kernel have /dev/net/tun?")

    def address(self, node: int) -> str:
        """IPv4 address of a node."""
        return "127.0.0.1" if self.num_nodes == 1 else f"10.77.0.{node + 1}"

    def environment(self, rank: int, port: int) -> dict[str, str]:
        """What torchrun would tell a rank."""
        node, local = divmod(rank, self.ranks_per_node)
        values: dict[str, object] = {"RANK": rank, "WORLD_SIZE": self.world, "LOCAL_RANK": local}
        values |= {"LOCAL_WORLD_SIZE": self.ranks_per_node, "GROUP_RANK": node, "GROUP_WORLD_SIZE": self.num_nodes}
        values |= {"MASTER_ADDR": self.address(0), "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1}
        values |= {"GLOO_SOCKET_IFNAME": "lo" if self.num_nodes == 1 else "eth0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        return {name: str(value) for name, value in values.items()}

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        while_running: Callable[[list[subprocess.Popen[bytes]]], object] = lambda _ranks: None,
    ) -> None:
        """Run ``command`` as every rank, each pinned to a core, and wait for all of them.

        Ranks but the first write to standard error. ``while_running`` is called some ten times a second.

        Raises:
            RunError: a rank ended with an error, or the time is up; the message names it and how it ended.
        """
        port = _free_port() if self.num_nodes == 1 else PORT
        ranks: list[subprocess.Popen[bytes]] = []
        started = time.monotonic()
        try:
            for rank in range(self.world):
                namespace = self._namespaces[rank // self.ranks_per_node] if self._namespaces else None
                ranks.append(
                    subprocess.Popen(
                        [*(["chrt", "-f", str(self.priority)] if self.priority else []), *command],
                        preexec_fn=_child(namespace, core=pinned_core(rank)),
                        start_new_session=True,
                        env={**os.environ, **self.environment(rank, port), **(environment or {})},
                        stdout=None if rank == 0 else sys.stderr.fileno(),
                    )
                )
            while any(process.poll() is None for process in ranks):
                while_running(ranks)
                if any(process.poll() for process in ranks):
                    time.sleep(0.05)  # who was killed goes before those who notice, but may be seen after them
                    break
                if timeout_s is not None and time.monotonic() - started > timeout_s:
                    late = [str(r) for r, process in enumerate(ranks) if process.poll() is None]
                    raise RunError(f"rank {', '.join(late)} not done after {timeout_s:g} s; ended")
                time.sleep(0.05)
            if codes := {r: process.returncode for r, process in enumerate(ranks) if process.poll()}:
                worst = min(codes, key=lambda r: codes[r])
                how = f"by signal {-codes[worst]}" if codes[worst] < 0 else f"with exit code {codes[worst]}"
                raise RunError(f"rank {worst} died {how}; the other ranks were ended")
        finally:
            _end(ranks)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End process groups: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None or number == signal.SIGKILL:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)
        until = time.monotonic() + GRACE_S
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------------- the delayed link


def _tun(holder: int) -> int:
    """A TUN device named eth0 in the namespace of a process; this process stays in that namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/proc/{holder}/ns/net").open("rb") as handle:
        if libc.setns(handle.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"eth0", 0x0001 | 0x1000))  # TUNSETIFF: IFF_TUN, IFF_NO_PI
    return tun


def forward(holders: Sequence[int], bytes_per_s: float, delay_s: float) -> None:
    """Carry packets both ways; each leaves when the link has sent those before it, and arrives a delay later."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY + 1))
    ends = [_tun(holder) for holder in holders]
    print("ready", flush=True)
    free_s = [0.0, 0.0]
    underway: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        wait = max(0.0, underway[0][0] - time.monotonic()) if underway else None
        for end in select.select(ends, [], [], wait)[0]:
            side = ends.index(end)
            with suppress(BlockingIOError):
                packet = os.read(end, 2 * SEGMENT_BYTES)
                now = time.monotonic()
                free_s[side] = max(now, free_s[side]) + (len(packet) / bytes_per_s if bytes_per_s else 0.0)
                count += 1
                heapq.heappush(underway, (free_s[side] + delay_s, count, 1 - side, packet))
        while underway and underway[0][0] <= time.monotonic():
            _, _, side, packet = heapq.heappop(underway)
            with suppress(BlockingIOError, OSError):  # a device that is going down drops packets, as links do
                os.write(ends[side], packet)


# ---------------------------------------------------------------------- check


def check_rank(megabytes: float) -> None:
    """Raw all-to-alls inside the node and across the link: values compared, the shortest of several times."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    elements = int(megabytes * 2**20 / 4)
    for name, splits in (
        ("inside a node", [elements if r // per_node == rank // per_node and r != rank else 0 for r in range(world)]),
        ("between nodes", [elements if r // per_node != rank // per_node and r % per_node == rank % per_node else 0
                           for r in range(world)]),
    ):  # fmt: skip
        source = torch.full((sum(splits),), float(rank))
        target = torch.empty(sum(splits))
        times = []
        for _ in range(5):
            dist.barrier()
            begun = time.perf_counter()
            dist.all_to_all_single(target, source, splits, splits)
            spent = torch.tensor(time.perf_counter() - begun, dtype=torch.float64)
            dist.all_reduce(spent, op=dist.ReduceOp.MAX)
            times.append(float(spent))
        peers = [r for r, size in enumerate(splits) if size]
        if peers and not bool((target == peers[0]).all()):
            raise SystemExit(f"rank {rank}: values from rank {peers[0]} are wrong")
        if rank == 0:
            print(f"{name}: {megabytes:g} MiB per rank in {min(times) * 1e3:.1f} ms", flush=True)
    dist.destroy_process_group()


def _stop(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    """See the module."""
    if sys.argv[1:2] == ["--forward"]:
        a, b, rate, delay = sys.argv[2:]
        return forward([int(a), int(b)], float(rate), float(delay))
    if sys.argv[1:2] == ["--check"]:
        return check_rank(float(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", default="200 Mbit/s", help="of the link, each way (default: 200 Mbit/s)")
    parser.add_argument("--delay", default="0 ms", help="one-way delay of the link")
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("command", nargs="*", help="what every rank runs; nothing: a check of the link")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    try:
        link = Link(parse_quantity(given.rate, "bytes per second"), parse_quantity(given.delay, "seconds"))
        with Nodes(2, given.ranks_per_node, link) as nodes:
            if given.command:
                nodes.run(given.command)
            else:
                nodes.run([sys.executable, str(Path(__file__).resolve()), "--check", "1"], timeout_s=100)
                assert link.bytes_per_s
                ideal = 2**20 * given.ranks_per_node / link.bytes_per_s + link.delay_s
                print(f"the link alone takes {ideal * 1e3:.1f} ms for {given.ranks_per_node} ranks' 1 MiB")
    except (MoeplanError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
