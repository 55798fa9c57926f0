"""Each documented layout built by hand, without the project's own writers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from moeplan.errors import TraceError
from moeplan.registry import load_plugin, plugin_names
from moeplan.routing.readers.base import ReadOptions
from moeplan.testing.readers import Layout, TraceReaderContract

E = 10


def choices(tokens: int = 40, layers: int = 3, top_k: int = 2, seed: int = 0) -> np.ndarray:
    """Distinct random experts [tokens, layers, k]; expert E - 1 occurs, so that ids tell E."""
    rng = np.random.default_rng(seed)
    experts = rng.random((tokens, layers, E)).argsort(axis=2)[:, :, :top_k]
    experts[0, :, 0], experts[0, :, 1] = E - 1, 0
    return experts.astype(np.int64)


def counted(experts: np.ndarray) -> np.ndarray:
    """Loads [L, E] by going through all selections one by one."""
    load = np.zeros((experts.shape[1], E))
    for token in experts:
        for layer, row in enumerate(token):
            for expert in row:
                load[layer, expert] += 1
    return load


class TestNpz(TraceReaderContract):
    reader = load_plugin("trace_readers", "npz")

    def build(self, folder: Path) -> Layout:
        experts = choices()
        np.savez(
            folder / "trace.npz",
            experts=experts.astype(np.uint8),
            scores=np.full(experts.shape, 0.5, np.float32),
            seq_lens=np.array([15, 25]),
            moe_layers=np.array([1, 2, 3]),
            num_experts=E,
        )
        return Layout(folder / "trace.npz", counted(experts), (1, 2, 3), experts)


class TestNpzTasks(TraceReaderContract):
    reader = load_plugin("trace_readers", "npz")

    def build(self, folder: Path) -> Layout:
        law, code = choices(20, seed=1), choices(20, seed=2)
        np.savez(
            folder / "tasks.npz",
            law_experts=law.astype(np.uint8),
            law_scores_x1e4=np.full(law.shape, 2500, np.uint16),
            law_seq_lens=np.array([20], np.int32),
            code_experts=code.astype(np.uint8),
            code_scores_x1e4=np.full(law.shape, 2500, np.uint16),
            code_seq_lens=np.array([12, 8], np.int32),
            num_experts=E,
        )
        both = np.concatenate([law, code])
        return Layout(folder / "tasks.npz", counted(both), (0, 1, 2), both)


class TestParquet(TraceReaderContract):
    reader = load_plugin("trace_readers", "parquet")

    def build(self, folder: Path) -> Layout:
        experts = choices()
        column = pa.FixedSizeListArray.from_arrays(pa.array(experts.astype(np.int16).reshape(-1)), 6)
        header = {
            "version": 1,
            "layer_ids": [3, 4, 5],
            "top_k": 2,
            "num_experts": E,
            "domains": ["a", "b"],
            "dropped_padding": 0,
            "origin": {},
        }
        domain = pa.array((np.arange(40) >= 30).astype(np.int32))
        table = pa.table({"experts": column, "domain": domain})
        table = table.replace_schema_metadata({b"moeplan.trace": json.dumps(header)})
        pq.write_table(table, folder / "trace.parquet", row_group_size=16)
        return Layout(folder / "trace.parquet", counted(experts), (3, 4, 5), experts)


class TestCountsNpy(TraceReaderContract):
    reader = load_plugin("trace_readers", "counts")

    def build(self, folder: Path) -> Layout:
        load = counted(choices())
        np.save(folder / "counts.npy", load)
        return Layout(folder / "counts.npy", load, (0, 1, 2))


class TestCountsCsv(TraceReaderContract):
    reader = load_plugin("trace_readers", "counts")

    def build(self, folder: Path) -> Layout:
        load = counted(choices())
        lines = [",".join(["layer", *(f"expert {e}" for e in range(E))])]
        lines += [",".join(str(int(v)) for v in (layer + 3, *row)) for layer, row in enumerate(load)]
        (folder / "counts.csv").write_text("\n".join(lines) + "\n")
        return Layout(folder / "counts.csv", load, (3, 4, 5))

    def test_files_cut_off_are_refused(self, tmp_path: Path) -> None:
        """A table without a length cannot tell a missing last row; a cut row is refused."""
        layout = self.build(tmp_path)
        layout.path.write_text(layout.path.read_text()[:-6])
        assert "ragged" in (self._failure(layout.path) or "")


class TestCountsJson(TraceReaderContract):
    reader = load_plugin("trace_readers", "counts")

    def build(self, folder: Path) -> Layout:
        load = np.stack([counted(choices()), counted(choices(seed=3))])
        document = {"logical_count": load.astype(int).tolist(), "moe_layers": [1, 2, 3], "top_k": 2}
        (folder / "counts.json").write_text(json.dumps(document))
        return Layout(folder / "counts.json", load.sum(axis=0), (1, 2, 3))


class TestCountsPt(TraceReaderContract):
    reader = load_plugin("trace_readers", "counts")

    def build(self, folder: Path) -> Layout:
        torch = pytest.importorskip("torch")
        load = counted(choices())
        torch.save(torch.tensor(load), folder / "counts.pt")
        return Layout(folder / "counts.pt", load, (0, 1, 2))


class TestSglangStat(TraceReaderContract):
    reader = load_plugin("trace_readers", "sglang")

    def build(self, folder: Path) -> Layout:
        """Five decoder layers of which 0 and 2 are dense: all zero. A ring of a thousand steps, most of them unused."""
        torch = pytest.importorskip("torch")
        load = counted(choices())
        counts = torch.zeros((1000, 5, E), dtype=torch.int32)
        for layer, where in enumerate((1, 3, 4)):
            counts[0, where] = torch.tensor(load[layer]).int()
            counts[2, where] = 2 * counts[0, where]
        path = folder / "expert_distribution_recorder_1700000000.0.pt"
        torch.save({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, path)
        return Layout(path, 3 * load, (1, 3, 4))

    def test_steps_without_a_token_are_no_windows(self, tmp_path: Path):
        layout = self.build(tmp_path)
        load = self.reader.read(layout.path, ReadOptions())
        assert load.windows == ("step 0", "step 2")
        assert (load.load_WLE[1] == 2 * load.load_WLE[0]).all()


def recorder_map(layers: int, seed: int = 5) -> np.ndarray:
    """[layers, E + 2] physical to logical: a random order, two experts twice."""
    rng = np.random.default_rng(seed)
    return np.stack([np.concatenate([rng.permutation(E), rng.permutation(E)[:2]]) for _ in range(layers)])


class TestSglangPerPass(TraceReaderContract):
    reader = load_plugin("trace_readers", "sglang")

    def build(self, folder: Path) -> Layout:
        """Two ranks, two passes; the ranks of a pass add up. The second's is two stages of a pipeline, of one rank."""
        torch = pytest.importorskip("torch")
        physical_to_logical = recorder_map(3)
        rng = np.random.default_rng(6)
        load = np.zeros((3, E))
        for rank in range(2):
            records = []
            for number in (7, 8):
                physical = rng.integers(0, 50, (3, E + 2))
                for layer in range(3):
                    for slot in range(E + 2):
                        load[layer, physical_to_logical[layer, slot]] += physical[layer, slot]
                records.append(
                    {
                        "forward_pass_id": number,
                        "rank": rank,
                        "gatherer_key": "primary",
                        "global_physical_count": torch.tensor(physical),
                    }
                )
            for stage, layers in enumerate([[0, 1, 2]] if rank == 0 else [[0, 1], [2]]):
                held = torch.tensor([[int(layer in layers)] for layer in range(3)])
                part = [{**r, "global_physical_count": r["global_physical_count"] * held} for r in records]
                pack = {"records": part, "last_physical_to_logical_map": torch.tensor(physical_to_logical)}
                torch.save(pack, folder / f"expert_distribution_recorder_1.{stage}_{rank}.pt")
        return Layout(folder, load, (0, 1, 2))


