from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from moeplan.artifacts.placement import EMPTY
from moeplan.errors import InfeasibleError, TraceError
from moeplan.planning.cluster_ranks import by_dynamic_programming, by_program, by_sweeps
from moeplan.planning.clustering import cluster_experts
from moeplan.planning.moetuner import moetuner
from moeplan.testing.problems import make_problem


def _all_clusterings(experts: int, clusters: int) -> np.ndarray:
    return np.array(list(product(range(clusters), repeat=experts)))


@pytest.mark.parametrize("balance", ["deviation", "max"])
@pytest.mark.parametrize("equal_sizes", [True, False])
def test_clusters_are_as_even_as_brute_force(balance: str, equal_sizes: bool) -> None:
    rng = np.random.default_rng(3)
    every_XE = _all_clusterings(6, 3)
    for size_G in ([2, 2, 2], [3, 2, 1], [4, 4, 4]):
        if equal_sizes and sum(size_G) != 6:
            continue
        weight_E = rng.integers(1, 60, 6).astype(float)
        found_E, answer = cluster_experts(
            weight_E,
            np.array(size_G),
            equal_sizes=equal_sizes,
            balance=balance,
            tolerance=0.0,  # type: ignore[arg-type]
        )

        def cost(cluster_E: np.ndarray, weight_E: np.ndarray = weight_E) -> float:
            load_G = np.bincount(cluster_E, weights=weight_E, minlength=3)
            return float(abs(load_G - load_G.mean()).sum() if balance == "deviation" else load_G.max())

        counts_XG = np.stack([(every_XE == c).sum(axis=1) for c in range(3)], axis=1)
        fits_X = (
            (counts_XG == size_G).all(axis=1) if equal_sizes else ((counts_XG >= 1) & (counts_XG <= size_G)).all(axis=1)
        )
        best = min(cost(cluster_E) for cluster_E in every_XE[fits_X])
        assert cost(found_E) == pytest.approx(best)
        assert answer.objective * weight_E.sum() / 3 == pytest.approx(best)
        assert answer.gap < 1e-6


def test_a_node_limit_gives_a_gap_that_is_not_called_proven() -> None:
    weight_E = np.random.default_rng(0).lognormal(0, 0.6, 40)
    cluster_E, answer = cluster_experts(weight_E, np.full(8, 5), max_nodes=1)
    assert np.bincount(cluster_E).tolist() == [5] * 8
    assert answer.found
    assert answer.gap > 0.025


def test_sizes_that_hold_too_little_are_named() -> None:
    with pytest.raises(InfeasibleError, match=r"num_experts \(7\) do not fit 3 clusters of 0 to 2"):
        cluster_experts(np.ones(7), np.array([2, 2, 2]))


def slowest_pairs(traffic_LGG: np.ndarray, cost_GG: np.ndarray, cluster_LG: np.ndarray) -> float:
    """What the programs minimise, of a given answer."""
    pairs = zip(traffic_LGG, cluster_LG, cluster_LG[1:], strict=False)
    return sum(float((traffic_GG[np.ix_(before, after)] * cost_GG).max()) for traffic_GG, before, after in pairs)


