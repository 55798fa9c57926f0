"""Experts: a kernel of known g and w must be found again, and skew costed by its vector."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from moeplan.artifacts.profile import HardwareProfile, ProfileMeta, load_profile, shipped_profiles
from moeplan.costs.expert_law import ExpertCosts, expert_weight_bytes, fit_experts
from moeplan.costs.experts import expert_costs
from moeplan.costs.skew import busiest_rank, busiest_rank_eplb, draw_choices, nearest_draws, skewed_over_balanced
from moeplan.errors import UnknownNameError
from moeplan.specs.cluster import AcceleratorSpec
from moeplan.specs.clusters import find_accelerator
from moeplan.specs.model import Dtype, ModelSpec
from moeplan.specs.models import find_model

META = ProfileMeta(name="toy", accelerator="toy", date="2026-11-22", command="none")
GPU = AcceleratorSpec.model_validate(
    {
        "name": "toy",
        "memory": "80 GB",
        "memory_bandwidth": "1000 GB/s",
        "bf16": "100 TFLOPS",
        "scale_up_bandwidth": "400 GB/s",
        "scale_up_domain": 8,
        "nic_bandwidth": "50 GB/s",
    }
)
MODEL = ModelSpec(
    name="toy",
    num_layers=1,
    moe_layer_ids=(0,),
    hidden_size=64,
    num_experts=64,
    top_k=4,
    expert_intermediate_size=32,
    vocab_size=10,
)
EXPERTS, TOP_K = 64, 4


def truth_s(pairs: np.ndarray, tokens: float) -> np.ndarray:
    """One expert: 5 us to read, then 0.1 us per token; 20 us and 2 ns per token of the group shared."""
    each = np.where(pairs > 0, np.maximum(5e-6, 0.1e-6 * pairs), 0)
    return 20e-6 + 2e-9 * tokens + each.sum(-1)


def rows(inter: int = 32, scale: float = 1.0) -> list[dict[str, object]]:
    answer = []
    for ep in (2, 4, 8, 16):
        for tokens in (16, 64, 256, 512, 1024, 4096, 16384):
            local = EXPERTS // ep
            pairs = np.full(local, tokens * TOP_K / EXPERTS)
            answer.append(
                {
                    "hidden": 64,
                    "inter": inter,
                    "num_experts": EXPERTS,
                    "top_k": TOP_K,
                    "ep": ep,
                    "tp": 1,
                    "dtype": "bf16",
                    "distribution": "balanced",
                    "tokens": tokens,
                    "rank_pairs": tokens * TOP_K // ep,
                    "active_experts": local,
                    "backend": "b",
                    "kernel": "k",
                    "source": "s",
                    "latency_us": float(truth_s(pairs, tokens)) * 1e6 * scale,
                }
            )
    return answer


def profile(**changes: object) -> HardwareProfile:
    return HardwareProfile(META, {"experts": pa.Table.from_pylist(rows(**changes))})  # type: ignore[arg-type]


def test_balanced_rows_give_both_parts_back() -> None:
    costs = expert_costs(MODEL, GPU, "bf16", profile())
    assert costs.source.startswith("measured: s (k)")
    assert not costs.extrapolated
    assert costs.relative_error < 0.01
    for pairs, expected in ((1, 5e-6), (16, 5e-6), (256, 25.6e-6), (4096, 409.6e-6)):
        assert costs.one_expert_s(pairs) == pytest.approx(expected, rel=0.02)
    assert costs.one_expert_s(0) == 0
    assert costs.shared_s(64) == pytest.approx(20e-6 + 2e-9 * 1024, rel=0.02)


def test_an_intercept_that_noise_drove_to_zero_takes_little_from_the_others() -> None:
    """At one size of seven times stand on a line that begins below zero, at another only one group was measured."""
    bent = [
        row
        | {"latency_us": row["latency_us"] * (1.25 if (row["ep"], row["tokens"]) == (2, 1024) else 1)}  # type: ignore[operator]
        for row in rows()
        if (row["tokens"], row["ep"]) not in {(512, 2), (512, 4), (512, 16)}
    ]
    columns = [np.array([float(row[c]) for row in bent]) for c in ("rank_pairs", "active_experts", "latency_us")]  # type: ignore[arg-type]
    found = fit_experts(columns[0], columns[1], 1e-6 * columns[2], "s", 0.0)
    assert found is not None
    assert min(found.shared_m) > 10e-6  # 20 us and more, in truth
    vector = np.full(8, 32.0)  # 512 tokens: where one group alone was measured, nothing is counted twice
    assert found.rank_s(vector, 32.0) == pytest.approx(float(truth_s(vector, 512)), rel=0.03)


def test_experts_that_hid_behind_a_launch_take_what_memory_takes_to_give_their_weights() -> None:
    # Whatever one to four experts of 12.3 KB get, it takes 25 us; a memory that gives one in 6 us hides behind them.
    slow = GPU.model_copy(update={"memory_bandwidth": 6144 * 2 / 6e-6})
    hidden = [
        rows()[0] | {"num_experts": 8, "active_experts": 8 // ep, "ep": ep, "tokens": tokens,
                     "rank_pairs": 4 * tokens // ep, "latency_us": 25.0}
        for ep in (2, 4, 8) for tokens in (8, 16, 32, 64)
    ]  # fmt: skip
    measured = HardwareProfile(META, {"experts": pa.Table.from_pylist(hidden)})
    own = MODEL.model_copy(update={"num_experts": 8})
    costs = expert_costs(own, slow, "bf16", measured, mean_pairs=16.0, local_experts=4)
    assert costs.rank_s(np.full(4, 16.0), 16.0) == pytest.approx(25e-6)
    many = expert_costs(MODEL, slow, "bf16", measured, mean_pairs=16.0, local_experts=16)
    assert float(many.one_expert_s(16)) == pytest.approx(6e-6)  # nothing, were what they hid taken for what they cost
    assert many.shared_s(16) == pytest.approx((3 * 25 - (1 + 2 + 4) * 6) / 3 * 1e-6)  # what these leave of 25 us
    assert "and 4 experts on a rank" in many.source
    # A cache gave them in 25 us, where memory is slower still: what was measured stands.
    slower = slow.model_copy(update={"memory_bandwidth": 6144 * 2 / 20e-6})
    cached = expert_costs(MODEL, slower, "bf16", measured, mean_pairs=16.0, local_experts=4)
    assert float(cached.one_expert_s(16)) == pytest.approx(25e-6 / 4)


def test_the_error_is_that_of_rows_around_the_load() -> None:
    # Few tokens scatter by a fifth, many by nothing.
    def noise(row: dict[str, object]) -> float:
        return 1.0 if row["tokens"] > 256 else 1.2 if row["ep"] in (2, 8) else 0.8  # type: ignore[operator]

    bent = [row | {"latency_us": row["latency_us"] * noise(row)} for row in rows()]  # type: ignore[operator]
    found = fit_experts(*(np.array([float(row[c]) for row in bent]) for c in ("rank_pairs", "active_experts")),  # type: ignore[arg-type]
                        1e-6 * np.array([float(row["latency_us"]) for row in bent]), "s", 0.0)  # type: ignore[arg-type]  # fmt: skip
    assert found is not None
    assert found.error_around(1024.0) < 0.5 * found.error_around(4.0)
    assert found.error_around(1e9) == found.relative_error  # no rows near


def test_of_several_kernels_the_one_that_is_fastest_at_the_shape_asked_for_serves() -> None:
    # One pays a long launch and little for weights: at 64 times the weights it is the faster one.
    launch = [row | {"kernel": "launch", "latency_us": 60.0 + 0.5 * row["latency_us"]} for row in rows()]  # type: ignore[operator]
    both = HardwareProfile(META, {"experts": pa.Table.from_pylist(rows() + launch)})
    assert "(k)" in expert_costs(MODEL, GPU, "bf16", both, mean_pairs=16.0, local_experts=8).source
    wide = MODEL.model_copy(update={"hidden_size": 8 * 64, "expert_intermediate_size": 8 * 32})
    assert "(launch)" in expert_costs(wide, GPU, "bf16", both, mean_pairs=16.0, local_experts=8).source


def test_a_skewed_vector_is_costed_by_its_entries_not_its_sum() -> None:
    costs = expert_costs(MODEL, GPU, "bf16", profile())
    vector = np.array([1000.0, 0, 0, 2, 300, 1, 0, 700])
    assert costs.rank_s(vector, 256.0) == pytest.approx(float(truth_s(vector, 4096)), rel=0.02)
    spread = np.full(8, vector.sum() / 8)
    assert costs.rank_s(spread, 256.0) == pytest.approx(float(truth_s(spread, 4096)), rel=0.02)


def test_few_expected_tokens_cost_the_chance_of_a_weight_read() -> None:
    costs = expert_costs(MODEL, GPU, "bf16", profile())
    # One token in four expected: P(hit) = 1 - e^-0.25, and a hit costs the read of 5 us.
    assert costs.expected_s(0.25) == pytest.approx(5e-6 * (1 - np.exp(-0.25)), rel=0.02)
    counts = np.random.default_rng(0).poisson(40, 20000)
    assert costs.expected_s(40.0) == pytest.approx(costs.one_expert_s(counts).mean(), rel=0.02)
    assert costs.expected_s(5000.0) == costs.one_expert_s(5000.0)


def test_an_even_load_takes_what_was_measured_where_no_law_for_all_sizes_says_it() -> None:
    # Groups of eight take half as long again at 4,096 tokens, as where a kernel picks another tile there.
    bent = [
        row | {"latency_us": row["latency_us"] * (1.5 if (row["ep"], row["tokens"]) == (8, 4096) else 1)}  # type: ignore[operator]
        for row in rows()
    ]
    measured = HardwareProfile(META, {"experts": pa.Table.from_pylist(bent)})
    for ep, factor in ((8, 1.5), (4, 1.0), (16, 1.0)):
        local = EXPERTS // ep
        costs = expert_costs(MODEL, GPU, "bf16", measured, mean_pairs=256.0, local_experts=local)
        even = costs.rank_s(np.full(local, 256.0), 256.0)
        assert even == pytest.approx(factor * float(truth_s(np.full(local, 256.0), 4096)), rel=0.01)
    other = MODEL.model_copy(update={"num_experts": 32})  # not measured: the law alone
    costs = expert_costs(other, GPU, "bf16", measured, mean_pairs=256.0, local_experts=8)
    assert costs.rank_s(np.full(8, 256.0), 256.0) == pytest.approx(float(truth_s(np.full(8, 256.0), 4096)), rel=0.25)


def test_the_kernel_that_measured_fastest_serves_not_the_one_whose_law_is_fastest() -> None:
    slow_here = [
        row | {"latency_us": row["latency_us"] * (3 if (row["ep"], row["tokens"]) == (8, 4096) else 1)}  # type: ignore[operator]
        for row in rows()
    ]
    both = HardwareProfile(
        META, {"experts": pa.Table.from_pylist(slow_here + [row | {"kernel": "steady"} for row in rows(scale=1.5)])}
    )
    for ep, kernel, factor in ((8, "steady", 1.5), (4, "k", 1.0)):
        costs = expert_costs(MODEL, GPU, "bf16", both, mean_pairs=256.0, local_experts=EXPERTS // ep)
        assert f"({kernel})" in costs.source
        vector = np.full(EXPERTS // ep, 256.0)
        assert costs.rank_s(vector, 256.0) == pytest.approx(factor * float(truth_s(vector, 4096)), rel=0.01)


def test_linear_coefficients_meet_the_curve_at_the_point() -> None:
    costs = expert_costs(MODEL, GPU, "bf16", profile())
    fixed, active, pair = costs.linear(1024.0)
    assert fixed == pytest.approx(20e-6 + 2e-9 * 16384, rel=0.02)
    assert active + 1024 * pair == pytest.approx(float(costs.one_expert_s(1024.0)), rel=0.05)
    assert pair == pytest.approx(0.1e-6, rel=0.05)
    fixed, active, pair = costs.linear(4.0)
    assert (active, pair) == (pytest.approx(5e-6, rel=0.02), pytest.approx(0, abs=1e-9))


def test_a_kernel_timed_without_expert_parallelism_serves_a_group_only_where_nothing_else_was() -> None:
    alone = [row | {"kernel": "alone", "ep": 1, "latency_us": 0.1 * row["latency_us"]} for row in rows()]  # type: ignore[operator]
    both = HardwareProfile(META, {"experts": pa.Table.from_pylist(rows() + alone)})
    costs = expert_costs(MODEL, GPU, "bf16", both, mean_pairs=64.0, local_experts=8)
    assert (costs.source, costs.extrapolated) == ("measured: s (k)", False)
    assert "(alone)" in expert_costs(MODEL, GPU, "bf16", both, mean_pairs=64.0, local_experts=64).source
    only = HardwareProfile(META, {"experts": pa.Table.from_pylist(alone)})
    costs = expert_costs(MODEL, GPU, "bf16", only, mean_pairs=64.0, local_experts=8)
    assert costs.source == "extrapolated: s (alone), from EP 1 to 1"
    assert (costs.extrapolated, costs.relative_error) == (True, 0.5)


def test_a_kernel_measured_around_the_load_serves_before_a_faster_one_that_was_not() -> None:
    quick = [row | {"kernel": "short", "latency_us": 0.5 * row["latency_us"]} for row in rows()]  # type: ignore[operator]
    short = [row for row in quick if row["tokens"] <= 1024]  # type: ignore[operator]
    both = HardwareProfile(META, {"experts": pa.Table.from_pylist(rows() + short)})
    for mean_pairs, kernel in ((64.0, "short"), (65.0, "k"), (4096.0, "k")):  # the last is beyond both
        assert f"({kernel})" in expert_costs(MODEL, GPU, "bf16", both, mean_pairs=mean_pairs, local_experts=8).source


def test_kernels_of_the_other_phase_serve_only_where_there_are_no_others() -> None:
    quick = [row | {"kernel": "d/generation", "latency_us": 0.5 * row["latency_us"]} for row in rows()]  # type: ignore[operator]
    slow = [row | {"kernel": "d/context"} for row in rows()]
    both = HardwareProfile(META, {"experts": pa.Table.from_pylist(quick + slow)})
    for phase, kernel in (("decode", "generation"), ("prefill", "context"), ("mix", "context")):
        assert f"d/{kernel}" in expert_costs(MODEL, GPU, "bf16", both, local_experts=8, phase=phase).source  # type: ignore[arg-type]
    deepep = [row | {"kernel": "deepepmoe", "latency_us": 0.1 * row["latency_us"]} for row in rows()]  # type: ignore[operator]
    mixed = HardwareProfile(META, {"experts": pa.Table.from_pylist(rows() + deepep)})
    for sent, kernel in ((True, "(deepepmoe)"), (False, "(k)")):
        assert kernel in expert_costs(MODEL, GPU, "bf16", mixed, local_experts=8, sent=sent).source
    one = HardwareProfile(META, {"experts": pa.Table.from_pylist(quick)})
    assert "d/generation" in expert_costs(MODEL, GPU, "bf16", one, local_experts=8, phase="prefill").source


@pytest.mark.parametrize(("mean_pairs", "local", "inside"), [(1024.0, 8, True), (1025.0, 8, False), (64.0, 2, False)])
def test_loads_and_groups_beyond_the_measured_ones_say_so(mean_pairs: float, local: int, inside: bool) -> None:
    costs = expert_costs(MODEL, GPU, "bf16", profile(), mean_pairs=mean_pairs, local_experts=local)
    assert costs.extrapolated is not inside
    assert costs.source == "measured: s (k)" if inside else costs.source.startswith("extrapolated: s (k), from EP 2")


def test_of_a_scaled_shape_launches_stay_and_weights_grow() -> None:
    measured = expert_costs(MODEL, GPU, "bf16", profile())
    wide = MODEL.model_copy(update={"hidden_size": 4 * 64, "expert_intermediate_size": 2 * 32})
    costs = expert_costs(wide, GPU, "bf16", profile())
    assert costs.one_expert_s(256) == pytest.approx(8 * float(measured.one_expert_s(256)))
    launches = measured.shared_s(1)
    assert costs.shared_s(1) == pytest.approx(launches)
    assert costs.shared_s(1024) == pytest.approx(launches + 4 * (measured.shared_s(1024) - launches))


def test_weights_of_a_row_without_a_gate_are_two_matrices() -> None:
    row = {"hidden": 64, "inter": 32, "tp": 2, "dtype": "nvfp4", "kernel": "k"}
    assert expert_weight_bytes(row) == 3 * 64 * 32 / 2 / 2
    assert expert_weight_bytes(row | {"kernel": "k_nongated"}) == 2 * 64 * 32 / 2 / 2


def test_experts_without_a_gate_have_two_matrices_of_three() -> None:
    plain = MODEL.model_copy(update={"gated_ffn": False})
    gated = expert_costs(MODEL, GPU, "bf16", profile())
    costs = expert_costs(plain, GPU, "bf16", profile())
    assert costs.one_expert_s(256) == pytest.approx(2 / 3 * float(gated.one_expert_s(256)))
    assert costs.source.endswith(", from gated experts")
    own = [row | {"kernel": "k_nongated", "latency_us": 0.5 * row["latency_us"]} for row in rows()]  # type: ignore[operator]
    both = HardwareProfile(META, {"experts": pa.Table.from_pylist(rows() + own)})
    assert expert_costs(plain, GPU, "bf16", both).source == "measured: s (k_nongated)"
    assert expert_costs(MODEL, GPU, "bf16", both).source == "measured: s (k)"


def test_experts_on_a_latent_are_of_its_width() -> None:
    latent = MODEL.model_copy(update={"hidden_size": 512, "expert_hidden_size": 64})
    costs = expert_costs(latent, GPU, "bf16", profile())
    assert costs.source == "measured: s (k)"
    assert costs.one_expert_s(256) == expert_costs(MODEL, GPU, "bf16", profile()).one_expert_s(256)


def test_another_shape_is_scaled_and_says_so() -> None:
    costs = expert_costs(MODEL, GPU, "bf16", profile(inter=64))
    assert costs.extrapolated
    assert "scaled from 64 x 64" in costs.source
    exact = expert_costs(MODEL, GPU, "bf16", profile())
    assert costs.one_expert_s(256) == pytest.approx(float(exact.one_expert_s(256)) / 2, rel=1e-6)


def mixed(*parts: tuple[str, int, float]) -> HardwareProfile:
    """Rows of one kernel in several number formats: name, expert size, and times what."""
    table = [row | {"dtype": dtype} for dtype, inter, scale in parts for row in rows(inter, scale)]
    return HardwareProfile(META, {"experts": pa.Table.from_pylist(table)})


@pytest.mark.parametrize(
    ("dtype", "parts", "serves"),
    [
        ("fp8", (("fp8", 32, 3.0), ("fp8_block", 32, 1.0)), "measured: s (k) in fp8_block"),
        ("fp4", (("w4a16_mxfp4", 32, 3.0), ("w4a8_mxfp4_mxfp8", 32, 1.0)), "measured: s (k) in w4a8_mxfp4_mxfp8"),
        # A format measured at the shape serves before one that comes first elsewhere.
        ("fp8", (("fp8", 32, 1.0), ("fp8_block", 64, 3.0)), "measured: s (k)"),
        ("fp8", (("fp8", 128, 9.0), ("fp8_block", 64, 2.0)), "modelled: s (k) in fp8_block, scaled from 64 x 64"),
    ],
)
def test_number_formats_of_one_kernel_are_never_mixed(
    dtype: Dtype, parts: tuple[tuple[str, int, float], ...], serves: str
) -> None:
    costs = expert_costs(MODEL, GPU, dtype, mixed(*parts))
    assert costs.source.removesuffix(" (tp 1)") == serves
    assert costs.one_expert_s(256) == pytest.approx(25.6e-6, rel=0.02)


def test_a_backend_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"backend 'vlm' is not known; did you mean 'vllm'\? .*: b, sglang"):
        expert_costs(MODEL, GPU, "bf16", profile(), backend="vlm")
    assert expert_costs(MODEL, GPU, "bf16", profile(), backend="b").source == "measured: s (k)"
    assert expert_costs(MODEL, GPU, "bf16", backend="vllm").extrapolated


def test_without_rows_the_roofline_answers() -> None:
    costs = expert_costs(MODEL, GPU, "fp8", profile())
    assert costs.source == "roofline of toy"
    assert costs.extrapolated
    # 2 operations x 3 x 64 x 32 weights / 100 TFLOPS (no fp8 unit: bf16)
    arithmetic = 4096 * 2 * 6144 / 100e12
    assert costs.one_expert_s(4096) > arithmetic
    assert expert_costs(MODEL, GPU, "fp8").source == "roofline of toy"


def test_a_roofline_computes_whole_tiles() -> None:
    """Beside grouped products that alibaba/InferSim measured on H20 (bench_data/grouped_gemm/decode/h20)."""
    h20 = find_accelerator("h20")
    measured = {  # H, F, experts: tokens of each -> us of both products
        (5120, 1664, 40): {5: 539.0, 19: 539.0, 38: 538.3, 77: 982.4},
        (4096, 1536, 32): {4: 346.8, 16: 346.5, 32: 346.8, 64: 492.0, 128: 954.5},
        (2560, 1664, 28): {7: 207.5, 27: 207.4, 55: 270.7, 110: 457.0},
    }
    for (hidden, inter, active), rows in measured.items():
        model = MODEL.model_copy(update={"hidden_size": hidden, "expert_intermediate_size": inter})
        costs = expert_costs(model, h20, "fp8")
        for tokens, us in rows.items():
            assert 0.7 < 1e6 * active * float(costs.one_expert_s(tokens)) / us < 1.15
    # Without tiles: 16 rows at most for a device whose instruction takes so many.
    small = expert_costs(model, h20.model_copy(update={"tile_rows": 16}), "fp8")
    assert small.one_expert_s(7) < 0.75 * costs.one_expert_s(7)
    assert small.one_expert_s(2.0**16) == pytest.approx(float(costs.one_expert_s(2.0**16)), rel=0.001)


@pytest.mark.skipif("b200-sxm" not in shipped_profiles(), reason="the b200-sxm profile is not shipped")
def test_training_products_of_b200_are_those_measured_for_training() -> None:
    """Transformer Engine, by SimuMax: 32 experts with 1024 tokens of DeepSeek-V3 take 2.93 and 2.98 ms, 64 with 512
    3.44 and 3.33; few tokens are left to the kernels of serving engines."""
    model, b200, shipped = find_model("deepseek-v3"), find_accelerator("b200"), load_profile("b200-sxm")
    for experts, tokens, ms in ((32, 1024.0, 2.957), (64, 512.0, 3.386)):
        costs = expert_costs(model, b200, "bf16", shipped, mean_pairs=tokens, local_experts=experts)
        assert "general_grouped_gemm" in costs.source
        assert 1e3 * costs.rank_s(np.full(experts, tokens), tokens) == pytest.approx(ms, rel=0.02)
    few = expert_costs(model, b200, "bf16", shipped, mean_pairs=4.0, local_experts=32)
    assert "general_grouped_gemm" not in few.source


def test_too_few_rows_do_not_make_a_curve() -> None:
    ones = np.ones(8)
    assert fit_experts(ones, ones, ones * 1e-6, "s", 0.0) is None


@pytest.mark.parametrize(("tokens", "top_k", "experts", "ep"), [(4096, 4, 64, 8), (4096, 2, 8, 8), (8, 2, 64, 8)])
def test_drawn_choices_are_whole_and_capped(tokens: int, top_k: int, experts: int, ep: int) -> None:
    counts = draw_choices(tokens, top_k, experts, 1.2, ep, 20, np.random.default_rng(0))
    np.testing.assert_allclose(counts.sum(1), tokens * top_k)
    assert counts.max() <= tokens
    assert counts.min() >= 0
    busiest, _ = busiest_rank(counts, ep, tokens)
    assert busiest.shape == (20, experts // ep)
    np.testing.assert_allclose(busiest.sum(1), counts.reshape(20, ep, -1).sum(2).max(1))


def test_copies_take_the_skew_away() -> None:
    counts = draw_choices(16384, 4, 64, 1.2, 8, 20, np.random.default_rng(0))
    spread, _ = busiest_rank_eplb(counts, 8, 96, 16384)
    assert spread.shape == (20, 12)
    assert spread.sum(1).mean() < 0.7 * busiest_rank(counts, 8, 16384)[0].sum(1).mean()
    assert (spread.sum(1) >= counts.sum(1) / 8 - 1e-6).all()


def test_arriving_tokens_are_those_that_choose_the_busiest_rank() -> None:
    # Deal the choices out one by one and count the tokens that meet the rank.
    tokens, top_k, ep = 64, 4, 4
    counts = np.random.default_rng(3).multinomial(tokens * top_k, np.arange(1, 17) / 136, 12).astype(float)
    vectors, arriving = busiest_rank(counts, ep, tokens)
    for row, vector, count in zip(counts.astype(int), vectors, arriving, strict=True):
        order = np.argsort(-row, kind="stable")
        chosen_TK = np.repeat(order, row[order]).reshape(top_k, tokens).T
        rank = int(row.reshape(ep, -1).sum(1).argmax())
        assert vector.tolist() == row.reshape(ep, -1)[rank].tolist()
        assert count == (chosen_TK // 4 == rank).any(1).sum()
    # As many slots as experts: greedy packing moves experts, and no rank gets fewer tokens than its largest slot.
    packed, met = busiest_rank_eplb(counts, ep, 16, tokens)
    assert (packed.sum(1) <= vectors.sum(1)).all()
    assert (met >= packed.max(1)).all()
    assert (met <= np.minimum(packed.sum(1), tokens)).all()


def test_the_draws_nearest_to_what_was_recorded_are_kept() -> None:
    assert nearest_draws(np.array([5.0, 1.0, 9.0, 4.0]), 4.4, 2).tolist() == [3, 0]


def test_the_skewed_ratio_counts_what_is_shared() -> None:
    flat = ExpertCosts(np.array([1.0, 1e6]), np.array([1e-9, 1e-3]), np.array([1e-6, 1.0]), 0.0, "s")
    vectors = np.array([[300.0, 100.0]])
    # mean 100 per expert, two local experts: w is linear, so pairs double the expert part
    shared, each = flat.shared_s(100.0), float(flat.one_expert_s(100.0))
    expected = (shared + float(flat.one_expert_s(300.0)) + each) / (shared + 2 * each)
    assert skewed_over_balanced(flat, vectors, 800, 1, 8, 4) == pytest.approx(expected)
    # A balanced rank of another program stands as measured.
    seconds = shared + float(flat.one_expert_s(300.0)) + each
    assert skewed_over_balanced(flat, vectors, 800, 1, 8, 4, balanced_s=2e-4) == pytest.approx(seconds / 2e-4)


@pytest.mark.parametrize("ep", [1, 2, 8])
@pytest.mark.parametrize("system", ["h100-sxm", "h200-sxm"])
def test_more_tokens_take_no_less_beyond_what_was_measured(system: str, ep: int) -> None:
    model, device = find_model("deepseek-v3"), find_accelerator(system)
    took = []
    for tokens in (8192, 16384, 17500, 32768, 65536):
        mean = tokens * 8 / 256
        costs = expert_costs(model, device, "fp8", load_profile(system), mean_pairs=mean, local_experts=256 / ep)
        took.append(float(costs.shared_s(mean) + 256 / ep * costs.one_expert_s(mean)))
    assert all(a <= 1.02 * b for a, b in pairwise(took)), took
