"""Round trips, and files that are wrong or hostile."""

from __future__ import annotations

import io
import json
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplan.files
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import TraceError, UnknownNameError
from moeplan.routing.io import read_load, read_trace, save_trace
from moeplan.routing.loads import expert_load
from moeplan.routing.readers import parquet
from moeplan.routing.readers.base import drop_padding, input_files


@st.composite
def traces(draw) -> RoutingTrace:
    tokens, layers = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    experts = draw(st.integers(2, 300))
    top_k = draw(st.integers(1, min(4, experts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = rng.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k].astype(np.int16)
    if draw(st.booleans()) and top_k > 1:
        ids[rng.random(ids.shape) < 0.1] = -1
        ids[:, :, 0] = np.abs(ids[:, :, 0])
    maybe = draw(st.lists(st.booleans(), min_size=5, max_size=5))
    cuts = np.sort(rng.choice(np.arange(1, tokens + 1), size=min(tokens, 3), replace=False))
    lens = np.diff(np.concatenate(([0], cuts, [tokens])))
    return RoutingTrace(
        experts_TLK=ids,
        num_experts=experts,
        layer_ids=tuple(range(3, 3 + layers)),
        scores_TLK=rng.random(ids.shape).astype(np.float32) if maybe[0] else None,
        seq_lens_S=lens[lens > 0].astype(np.int64) if maybe[1] else None,
        phase_T=rng.integers(0, 2, tokens).astype(np.uint8) if maybe[2] else None,
        source_rank_T=rng.integers(0, 5, tokens).astype(np.int32) if maybe[3] else None,
        domain_T=rng.integers(0, 2, tokens).astype(np.int32) if maybe[4] else None,
        domains=("law", "code") if maybe[4] else (),
        dropped_padding=7,
    )


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
@given(trace=traces())
@settings(max_examples=30, deadline=None)
def test_what_is_saved_is_read_back(tmp_path_factory, suffix, trace):
    path = tmp_path_factory.mktemp("trip") / f"trace.{suffix}"
    save_trace(trace, path)
    back = read_trace(path, num_experts=trace.num_experts)
    assert isinstance(back, RoutingTrace)
    np.testing.assert_array_equal(back.experts_TLK.astype(int), trace.experts_TLK.astype(int))
    for name in ("scores_TLK", "seq_lens_S", "phase_T", "source_rank_T", "domain_T"):
        mine, other = getattr(trace, name), getattr(back, name)
        assert (mine is None) == (other is None)
        if mine is not None:
            np.testing.assert_array_equal(mine, other)
    for name in ("num_experts", "layer_ids", "domains", "dropped_padding"):
        assert getattr(back, name) == getattr(trace, name)


@given(trace=traces())
@settings(max_examples=20, deadline=None)
def test_a_streamed_load_equals_the_load_in_memory(tmp_path_factory, trace):
    path = tmp_path_factory.mktemp("stream") / "trace.parquet"
    save_trace(trace, path)
    whole = expert_load(trace, "domain" if trace.domains else "all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "BATCH_TOKENS", 7)
        streamed = read_load(path, keep_tokens=False)
    assert streamed.trace is None
    for name, load_LE in zip(whole.windows, whole.load_WLE, strict=True):
        np.testing.assert_array_equal(streamed.load_WLE[streamed.windows.index(name)], load_LE)


def small(**fields) -> RoutingTrace:
    ids = np.arange(24).reshape(4, 3, 2) % 8
    return RoutingTrace(experts_TLK=ids, num_experts=8, layer_ids=(0, 1, 2), **fields)


def test_equal_traces_are_equal_bytes(tmp_path):
    for name in ("a", "b"):
        save_trace(small(), tmp_path / f"{name}.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_origin_names_file_format_and_hash(tmp_path):
    save_trace(small(), tmp_path / "a.npz")
    origin = read_trace(tmp_path / "a.npz").origin
    assert (origin["file"], origin["format"]) == ("a.npz", "npz")
    assert origin["sha256"] == moeplan.files.sha256_file(tmp_path / "a.npz")


def test_writes_in_row_groups_without_an_object_per_token(tmp_path):
    many = RoutingTrace(np.zeros((200_000, 1, 1), np.uint8), num_experts=2, layer_ids=(0,))
    save_trace(many, tmp_path / "t.parquet")
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == 4


def _recorded(folder: Path, engine: str) -> RoutingTrace:
    """8 requests of 1,000 tokens, as an engine records them: ids of 32 bits, one layer without experts."""
    ids = np.random.default_rng(0).integers(1, 256, (8_000, 11, 8), np.int32)
    ids[0, 0, 0] = 255
    for number, part in enumerate(np.split(ids, 8)):
        if engine == "vllm":
            part[:, 0] = 0
            np.save(folder / f"{number}.npy", part)
            continue
        torch = pytest.importorskip("torch")
        part[:, 0] = -1
        record = {
            "forward_pass_id": number,
            "rank": 0,
            "topk_ids_of_layer": torch.tensor(part.transpose(1, 0, 2)),
            "forward_mode": 1,
        }
        pack = {"records": [record], "last_physical_to_logical_map": torch.arange(256).repeat(11, 1)}
        torch.save(pack, folder / f"{number}.pt")
    return RoutingTrace(ids[:, 1:].astype(np.uint8), 256, tuple(range(1, 11)))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_engines_record_is_read_in_a_few_times_its_own_size(tmp_path, engine):
    written = _recorded(tmp_path, engine)
    read_trace(tmp_path, format=engine)  # what is loaded once, is
    tracemalloc.start()
    try:
        read = read_trace(tmp_path, format=engine)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(read.experts_TLK, written.experts_TLK)
    assert peak < 8 * written.experts_TLK.nbytes


def test_a_trace_is_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "BATCH_TOKENS", 1_000)
    many = RoutingTrace(np.zeros((50_000, 4, 4), np.uint8), num_experts=4, layer_ids=(0, 1, 2, 3))
    tracemalloc.start()
    try:
        save_trace(many, tmp_path / "t.parquet")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < many.experts_TLK.nbytes


def npz(path: Path, **arrays) -> Path:
    np.savez(path / "t.npz", **arrays)
    return path / "t.npz"


IDS = np.arange(24).reshape(4, 3, 2) % 8


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"experts": IDS, "num_experts": 6},
            r"expert id 7 at \[token, layer, k\] \[1, 0, 1\] is outside 0..5",
        ),
        ({"experts": IDS - 1, "num_experts": 8}, "negative id at .* add an array 'padding'"),
        ({"experts": IDS - 2, "num_experts": 8, "padding": -1}, "expert id -2"),
        ({"experts": IDS.astype(float)}, "must hold integer expert ids"),
        ({"experts": IDS[:0]}, "not empty"),
        ({"experts": IDS[0]}, r"must be \[tokens, layers, k\]"),
        ({"experts": IDS, "seq_lens": np.array([3, 3])}, "seq_lens sums to 6 but experts has 4 tokens"),
        ({"experts": IDS, "moe_layers": np.arange(2)}, "moe_layers has 2 entries but experts has 3 layers"),
        ({"experts": IDS, "scores": np.full(IDS.shape, np.nan)}, "NaN"),
        ({"experts": IDS, "scores": np.zeros((4, 3))}, "experts has"),
        ({"experts": IDS, "phase": np.array([0, 1, 2, 0])}, "phase holds 0..2"),
        ({"experts": IDS, "phase": np.array("training")}, "'training' is not one of prefill, decode"),
        ({"experts": IDS, "num_experts": np.array([8, 9])}, "must be one integer"),
        ({"experts": IDS, "origin": np.array("{")}, "origin is not a JSON object"),
        ({"a_experts": IDS, "b_experts": IDS[:, :2]}, "layer_ids"),
        ({"experts": np.array([[["a"]]])}, "must hold integer expert ids"),
        ({"experts": np.array([None])}, "only numbers and text are read"),
    ],
)
def test_wrong_npz(tmp_path, arrays, message):
    with pytest.raises(TraceError, match=message):
        read_trace(npz(tmp_path, **arrays), format="npz")


