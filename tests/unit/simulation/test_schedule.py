"""Pipeline schedules: textbook bubbles, the best of all orders in tiny cases, causality in all."""

from __future__ import annotations

import itertools

import pytest

from moeplan.errors import SpecError
from moeplan.simulation.schedule import Op, Timed, one_forward_one_backward, run_schedule


def _run(p: int, m: int, v: int = 1, f: float = 1.0, b: float = 2.0, send: float = 0.0) -> list[Timed]:
    orders = one_forward_one_backward(p, m, v)
    return run_schedule(orders, lambda _s, op: f if op.kind == "forward" else b, lambda _s, _op: send, v)


@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 2), (4, 4), (4, 9), (8, 64), (5, 3)])
def test_bubble_of_1f1b_is_the_textbooks(p: int, m: int) -> None:
    end = max(t.end_s for t in _run(p, m))
    work = m * 3.0
    assert (end - work) / work == pytest.approx((p - 1) / m)


@pytest.mark.parametrize(("p", "m", "v"), [(2, 2, 2), (4, 8, 2), (4, 4, 3), (8, 16, 4)])
def test_interleaving_divides_the_bubble_by_the_chunks(p: int, m: int, v: int) -> None:
    end = max(t.end_s for t in _run(p, m, v))
    work = m * v * 3.0
    assert (end - work) / work == pytest.approx((p - 1) / (v * m))


def _orders(m: int) -> list[list[Op]]:
    """All orders of a stage in which each micro-batch goes forward before it goes backward."""
    ops = [Op(kind, i, 0) for i in range(m) for kind in ("forward", "backward")]
    return [
        list(order)
        for order in itertools.permutations(ops)
        if all(order.index(Op("forward", i, 0)) < order.index(Op("backward", i, 0)) for i in range(m))
    ]


@pytest.mark.parametrize(("f", "b", "send"), [(1.0, 2.0, 0.0), (1.0, 1.0, 0.5), (3.0, 1.0, 0.0)])
def test_no_order_of_two_stages_beats_1f1b(f: float, b: float, send: float) -> None:
    best = float("inf")
    for first, second in itertools.product(_orders(2), repeat=2):
        try:
            timed = run_schedule(
                [first, second], lambda _s, op: f if op.kind == "forward" else b, lambda _s, _op: send
            )
        except SpecError:
            continue
        best = min(best, max(t.end_s for t in timed))
    assert max(t.end_s for t in _run(2, 2, f=f, b=b, send=send)) == pytest.approx(best)


@pytest.mark.parametrize(("p", "m", "v"), [(4, 6, 1), (3, 6, 2), (4, 8, 3)])
def test_nothing_happens_before_what_it_needs_and_everything_happens_once(p: int, m: int, v: int) -> None:
    timed = _run(p, m, v, send=0.25)
    when = {(t.op.kind, t.op.micro_batch, t.op.chunk * p + t.stage): t for t in timed}
    assert len(when) == len(timed) == 2 * m * p * v
    for (kind, i, here), t in when.items():
        if kind == "forward" and here > 0:
            assert t.start_s >= when["forward", i, here - 1].end_s + 0.25 - 1e-12
        if kind == "backward":
            assert t.start_s >= when["forward", i, here].end_s - 1e-12
            if here < p * v - 1:
                assert t.start_s >= when["backward", i, here + 1].end_s + 0.25 - 1e-12
    for stage in range(p):
        mine = [t for t in timed if t.stage == stage]
        assert all(a.end_s <= b.start_s + 1e-12 for a, b in itertools.pairwise(mine))


def test_at_most_as_many_micro_batches_are_kept_as_stages_lie_ahead() -> None:
    p, m = 4, 12
    for stage, order in enumerate(one_forward_one_backward(p, m)):
        kept = list(itertools.accumulate(1 if op.kind == "forward" else -1 for op in order))
        assert max(kept) == p - stage
        assert kept[-1] == 0


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(SpecError, match=r"micro-batches \(5\) in multiples of stages \(2\)"):
        one_forward_one_backward(2, 5, 2)
    backwards_first = [[Op("backward", 0, 0), Op("forward", 0, 0)]]
    with pytest.raises(SpecError, match="stage 0 waits"):
        run_schedule(backwards_first, lambda _s, _op: 1.0, lambda _s, _op: 0.0)
