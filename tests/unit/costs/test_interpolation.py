"""Interpolation against functions whose values are known everywhere."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.artifacts.profile import HardwareProfile, ProfileMeta
from moeplan.costs import interpolation
from moeplan.costs.interpolation import GridInterpolator, line
from moeplan.costs.kriging import krige
from moeplan.costs.tables import TableCosts
from moeplan.costs.waves import active_experts, idle_share


def grid(*axes: list[float]) -> np.ndarray:
    return np.stack([a.ravel() for a in np.meshgrid(*(np.array(a, float) for a in axes), indexing="ij")], 1)


SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_measured_points_are_answered_by_their_measurement() -> None:
    x = grid(SIZES, [1, 2, 4])
    y = np.random.default_rng(0).uniform(1, 100, len(x))
    answer = GridInterpolator(np.zeros(len(x), int), x, y).predict(np.zeros(len(x), int), x)
    np.testing.assert_allclose(answer.latency_us, y)
    assert answer.measured.all()
    assert answer.inside.all()


def test_a_power_law_is_exact_between_points() -> None:
    x = grid(SIZES, [1, 2, 4, 8])
    model = GridInterpolator(np.zeros(len(x), int), x, 3 * x[:, 0] ** 0.7 * x[:, 1] ** -0.5)
    at = np.array([[3.0, 2.0], [100.0, 3.0], [5.0, 8.0]])
    answer = model.predict(np.zeros(3, int), at)
    np.testing.assert_allclose(answer.latency_us, 3 * at[:, 0] ** 0.7 * at[:, 1] ** -0.5, rtol=0.01)
    assert answer.inside.all()
    assert not answer.measured.any()


def test_steps_shared_by_all_widths_are_found_where_a_line_misses_them() -> None:
    # A step at size 16 that every width shows; one width lacks that size.
    x = grid(SIZES, [1, 2, 4, 8, 16])
    step = np.where(x[:, 0] == 16, 1.5, 1.0)
    y = 10 * x[:, 0] ** 0.5 * x[:, 1] ** 0.5 * step * np.random.default_rng(1).normal(1, 0.002, len(x))
    hidden = (x[:, 0] == 16) & (x[:, 1] == 4)
    model = GridInterpolator(np.zeros((~hidden).sum(), int), x[~hidden], y[~hidden])
    ours = model.predict(np.zeros(1, int), x[hidden]).latency_us
    plain = model.plain(np.zeros(1, int), x[hidden])
    assert abs(ours[0] / y[hidden][0] - 1) < 0.05
    assert abs(plain[0] / y[hidden][0] - 1) > 0.25


def test_sizes_that_need_padding_are_told_from_their_neighbours() -> None:
    # Sizes that no 4 divides take 30 % longer: a line between 64 and 66 misses 65.
    sizes = [64.0, 65, 66, 67, 68, 96, 97, 128, 129, 130]
    x = grid(sizes, [1, 2, 4, 8])
    y = 10 * x[:, 1] ** 0.5 * np.where(x[:, 0] % 4 == 0, 1.0, 1.3)
    hidden = (x[:, 0] == 97) & (x[:, 1] == 2)
    model = GridInterpolator(np.zeros((~hidden).sum(), int), x[~hidden], y[~hidden])
    ours = model.predict(np.zeros(1, int), x[hidden]).latency_us
    plain = model.plain(np.zeros(1, int), x[hidden])
    assert abs(ours[0] / y[hidden][0] - 1) < 0.05
    assert abs(plain[0] / y[hidden][0] - 1) > 0.1


def test_runs_that_were_disturbed_do_not_pull_their_neighbours() -> None:
    x = grid(SIZES, [1, 2, 4, 8, 16, 32], [1, 2, 4, 8])
    true = 10 * x[:, 0] ** 0.6 * x[:, 1] ** 0.4 * x[:, 2] ** 0.3
    rng = np.random.default_rng(5)
    bad = rng.random(len(x)) < 0.1
    y = true * np.exp(rng.normal(0, 0.01, len(x))) * np.where(bad, 1.5, 1.0)
    hidden = rng.random(len(x)) < 0.25
    model = GridInterpolator(np.zeros((~hidden).sum(), int), x[~hidden], y[~hidden])
    ours = model.predict(np.zeros(hidden.sum(), int), x[hidden]).latency_us
    plain = model.plain(np.zeros(hidden.sum(), int), x[hidden])
    ours_80, plain_80 = (np.nanquantile(np.abs(v / true[hidden] - 1), 0.8) for v in (ours, plain))
    assert ours_80 < 0.025
    assert plain_80 > 3 * ours_80


def test_where_runs_are_slow_but_never_fast_the_fast_ones_are_believed() -> None:
    # Eight runs of one kernel in a row, three of them 40 % late.
    x = np.log(np.arange(1.0, 9.0))[:, None]
    y = np.log(np.array([10.0, 14, 10, 10, 14, 10, 14, 10]))
    one, at, rows = np.zeros(8, np.int64), np.log([[4.5]]), np.arange(8)[None, :]

    def answer(late: float) -> float:
        setting = (30.0, 0.0, 0.0, 0.0, 0.003, 0.02, late)
        return float(np.exp(krige(1, x, x, one, y, at, at, one[:1], rows, 8, setting)[0]))

    assert 10 < answer(1.5) < answer(1.0) < 12


def test_a_size_measured_nowhere_is_told_by_its_alignment() -> None:
    # Sizes that no 4 divides take 30 % longer, and every second of them is measured at no width at all.
    aligned = [16.0, 32, 48, 64, 96, 128, 192, 256, 512, 768, 1024, 1536, 2048]
    known, absent = [17.0, 49, 97, 193, 513, 1025, 2049], [33.0, 65, 129, 257, 769, 1537]
    rng = np.random.default_rng(3)

    def seconds(x: np.ndarray) -> np.ndarray:
        return x[:, 1] ** 0.1 * np.where(x[:, 0] % 4 == 0, 180, 235) * np.exp(rng.normal(0, 0.02, len(x)))

    x, at = grid(sorted(aligned + known), [256, 512, 1024, 2048, 4096, 8192]), grid(absent, [256, 1024, 4096])
    model = GridInterpolator(np.zeros(len(x), int), x, seconds(x))
    off = np.abs(model.predict(np.zeros(len(at), int), at).latency_us / seconds(at) - 1)
    plain = np.abs(model.plain(np.zeros(len(at), int), at) / seconds(at) - 1)
    assert np.median(off) < 0.04
    assert np.nanmedian(plain) > 0.1


def test_a_size_measured_nowhere_is_told_by_the_tiles_it_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows are taken 256 at a time: 257 take what 512 do, as 513 take what 768 do.
    sizes = [float(size + more) for size in (16, 32, 64, *range(128, 2049, 128)) for more in (0, 1)]
    x = grid(sizes, [256.0 * 2**power for power in range(8)], [256, 1024, 4096, 16384])
    seconds = np.ceil(x[:, 0] / 256) * x[:, 1] * x[:, 2] * np.exp(np.random.default_rng(6).normal(0, 0.02, len(x)))
    absent = np.isin(x[:, 0], [257, 769, 1537])
    names = np.zeros(len(x), int)

    def miss() -> float:
        model = GridInterpolator(names[~absent], x[~absent], seconds[~absent])
        answer = model.predict(names[absent], x[absent]).latency_us
        return float(np.quantile(np.abs(answer / seconds[absent] - 1), 0.9))

    with_trend = miss()
    monkeypatch.setattr(interpolation, "_TILE_TREND", 0.0)
    assert with_trend < 0.5 * miss()


def test_powers_of_two_alone_tell_no_steps_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that grows with the size from 64 on: one more than a power of two takes hardly longer, though tiles are
    counted."""
    counted = tuple(setting for setting in interpolation._SETTINGS if setting.tiles)
    monkeypatch.setattr(interpolation, "_SETTINGS", counted)
    x = grid([2.0**n for n in range(1, 15)], [1.0, 4.0, 16.0, 64.0])
    seconds = 5 + 0.3 * np.maximum(x[:, 0] / 64, 1) * np.sqrt(x[:, 1])
    model = GridInterpolator(np.zeros(len(x), np.int64), x, seconds)
    for size in (64.0, 128.0, 256.0, 512.0):
        at = np.array([[size, 16.0], [size + 1, 16.0], [2 * size, 16.0]])
        one, more, twice = model.predict(np.zeros(3, np.int64), at).latency_us
        assert more / one - 1 < 0.05 * (twice / one - 1)