def test_declared_padding_is_dropped_and_counted(tmp_path):
    ids = IDS.copy()
    ids[1] = -1
    ids[2, 1, 1] = -1
    trace = read_trace(npz(tmp_path, experts=ids, num_experts=8, padding=-1))
    assert trace.num_tokens == 3
    assert trace.dropped_padding == 7
    assert expert_load(trace).load_LE.sum() == 24 - 7


def test_padding_shortens_its_sequences():
    ids = IDS.copy()
    ids[1:3] = -1
    trace = drop_padding(small(seq_lens_S=np.array([2, 1, 1])))
    assert trace.seq_lens_S.tolist() == [2, 1, 1]
    padded = RoutingTrace(ids, 8, (0, 1, 2), seq_lens_S=np.array([2, 1, 1]))
    assert drop_padding(padded).seq_lens_S.tolist() == [1, 1]


def test_domains_and_phases_of_task_files(tmp_path):
    path = npz(tmp_path, prefill_experts=IDS, decode_law_experts=IDS[:2], num_experts=8)
    assert read_trace(path).phase_T.tolist() == [0, 0, 0, 0, 1, 1]
    law = read_trace(path, domain="law")
    assert law.domains == ("law",)
    assert law.phase_T.tolist() == [1, 1]
    with pytest.raises(TraceError, match="has no domain 'code'; it has prefill, law"):
        read_trace(path, domain="code")


