from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="live runs need torch")

from moeplan.errors import SpecError
from moeplan.execution.groups import Axis
from moeplan.execution.options import RouterOptions
from moeplan.execution.router import Router

T, H, E = 64, 16, 8


def _router(**options) -> tuple[Router, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    router = Router(H, E, RouterOptions(**options))
    torch.nn.init.normal_(router.weight)
    x = torch.randn(T, H)
    return router, x, x @ router.weight.detach().t()


def test_softmax_top_k_is_mixtrals() -> None:
    router, x, logits = _router(top_k=2)
    routing = router(x)
    for t in range(T):
        best = sorted(range(E), key=lambda e: -float(logits[t, e]))[:2]
        assert routing.experts_TK[t].tolist() == best
        torch.testing.assert_close(routing.weights_TK[t], logits[t, best].softmax(0))  # softmax of the chosen
    assert routing.load_E.sum() == 2 * T


def test_group_limited_sigmoid_is_deepseek_v3s() -> None:
    router, x, logits = _router(top_k=3, score="sigmoid", n_group=4, topk_group=2, group_top=2, scale=2.5)
    router.bias_E += torch.linspace(-0.2, 0.2, E)
    with torch.no_grad():
        routing = router(x)
    for t in range(T):
        score = [1 / (1 + math.exp(-float(v))) for v in logits[t]]
        biased = [s + float(b) for s, b in zip(score, router.bias_E, strict=True)]
        groups = sorted(range(4), key=lambda g: -(biased[2 * g] + biased[2 * g + 1]))[:2]
        allowed = [e for e in range(E) if e // 2 in groups]
        best = sorted(allowed, key=lambda e: -biased[e])[:3]
        assert routing.experts_TK[t].tolist() == best
        total = sum(score[e] for e in best)  # the bias chooses, it does not weigh
        for k, e in enumerate(best):
            assert float(routing.weights_TK[t, k]) == pytest.approx(2.5 * score[e] / total, rel=1e-5)


@pytest.mark.parametrize("drop", ["position", "score"])
def test_capacity_drops_those_beyond_it(drop: str) -> None:
    free, x, _ = _router(top_k=2)
    limited, _, _ = _router(top_k=2, capacity_factor=1.0, drop=drop)
    with torch.no_grad():
        all_choices, kept = free(x), limited(x)
    capacity = math.ceil(T * 2 / E)
    assert int(all_choices.load_E.max()) > capacity  # something is to be dropped
    for e in range(E):
        pairs = [(t, k) for t in range(T) for k in range(2) if int(all_choices.experts_TK[t, k]) == e]
        if drop == "score":
            pairs.sort(key=lambda p: -float(all_choices.weights_TK[p]))
        stay = set(pairs[:capacity])
        for p in pairs:
            assert (int(kept.experts_TK[p]) == e) == (p in stay)
            assert float(kept.weights_TK[p]) == (float(all_choices.weights_TK[p]) if p in stay else 0.0)


def test_experts_choose_their_tokens() -> None:
    router, x, logits = _router(top_k=2, expert_choice=True)
    with torch.no_grad():
        routing = router(x)
    probability = logits.softmax(1)
    capacity = T * 2 // E
    found = {(t, int(e)) for t in range(T) for e in routing.experts_TK[t] if e >= 0}
    wanted = {(int(t), e) for e in range(E) for t in probability[:, e].topk(capacity).indices}
    assert found == wanted
    assert (routing.load_E == capacity).all()
    t, k = (routing.experts_TK >= 0).nonzero()[5].tolist()
    assert float(routing.weights_TK[t, k]) == pytest.approx(float(probability[t, routing.experts_TK[t, k]]))


def test_auxiliary_loss_is_one_when_balanced_and_falls_by_its_gradient() -> None:
    router, x, _ = _router(top_k=1, aux_loss=1.0)
    with torch.no_grad():
        router.weight.zero_()
    assert float(router(x).aux_loss.detach()) == pytest.approx(1.0)  # E * sum(f / E): P is uniform
    torch.nn.init.normal_(router.weight)
    before = router(x).aux_loss
    before.backward()
    with torch.no_grad():
        router.weight -= 0.1 * router.weight.grad
    assert float(router(x).aux_loss.detach()) < float(before.detach())


def test_bias_brings_loads_together() -> None:
    router, x, _ = _router(top_k=2, score="sigmoid", bias_rate=0.02)
    before = router(x).load_E
    for _ in range(60):
        router.update_bias(router(x).load_E, Axis(0, (0,)))
    after = router(x).load_E
    assert float(after.max()) < 0.8 * float(before.max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, r"top_k \(9\) must be within 1..num_experts \(8\)"),
        ({"n_group": 3}, r"num_experts \(8\) must divide by n_group \(3\)"),
        ({"top_k": 3, "n_group": 4, "topk_group": 1}, r"hold fewer than top_k \(3\)"),
        ({"capacity_factor": 0.0}, r"capacity_factor \(0.0\) must be positive"),
    ],
)
def test_options_that_do_not_fit(options, message) -> None:
    with pytest.raises(SpecError, match=message):
        Router(H, E, RouterOptions(**options))