def test_outside_is_said() -> None:
    x = grid(SIZES)
    model = GridInterpolator(np.zeros(len(x), int), x, x[:, 0])
    assert model.predict(np.zeros(2, int), np.array([[512.0], [0.5]])).inside.tolist() == [False, False]


def test_the_error_is_what_left_out_points_miss_by() -> None:
    x = grid(SIZES, SIZES, [1, 2])
    quiet = 5 * x[:, 0] ** 0.5 * x[:, 1] ** 0.5
    noisy = quiet * np.exp(np.random.default_rng(2).normal(0, 0.1, len(x)))
    names = np.zeros(len(x), int)
    assert GridInterpolator(names, x, quiet).relative_error < 0.01
    # Nine of ten normal errors lie within 1.64 sigma, here of the point and of what predicts it.
    assert 0.15 < GridInterpolator(names, x, noisy).relative_error < 0.4


def test_series_do_not_mix() -> None:
    x = np.concatenate([grid(SIZES), grid(SIZES)])
    names = np.repeat([3, 7], len(SIZES))
    model = GridInterpolator(names, x, np.where(names == 3, 1.0, 100.0) * x[:, 0])
    answer = model.predict(np.array([3, 7]), np.array([[3.0], [3.0]])).latency_us
    np.testing.assert_allclose(answer, [3, 300], rtol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1, 1e6), min_size=2, max_size=8, unique=True), st.floats(1, 1e6))