def _chain(seed: int, layers: int, ranks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    cost_GG = rng.uniform(1, 3, (ranks, ranks))
    np.fill_diagonal(cost_GG, 0)
    return (
        rng.lognormal(0, 1, (layers - 1, ranks, ranks)),
        cost_GG,
        np.ones((layers, ranks, ranks), dtype=bool),
    )


def _brute_force(traffic_LGG: np.ndarray, cost_GG: np.ndarray, allowed_LCG: np.ndarray) -> float:
    ranks, best = len(cost_GG), np.inf
    for perms in product(permutations(range(ranks)), repeat=len(traffic_LGG) + 1):
        if all(allowed_LCG[layer, c, g] for layer, perm in enumerate(perms) for g, c in enumerate(perm)):
            best = min(best, slowest_pairs(traffic_LGG, cost_GG, np.array(perms)))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_program_and_dynamic_programming_reach_the_brute_force_optimum(seed: int) -> None:
    traffic_LGG, cost_GG, allowed_LCG = _chain(seed, 3, 3)
    if seed % 2:
        allowed_LCG[1, 0, 2] = allowed_LCG[2, 1, 0] = False
    best = _brute_force(traffic_LGG, cost_GG, allowed_LCG)
    exact_LG = by_dynamic_programming(traffic_LGG, cost_GG, allowed_LCG)
    program_LG, answer = by_program(traffic_LGG, cost_GG, allowed_LCG, tolerance=0.0)
    for cluster_LG in (exact_LG, program_LG):
        assert slowest_pairs(traffic_LGG, cost_GG, cluster_LG) == pytest.approx(best)
        assert allowed_LCG[np.arange(3)[:, None], cluster_LG, np.arange(3)].all()
    assert answer.gap < 1e-6


def test_slowest_pairs_counts_pairs_of_ranks_and_nothing_on_a_rank() -> None:
    traffic_LGG = np.array([[[5.0, 1.0], [2.0, 7.0]]])
    cost_GG = np.array([[0.0, 1.0], [10.0, 0.0]])
    assert slowest_pairs(traffic_LGG, cost_GG, np.array([[0, 1], [0, 1]])) == 20.0
    assert slowest_pairs(traffic_LGG, cost_GG, np.array([[0, 1], [1, 0]])) == 70.0


def test_one_step_of_the_sweeps_is_exact_and_more_layers_stay_close() -> None:
    for seed in range(5):
        two = _chain(seed, 2, 5)
        two[2][1, 0, 3] = False
        first_LG = by_sweeps(*two, sweeps=0)
        best = min(
            slowest_pairs(two[0], two[1], np.array([range(5), perm])) for perm in permutations(range(5)) if perm[3] != 0
        )
        assert slowest_pairs(two[0], two[1], first_LG) == pytest.approx(best)
        many = _chain(seed, 8, 5)
        optimum = slowest_pairs(many[0], many[1], by_dynamic_programming(*many))
        once, swept = (slowest_pairs(many[0], many[1], by_sweeps(*many, sweeps=n)) for n in (0, 4))
        assert optimum <= swept + 1e-9
        assert swept <= once + 1e-9


@pytest.mark.parametrize("assign", ["program", "exact", "sweeps"])
def test_all_ways_to_assign_give_valid_placements(assign: str) -> None:
    problem = make_problem(layers=2, experts=6, ranks=3)
    result = moetuner(problem, assign=assign)  # type: ignore[arg-type]
    result.placement.require_valid()
    assert result.status == "feasible"


def test_mixtral_size_on_four_and_eight_ranks() -> None:
    for ranks, per_node, how in ((4, 4, "all permutations"), (8, 4, "one after the other")):
        problem = make_problem(layers=32, experts=8, ranks=ranks, ranks_per_node=per_node, tokens=500)
        result = moetuner(problem)
        result.placement.require_valid()
        assert len(set(np.bincount(result.placement.rank_of_slot_P))) == 1
        assert any("32 of 32 layers within 2.5%" in note for note in result.notes)
        assert any(how in note for note in result.notes)


def test_unequal_clusters_hold_as_many_experts_per_rank_over_all_layers() -> None:
    problem = make_problem(layers=4, experts=6, ranks=2, slots=5, hot=0.8, seed=1)
    placement = moetuner(problem, equal_slots=False).placement
    placement.require_valid()
    used_LP = placement.physical_to_logical_LP != EMPTY
    assert used_LP.sum() == 24
    assert used_LP[:, :5].sum() == 12
    assert (used_LP[:, :5].sum(axis=1) != 3).any()


def test_a_load_of_counts_only_is_refused() -> None:
    problem = make_problem()
    object.__setattr__(problem.load, "trace", None)
    with pytest.raises(TraceError, match="moetuner plans by how tokens go from layer to layer"):
        moetuner(problem)