class TestSglangPerToken(TraceReaderContract):
    reader = load_plugin("trace_readers", "sglang")

    def build(self, folder: Path) -> Layout:
        """Top-2 in an array with room for eight; layer 0 dense; three padding tokens; physical ids."""
        torch = pytest.importorskip("torch")
        physical_to_logical = recorder_map(4)
        experts = choices(20)
        ids = np.full((4, 23, 8), -1, np.int32)
        for layer in range(3):
            for token in range(20):
                for k in range(2):
                    slots = np.flatnonzero(physical_to_logical[layer + 1] == experts[token, layer, k])
                    ids[layer + 1, token, k] = slots[token % len(slots)]
        counts = np.stack([np.bincount(layer[layer >= 0], minlength=E + 2) for layer in ids])
        record = {
            "forward_pass_id": 3,
            "rank": 0,
            "gatherer_key": "primary",
            "input_ids": list(range(23)),
            "positions": [*range(12), *range(8), 0, 0, 0],
            "extend_seq_lens": [12, 8],
            "forward_mode": 1,
            "topk_ids_of_layer": torch.tensor(ids),
            "misc_objects": [],
            "global_physical_count": torch.tensor(counts).int(),
        }
        pack = {"records": [record], "last_physical_to_logical_map": torch.tensor(physical_to_logical)}
        path = folder / "expert_distribution_recorder_1.0_0.pt"
        torch.save(pack, path)
        return Layout(path, counted(experts), (1, 2, 3), experts, dropped_padding=4 * 23 * 8 - 20 * 3 * 2)


