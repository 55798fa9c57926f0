"""Max-min fair sharing: textbook networks, and its definition checked on random ones."""

from __future__ import annotations

import numpy as np
import pytest
import simpy

from moeplan.simulation.links import Links, max_min_rates


def _rates(routes: list[list[int]], capacity: list[float]) -> np.ndarray:
    start = np.concatenate([[0], np.cumsum([len(r) for r in routes])]).astype(np.int64)
    return max_min_rates(start, np.array([x for route in routes for x in route], np.int64), np.array(capacity, float))


def test_textbook_line_of_links() -> None:
    # Bertsekas and Gallager, fig. 6.11: one long session and one on each of the links.
    assert _rates([[0, 1], [0], [0], [1]], [1.0, 1.0]).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3])


def test_every_transfer_has_a_link_that_is_full_where_it_is_among_the_fastest() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        links = int(rng.integers(2, 7))
        routes = [
            rng.choice(links, rng.integers(1, links + 1), replace=False).tolist() for _ in range(rng.integers(1, 9))
        ]
        capacity = rng.uniform(1, 10, links)
        rate = _rates(routes, capacity.tolist())
        used = np.array([sum(r for r, route in zip(rate, routes, strict=True) if x in route) for x in range(links)])
        assert (used <= capacity * (1 + 1e-9)).all()
        for mine, route in zip(rate, routes, strict=True):
            bottleneck = [
                x
                for x in route
                if used[x] >= capacity[x] * (1 - 1e-9)
                and mine >= max(r for r, other in zip(rate, routes, strict=True) if x in other) * (1 - 1e-9)
            ]
            assert bottleneck


def _send(links: Links, routes: list[list[int]], sizes: list[float], done: dict[int, float], env: simpy.Environment,
          first: int = 0) -> None:  # fmt: skip
    links.send(
        np.array([len(r) for r in routes], np.int64),
        np.array([x for route in routes for x in route], np.int64),
        np.array(sizes),
        list(range(first, first + len(routes))),
        lambda key: done.__setitem__(key, env.now),
    )


def test_rates_rise_when_a_transfer_ends() -> None:
    env, done = simpy.Environment(), {}
    links = Links(env, np.array([2.0]))
    _send(links, [[0], [0]], [1.0, 3.0], done, env)
    env.run(until=10)
    assert done == pytest.approx({0: 1.0, 1: 2.0})  # both at 1 for a second, then one alone at 2
    assert links.moved_X.tolist() == pytest.approx([4.0])


def test_rates_fall_when_a_transfer_starts_later() -> None:
    env, done = simpy.Environment(), {}
    links = Links(env, np.array([1.0]))

    def later():
        yield env.timeout(1.0)
        _send(links, [[0]], [1.0], done, env, first=1)

    _send(links, [[0]], [2.0], done, env)
    env.process(later())
    env.run(until=10)
    assert done == pytest.approx({0: 3.0, 1: 3.0})


def test_a_transfer_without_links_arrives_at_once() -> None:
    env, done = simpy.Environment(), {}
    links = Links(env, np.array([1.0]))
    _send(links, [[], [0]], [5.0, 1.0], done, env)
    env.run(until=10)
    assert done == pytest.approx({0: 0.0, 1: 1.0})
