from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from report_plans import LAYERS, bare_plan, contiguous, evaluations, full_plan, load_LE

from moeplan.artifacts.placement import Placement
from moeplan.errors import PlanError
from moeplan.reports.summary import Evidence, key_figures, layer_rows, rank_load, relative_load


def test_rank_load_splits_replicas() -> None:
    load = load_LE()
    got_LR = rank_load(bare_plan().placement, load)
    # Slots by hand: ranks hold 0 1 2, 3 4, 1 5 and 6 7 0; experts 0 and 1 have two copies.
    e = load.T
    want = np.stack(
        [e[0] / 2 + e[1] / 2 + e[2], e[3] + e[4], e[1] / 2 + e[5], e[6] + e[7] + e[0] / 2], axis=1
    )
    np.testing.assert_allclose(got_LR, want)


def test_rank_load_follows_given_shares_and_empty_slots() -> None:
    placement = Placement(
        np.array([[0, 1, 0, -1]], dtype=np.int32), np.array([0, 0, 1, 1], dtype=np.int32), 2, 2, 2,
        share_LP=np.array([[0.25, 1.0, 0.75, 0.0]]),
    )  # fmt: skip
    np.testing.assert_allclose(rank_load(placement, np.array([[8.0, 5.0]])), [[7.0, 6.0]])


def test_relative_load_accounts_for_speed_and_ranks_without_slots() -> None:
    placement = Placement(np.array([[0, 1]], dtype=np.int32), np.array([0, 2], dtype=np.int32), 2, 3, 3)
    relative = relative_load(placement, rank_load(placement, np.array([[6.0, 6.0]])), np.array([1.0, 1.0, 0.5]))
    # 12 tokens over speed 1.5 take 8; rank 0 takes 6, rank 2 takes 12.
    np.testing.assert_allclose(relative, [[0.75, np.nan, 1.5]])


def test_load_of_another_model_is_refused() -> None:
    with pytest.raises(
        PlanError, match=r"load has shape \(2, 3\) but the placement has 12 layers of 8 experts"
    ):
        rank_load(bare_plan().placement, np.ones((2, 3)))


def test_rows_take_both_sides_from_the_load() -> None:
    load = load_LE()
    plan = full_plan()
    rows = layer_rows(plan, Evidence(load_LE=load, before=contiguous()))
    after, before = rank_load(plan.placement, load), load.reshape(LAYERS, 4, 2).sum(axis=2)
    for index, row in enumerate(rows):
        assert row.max_over_mean == pytest.approx(after[index].max() / after[index].mean())
        assert row.max_over_mean_before == pytest.approx(before[index].max() / before[index].mean())
        assert row.busiest_rank == int(after[index].argmax())
        assert row.nodes_per_token == 1.4


def test_rows_without_load_come_from_the_plan() -> None:
    rows = layer_rows(full_plan(), Evidence(evaluation_before=evaluations(1.5, 1.9)))
    assert rows[2].max_over_mean == pytest.approx(1.024)
    assert rows[2].max_over_mean_before == pytest.approx(1.504)
    assert rows[2].busiest_rank is None


def test_key_figures() -> None:
    figures = {figure.label: figure for figure in key_figures(full_plan(), Evidence())}
    assert list(figures) == [
        "Predicted step time", "Max/mean load", "Nodes per token", "Proven gap", "Migration", "Break-even",
    ]  # fmt: skip
    assert figures["Max/mean load"].before is None
    assert figures["Max/mean load"].after == "1.031"  # 1.02 plus the mean of 0 to 0.022
    assert "worst is layer 14 with 1.042" in figures["Max/mean load"].detail
    assert key_figures(bare_plan(), Evidence()) == []


def test_figures_before_name_their_placement_where_it_is_not_the_predictions() -> None:
    evidence = Evidence(load_LE=load_LE(), before=contiguous())
    same, other = (
        {figure.label: figure.before for figure in key_figures(full_plan(), replace(evidence, before_name=name))}
        for name in ("contiguous", "eplb.json")
    )
    assert not any("(" in (before or "") for before in same.values())
    assert other["Predicted step time"] == f"{same['Predicted step time']} (contiguous)"
    assert other["Max/mean load"] == f"{same['Max/mean load']} (eplb.json)"