def test_a_rising_line_rises_and_stays_within_its_ends(sizes: list[float], at: float) -> None:
    x = np.sort(np.array(sizes))
    y = np.sqrt(x)
    value = line(x, y, np.array([at]))[0]
    assert y[0] * (1 - 1e-12) <= value <= y[-1] * (1 + 1e-12)
    assert value <= line(x, y, np.array([at * 1.1]))[0] * (1 + 1e-12)


def test_incomplete_grids_answer() -> None:
    x = grid(SIZES, [1, 2, 4, 8])
    keep = np.random.default_rng(4).random(len(x)) < 0.6
    y = 7 * x[:, 0] ** 0.9 * x[:, 1] ** 0.2
    model = GridInterpolator(np.zeros(keep.sum(), int), x[keep], y[keep])
    answer = model.predict(np.zeros((~keep).sum(), int), x[~keep])
    ok = np.isfinite(answer.latency_us)
    assert ok.mean() > 0.9
    miss = np.abs(answer.latency_us[ok] / y[~keep][ok] - 1)
    assert np.quantile(miss, 0.85) < 0.02
    assert miss.max() < 0.3  # missing corners are the trend's


def test_a_product_whose_time_goes_in_waves_is_known_between_its_sizes() -> None:
    # Time by whole waves of 128 x 128 tiles on 100 multiprocessors: a line cuts through the stairs.
    def seconds(x: np.ndarray) -> np.ndarray:
        tiles = np.ceil(x[:, 0] / 128) * np.ceil(x[:, 1] / 128)
        return 5 * np.ceil(tiles / 100) * x[:, 2] ** 0.9

    x = grid([128.0 * i for i in range(1, 25)], [1024, 2048, 3072, 4096], [512, 1024, 2048])
    hidden = np.random.default_rng(7).random(len(x)) < 0.25
    names, known, y = np.zeros(len(x), int), x[~hidden], seconds(x)
    with_waves = GridInterpolator(names[~hidden], known, y[~hidden], steps=idle_share(100))
    without = GridInterpolator(names[~hidden], known, y[~hidden])
    off, plain_off = (
        float(np.quantile(np.abs(model.predict(names[hidden], x[hidden]).latency_us / y[hidden] - 1), 0.9))
        for model in (with_waves, without)
    )
    assert off < 0.7 * plain_off


def test_the_last_wave_is_idle_where_few_tiles_are_left() -> None:
    # 101 tiles of 128 x 128 on 100 multiprocessors take two waves; 100 tiles fill one.
    shares = np.exp(2 * idle_share(100)(np.zeros(2, int), np.array([[128.0, 128 * 101, 64], [128.0, 128 * 100, 64]])))
    np.testing.assert_allclose(shares[:, 3], [200 / 101, 1.0])


def test_a_batch_reaches_no_more_experts_than_its_choices() -> None:
    # Two series: 64 experts and 8 per token, 8 experts and 2 per token; coordinates tokens, ep, tp, skew.
    of = active_experts(np.array([64, 8]), np.array([8, 2]))
    coords = np.array([[1.0, 1, 1, 1], [1, 8, 1, 2], [1000, 8, 1, 2], [1, 2, 1, 2], [100, 2, 1, 1]])
    place = of(np.array([0, 0, 0, 1, 1]), coords)
    np.testing.assert_allclose(np.exp(place[:, 0]), [8, 1, 8, 1, 4])
    assert place[:, 1].tolist() == [0, 1, 0, 1, 0]  # balanced, few, many, few, balanced


