"""Bytes from rank to rank of a run: against every token sent from every home by hand, and against the whole."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs.passes import Batch, Pass, no_chunks, passes_of
from moeplan.costs.run_traffic import RunTraffic, Wire
from moeplan.routing.loads import count_selections
from moeplan.specs.cluster import ClusterSpec, RankSpec
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model
from moeplan.specs.workload import DispatchKind

MODEL = find_model("mixtral-8x7b")
HIDDEN, LAYERS, EXPERTS, RANKS, PER_NODE = MODEL.hidden_size, 3, 8, 8, 4
OUT, BACK = HIDDEN * (1 + 4 / 128), HIDDEN * 2  # fp8 with a scale per 128 numbers; bf16
Floats = NDArray[np.float64]


def _trace(seed: int, tokens: int = 60) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    chosen = np.argsort(rng.random((tokens, LAYERS, EXPERTS)) ** np.arange(1, EXPERTS + 1), axis=2)[:, :, :2]
    return RoutingTrace(chosen.astype(np.int16), EXPERTS, tuple(range(LAYERS)))


def _placement(seed: int) -> Placement:
    """One expert per rank, in another order in each layer."""
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)]).astype(np.int32)
    return Placement(rows, np.arange(RANKS, dtype=np.int32), EXPERTS, RANKS, PER_NODE)


def _step(tokens_D: Floats, drafts: int = 0, prefill: bool = False) -> tuple[Pass, ...]:
    """Of so many tokens, all of decoding sequences but where a prompt is among them."""
    groups = len(tokens_D)
    return passes_of(Batch(tokens_D / (1 + drafts), np.zeros(groups), no_chunks(groups), tokens_D, prefill), drafts)


def _by_hand(
    trace: RoutingTrace, placement: Placement, tokens_R: Floats, dispatch: DispatchKind
) -> Floats:
    """Each recorded token stands for an equal part of the tokens at home on each rank."""
    bytes_RR = np.zeros((RANKS, RANKS))

    def copy(a: int, b: int, count: float) -> None:
        if a != b:
            bytes_RR[a, b] += count * OUT
            bytes_RR[b, a] += count * BACK

    for experts_LK in trace.experts_TLK.tolist():
        for layer, experts in enumerate(experts_LK):
            ranks = [placement.physical_to_logical_LP[layer].tolist().index(e) for e in experts]
            for home in range(RANKS):
                count, through = tokens_R[home] / trace.num_tokens, set()
                for rank in range(RANKS) if dispatch == "allgather" else ranks:
                    node, peer = rank // PER_NODE, rank // PER_NODE * PER_NODE + home % PER_NODE
                    if node == home // PER_NODE or dispatch in ("per_expert", "per_rank"):
                        copy(home, rank, count)
                        continue
                    if node not in through:
                        copy(home, peer, count)
                        through.add(node)
                    copy(peer, rank, count)
    return bytes_RR


@pytest.mark.parametrize("dispatch", ["per_node", "per_rank", "per_expert", "allgather"])
def test_a_run_is_the_sum_of_its_tokens(dispatch: DispatchKind) -> None:
    cluster, traces = cluster_for("h100", 2, PER_NODE), [_trace(0), _trace(1)]
    loads = [count_selections(trace.experts_TLK, EXPERTS).astype(float) for trace in traces]
    first, last = _placement(2), _placement(3)
    half = first.physical_to_logical_LP.copy()
    half[1] = last.physical_to_logical_LP[1]  # one layer has moved
    mixed = Placement(half, first.rank_of_slot_P, EXPERTS, RANKS, PER_NODE)
    run = RunTraffic(
        Wire(MODEL, dispatch, "fp8"), lambda load: traces[next(i for i in range(2) if loads[i] is load)]
    )
    rng = np.random.default_rng(4)
    expected, kept = np.zeros((RANKS, RANKS)), np.zeros((RANKS, RANKS))
    played = [(first, 0), (first, 1), (first, 0), (mixed, 0), (last, 0), (last, 1)]
    for placement, load in played:
        tokens_D = rng.integers(0, 50, RANKS // 2).astype(float)  # two ranks in a group
        run.add(placement, cluster, loads[load], _step(tokens_D))
        tokens_R = np.repeat(tokens_D / 2, 2)
        expected += _by_hand(traces[load], placement, tokens_R, dispatch)
        kept += _by_hand(traces[load], first, tokens_R, dispatch)
    np.testing.assert_allclose(run.sent_RR, expected / len(played), rtol=1e-12, atol=1e-9)
    unchanged_RR = run.unchanged_RR
    assert unchanged_RR is not None
    np.testing.assert_allclose(unchanged_RR, kept / len(played), rtol=1e-12, atol=1e-9)
    assert (run.steps, run.tokens, run.expected) == (6, 120, False)


def test_copies_share_their_experts_tokens() -> None:
    """Expert 0 on ranks 0 and 1, half each: every pair arrives once, and about as many at both."""
    rows = np.zeros((1, 2), np.int32)
    placement = Placement(rows, np.arange(2, dtype=np.int32), 1, 2, 2)
    trace = RoutingTrace(np.zeros((4000, 1, 1), np.uint8), 1, (0,))
    run = RunTraffic(Wire(MODEL, "per_rank", "bf16"), lambda _load: trace)
    run.add(placement, cluster_for("h100", 1, 2), np.ones((1, 1)), _step(np.array([100.0, 100.0])))
    copies = run.sent_RR.sum() / (4 * HIDDEN)
    assert copies == pytest.approx(100, rel=1e-12)  # half of all tokens are at home where their copy is
    assert run.sent_RR[0, 1] == pytest.approx(run.sent_RR[1, 0], rel=0.05)


def test_counts_give_the_expectation_and_say_so() -> None:
    cluster, placement = cluster_for("h100", 2, PER_NODE), _placement(5)
    run = RunTraffic(Wire(MODEL, "per_expert", "bf16"), lambda _load: None)
    run.add(placement, cluster, np.ones((LAYERS, EXPERTS)), _step(np.full(RANKS, 10.0)))
    # 80 tokens x 3 layers x 2 choices, of which 7 in 8 leave their rank, 4 bytes a number there and back
    assert run.sent_RR.sum() == pytest.approx(80 * LAYERS * 2 * 7 / 8 * 4 * HIDDEN)
    assert run.expected
    assert run.unchanged_RR is None


@pytest.mark.parametrize("prefill", [False, True])
def test_drafts_send_what_a_layer_sends_in_the_mean(prefill: bool) -> None:
    """Four tokens of 10 sequences through all layers, then through one more; then twice one token of each, which go as
    decodes do."""
    cluster, placement, trace = cluster_for("h100", 2, PER_NODE), _placement(5), _trace(6)
    load = count_selections(trace.experts_TLK, EXPERTS).astype(float)
    run = RunTraffic(Wire(MODEL, "per_expert", "fp8"), lambda _load: trace)
    sequences_R = np.arange(RANKS) * 2.5
    run.add(placement, cluster, load, _step(4 * sequences_R, 3, prefill))
    first = _by_hand(trace, placement, 4 * sequences_R, "per_node" if prefill else "per_expert")
    one = _by_hand(trace, placement, sequences_R, "per_expert")
    np.testing.assert_allclose(run.sent_RR, first * (1 + 1 / LAYERS) + one * 2 / LAYERS, rtol=1e-9, atol=1e-6)
    assert run.steps == 1
    dense = RunTraffic(Wire(MODEL.model_copy(update={"prediction_intermediate_size": 64}), "per_expert", "fp8"),
                       lambda _load: trace)  # fmt: skip
    dense.add(placement, cluster, load, _step(4 * sequences_R, 3, prefill))
    np.testing.assert_allclose(dense.sent_RR, first, rtol=1e-9, atol=1e-6)


def test_lost_ranks_end_the_comparison_with_the_first_placement() -> None:
    cluster, load = cluster_for("h100", 2, PER_NODE), np.ones((LAYERS, EXPERTS))
    failed: ClusterSpec = cluster.model_copy(update={"ranks": {1: RankSpec(failed=True)}})
    run = RunTraffic(Wire(MODEL, "per_expert", "bf16"), lambda _load: None)
    run.add(_placement(0), cluster, load, _step(np.ones(RANKS)))
    run.add(_placement(1), failed, load, _step(np.ones(RANKS)))
    assert run.ranks_changed
    assert run.unchanged_RR is None
