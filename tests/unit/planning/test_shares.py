from __future__ import annotations

import numpy as np

from moeplan.artifacts.placement import Placement
from moeplan.costs.counting import count_loads
from moeplan.planning.shares import weighted_shares


def test_shares_make_the_busiest_rank_least_busy():
    # Expert 0 (load 6) is on both ranks, experts 1 and 2 (loads 3 and 1) on one each: 2:4 levels both at 5.
    placement = Placement(np.array([[0, 1, 0, 2]], dtype=np.int32), np.array([0, 0, 1, 1], dtype=np.int32), 3, 2, 2)
    load = np.array([[6.0, 3.0, 1.0]])
    shared = weighted_shares(placement, load, np.ones(2))
    assert np.allclose(count_loads(load[None], shared)[0, 0], [5.0, 5.0])
    assert np.allclose(shared.share_LP, [[1 / 3, 1.0, 2 / 3, 1.0]])


def test_shares_follow_speed():
    placement = Placement(np.array([[0, 0]], dtype=np.int32), np.array([0, 1], dtype=np.int32), 1, 2, 2)
    shared = weighted_shares(placement, np.array([[3.0]]), np.array([1.0, 0.5]))
    assert np.allclose(shared.share_LP, [[2 / 3, 1 / 3]])
