"""Outputs and gradients of the expert-parallel layer equal those of one process, wherever the experts are."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="live runs need torch")

from dense_reference import dense_moe, random_placement

from moeplan.artifacts.placement import Placement
from moeplan.errors import PlanError, SpecError
from moeplan.execution.clock import Clock
from moeplan.execution.dispatch import make_dispatcher
from moeplan.execution.groups import build_mesh, single_mesh
from moeplan.execution.launch import Launch, Rank, run_ranks
from moeplan.execution.layer import ExpertLayer, MoELayer, SharedExpert
from moeplan.execution.options import RouterOptions
from moeplan.execution.router import Router
from moeplan.execution.sync import sync_copies

H, F, E, K = 32, 32, 12, 3


def _layer_case(me: Rank, case: dict) -> dict[str, float]:
    """One placement on one mesh: the greatest relative error of outputs and gradients."""
    mesh = build_mesh(case["tp"], case["edp"], case["per_node"])
    rng = np.random.default_rng(case["seed"])
    placement = random_placement(
        rng, 2, E, mesh.ep.size, mesh.ranks_per_node, case["extra"], case["split"] == "weighted", case["empty"]
    )
    dtype = case.get("dtype", torch.float32)
    generator = torch.Generator().manual_seed(case["seed"])
    rows_EW = (torch.randn(E, 3 * H * F, generator=generator) * 0.2).to(dtype)
    sizes = rng.integers(0, 20, size=mesh.dp.size)
    sizes[0] = 0 if case.get("idle") else max(1, sizes[0])
    x_all = [torch.randn(int(n), H, generator=generator).to(dtype) for n in sizes]
    experts_all = [torch.rand(int(n), E, generator=generator).topk(K, 1).indices for n in sizes]
    for ids in experts_all:
        ids[torch.rand(ids.shape, generator=generator) < case.get("dropped", 0.0)] = -1
    weights_all = [torch.rand(int(n), K, generator=generator) for n in sizes]
    target_all = [torch.randn(int(n), H, generator=generator).double() for n in sizes]

    # One process, in double precision.
    dense = [rows_EW.double().requires_grad_()]
    for parts in (x_all, weights_all):
        dense.append(torch.cat(parts).double().requires_grad_())
    out = dense_moe(dense[1], torch.cat(experts_all), dense[2], dense[0], H, F)
    (out * torch.cat(target_all)).sum().backward()

    here = mesh.dp.rank
    clock = Clock(me.rank, enabled=True)
    layer = ExpertLayer(
        mesh, H, F, placement, 1, split=case["split"], dtype=dtype, clock=clock,
        dispatcher=make_dispatcher(case["dispatch"], mesh, clock),
    )  # fmt: skip
    layer.load(lambda e: rows_EW[e])
    x, w = x_all[here].clone().requires_grad_(), weights_all[here].clone().requires_grad_()
    y = layer(x, experts_all[here], w)
    (y * target_all[here].to(y.dtype)).sum().backward()

    part = slice(int(sizes[:here].sum()), int(sizes[: here + 1].sum()))
    errors = {
        "output": _error(y, out[part]),
        "grad x": _error(x.grad, dense[1].grad[part]),
        "grad weights": _error(w.grad, dense[2].grad[part]),
    }
    # Copies and expert-data-parallel ranks each saw a part of the tokens: their gradients sum to the whole.
    total = torch.zeros(E, layer.shape.row_size, dtype=torch.float64)
    for s, e in enumerate(layer.table.local_experts_S.tolist()):
        if e >= 0:
            total[e] += layer.weights_SW.grad[s].double()
        else:
            assert not layer.weights_SW.grad[s].any()
    mesh.ep.sum_(total)
    mesh.edp.sum_(total)
    whole = layer.shape.local_part(dense[0].grad)
    errors["grad experts"] = _error(total, whole)
    # Copies told each other: every one has the whole gradient.
    sync_copies([layer], mesh, clock)
    mesh.edp.sum_(layer.weights_SW.grad)
    held = [(s, e) for s, e in enumerate(layer.table.local_experts_S.tolist()) if e >= 0]
    got = torch.stack([layer.weights_SW.grad[s] for s, _ in held]) if held else whole[:0]
    errors["grad copies"] = _error(got, whole[[e for _, e in held]])
    return errors


def _error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    if not wanted.numel():
        return float(value.numel())
    return float((value.double() - wanted.double()).abs().max() / (wanted.abs().max() + 1e-9))


def _layer_cases(me: Rank, cases: list[dict]) -> list[dict[str, float]]:
    return [_layer_case(me, case) for case in cases]


def _cases(world: int) -> list[dict]:
    cases: list[dict] = []
    meshes = [(1, 1)] + ([(2, 1), (1, 2)] if world >= 4 else [(2, 1)] if world == 2 else [])
    for tp, edp in meshes:
        ep = world // tp // edp
        for number, dispatch in enumerate(("per_expert", "per_node", "per_rank", "allgather")):
            for split in ("even", "weighted", "nearest") if dispatch in ("per_expert", "per_node") else ("even",):
                cases.append({
                    "tp": tp, "edp": edp, "per_node": max(1, ep // 2), "dispatch": dispatch, "split": split,
                    "extra": (0, 3, 6)[len(cases) % 3], "dropped": 0.2 * (len(cases) % 2), "idle": len(cases) % 4 == 3,
                    "empty": len(cases) % 5 == 4, "seed": 100 * world + 10 * len(cases) + number,
                })  # fmt: skip
    return cases


@pytest.mark.parametrize("world", [1, 2, 4])
def test_equals_dense_reference(world: int) -> None:
    cases = _cases(world)
    for errors_per_case in run_ranks(Launch(world), _layer_cases, cases):
        for case, errors in zip(cases, errors_per_case, strict=True):
            assert max(errors.values()) < 2e-5, (case, errors)


def test_eight_ranks_and_bfloat16() -> None:
    base = {"tp": 1, "edp": 1, "per_node": 4, "split": "even", "extra": 5, "empty": False}
    cases = [
        {**base, "dispatch": "per_expert", "seed": 1},
        {**base, "dispatch": "per_node", "seed": 2},
        {**base, "tp": 2, "edp": 2, "per_node": 1, "dispatch": "per_node", "seed": 3},
        {**base, "dispatch": "per_expert", "seed": 4, "dtype": torch.bfloat16},
        {**base, "dispatch": "per_node", "seed": 5, "dtype": torch.bfloat16},
    ]
    for errors_per_case in run_ranks(Launch(8), _layer_cases, cases):
        for case, errors in zip(cases, errors_per_case, strict=True):
            limit = 3e-2 if case.get("dtype") is torch.bfloat16 else 2e-5  # bf16: 8 bits, a few roundings
            assert max(errors.values()) < limit, (case, errors)


def _bitwise(me: Rank, placements: list[Placement]) -> list[list[np.ndarray]]:
    """Output and gradients under each placement; gradients of experts by logical number."""
    mesh = build_mesh()
    generator = torch.Generator().manual_seed(me.rank)
    x = torch.randn(50, H, generator=generator)
    router = Router(H, E, RouterOptions(top_k=K))
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    answers = []
    for placement in placements:
        layer = MoELayer(router, ExpertLayer(mesh, H, F, placement, 0))
        rows = torch.randn(E, 3 * H * F, generator=torch.Generator().manual_seed(5))
        layer.experts.load(lambda e, rows=rows: rows[e])
        mine = x.clone().requires_grad_()
        router.weight.grad = None
        y = layer(mine)
        y.square().sum().backward()
        gathered = torch.zeros(E, 3 * H * F)
        for s, e in enumerate(layer.experts.table.local_experts_S.tolist()):
            gathered[e] = layer.experts.weights_SW.grad[s]
        mesh.ep.sum_(gathered)  # one rank's value and zeros: exact
        answers.append([v.numpy().copy() for v in (y.detach(), mine.grad, router.weight.grad, gathered)])
    return answers


def test_placement_changes_no_bit_in_float32() -> None:
    rng = np.random.default_rng(3)
    placements = [random_placement(rng, 1, E, 4, 2, 0) for _ in range(4)]
    for first, *others in run_ranks(Launch(4), _bitwise, placements):
        for other in others:
            for a, b in zip(first, other, strict=True):
                assert np.array_equal(a, b)


def test_shared_expert_is_added_to_every_token() -> None:
    placement = random_placement(np.random.default_rng(0), 1, E, 1, 1, 0)
    shared = SharedExpert(H, 2 * F)
    experts = ExpertLayer(single_mesh(), H, F, placement, 0)  # all zeros: only the shared expert speaks
    layer = MoELayer(Router(H, E, RouterOptions(top_k=K)), experts, shared)
    x = torch.randn(2, 7, H)
    torch.testing.assert_close(layer(x), shared(x))


def test_copies_take_their_share_of_tokens() -> None:
    share = np.array([[0.7, 1.0, 0.3]])
    placement = Placement(np.array([[0, 1, 0]], np.int32), np.array([0, 0, 1], np.int32), 2, 2, 1, share)
    from moeplan.execution.groups import Axis
    from moeplan.execution.table import LayerTable

    experts = torch.zeros(1000, 1, dtype=torch.int64)
    for rank in (0, 1):
        axis = Axis(rank, (0, 1))
        counts = torch.bincount(LayerTable(placement, 0, axis, "weighted").slots(experts).flatten(), minlength=3)
        assert counts.tolist() == [700, 0, 300]
        counts = torch.bincount(LayerTable(placement, 0, axis, "even").slots(experts).flatten(), minlength=3)
        assert counts.tolist() == [500, 0, 500]
        nearest = LayerTable(placement, 0, axis, "nearest").slots(experts).flatten().unique()
        assert nearest.tolist() == [0 if rank == 0 else 2]
    # One token per rank: ranks begin at different copies, so that the copies still share the work.
    one = torch.zeros(1, 1, dtype=torch.int64)
    assert {int(LayerTable(placement, 0, Axis(r, (0, 1)), "even").slots(one)) for r in (0, 1)} == {0, 2}


def test_wrong_sizes_are_refused() -> None:
    placement = random_placement(np.random.default_rng(0), 1, E, 2, 1, 0)
    with pytest.raises(PlanError, match=r"num_ranks \(2\).*expert-parallel size \(1\)"):
        ExpertLayer(single_mesh(), H, F, placement, 0)
    with pytest.raises(SpecError, match=r"world size \(2\) is not a multiple of tp \(3\)"):
        run_ranks(Launch(2), _mesh_of_three)


def _mesh_of_three(_me: Rank) -> None:
    build_mesh(tp=3)
