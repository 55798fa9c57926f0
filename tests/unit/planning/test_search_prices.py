"""What searches charge for an exchange is what evaluation does, on any placement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moeplan.costs.evaluation import evaluate
from moeplan.planning.prepare import layer_tokens, prepare
from moeplan.planning.search_home import group_arrivals, slowest_and_mean
from moeplan.specs.workload import Objective
from moeplan.testing.problems import make_problem

LINKS = {
    "alike": (),
    "a slow rank": (1.0, 0.25, *[1.0] * 6),
    "a slow node": (0.5, 0.5, *[1.0] * 6),
    "all unlike": tuple(np.linspace(0.3, 1.0, 8)),
}


@pytest.mark.parametrize("links", LINKS)
@pytest.mark.parametrize(
    ("dispatch", "homes"),
    [("per_node", False), ("per_node", True), ("per_rank", False), ("per_rank", True), ("per_expert", True)],
)
@pytest.mark.parametrize("ranks_per_nic", [1, 2])
def test_searches_charge_both_paths_as_evaluation_does(links, dispatch, homes, ranks_per_nic):
    problem = make_problem(
        layers=4, experts=24, ranks=8, ranks_per_node=2, top_k=3, tokens=640, seed=1,
        objective=Objective(dispatch=dispatch),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    if homes:
        trace = problem.load.trace
        assert trace is not None
        home_T = (trace.experts_TLK[:, 0, 0] // 3).astype(np.int32)  # homes have experts of their own
        problem = replace(problem, load=replace(problem.load, trace=replace(trace, source_rank_T=home_T)))
    problem = replace(problem, costs=replace(problem.costs, link_R=LINKS[links], ranks_per_nic=ranks_per_nic))
    rows = np.stack([rng.permutation(24) for _ in range(4)])
    found = evaluate(problem.load, problem.placement(rows), problem.costs, problem.objective, problem.speed_R)
    ready, nodes = prepare(problem), problem.num_nodes
    for layer, row_P in enumerate(rows):
        data = layer_tokens(ready, layer, row_P)
        slots = data.copy_of_slot_P
        into_WG = group_arrivals(data.bits_PM, slots, data.first_G, data.away_GM, data.start_W)
        between = slowest_and_mean(data.weight_W @ into_WG, data.pace_X, nodes, True)[0]
        assert data.group_price * between == pytest.approx(found.node_path_WL[0, layer], rel=1e-9)
        everyone_GM = ~np.zeros((1, data.bits_PM.shape[1]), np.uint64)
        into_WR = group_arrivals(data.bits_PM, slots, data.first_R, everyone_GM, data.start_W)
        inside = slowest_and_mean(data.weight_W @ into_WR, data.pace_R, nodes, False)[0]
        assert ready.rank_price_s * inside == pytest.approx(found.rank_path_WL[0, layer], rel=1e-9)
