"""Benches of exchanges between ranks: ``R`` ranks in ``N`` nodes of ``G`` ranks each.

Scopes are measured apart: all ranks; the ranks of one node; one rank per node. Two-level forms first exchange
inside nodes, then between ranks of the same place in their nodes; dispatch of tokens the other way round, so that one
copy goes to each node, as in DeepEP's normal mode. A sample is the slowest rank's time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.costs.roofline import expected_active
from moeplan.errors import SpecError
from moeplan.files import canonical_json, sha256_bytes
from moeplan.profiling.device import Device
from moeplan.profiling.protocol import Bench, Call, CpuTimer, CudaTimer, Series, shrunk

__all__ = ["OPS", "CollectiveTimer", "Communicator", "Exchange", "collective_benches", "most_elements", "uneven_splits"]

OPS = ("all_reduce", "all_gather", "reduce_scatter", "alltoall", "p2p")
_TWO_LEVEL = ("all_reduce", "alltoall")
_PHASES = ("dispatch", "combine")
Prepare = Callable[[Series, int], Call]


@dataclass(frozen=True, slots=True)
class Exchange:
    """What to measure. ``weight_RR`` shapes uneven all-to-alls: what rank i sends to rank j, in any unit.

    ``tokens`` lists (H, K, E) of layers whose dispatch and combine are measured, up to ``max_tokens`` per rank.
    """

    ops: tuple[str, ...] = OPS
    dtype: str = "fp32"
    max_bytes: int = 2**24
    weight_RR: tuple[tuple[float, ...], ...] | None = None
    tokens: tuple[tuple[int, int, int], ...] = ()
    max_tokens: int = 1024

    def traffic(self, built_in: str) -> str:
        """Name of the matrix in a table: times of different ones must not mix."""
        if self.weight_RR is None:
            return built_in
        return f"trace:{sha256_bytes(canonical_json(self.weight_RR).encode())[:12]}"


@dataclass(slots=True)
class Communicator:
    """The process group of this run; ``node_R`` is the node of each rank. Call after ``init_process_group``."""

    device: Device
    rank: int
    node_R: tuple[int, ...]
    dist: Any
    intra: Any = None
    inter: Any = None
    first_of_nodes: Any = None

    def __post_init__(self) -> None:
        members: dict[int, list[int]] = {}
        for rank, node in enumerate(self.node_R):
            members.setdefault(node, []).append(rank)
        sizes = {len(ranks) for ranks in members.values()}
        if len(sizes) > 1:
            raise SpecError(f"nodes hold {sorted(sizes)} ranks; give every node the same number of ranks")
        if len(members) == 1:
            return
        # Every rank takes part in making every group, in one order.
        for ranks in members.values():
            group = self.dist.new_group(ranks)
            if self.rank in ranks:
                self.intra = group
        for place in range(self.per_node):
            ranks = [ranks[place] for ranks in members.values()]
            group = self.dist.new_group(ranks)
            if self.rank in ranks:
                self.inter = group
            if place == 0:
                self.first_of_nodes = ranks

    @property
    def world(self) -> int:
        """``R``."""
        return len(self.node_R)

    @property
    def nodes(self) -> int:
        """``N``."""
        return len(set(self.node_R))

    @property
    def per_node(self) -> int:
        """``G``."""
        return self.world // self.nodes

    @property
    def two_levels(self) -> bool:
        """Whether there is something to exchange inside nodes and between them."""
        return self.nodes > 1 and self.per_node > 1

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        box = [value]
        where = {"device": self.device.torch.device("cuda")} if self.device.is_cuda else {}
        self.dist.broadcast_object_list(box, src=0, **where)
        return box[0]


    def most(self, value: float) -> float:
        """The largest value of all ranks."""
        torch = self.device.torch
        box = torch.tensor([value], dtype=torch.float64, device=self.device.kind)
        self.dist.all_reduce(box, op=self.dist.ReduceOp.MAX)
        return float(box.cpu())

    @property
    def room_bytes(self) -> int:
        """Bytes that the buffers of every rank may take now; ranks of a machine without GPUs share its memory."""
        return int(-self.most(-self.device.free_bytes // (1 if self.device.is_cuda else self.per_node)))


class CollectiveTimer:
    """Times a collective on all ranks at once; the samples are the largest over ranks, the same on all."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._timer = CudaTimer() if comm.device.is_cuda else CpuTimer(before=comm.dist.barrier)

    def time(self, call: Call, count: int) -> list[float]:
        """See :class:`moeplan.profiling.protocol.Timer`."""
        comm, torch = self._comm, self._comm.device.torch
        if comm.device.is_cuda:
            comm.dist.barrier()
        own = self._timer.time(call, count)
        slowest = torch.tensor(own, dtype=torch.float64, device=comm.device.kind)
        comm.dist.all_reduce(slowest, op=comm.dist.ReduceOp.MAX)
        return [float(value) for value in slowest.cpu()]