def test_grouped_products_are_known_where_their_experts_run_out() -> None:
    # Weights of the experts reached are read, then tokens count: the bend lies elsewhere at every ep and series.
    tokens, ep = [1.0, 2, 4, 8, 16, 32, 64, 128, 256, 512], [1.0, 2, 4, 8, 16]
    x = np.tile(grid(tokens, ep, [1.0], [1.0]), (2, 1))
    series = np.repeat([0, 1], len(x) // 2)
    experts, top_k = np.array([32, 256]), np.array([2, 8])
    pairs = x[:, 0] * top_k[series]
    y = 20 + 10 * np.minimum(experts[series], np.maximum(pairs, x[:, 1])) / x[:, 1] + 0.02 * pairs / x[:, 1]
    hidden = np.random.default_rng(8).random(len(x)) < 0.25
    off, without = (
        np.abs(
            GridInterpolator(series[~hidden], x[~hidden], y[~hidden], steps=steps)
            .predict(series[hidden], x[hidden])
            .latency_us
            / y[hidden]
            - 1
        )
        for steps in (active_experts(experts, top_k), None)
    )
    assert np.nanmean(off) < 0.7 * np.nanmean(without)


def triangle() -> tuple[np.ndarray, np.ndarray]:
    """Batches and contexts measured as far as their product fits: seconds of attention, and a first size of 1."""
    x = grid([1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384], [1, 2, 4, 8, 16, 32, 64])
    x = x[x[:, 0] * x[:, 1] <= 65536]
    return x, 2 + x[:, 1] * (0.01 * x[:, 0] + 1e-5 * x[:, 0] ** 2)


def test_what_has_no_points_on_all_sides_is_not_inside() -> None:
    x, y = triangle()
    model = GridInterpolator(np.zeros(len(x), int), x, y)
    at = np.array([[512.0, 37], [1024, 64], [1100, 64], [8192, 8], [8300, 8], [8300, 3], [8300, 37], [0.5, 1]])
    answer = model.predict(np.zeros(len(at), int), at)
    assert answer.inside.tolist() == [True, True, False, True, False, True, False, False]
    inside, near = model.nearest_covered(np.zeros(len(at), int), at)
    np.testing.assert_array_equal(inside, answer.inside)
    places = near[np.isfinite(near).all(2)]
    assert model.predict(np.zeros(len(places), int), places).inside.all()
    np.testing.assert_allclose(near[0], [[1024, 64], [1100, 32]])  # less context, or fewer sequences
    np.testing.assert_allclose(near[-1], [[1, 1], [1, 1]])
    beyond = model.nearest_covered(np.zeros(1, int), np.array([[20000.0, 3]]))[1]  # 3 is between measured numbers
    np.testing.assert_allclose(beyond[0], [[16384, 3], [16384, 3]])


def test_a_table_that_ends_askew_is_extended_by_its_law_without_a_fall() -> None:
    x, y = triangle()
    rows = [
        {"context_tokens": int(c), "query_tokens": int(c), "batch": int(b)}
        | {"heads": 8, "kv_heads": 8, "head_dim": 128, "window": 0}
        | {"kind": "gqa", "phase": "prefill", "scope": "kernel", "dtype": "bf16", "kv_dtype": "bf16"}
        | {"backend": "b", "kernel": "k", "source": "s", "latency_us": t}
        for (c, b), t in zip(x, y, strict=True)
    ]
    meta = ProfileMeta(name="toy", accelerator="toy", date="2026-11-30", command="none")
    profile = HardwareProfile(meta, {"attention": pa.Table.from_pylist(rows)})

    def law(coords: np.ndarray) -> np.ndarray:
        return 1e-11 * coords[:, 0] ** 2 * coords[:, 1]

    costs = TableCosts(profile, "attention", ("context_tokens", "batch"), {"kind": "gqa"}, law, "toy")
    context = np.unique(np.round(np.geomspace(16, 16384, 400)))
    for batch in (3, 8, 37, 64):
        found = costs.seconds(context, float(batch)).value
        assert (found / np.maximum.accumulate(found)).min() > 0.85
        true = 1e-6 * (2 + batch * (0.01 * context + 1e-5 * context**2))
        assert np.abs(np.log(found / true)).max() < np.log(1.5)
    assert costs.seconds(8300.0, 37.0).extrapolated
    assert not costs.seconds(8300.0, 3.0).extrapolated


def test_one_size_of_an_alignment_does_not_stand_for_others() -> None:
    # Only the size 1 is odd: what it shows is how small it is, nothing about 31 or 47.
    x = grid([1, 16, 32, 48, 64, 128, 256, 512], [1, 2, 4, 8, 16])
    y = 5 + 0.2 * x[:, 0] * x[:, 1] ** 0.5 * np.where(x[:, 0] == 1, 20, 1)
    model = GridInterpolator(np.zeros(len(x), int), x, y)
    at = grid([31, 32, 47, 48, 63, 64], [3, 8])
    found = model.predict(np.zeros(len(at), int), at).latency_us.reshape(-1, 2, 2)
    assert (found[:, 0] < found[:, 1] * 1.02).all()
