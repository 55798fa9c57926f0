"""Permuted torch_dist checkpoints, in Megatron-Core's layout, read back by torch's own reader."""

from __future__ import annotations

import io
import os
import pickle
from itertools import product
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are read with torch")

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from moeplan.errors import ExportError, InputError
from moeplan.exports.base import ExportContext
from moeplan.registry import load_plugin
from moeplan.testing.exporters import plan_of, tiny_model

L, E, H, F = 3, 4, 6, 5
MODEL = tiny_model(E, num_layers=L, moe_layer_ids=(0, 2), hidden_size=H, expert_intermediate_size=F)
ORDERS = {0: [3, 0, 2, 1], 2: [1, 3, 0, 2]}


def save(folder: Path, tensors: dict, objects: dict) -> None:
    """``tensors``: name -> (tensor, chunks along each axis)."""
    folder.mkdir(parents=True)
    about, places = {}, {}
    with (folder / "__0_0.distcp").open("wb") as file:
        def put(value) -> _StorageInfo:
            stream, begin = io.BytesIO(), file.tell()
            torch.save(value, stream)
            file.write(stream.getbuffer())
            return _StorageInfo("__0_0.distcp", begin, file.tell() - begin)

        for name, (tensor, counts) in tensors.items():
            chunks = []
            sizes = [size // count for size, count in zip(tensor.shape, counts, strict=True)]
            for at in product(*map(range, counts)):
                offsets = torch.Size([i * size for i, size in zip(at, sizes, strict=True)])
                part = tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].clone()
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(sizes)))
                places[MetadataIndex(name, offsets)] = put(part)
            about[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
        for name, value in objects.items():
            about[name], places[MetadataIndex(name)] = BytesStorageMetadata(), put(value)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(about, None, places)))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')


def megatron(stacked: bool) -> tuple[dict, dict]:
    """Layers as an axis, or in the names, where the one in the middle is dense."""
    rng, tensors, objects = torch.Generator().manual_seed(1), {}, {}

    def part(name: str, shape: tuple, counts: tuple, prefix: str = "") -> None:
        if stacked:
            tensors[f"{prefix}decoder.layers.{name}"] = torch.randn(L, *shape, generator=rng), (L, *counts)
        else:
            for layer in ORDERS:
                tensors[f"{prefix}decoder.layers.{layer}.{name}"] = torch.randn(*shape, generator=rng), counts

    for prefix in ("", "optimizer.state.exp_avg."):
        part("mlp.experts.experts.linear_fc1.weight", (E, 2 * F, H), (E, 2, 1), prefix)  # two tensor-parallel ranks
        part("mlp.experts.experts.linear_fc2.weight", (E, H, F), (E, 1, 1), prefix)
        part("mlp.router.weight", (E, H), (1, 1), prefix)
    part("mlp.router.expert_bias", (E,), (1,))
    part("self_attention.linear_proj.weight", (H, H), (1, 1))
    tensors["mtp.layers.0.mlp.experts.experts.linear_fc1.weight"] = torch.randn(E, F, H, generator=rng), (E, 1, 1)
    for layer, e in product(range(L) if stacked else ORDERS, range(E)):
        name = "decoder.layers." + ("" if stacked else f"{layer}.") + "mlp.experts.experts.linear_fc1._extra_state"
        objects[f"{name}/shard_{layer}.{e}_{L}.{E}" if stacked else f"{name}/shard_{e}_{E}"] = [layer, e]
    return tensors, objects | {"common_state/shard_0_1": {"iteration": 5}}