def uneven_splits(weight_RR: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole elements that rank i sends to rank j: in proportion to the weights, ``total`` per rank on average.

    Rows of equal weight hold exactly ``total``; an entry is its part of the row, rounded up or down. Sums along row i
    are cut i / R later than those of row 0, so that columns of like rows hold their share to within one as well.
    """
    ranks = len(weight_RR)
    upto_RR = weight_RR.cumsum(1)
    row_R = np.diff(_floor(upto_RR[:, -1].cumsum() * (total * ranks / weight_RR.sum())), prepend=0)
    part_RR = upto_RR / np.where(row_R, upto_RR[:, -1], 1.0)[:, None]
    cut_R = np.arange(ranks) / ranks
    return np.diff(_floor(part_RR * row_R[:, None] + cut_R[:, None]), prepend=0)


def _floor(value: NDArray[np.float64]) -> NDArray[np.int64]:
    whole: NDArray[np.int64] = np.floor(value.round(6)).astype(np.int64)  # 3 less an ulp is 3
    return whole


def most_elements(weight_RR: NDArray[np.float64], total: int) -> int:
    """What no rank sends or receives more of under :func:`uneven_splits` of ``total`` or less."""
    share_RR = weight_RR / weight_RR.sum() * (total * len(weight_RR))
    # Rounding adds less than one to a row, less than one more to each of its entries.
    return int(max(share_RR.sum(0).max(), share_RR.sum(1).max())) + 2 * len(weight_RR)


@dataclass(frozen=True, slots=True)
class _Case:
    """One series: its operation among ``ranks`` ranks in ``nodes`` nodes, through ``group``."""

    op: str
    algorithm: str
    distribution: str
    ranks: int
    nodes: int
    group: Any
    takes_part: bool
    peer: int = -1


def collective_benches(comm: Communicator, what: Exchange) -> list[Bench]:
    """All benches of a run, the same on every rank.

    Raises:
        SpecError: one rank only, or a type that no exchange carries.
    """
    if comm.world < 2:
        raise SpecError(
            "collectives need at least 2 ranks, this run has 1: start them with --ranks N or torchrun; one GPU"
            " cannot measure an all-to-all, and the public tables' entries stay marked as theirs"
        )
    if what.dtype not in ("fp32", "bf16", "fp16"):
        raise SpecError(f"dtype ({what.dtype}): exchanges are measured in fp32, bf16 or fp16")
    backend = "nccl" if comm.device.is_cuda else "gloo"
    asked, room = what, comm.room_bytes
    what = replace(what, max_bytes=_fitting(what.max_bytes, room, lambda size: _buffer_bytes(comm, what, size)))
    left_out = shrunk(f"collectives {backend}", asked.max_bytes, what.max_bytes, "bytes")
    cases: dict[str, _Case] = {}
    series = []
    scopes = [("all", comm.world, comm.nodes, None, True)]
    if comm.nodes > 1:
        scopes += [
            ("intra-node", comm.per_node, 1, comm.intra, True),
            ("inter-node", comm.nodes, comm.nodes, comm.inter, comm.rank in comm.first_of_nodes),
        ]
    for op in what.ops:
        for scope, ranks, nodes, group, part in scopes:
            if ranks < 2 or (op == "p2p" and scope == "all" and comm.nodes > 1):
                continue
            forms = [("flat", "even")]
            if scope == "all" and comm.two_levels and op in _TWO_LEVEL:
                forms.append(("two_level", "even"))
            if scope == "all" and op == "alltoall":
                forms.append(("flat", "uneven"))
            for algorithm, distribution in forms:
                peer = -1
                if op == "p2p":
                    other = comm.first_of_nodes[1] if scope == "inter-node" else 1
                    ranks, nodes, part = 2, min(nodes, 2), comm.rank in (0, other)
                    peer = other if comm.rank == 0 else 0
                case = _Case(op, algorithm, distribution, ranks, nodes, group, part, peer)
                label = f"{op} {algorithm} {distribution} {scope} {ranks} ranks {nodes} nodes"
                cases[label] = case
                series.append(_series(label, case, backend, what))
    name, smaller = f"collectives {backend}", "give a smaller --max-bytes"
    benches = [Bench(name, tuple(series), lambda: _open(comm, what, cases), left_out, smaller)]
    if "alltoall" in what.ops:
        benches += [_token_bench(comm, what, layer, backend, room) for layer in what.tokens]
    return benches


def _fitting(asked: int, room_bytes: int, needed: Callable[[int], int]) -> int:
    """The largest of ``asked``, its half, its quarter ... whose buffers fit; 1 at least."""
    while asked > 1 and needed(asked) > room_bytes:
        asked //= 2
    return asked


def _buffer_elements(comm: Communicator, what: Exchange, max_bytes: int) -> int:
    """Of the largest buffer: an uneven rank may receive several times the mean."""
    mean = max_bytes // _width(what)
    largest = max(most_elements(_weights(comm, what), mean), mean, comm.world)
    return comm.world * -(-largest // comm.world)


def _buffer_bytes(comm: Communicator, what: Exchange, max_bytes: int) -> int:
    return 2 * _width(what) * _buffer_elements(comm, what, max_bytes)


def _width(what: Exchange) -> int:
    return 4 if what.dtype == "fp32" else 2


def _series(label: str, case: _Case, backend: str, what: Exchange) -> Series:
    def row(size: int) -> Mapping[str, Any]:
        return {
            "backend": backend,
            "kernel": f"{backend}_{case.op}",
            "op": case.op,
            "dtype": what.dtype,
            "ranks": case.ranks,
            "nodes": case.nodes,
            "message_size_bytes": size,
            "algorithm": case.algorithm,
            "distribution": what.traffic("uneven") if case.distribution == "uneven" else case.distribution,
        }

    return Series("collectives", label, row, 256, what.max_bytes, 7)


def _weights(comm: Communicator, what: Exchange) -> NDArray[np.float64]:
    """What the caller gave, or a seeded skewed choice of experts by tokens of every rank."""
    if what.weight_RR is not None:
        weight_RR = np.asarray(what.weight_RR, float)
        if weight_RR.shape != (comm.world, comm.world) or weight_RR.min() < 0 or weight_RR.sum() <= 0:
            raise SpecError(
                f"traffic matrix has shape {weight_RR.shape}; it must be {comm.world} x {comm.world}, not"
                " negative and not all zero"
            )
        return weight_RR
    popularity_R = np.random.default_rng(0).dirichlet(np.full(comm.world, 2.0))
    return np.tile(popularity_R, (comm.world, 1))


def _open(comm: Communicator, what: Exchange, cases: Mapping[str, _Case]) -> Prepare:
    dist = comm.dist
    # Renamed in torch 2.13; the old names warn there.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    kind = comm.device.dtype(what.dtype)
    width, weight_RR = _width(what), _weights(comm, what)
    room = _buffer_elements(comm, what, what.max_bytes)
    turns = comm.device.copies(2 * room * width, most=4)
    sources = [comm.device.normal((room,), kind) for _ in range(turns)]
    targets = [comm.device.normal((room,), kind) for _ in range(turns)]

    def prepare(series: Series, size: int) -> Call:
        case = cases[series.label]
        elements = max(1, size // width)
        each = max(1, elements // case.ranks)
        whole = each * case.ranks

        def all_reduce(a: Any, b: Any) -> None:
            dist.all_reduce(a[:elements], group=case.group)

        def all_reduce_two_level(a: Any, b: Any) -> None:
            part = -(-elements // comm.per_node)
            mine = b[:part]
            scatter(mine, a[: part * comm.per_node], group=comm.intra)
            dist.all_reduce(mine, group=comm.inter)
            gather(a[: part * comm.per_node], mine, group=comm.intra)

        def all_gather(a: Any, b: Any) -> None:
            gather(b[:whole], a[:each], group=case.group)

        def reduce_scatter(a: Any, b: Any) -> None:
            scatter(b[:each], a[:whole], group=case.group)

        def alltoall(a: Any, b: Any) -> None:
            dist.all_to_all_single(b[:whole], a[:whole], group=case.group)

        def alltoall_two_level(a: Any, b: Any) -> None:
            # [node, place, x]: to the rank of my node that has the place, then to the node.
            by_place = a[:whole].view(comm.nodes, comm.per_node, each).transpose(0, 1).contiguous()
            half = b[:whole].view(comm.per_node, comm.nodes, each)
            dist.all_to_all_single(half, by_place, group=comm.intra)
            by_node = half.transpose(0, 1).contiguous()
            dist.all_to_all_single(b[:whole].view(by_node.shape), by_node, group=comm.inter)

        split_RR = uneven_splits(weight_RR, elements)
        out, into = split_RR[comm.rank].tolist(), split_RR[:, comm.rank].tolist()

        def alltoall_uneven(a: Any, b: Any) -> None:
            dist.all_to_all_single(b[: sum(into)], a[: sum(out)], into, out)

        def p2p(a: Any, b: Any) -> None:
            if comm.rank == 0:
                dist.send(a[:elements], case.peer)
            else:
                dist.recv(b[:elements], case.peer)

        by_name = {f.__name__: f for f in (all_reduce, all_gather, reduce_scatter, alltoall, p2p)}
        by_name |= {f.__name__: f for f in (all_reduce_two_level, alltoall_two_level, alltoall_uneven)}
        suffix = "_two_level" * (case.algorithm == "two_level") + "_uneven" * (case.distribution == "uneven")
        run = by_name[case.op + suffix]
        return lambda i: run(sources[i % turns], targets[i % turns]) if case.takes_part else None

    return prepare


def _token_bench(
    comm: Communicator, what: Exchange, layer: tuple[int, int, int], backend: str, room_bytes: int
) -> Bench:
    """Dispatch and combine of tokens by their choices: one copy per (token, expert) pair; on two levels one per node,
    passed on there to each rank that is chosen."""
    hidden, top_k, num_experts = layer
    name = f"tokens H{hidden} K{top_k} {backend}"
    forms = _forms(comm, what)
    asked = what.max_tokens
    high = _fitting(asked, room_bytes, lambda tokens: 2 * _width(what) * hidden * _rows(forms, tokens * top_k))
    what = replace(what, max_tokens=high)
    ways = [("flat", "balanced"), ("flat", "explicit"), *([("two_level", "balanced")] if comm.two_levels else [])]
    kinds = {f"tokens {phase} {mode} {form}": (mode, phase, form) for phase in _PHASES for mode, form in ways}
    series = []
    for label, (mode, phase, form) in kinds.items():

        def row(tokens: int, mode: str = mode, phase: str = phase, form: str = form) -> Mapping[str, Any]:
            return {
                "backend": backend,
                "kernel": f"{backend}_alltoall",
                "mode": mode,
                "phase": phase,
                "nodes": comm.nodes,
                "ranks": comm.world,
                "hidden": hidden,
                "top_k": top_k,
                "num_experts": num_experts,
                "dtype": what.dtype,
                "tokens_per_rank": tokens,
                "distribution": what.traffic("explicit") if form == "explicit" else form,
            }

        series.append(Series("alltoall", f"{label} H{hidden} K{top_k} {comm.world} ranks", row, 1, what.max_tokens, 6))
    names = {s.label: kind for s, kind in zip(series, kinds.values(), strict=True)}
    return Bench(
        name, tuple(series), lambda: _open_tokens(comm, what, hidden, top_k, names), shrunk(name, asked, high)
    )


def _forms(comm: Communicator, what: Exchange) -> dict[str, NDArray[np.float64]]:
    return {"balanced": _even(comm.world), "explicit": _weights(comm, what)}


def _even(ranks: int) -> NDArray[np.float64]:
    return np.ones((ranks, ranks))


def _rows(forms: Mapping[str, NDArray[np.float64]], pairs: int) -> int:
    return 1 + max(most_elements(weight_RR, pairs) for weight_RR in forms.values())


def _open_tokens(
    comm: Communicator, what: Exchange, hidden: int, top_k: int, names: Mapping[str, tuple[str, str, str]]
) -> Prepare:
    dist = comm.dist
    kind = comm.device.dtype(what.dtype)
    forms = _forms(comm, what)
    room = _rows(forms, what.max_tokens * top_k)
    source, target = (comm.device.normal((room, hidden), kind) for _ in range(2))

    def hop(weight_MM: NDArray[np.float64], rows: int, group: Any, phase: str) -> partial[Any]:
        split_MM = uneven_splits(weight_MM, rows)
        if phase == "combine":
            split_MM = split_MM.T
        me = dist.get_rank(group)
        out, into = split_MM[me].tolist(), split_MM[:, me].tolist()
        return partial(dist.all_to_all_single, target[: sum(into)], source[: sum(out)], into, out, group=group)

    def prepare(series: Series, tokens: int) -> Call:
        mode, phase, form = names[series.label]
        hops = [(forms[form], tokens * top_k, None)]
        if mode == "two_level":  # rows: the nodes, and the ranks of all nodes, that a token's choices fall on
            per_node, per_rank = (round(tokens * expected_active(n, top_k)) for n in (comm.nodes, comm.world))
            hops = [(_even(comm.nodes), per_node, comm.inter), (_even(comm.per_node), per_rank, comm.intra)]
        calls = [hop(*each, phase) for each in (hops if phase == "dispatch" else hops[::-1])]
        return lambda _i: [call() for call in calls]

    return prepare