class TestSglangPipeline(TestSglangPerToken):
    def build(self, folder: Path) -> Layout:
        """Both stages of a pipeline are rank 0, run the same passes, and hold layers of their own."""
        torch = pytest.importorskip("torch")
        layout = super().build(folder)
        pack = torch.load(layout.path)
        layout.path.unlink()
        (record,) = pack["records"]
        stage_L = torch.tensor([0, 0, 0, 1])[:, None, None]
        for stage in range(2):
            ids = torch.where(stage_L == stage, record["topk_ids_of_layer"], -1)
            part = {**pack, "records": [{**record, "topk_ids_of_layer": ids}]}
            torch.save(part, folder / f"expert_distribution_recorder_1.{stage}_0.pt")
        return replace(layout, path=folder)


class TestTrtllm(TraceReaderContract):
    reader = load_plugin("trace_readers", "trtllm")

    def build(self, folder: Path) -> Layout:
        rng = np.random.default_rng(8)
        counts = rng.integers(0, 90, (2, 3, 4, E))  # rank, iteration, layer
        meta = {"num_experts": E, "num_experts_per_token": 2, "ep_size": 2}
        (folder / "meta_info.json").write_text(json.dumps(meta))
        for rank in range(2):
            tensors = {
                f"{100 + i}_{3 + layer}": counts[rank, i, layer] for i in range(3) for layer in range(4)
            }
            save_file(tensors, folder / f"rank{rank}.safetensors")
        return Layout(folder, counts.sum(axis=(0, 1)), (3, 4, 5, 6))

    def test_knows_where_the_tokens_came_from(self, tmp_path: Path) -> None:
        load = self._read(self.build(tmp_path))
        counts = np.random.default_rng(8).integers(0, 90, (2, 3, 4, E))
        np.testing.assert_array_equal(load.source_SLE, counts.sum(axis=1))
        assert load.windows == ("iteration 0", "iteration 1", "iteration 2")
        assert load.top_k == 2


class TestMegatron(TraceReaderContract):
    reader = load_plugin("trace_readers", "megatron")

    def build(self, folder: Path) -> Layout:
        """Two ranks, two steps; a prediction block beside the decoder."""
        experts = choices()
        for rank in range(2):
            lines = []
            for step in range(2):
                part = experts[rank * 20 + step * 10 : rank * 20 + step * 10 + 10]
                for layer in range(3):
                    lines.append(
                        {
                            "step": step,
                            "stage": "pre_dispatch",
                            "block": "decoder",
                            "layer": layer + 1,
                            "rank": rank,
                            "num_tokens": 10,
                            "topk": 2,
                            "top_indices": part[:, layer].tolist(),
                        }
                    )
                lines.append({**lines[-1], "block": "mtp", "mtp_idx": 0, "layer": 0})
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"router_trace_rank{rank}.jsonl").write_text(text)
        return Layout(folder, counted(experts), (1, 2, 3), experts, states_experts=False)

    def test_tokens_keep_their_rank(self, tmp_path: Path) -> None:
        trace = self._read(self.build(tmp_path))
        assert trace.source_rank_T.tolist() == [0] * 20 + [1] * 20
        assert trace.origin["left_out_mtp_records"] == 4

    def test_reads_a_pattern(self, tmp_path: Path) -> None:
        layout = self.build(tmp_path)
        one = self.reader.read(tmp_path / "router_trace_rank[1].jsonl", ReadOptions(num_experts=E))
        np.testing.assert_array_equal(one.experts_TLK, layout.experts_TLK[20:])