def test_a_domain_of_a_file_without_any_is_refused(tmp_path):
    with pytest.raises(TraceError, match="names no domains"):
        read_trace(npz(tmp_path, experts=IDS), domain="law")


def test_a_domain_of_a_format_without_domains_is_refused(tmp_path):
    (tmp_path / "t.json").write_text("[[1, 2], [3, 4]]")
    with pytest.raises(TraceError, match=r"\(counts\) has no domains to choose 'law' from"):
        read_trace(tmp_path / "t.json", domain="law")


def test_the_number_of_experts_comes_from_the_caller_where_the_file_is_silent(tmp_path):
    path = npz(tmp_path, experts=IDS)
    assert read_trace(path).num_experts == 8
    assert read_trace(path).origin["num_experts_from"] == "highest id"
    assert read_trace(path, num_experts=64).num_experts == 64


def test_a_damaged_id_does_not_decide_how_much_memory_is_taken(tmp_path):
    ids = IDS.astype(np.int64)
    ids[2, 1, 0] = 2**40
    with pytest.raises(TraceError, match=r"num_experts \(1099511627777\) must lie within 1..65536"):
        read_trace(npz(tmp_path, experts=ids))


def test_an_unknown_format_and_a_missing_file(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'npz'"):
        read_trace(npz(tmp_path, experts=IDS), format="npy")
    with pytest.raises(TraceError, match="does not exist"):
        read_trace(tmp_path / "nowhere.npz")
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(TraceError, match="in no format known here; name its format: counts, "):
        read_trace(tmp_path / "x.txt")


def npy_header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_a_header_that_promises_terabytes_asks_for_no_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("experts.npy", npy_header((2**40, 8, 8)) + b"\0" * 64)
    with pytest.raises(TraceError, match=r"says \[1099511627776, 8, 8\] uint8 .* but holds 64 bytes"):
        read_trace(tmp_path / "t.npz")
    (tmp_path / "t.npy").write_bytes(npy_header((2**40, 8), "<f8") + b"\0" * 64)
    with pytest.raises(TraceError, match="but holds 64 bytes"):
        read_trace(tmp_path / "t.npy", format="counts")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("moeplan.routing.arrays.MAX_ARRAY_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "t.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("experts.npy", npy_header((1000, 2, 2)) + b"\0" * 4000)
    with pytest.raises(TraceError, match=r"unpacks to .* bytes, more than 1000; store it as .parquet"):
        read_trace(tmp_path / "t.npz")


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the bomb went off')",))


def test_a_pickle_bomb_is_not_run(tmp_path):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.array([[[Bomb()]]], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("experts.npy", stream.getvalue())
    (tmp_path / "t.npy").write_bytes(stream.getvalue())
    with pytest.raises(TraceError, match="never objects"):
        read_trace(tmp_path / "t.npz")
    with pytest.raises(TraceError, match="never objects"):
        read_trace(tmp_path / "t.npy")


def test_a_pickle_bomb_in_a_torch_file_is_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"rank": 0, "logical_count": Bomb()}, tmp_path / "t.pt")
    with pytest.raises(TraceError, match="nothing in it was run"):
        read_trace(tmp_path / "t.pt")
    (tmp_path / "u.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(TraceError, match="nothing in it was run"):
        read_trace(tmp_path / "u.pt")


def test_a_tensor_that_unfolds_to_terabytes_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.zeros(1).expand(2**30, 2**10), tmp_path / "t.pt")
    with pytest.raises(TraceError, match="elements, more than"):
        read_trace(tmp_path / "t.pt")


def test_a_line_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(moeplan.files.read_lines, "__defaults__", (1000,))
    line = {"block": "decoder", "step": 0, "layer": 0, "rank": 0, "top_indices": [[1, 2]] * 1000}
    (tmp_path / "t.jsonl").write_text(json.dumps(line))
    with pytest.raises(TraceError, match="line 1 is longer than 1000 bytes"):
        read_trace(tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([[1, 2], [3]], "top_indices is ragged"),
        ([], "not be empty"),
        ([[1.5, 2.0]], "must hold integers"),
        ([[10**30, 2]], "must hold integers"),
        ([[-7, 2]], "expert id -7"),
        ("ab", "must have 2 axes"),
    ],
)
def test_wrong_jsonl(tmp_path, indices, message):
    line = {"block": "decoder", "step": 0, "layer": 0, "rank": 0, "top_indices": indices}
    (tmp_path / "t.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(TraceError, match=message):
        read_trace(tmp_path / "t.jsonl")


def test_a_step_that_misses_a_layer_is_refused(tmp_path):
    lines = [
        {"block": "decoder", "step": s, "layer": layer, "rank": 0, "top_indices": [[1, 2]]}
        for s, layer in ((0, 0), (0, 1), (1, 0))
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(TraceError, match="rank 0 step 1 micro-batch 0 has no layer 1"):
        read_trace(tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1, NaN], [2, 3]]", "not finite"),
        ("[[1, -2], [2, 3]]", "is negative"),
        ("[[1, 1e308], [2, 3]]", r"layer 0, expert 1 is above 2\^53"),
        ("[[1, 2], [3]]", "ragged"),
        ("[]", "not be empty"),
        ("[[0, 0], [1, 2]]", "layer 0 has no tokens"),
        ('{"counts": [[1, 2]], "moe_layers": [1, 2]}', "moe_layers has 2 entries"),
        ('{"counts": [[1, 2]], "load": [[1, 2]]}', "exactly one of logical_count, counts, load"),
        ('{"counts": "many"}', "is a str"),
        ("[[1, 2]", "not valid JSON"),
        ("[" * 100_000, "nested too deeply|not valid JSON"),
    ],
)
def test_wrong_counts(tmp_path, text, message):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(TraceError, match=message):
        read_trace(tmp_path / "t.json")


