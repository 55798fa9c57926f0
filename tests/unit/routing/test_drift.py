"""The drift test: its distance by hand, its false alarms at the stated rate, and changes it must see."""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.errors import TraceError
from moeplan.routing.drift import Drift, drift_between


def window(rng, popularity_LE, blocks=8, tokens=200, restless=0.0):
    """Blocks whose popularity wanders by ``restless``: tokens of one block are alike."""
    out = []
    for _ in range(blocks):
        p = popularity_LE * np.exp(rng.normal(0, restless, popularity_LE.shape))
        out.append([rng.multinomial(tokens, row / row.sum()) for row in p])
    return np.array(out)


def test_distance_is_the_share_of_tokens_that_moved():
    before = np.tile(np.array([[[60, 40, 0], [50, 25, 25]]]), (4, 1, 1))
    now = np.tile(np.array([[[60, 20, 20], [50, 25, 25]]]), (4, 1, 1))
    found = drift_between(before, now)
    assert found.distance == pytest.approx((0.2 + 0.0) / 2)
    # of the 70 ways to part 8 blocks 4 : 4 two show as much: p is about 2 / 70
    assert 1 / 500 <= found.p_value < 0.08


@pytest.mark.parametrize("restless", [0.0, 0.3])
def test_false_alarms_come_at_the_stated_rate(restless):
    rng = np.random.default_rng(0)
    popularity = rng.lognormal(0, 0.6, (3, 16))
    alarms = sum(
        drift_between(window(rng, popularity, restless=restless), window(rng, popularity, restless=restless),
                      seed=i, permutations=199).p_value <= 0.1
        for i in range(200)
    )  # fmt: skip
    assert 8 <= alarms <= 34  # 20 expected; binomial, 3 standard deviations


def test_a_change_is_found_and_a_tiny_one_is_let_be():
    rng = np.random.default_rng(1)
    popularity = rng.lognormal(0, 0.6, (3, 16))
    changed = popularity * np.exp(rng.normal(0, 0.4, popularity.shape))
    assert drift_between(window(rng, popularity), window(rng, changed)).found()
    assert not drift_between(window(rng, popularity), window(rng, popularity)).found()
    assert Drift(0.05, 0.03, 0.001).found()
    assert not Drift(0.04, 0.03, 0.001).found()
    assert not Drift(0.5, 0.1, 0.02).found()


def test_windows_of_other_models_and_empty_ones_are_refused():
    some = np.ones((4, 2, 3), int)
    with pytest.raises(TraceError, match="do not compare"):
        drift_between(some, np.ones((4, 2, 4), int))
    with pytest.raises(TraceError, match="later window has a layer without tokens"):
        drift_between(some, some * np.array([[[1], [0]]]))