class TestVllm(TraceReaderContract):
    reader = load_plugin("trace_readers", "vllm")

    def build(self, folder: Path) -> Layout:
        """Two requests; hidden layer 0 is dense, hence zeros."""
        experts = choices()
        for name, part in (("req-2", experts[:15]), ("req-10", experts[15:])):
            full = np.zeros((len(part), 4, 2), np.uint8)  # up to 256 experts, as of vLLM 0.32
            full[:, 1:] = part
            np.save(folder / f"{name}.npy", full)
        return Layout(folder, counted(experts), (1, 2, 3), experts, dropped_padding=80, states_experts=False)


class TestVllmNpz(TraceReaderContract):
    reader = load_plugin("trace_readers", "vllm")

    def build(self, folder: Path) -> Layout:
        experts = choices()
        np.savez(
            folder / "routed.npz",
            request_a=experts[:15].astype(np.int32),
            request_b=experts[15:].astype(np.int32),
        )
        return Layout(folder / "routed.npz", counted(experts), (0, 1, 2), experts, states_experts=False)


class TestSimllm(TraceReaderContract):
    reader = load_plugin("trace_readers", "simllm")

    def build(self, folder: Path) -> Layout:
        """Two requests whose rows alternate: 12 prefill and 8 decode tokens each."""
        experts = choices()
        schema = "simllm-preplay-trace-v2"
        provenance = {"expert_count": E, "top_k": 2, "moe_layer_indices": [0, 1, 2]}
        rows: list[dict] = [{"row_type": "header", "schema": schema, "provenance": provenance}]
        for index in range(20):
            for request in range(2):
                token = experts[request * 20 + index]
                rows.append(
                    {
                        "row_type": "observed-dispatch",
                        "schema": schema,
                        "request_id": f"p{request}",
                        "phase": "prefill" if index < 12 else "decode",
                        "token_index": index,
                        "routing": [
                            {"layer_index": i, "expert_ids": ids.tolist()} for i, ids in enumerate(token)
                        ],
                    }
                )
        rows.append({"row_type": "kv-event", "schema": schema})
        rows.append(
            {
                "row_type": "footer",
                "schema": schema,
                "prefill_dispatch_count": 24,
                "decode_dispatch_count": 16,
            }
        )
        (folder / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Layout(folder / "trace.jsonl", counted(experts), (0, 1, 2), experts)

    def test_requests_and_phases(self, tmp_path: Path) -> None:
        trace = self._read(self.build(tmp_path))
        assert trace.seq_lens_S.tolist() == [20, 20]
        assert trace.phase_T.tolist() == ([0] * 12 + [1] * 8) * 2

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ('"layer_index": 1', '"layer_index": "1"', r"line 2: layer_index \('1'\) must be an integer"),
            ('"layer_index": 1', '"layer_index": [1]', r"line 2: layer_index \(\[1\]\) must be an integer"),
            ("[0, 1, 2]", "7", "line 1: moe_layer_indices must be a list"),
        ],
    )
    def test_layers_that_are_no_numbers(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        layout = self.build(tmp_path)
        layout.path.write_text(layout.path.read_text().replace(old, new, 1))
        with pytest.raises(TraceError, match=message):
            self._read(layout)


LAYOUTS = [
    cls for cls in list(globals().values()) if isinstance(cls, type) and cls.__name__.startswith("Test")
]


@pytest.mark.parametrize("suite", LAYOUTS, ids=lambda suite: suite.__name__)
def test_exactly_one_reader_claims_each_layout(suite, tmp_path):
    path = suite().build(tmp_path).path
    names = plugin_names("trace_readers")
    assert [n for n in names if load_plugin("trace_readers", n).sniff(path)] == [suite.reader.name]


def test_every_registered_reader_has_a_layout_here():
    built_in = {"npz", "parquet", "counts", "sglang", "trtllm", "megatron", "vllm", "simllm"}
    assert {suite.reader.name for suite in LAYOUTS} == built_in
    assert built_in <= set(plugin_names("trace_readers"))