def read(folder: Path, tensors: dict, objects: dict) -> dict:
    state = {name: torch.zeros_like(tensor) for name, (tensor, _) in tensors.items()} | dict.fromkeys(objects)
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def permute(source: Path, out: Path, orders: dict = ORDERS, model=MODEL) -> list[Path]:
    plan = plan_of([np.array(order) for order in orders.values()], model, 2)
    return load_plugin("exporters", "megatron").export(plan, out, ExportContext(checkpoint=source, num_groups=1))


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("stacked", [True, False])
def test_experts_routers_and_their_state_change_places(tmp_path, stacked):
    tensors, objects = megatron(stacked)
    save(tmp_path / "saved" / "iter_0000005", tensors, objects)
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("5")
    files = permute(tmp_path / "saved", tmp_path / "out")
    folder = tmp_path / "out" / "iter_0000005"
    assert {path.relative_to(tmp_path / "out").as_posix() for path in files} == {
        "latest_checkpointed_iteration.txt", "moeplan_expert_permutation.json",
        *(f"iter_0000005/{name}" for name in (".metadata", "metadata.json", "__0_0.distcp", "__moeplan_0.distcp")),
    }  # fmt: skip
    found = read(folder, tensors, objects)
    for name, (tensor, _) in tensors.items():
        expected = tensor.clone()
        for layer, order in ORDERS.items():
            if not stacked and f"layers.{layer}.mlp" in name and "mtp" not in name:
                expected = tensor[order]
            elif stacked and ".mlp." in name and "mtp" not in name:
                expected[layer] = tensor[layer][order]
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0)
    for name, value in objects.items():
        if "shard_0_1" in name:
            assert found[name] == value
        else:
            layer, e = value
            assert found[name] == [layer, ORDERS[layer][e] if layer in ORDERS else e]
    old = (tmp_path / "saved/iter_0000005/__0_0.distcp").read_bytes()
    assert (folder / "__0_0.distcp").read_bytes() == old  # weights are not written anew


class _Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_a_pickle_that_would_run_code_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "saved", *megatron(True))
    (tmp_path / "saved/.metadata").write_bytes(pickle.dumps(Metadata({}, _Runs(), {})))
    with pytest.raises(InputError, match=r"cannot be read as the metadata .*: it names (posix|nt).system"):
        permute(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "ran").exists()




EXPERTS = "decoder.layers.mlp.experts.experts.linear_fc1.weight"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.param": (torch.ones(9), (1,))}, ExportError,
         r"in buckets without parameter names.*save with --dist-ckpt-optim-fully-reshardable"),
        ({EXPERTS: (torch.ones(L, 8, 2, 2), (L, 8, 1, 1))}, ExportError, r"\[3, 8, 2, 2\] belongs to .* layer 0 .* 4"),
        ({EXPERTS: (torch.ones(L, E, 2, 2), (L, 2, 1, 1))}, ExportError, r"belongs to routed experts of layer 0"),
        ({EXPERTS: (torch.ones(L, E, 2, 2), (1, E, 1, 1))}, ExportError, r"belongs to routed experts of layer 0"),
        ({"decoder.layers.mlp.experts.odd": (torch.ones(L, E), (L, E))}, ExportError, r"experts.odd \[3, 4\] belongs"),
        ({"decoder.layers.mlp.router.odd": (torch.ones(L, E), (L, 1))}, ExportError, r"router.odd \[3, 4\] belongs"),
    ],
)  # fmt: skip
def test_forms_that_cannot_be_permuted_are_refused(tmp_path, change, error, message):
    tensors, objects = megatron(True)
    save(tmp_path / "saved", tensors | change, objects)
    with pytest.raises(error, match=message):
        permute(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_incomplete_checkpoints_are_refused(tmp_path):
    saved = tmp_path / "saved"
    save(saved, *megatron(False))
    with pytest.raises(InputError, match=r"layer 1 has no routed experts; is the plan of another model"):
        permute(saved, tmp_path / "out", {1: ORDERS[0]}, MODEL.model_copy(update={"moe_layer_ids": (1,)}))
    with pytest.raises(InputError, match=r"__0_0.distcp is one file of a torch_dist checkpoint; give its directory"):
        permute(saved / "__0_0.distcp", tmp_path / "out")
    data = (saved / "__0_0.distcp").read_bytes()
    (saved / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"router.* of layer 0 is missing or damaged"):
        permute(saved, tmp_path / "out")
    (saved / "__0_0.distcp").unlink()
    with pytest.raises(InputError, match=r"__0_0.distcp is missing in .*saved, but .metadata names it"):
        permute(saved, tmp_path / "out")
    (saved / "__0_0.distcp").write_bytes(data)
    (saved / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(InputError, match=r"cannot be read as the metadata of a torch_dist checkpoint"):
        permute(saved, tmp_path / "out")
    (saved / ".metadata").unlink()
    with pytest.raises(InputError, match=r".metadata is missing beside .*__0_0.distcp; bring all files"):
        permute(saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()