def test_wrong_parquet(tmp_path):
    pq.write_table(pa.table({"experts": [1, 2]}), tmp_path / "t.parquet")
    with pytest.raises(TraceError, match=r"no 'moeplan.trace' metadata; write it with 'moeplan trace convert'"):
        read_trace(tmp_path / "t.parquet")
    save_trace(small(), tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    pq.write_table(table.set_column(0, "experts", pa.array([[1]] * 4)), tmp_path / "t.parquet")
    with pytest.raises(TraceError, match=r"must be a fixed-size list of layers \* k \(6\)"):
        read_trace(tmp_path / "t.parquet")
    nulls = pa.array([[1] * 6, [1] * 5 + [None], [1] * 6, [1] * 6], pa.list_(pa.uint8(), 6))
    pq.write_table(table.set_column(0, "experts", nulls), tmp_path / "t.parquet")
    with pytest.raises(TraceError, match="has nulls"):
        read_trace(tmp_path / "t.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "t.parquet")
    with pytest.raises(TraceError, match="holds no tokens"):
        read_trace(tmp_path / "t.parquet")


def test_a_save_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(TraceError, match=r"suffix '.csv' must be .npz or .parquet"):
        save_trace(small(), tmp_path / "t.csv")
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_directory_come_in_natural_order(tmp_path):
    for rank in (10, 9, 1):
        (tmp_path / f"rank{rank}.jsonl").touch()
    assert [p.name for p in input_files(tmp_path, ".jsonl")] == ["rank1.jsonl", "rank9.jsonl", "rank10.jsonl"]
    assert [p.name for p in input_files(tmp_path / "rank1*.jsonl", ".jsonl")] == [
        "rank1.jsonl",
        "rank10.jsonl",
    ]


def test_sglang_ranks_that_ran_the_same_tokens_count_once(tmp_path):
    torch = pytest.importorskip("torch")
    ids = torch.tensor([[[1, 2, -1], [0, 3, -1]]])
    for rank in range(2):
        record = {
            "forward_pass_id": 0,
            "rank": rank,
            "topk_ids_of_layer": ids,
            "input_ids": torch.tensor([5, 6]),
            "forward_mode": 2,
        }
        pack = {"records": [record], "last_physical_to_logical_map": torch.tensor([[3, 2, 1, 0]])}
        torch.save(pack, tmp_path / f"r_{rank}.pt")
    trace = read_trace(tmp_path)
    assert trace.experts_TLK.tolist() == [[[2, 1]], [[3, 0]]]
    assert trace.origin["repeated_records"] == 1
    assert trace.phase_T.tolist() == [1, 1]


def test_counts_or_ids_is_told_from_the_content(tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.random((50, 4, 8)).argsort(axis=2)[:, :, :2]
    np.save(tmp_path / "ids.npy", ids)
    assert isinstance(read_trace(tmp_path / "ids.npy"), RoutingTrace)
    counts = np.stack([expert_load(RoutingTrace(ids[i::2], 8, (0, 1, 2, 3))).load_LE for i in (0, 1)])
    np.save(tmp_path / "counts.npy", counts.astype(np.int64))
    np.testing.assert_array_equal(read_trace(tmp_path / "counts.npy").load_WLE, counts)
