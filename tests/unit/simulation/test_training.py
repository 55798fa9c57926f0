"""Training steps: textbook bubbles, brute-force sums in tiny cases, conservation, and what each technique must do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import HardwareProfile, ProfileMeta, Source
from moeplan.costs.activations import activation_bytes, recomputed_s
from moeplan.costs.dense import DenseCosts
from moeplan.costs.training import (
    TrainingCosts,
    capacity,
    model_flops_per_token,
    training_step,
)
from moeplan.costs.training_teams import expert_group
from moeplan.errors import InputError, SpecError
from moeplan.simulation.training import TrainingResult, simulate_training
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model
from moeplan.specs.training import TrainingSpec

MIXTRAL = find_model("mixtral-8x7b")  # 32 equal MoE layers, 8 experts


def _costs(
    load: np.ndarray | None = None, nodes: int = 4, model: Any = MIXTRAL, profile: Any = None, **fields: Any
) -> TrainingCosts:
    spec = TrainingSpec.parse({"global_batch": 64, "ep": 8, **fields}, "training")
    L, E = model.num_moe_layers, model.num_experts
    group = expert_group(cluster_for("h100", nodes, 8), spec.ep)
    placement = Placement(
        np.tile(np.arange(E, dtype=np.int32), (L, 1)),
        np.repeat(np.arange(spec.ep, dtype=np.int32), E // spec.ep),
        E,
        spec.ep,
        group.ranks_per_node,
    )
    load = np.ones((1, L, E)) if load is None else load
    return TrainingCosts(model, cluster_for("h100", nodes, 8), profile, placement, load, spec)


def _run(**fields: Any) -> TrainingResult:
    return simulate_training(_costs(**fields))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_simulated_step_is_the_closed_form_where_stages_are_equal(zero: int) -> None:
    # Without embedding and head the stages are equal but for their gradients; take those away too.
    model = MIXTRAL.model_copy(update={"vocab_size": 1})
    for fields in ({"pp": 1}, {"pp": 4}, {"pp": 4, "virtual_stages": 2}, {"pp": 2, "overlap": "1f1b"}):
        costs = _costs(model=model, zero=zero, **fields)
        found, closed = simulate_training(costs), training_step(costs)
        send = 2 * (costs.spec.pp - 1) * costs.transfer_s()[0] * costs.spec.virtual_stages
        assert found.step_s == pytest.approx(closed.total_s, rel=1e-6, abs=3 * send)
        if costs.spec.pp == 1:
            assert found.exposed_sync_share * found.step_s == pytest.approx(closed.gradient_sync_s)
        waits = costs.micro_batches / costs.spec.pp * sum(np.sum(costs.sharded(c)) for c in costs.chunks())
        work = closed.forward_s + closed.backward_s + waits
        assert closed.bubble_s / work == pytest.approx(
            (costs.spec.pp - 1) / (costs.spec.virtual_stages * costs.micro_batches)
        )


def test_context_parallel_ranks_split_a_sequence_and_gather_its_keys() -> None:
    one, two = _costs(pp=1, nodes=1), _costs(pp=1, nodes=1, cp=2)
    assert two.tokens == one.tokens / 2 == 2048
    assert two.micro_batches == 2 * one.micro_batches  # half as many groups share the batch
    alone, shared = one.teams[0].step.fixed, two.teams[0].step.fixed
    assert shared.kernel_s == pytest.approx(alone.kernel_s / 2)
    assert shared.layer.total_s == pytest.approx(alone.layer.total_s / 2, rel=0.02)
    gathered_s = two.links.seconds("all_gather", 2, 4096 * 2 * 8 * 128 * 2).total  # keys and values of 8 heads in bf16
    assert gathered_s > 0
    assert two.teams[0].attention_s[0] == pytest.approx(one.teams[0].attention_s[0] / 2 + gathered_s, rel=1e-3)
    (first,), (second,) = one.chunks(), two.chunks()
    assert second.activation_bytes_WR == pytest.approx(first.activation_bytes_WR / 2)
    assert second.state_bytes == pytest.approx(first.state_bytes)  # copies are on cp ranks, too


def test_every_micro_batch_reads_and_writes_all_gradients() -> None:
    backward = {}
    for dtype in ("fp32", "bf16"):
        (chunk,) = _costs(pp=1, gradient_dtype=dtype).chunks()
        backward[dtype] = chunk.backward_s_W[0]
    # Per layer attention (4096 x (4096 + 2 x 1024 + 4096)), router, norms, and one expert of 3 x 4096 x 14336.
    parameters = 32 * (4096 * (2 * 4096 + 2 * 1024) + 8 * 4096 + 3 * 4096 * 14336)
    moved = 2 * (4 - 2) * parameters  # read and write, two bytes less each
    assert backward["fp32"] - backward["bf16"] == pytest.approx(moved / (0.8 * 3.35e12), rel=2e-3)


def test_one_stage_is_the_sum_of_its_layers() -> None:
    costs = _costs(pp=1, nodes=1, global_batch=16, zero=0)
    (chunk,) = costs.chunks()
    assert chunk.layers == tuple(range(32))
    by_hand = 2 * (chunk.forward_s_W + chunk.backward_s_W + 2 * chunk.exchange_s_W)[0]
    found = simulate_training(costs)
    # Copies of dense parts only: their reduction hides behind the last backward.
    assert chunk.sync_s < chunk.backward_s_W[0]
    gathered_s = max(0.0, chunk.gather_s - (chunk.forward_s_W + chunk.exchange_s_W)[0])
    assert found.step_s == pytest.approx(by_hand + chunk.optimizer_s + gathered_s)
    assert found.bubble_share == pytest.approx(0.0, abs=1e-12)
    assert found.exposed_exchange_share == pytest.approx(4 * chunk.exchange_s_W[0] / found.step_s)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_shares_and_tokens_add_up(zero: int) -> None:
    found = _run(pp=4, virtual_stages=2, zero=zero)
    log = found.log
    tokens = 64 * 4096
    assert found.tokens_per_s * found.step_s == pytest.approx(tokens)
    assert log.amount_V[log.of_kind("step")].sum() == tokens
    # Each token goes through every chunk once: 8 chunks; a stage's rank works on its 1/8 of the group's micro-batch.
    for kind in ("forward", "backward"):
        assert log.amount_V[log.of_kind(kind)].sum() * 8 == tokens * 8
    work = log.duration_s_V[log.of_kind("forward", "backward", "optimizer")].sum()
    costs = _costs(pp=4, virtual_stages=2, zero=zero)
    waits = 8 * sum(np.sum(costs.sharded(chunk)) for chunk in costs.chunks())  # part of the operations
    idle = found.bubble_share + found.exposed_sync_share
    assert (work - waits) / (4 * found.step_s) + idle == pytest.approx(1.0)
    # Gradients of 8 chunks, once or of each of 8 micro-batches; a reduction ends with its backward, or after it.
    reduced, backward = log.of_kind("gradient_sync"), log.of_kind("backward")
    assert reduced.sum() == 8 * (1 if zero == 1 else 8)
    if zero > 1:
        for v in np.flatnonzero(reduced):
            mine = backward & (log.rank_V == log.rank_V[v]) & (log.request_V == log.request_V[v])
            ends = log.start_s_V[mine] + log.duration_s_V[mine]
            assert np.isclose(ends, log.start_s_V[v] + log.duration_s_V[v], rtol=1e-9).any()
    sent = log.amount_V[log.of_kind("transfer")]
    assert len(sent) == 2 * 8 * (8 - 1)  # forward and backward, 8 micro-batches, 7 borders between 8 chunks
    assert set(sent.tolist()) == {4096 * 4096 * 2.0}


def test_recompute_costs_a_forward_and_frees_activations() -> None:
    plain, again = _costs(pp=1), _costs(pp=1, recompute="full")
    first, second = plain.chunks()[0], again.chunks()[0]
    head = plain._layers.head.forward.total_s
    more = second.backward_s_W[0] - first.backward_s_W[0]
    assert more == pytest.approx(first.forward_s_W[0] - head + first.exchange_s_W[0], rel=1e-9)
    assert second.activation_bytes_WR.max() < 0.2 * first.activation_bytes_WR.min()
    assert activation_bytes(MIXTRAL, True, "attention") < activation_bytes(MIXTRAL, True, "none")


def test_memory_follows_the_schedule() -> None:
    costs = _costs(pp=4)
    found, chunks = simulate_training(costs), costs.chunks()
    for track in found.memory:
        kept = (4 - track.stage) * chunks[track.stage].activation_bytes_WR.max()  # as many as stages lie ahead, and one
        assert track.activation_bytes.max() == pytest.approx(kept)
        assert track.activation_bytes[-1] == pytest.approx(0.0, abs=1.0)
    assert found.memory[0].peak_bytes > found.memory[3].state_bytes


def test_zero_shards_what_it_says() -> None:
    # Weights bf16, gradients fp32, 12 bytes of Adam: 18 per parameter without ZeRO.
    states = [_costs(pp=1, zero=zero).chunks()[0].state_bytes for zero in (0, 1, 2, 3)]
    experts = MIXTRAL.num_moe_layers * MIXTRAL.expert_parameters  # one expert per rank and layer
    dense = MIXTRAL.non_expert_parameters
    groups = ((dense, 32), (experts, 4))
    for zero, state in enumerate(states):
        by_hand = sum(
            n * (2 / (c if zero > 2 else 1) + 4 / (c if zero > 1 else 1) + 12 / (c if zero > 0 else 1))
            for n, c in groups
        )
        assert state == pytest.approx(by_hand)


def test_gradients_hide_behind_the_last_backward_or_do_not() -> None:
    hidden, open_ = _run(pp=1), _run(pp=1, overlap_gradients=False, overlap_parameters=False)
    chunk = _costs(pp=1).chunks()[0]
    assert open_.step_s - hidden.step_s == pytest.approx(
        chunk.sync_s + chunk.gather_s - hidden.exposed_sync_share * hidden.step_s
    )


def test_sharded_gradients_and_weights_go_over_the_links_in_every_micro_batch() -> None:
    """Rajbhandari et al. 2020, section 7: stage 3 moves 3 times the parameters, all in every micro-batch; stage 2 what
    stage 1 does, but the gradients in every micro-batch."""
    for fields in ({}, {"gradient_dtype": "bf16"}, {"recompute": "full"}):
        job = {"pp": 1, "overlap_gradients": False, "overlap_parameters": False, **fields}
        one, two, three = (training_step(_costs(zero=zero, **job)) for zero in (1, 2, 3))
        costs = _costs(zero=3, **job)
        (chunk,), m = costs.chunks(), costs.micro_batches
        assert m == 2
        assert one.gradient_sync_s == pytest.approx(chunk.sync_s + chunk.gather_s)
        assert two.gradient_sync_s == pytest.approx(m * chunk.sync_s + chunk.gather_s)
        assert three.gradient_sync_s == pytest.approx(m * (chunk.sync_s + 2 * chunk.gather_s))
        for other in (two, three):  # nothing else costs more
            assert other.total_s - other.gradient_sync_s == pytest.approx(one.total_s - one.gradient_sync_s)


def test_sharded_gradients_and_weights_hide_behind_computation_and_no_longer() -> None:
    for fields in ({"sequence": 16384}, {}, {"recompute": "full"}):  # work on few tokens is over before the links are
        for gradients in (True, False):
            costs = _costs(pp=1, zero=3, overlap_gradients=gradients, **fields)
            (chunk,), step = costs.chunks(), training_step(costs)
            forward_s, backward_s, exchange_s = chunk.forward_s_W[0], chunk.backward_s_W[0], chunk.exchange_s_W[0]
            gather_s, sync_s = chunk.gather_s, chunk.sync_s
            assert (forward_s > gather_s) == ("sequence" in fields)
            again_s = exchange_s if "recompute" in fields else 0.0  # dispatch and combine among what is computed again
            beside_s = gather_s + (sync_s if gradients else 0.0)
            took_s = max(forward_s, gather_s) + max(backward_s - again_s, beside_s) + again_s + 2 * exchange_s
            took_s += 0.0 if gradients else sync_s
            assert step.total_s == pytest.approx(costs.micro_batches * took_s + chunk.optimizer_s)
            assert simulate_training(costs).step_s == pytest.approx(step.total_s)


def test_sharded_weights_take_as_long_where_steps_are_played() -> None:
    for zero in (2, 3):
        costs = _costs(pp=2, nodes=2, global_batch=16, zero=zero, overlap_gradients=False)
        step, detailed = simulate_training(costs), simulate_training(costs, fidelity="detailed")
        open_s = [run.exposed_sync_share * run.step_s for run in (step, detailed)]
        sync_s = sum(chunk.sync_s for chunk in costs.chunks()) / costs.spec.pp  # what is gathered hides
        assert open_s[0] == pytest.approx(costs.micro_batches * sync_s)
        assert open_s[1] == pytest.approx(open_s[0], rel=1e-3)
        assert detailed.step_s == pytest.approx(step.step_s, rel=0.02)


def test_overlap_hides_exchange_and_never_more_than_it() -> None:
    none, both, shared = (_run(nodes=1, global_batch=16, overlap=how) for how in ("none", "1f1b", "shared_expert"))
    assert both.step_s < none.step_s
    assert shared.step_s == pytest.approx(none.step_s)  # mixtral has no shared expert to hide behind
    assert none.step_s - both.step_s == pytest.approx(
        none.exposed_exchange_share * none.step_s - both.exposed_exchange_share * both.step_s
    )


def test_stragglers_and_capacity() -> None:
    skewed = np.ones((1, 32, 8))
    skewed[:, :, 0] = 4.0
    even, dropless = _run(pp=1), _run(pp=1, load=skewed)
    assert dropless.step_s > even.step_s
    dropping = _run(pp=1, load=skewed, capacity_factor=1.0)
    assert dropping.dropped_share == pytest.approx((4 - 11 / 8) / 11)
    assert dropping.step_s < dropless.step_s
    padded = _run(pp=1, load=skewed, capacity_factor=1.0, overflow="pad")
    assert padded.step_s == pytest.approx(even.step_s, rel=1e-6)
    worked, dropped = capacity(skewed, 1.5, pad=False)
    np.testing.assert_allclose(worked.sum(2) / skewed.sum(2) + dropped, 1.0)
    assert worked.max() == pytest.approx(1.5 * skewed.mean(2).max())
    skewed[:, :, 1] = 0.0  # with no pairs of its own it is padded as well
    (batch,) = _costs(load=skewed, capacity_factor=1.5, overflow="pad").teams[0].batches_W
    np.testing.assert_allclose(batch.pairs_LR, 1.5 * 4096 * 2)


def test_the_busiest_rank_keeps_what_it_works_on() -> None:
    """On rank 0 four times the pairs in one window of two, in the other layers alike: 8 experts on as many ranks."""
    load = np.ones((2, 32, 8))
    load[1, :, 0] = 4.0
    pair = 2 * (2 * 4096 + 3 * 14336)  # as it arrives and returns, inner columns of experts
    even, more = (4096 * 2 * part * pair for part in (1, 4 * 8 / 11))
    for fields, kept in (
        ({}, more), ({"capacity_factor": 1.0}, even), ({"capacity_factor": 2.0}, 2 * even),
        ({"capacity_factor": 1.5, "overflow": "pad"}, 1.5 * even),
    ):  # fmt: skip
        costs = _costs(load=load, pp=4, **fields)
        first = costs.chunks()[0]
        alike = 4096 * activation_bytes(MIXTRAL, True, "none") - even
        busiest = first.activation_bytes_WR[1].max() / len(first.layers)
        assert busiest == pytest.approx(alike + kept)
        # Four micro-batches in flight, windows in turn.
        stage = simulate_training(costs).memory[0]
        assert stage.activation_bytes.max() == pytest.approx(2 * first.activation_bytes_WR[:, 0].sum())


def test_memory_is_that_of_the_rank_which_needs_most() -> None:
    """Rank 5 has the most pairs in the first window and over both, rank 2 in the second, rank 0 none."""
    load = np.ones((2, 32, 8))
    load[:, :, 0], load[0, :, 5], load[1, :, 2], load[1, :, 5] = 0.0, 6.0, 4.0, 3.0
    costs = _costs(load=load, pp=4)
    kept_WR = costs.chunks()[0].activation_bytes_WR
    assert kept_WR.argmax(1).tolist() == [5, 2]
    first, *_, last = simulate_training(costs).memory
    # Four micro-batches in flight, windows in turn; in the last stage one, and that rank's when another has more.
    assert first.activation_bytes.max() == pytest.approx(2 * kept_WR[:, 5].sum())
    kept_WR = costs.chunks()[-1].activation_bytes_WR
    assert last.activation_bytes[[0, 2]] == pytest.approx(kept_WR[:, 5])


@pytest.mark.parametrize("tp", [1, 2])
def test_a_prediction_layer_takes_what_another_does_and_its_join_and_head(tp: int) -> None:
    plain, more = (_costs(model=find_model("qwen3-30b-a3b"), pp=1, tp=tp, mtp_layers=mtp) for mtp in (0, 1))
    (one,), (two,) = plain.chunks(), more.chunks()
    expert_s = plain.teams[0].batches_W[0].expert_s_LR[-1].max()
    joined_s = 2 * (4096 * 2 * 2048 * 2048 / tp) / plain.cluster.accelerator.bf16  # 4096 tokens, 2 H x H
    head = plain._layers.head
    alike = plain.teams[0].attention_s + plain.teams[0].shared_s
    forward_s, backward_s = (getattr(two, name) - getattr(one, name) for name in ("forward_s_W", "backward_s_W"))
    assert forward_s == pytest.approx(alike[0] + expert_s + head.forward.total_s + joined_s, rel=1e-9)
    assert backward_s == pytest.approx(alike[1] + 2 * expert_s + head.backward.total_s + 2 * joined_s, rel=1e-9)


def test_micro_batches_take_their_windows_in_turn() -> None:
    quiet, busy = np.ones((32, 8)), np.ones((32, 8))
    busy[:, 0] = 4.0
    job = {"nodes": 1, "global_batch": 16, "overlap_parameters": False}
    mixed = _run(load=np.stack([quiet, busy]), **job)
    ends = [_run(load=one[None], **job).step_s for one in (quiet, busy)]
    assert mixed.step_s == pytest.approx(sum(ends) / 2)


@pytest.mark.parametrize(
    ("name", "mtp", "published"),
    # tokens and TFLOP per second and GPU as published: Megatron-Bridge, performance summary
    [("deepseek-v3", 1, 1199 / 4612), ("deepseek-v3", 0, 961 / 3848), ("qwen3-235b-a22b", 0, 974 / 6583)],
)
def test_operations_per_token_are_those_that_megatron_counts(name: str, mtp: int, published: float) -> None:
    assert model_flops_per_token(find_model(name), 4096, mtp) / 1e12 == pytest.approx(published, rel=0.01)


def test_layers_are_cut_evenly_by_time() -> None:
    layers = [len(chunk.layers) for chunk in _costs(pp=4, virtual_stages=4).chunks()]
    assert sum(layers) == 32
    assert layers[:-1] == [2] * 15 or min(layers) >= 1
    with pytest.raises(InputError, match=r"\(40\) exceeds the model's layers \(32\)"):
        _costs(pp=8, nodes=8, virtual_stages=5).chunks()


def test_the_same_run_twice_gives_the_same_log() -> None:
    first, second = _run(pp=2, steps=2), _run(pp=2, steps=2)
    for name in ("start_s_V", "duration_s_V", "kind_V", "rank_V"):
        np.testing.assert_array_equal(getattr(first.log, name), getattr(second.log, name))
    assert len(first.steps_s) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"global_batch": 30}, r"global_batch \(30\) is not a multiple .* the next one is 32"),
        ({"pp": 3}, r"pp x tp x cp \(3\) does not divide ranks \(32\)"),
        ({"pp": 4, "virtual_stages": 2, "global_batch": 40}, r"micro-batches by pp \(4\), but there are 5"),
        ({"virtual_stages": 2}, r"virtual_stages \(2\) needs pp above 1"),
        ({"tp": 3}, r"ep \(8\) is not a multiple of tp \(3\)"),
        ({"ep": 2, "tp": 2, "sequence": 4095}, r"sequence \(4095\) does not divide over cp x tp \(2\)"),
    ],
)
def test_impossible_degrees_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        _costs(**fields)


def _streams(**bytes_per_s: float) -> HardwareProfile:
    """A profile of passes alone: the largest size at a bandwidth, a small one at a tenth of it."""
    moved = {"norm": 2, "norm_backward": 3, "optimizer": 7}
    rows = [
        {
            "op": name.split("_")[0],
            "tokens": tokens,
            "hidden": 1024,
            "dtype": "fp32",
            "direction": "backward" if name.endswith("backward") else "forward",
            "backend": "moeplan",
            "kernel": "k",
            "source": "mine",
            "latency_us": moved[name] * 4 * tokens * 1024 / rate * 1e6,
        }
        for name, top in bytes_per_s.items()
        for tokens, rate in ((64, top / 10), (8192, top))
    ]
    meta = ProfileMeta(
        name="toy",
        accelerator="toy",
        date="2026-11-22",
        command="none",
        sources={"mine": Source(kind="measured", title="by hand", version="1")},
    )
    return HardwareProfile(meta, {"elementwise": pa.Table.from_pylist(rows)})


def test_recomputed_parts_run_again_and_are_not_kept() -> None:
    """Norms and gated activations by the bytes they move, up-projections by their operations, on the data sheet."""
    plain = _costs()
    sheet = 0.8 * plain.cluster.accelerator.memory_bandwidth
    times = MIXTRAL.num_layers * plain.micro_batches

    def more(name: str) -> float:
        return training_step(_costs(recompute_modules=[name])).backward_s - training_step(plain).backward_s

    # Both norms read and write the hidden state; two numbers of each pair and column are read, one written.
    assert more("layernorm") == pytest.approx(times * 2 * 2 * 2 * plain.tokens * 4096 / sheet)
    assert more("moe_act") == pytest.approx(times * 3 * 2 * plain.tokens * 2 * 14336 / sheet)
    kept = [activation_bytes(MIXTRAL, True, "none", modules=m) for m in ((), ("layernorm",), ("moe_act",))]
    assert kept[0] - kept[1] == 2 * 4096
    assert kept[0] - kept[2] == 2 * 2 * 14336
    assert training_step(_costs(recompute_modules=["moe_act"])).forward_s == training_step(plain).forward_s
    for module, message in (("mla_up_proj", "no latent attention"), ("mlp", "no dense layers")):
        with pytest.raises(InputError, match=message):
            _costs(recompute_modules=[module])
    with pytest.raises(SpecError, match="leave one of them out"):
        _costs(recompute="full", recompute_modules=["layernorm"])
    deepseek = find_model("deepseek-v3")
    dense = DenseCosts(plain.cluster.accelerator, "bf16")
    again = recomputed_s(("mla_up_proj", "mlp"), deepseek, 65536, 1, dense, sheet)
    flops = plain.cluster.accelerator.bf16
    assert again["mla_up_proj"] == pytest.approx(2 * 65536 * 128 * (512 * 256 + 1536 * 192) / flops)
    assert again["mlp"] == pytest.approx(2 * 65536 * 3 * 7168 * 18432 / flops)
    without = activation_bytes(deepseek, True, "none", modules=("mla_up_proj",))
    assert activation_bytes(deepseek, True, "none") - without == 2 * 128 * (192 + 192 + 128)


def test_an_optimizer_step_moves_what_its_kernels_read_and_write() -> None:
    """Bytes per parameter of each kernel: those of the whole rank, and those of the part that ZeRO leaves it."""
    bandwidth = 0.8 * cluster_for("h100", 4, 8).accelerator.memory_bandwidth
    for grad, dtype in ((4, "fp32"), (2, "bf16")):
        all_of_rank = {"zero": grad, "check": grad, "scale": 2 * grad}
        adam = {"master": 4 + 4, "first": 4 + 4, "second": 4 + 4, "gradient": grad}
        own = {"norm": grad, **adam, "copy out": 4 + 2}
        step = training_step(_costs(gradient_dtype=dtype, zero=0))
        sharded = training_step(_costs(gradient_dtype=dtype, zero=1))
        # On 4 nodes every expert has 4 copies, everything else 32.
        expert = MIXTRAL.expert_parameters * MIXTRAL.num_moe_layers
        dense = MIXTRAL.non_expert_parameters
        held, owned = expert + dense, expert / 4 + dense / 32
        for found, part in ((step, held), (sharded, owned)):
            moved = held * sum(all_of_rank.values()) + part * sum(own.values())
            assert found.optimizer_s == pytest.approx(moved / bandwidth, rel=1e-6)


def test_measured_passes_and_optimizer_steps_replace_the_roofline() -> None:
    sheet = 0.8 * cluster_for("h100", 4, 8).accelerator.memory_bandwidth
    plain = training_step(_costs())
    same = training_step(_costs(profile=_streams(norm=sheet, norm_backward=sheet, optimizer=sheet)))
    assert same.total_s == pytest.approx(plain.total_s)
    assert "optimizer" in plain.extrapolated
    assert "optimizer" not in same.extrapolated
    assert same.source["optimizer"].startswith("measured")
    # An optimizer at half the bandwidth takes twice its time and touches nothing else.
    slow = training_step(_costs(profile=_streams(optimizer=sheet / 2)))
    assert slow.optimizer_s == pytest.approx(2 * plain.optimizer_s)
    assert slow.total_s - slow.optimizer_s == pytest.approx(plain.total_s - plain.optimizer_s)
    # 40 passes of 4 bytes over the hidden state of every layer and micro-batch, a third of them forward.
    costs = _costs(profile=_streams(norm=sheet / 3, norm_backward=sheet / 2))
    moved = 4 * 40 * costs.tokens * MIXTRAL.hidden_size * MIXTRAL.num_layers * costs.micro_batches / sheet
    halved = training_step(costs)
    assert halved.forward_s - plain.forward_s == pytest.approx(moved / 3 * 2)
    assert halved.backward_s - plain.backward_s == pytest.approx(moved * 2 / 3)
