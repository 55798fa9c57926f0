"""Megatron-Core's ``torch_dist`` checkpoints (torch.distributed.checkpoint), permuted by relabelling.

``.metadata`` is a pickle that says, for every chunk of every tensor, in which ``.distcp`` file it lies and where.
Layers are an axis of the stored tensors (``decoder.layers.mlp.experts.experts.linear_fc1.weight`` [L, E, ...]) where
all are alike, else in the name. An expert has chunks of its own, so experts change places where chunks change their
labels; routers [E, H] and what else holds all experts in one chunk are written anew, into one more file. Layout as of
Megatron-Core 0.19.2.

A pickle can run code, so only the plain classes that such a file is made of are ever made from it, and tensors are read
as plain tensors (``weights_only``).
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moeplan.errors import ExportError, InputError, MissingExtraError
from moeplan.exports.checkpoint_names import Permutations

__all__ = ["METADATA", "DistFolder"]

METADATA = ".metadata"
_ADDED = "__moeplan_0.distcp"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int8", "uint8",
              "int16", "int32", "int64", "bool"},
    "collections": {"OrderedDict"},
}  # fmt: skip
_LAYER = re.compile(r"(?:^|\.)layers\.(?:(\d+)\.)?mlp\.(experts|router)\.")
_MTP = re.compile(r"(?:^|\.)mtp\.")
_KNOWN = re.compile(
    r"\.mlp\.(?:experts\.experts\.linear_fc[12]\.\w+|router\.(?:weight|bias|expert_bias))(?:/shard_.*)?$"
)
_OBJECT = re.compile(r"(.*/shard_)([\d.]+)(_[\d.]+)$")
_BUCKETS = re.compile(r"(?:^|\.)optimizer\.(?!state\.|param_groups)")


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not plain data of a checkpoint")
        return super().find_class(module, name)


class _Chunk(NamedTuple):
    """Where it lies along layers and experts, and how it is known: its entry in the metadata's ``storage_data``."""

    layer: int
    router: bool
    expert: int | None  # None: it holds all experts, along ``axis``
    axis: int
    sizes: tuple[int, ...]
    index: Any


class DistFolder:
    """A folder with ``.metadata``; :meth:`write` puts the permuted ``.metadata`` and one more file into a copy of it.

    Raises:
        InputError: unreadable, damaged, or of another model. ExportError: a form that cannot be permuted exactly.
    """

    def __init__(self, folder: Path, permutations: Permutations, num_experts: int) -> None:
        self.folder, self.permutations, self.num_experts = folder, permutations, num_experts
        path = folder / METADATA
        try:
            with path.open("rb") as file:
                self.metadata = _Plain(file).load()
            self.storage: dict[Any, Any] = self.metadata.storage_data
            self.chunks = list(self._chunks())
        except ImportError as error:
            raise MissingExtraError("a torch_dist checkpoint", "torch") from error
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        except (pickle.UnpicklingError, AttributeError, TypeError, ValueError, LookupError, EOFError) as error:
            raise InputError(f"{path} cannot be read as the metadata of a torch_dist checkpoint: {error}") from error
        for name in sorted({place.relative_path for place in self.storage.values()}):
            if Path(name).name != name or not (folder / name).is_file():
                raise InputError(f"checkpoint: {name} is missing in {folder}, but {METADATA} names it; bring all files")
        for layer in permutations:
            for router, what in ((False, "routed experts"), (True, "router")):
                if not any(chunk.layer == layer and chunk.router == router for chunk in self.chunks):
                    raise InputError(f"checkpoint {folder}: layer {layer} has no {what}; is the plan of another model?")

    def _chunks(self) -> Iterator[_Chunk]:
        """What belongs to the experts and routers of planned layers."""
        about = self.metadata.state_dict_metadata
        sizes_of: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {}
        for index in self.storage:
            name, tensor = index.fqn, index.offset is not None
            if tensor and _BUCKETS.search(name):
                raise ExportError(
                    f"checkpoint: {name} is optimizer state in buckets without parameter names, in which experts cannot"
                    " be found; save with --dist-ckpt-optim-fully-reshardable, or with --no-save-optim"
                )
            if not _LAYER.search(name) or _MTP.search(name):
                continue
            if tensor:
                if name not in sizes_of:
                    sizes_of[name] = {tuple(c.offsets): tuple(c.sizes) for c in about[name].chunks}
                place = tuple(index.offset)
                found = self._chunk(index, place, sizes_of[name][place], list(about[name].size))
            else:
                where = _OBJECT.fullmatch(name)
                place = () if where is None else tuple(int(i) for i in where[2].split("."))
                found = self._chunk(index, place, (1,) * len(place), None)
            if found is not None:
                yield found

    def _chunk(
        self, index: Any, place: tuple[int, ...], sizes: tuple[int, ...], shape: list[int] | None
    ) -> _Chunk | None:
        """The chunk at ``place``, of ``sizes``, of a tensor of ``shape`` (None: of an object); None where no plan is.

        Raises:
            ExportError: it is of no known form.
        """
        name = index.fqn
        number, kind = _LAYER.search(name).groups()  # type: ignore[union-attr]
        axis = 0 if number else 1
        layer = int(number) if number else place[0] if place else -1
        if layer >= 0 and layer not in self.permutations:
            return None
        known = _KNOWN.search(name) and len(place) > axis and (axis == 0 or sizes[0] == 1)
        known = known and (shape is None or shape[axis] == self.num_experts)
        if not known or sizes[axis] not in (1, self.num_experts):
            raise ExportError(
                f"checkpoint: {name} {shape or ''} belongs to routed experts of layer {layer} and is not of a known"
                f" form with {self.num_experts} experts; it cannot be permuted (is the plan of another model?)"
            )
        expert = place[axis] if sizes[axis] == 1 < self.num_experts else None
        return _Chunk(layer, kind == "router", expert, axis, sizes, index)

    def write(self, copied: Path) -> None:
        """Write the new labels, and what holds all experts in one chunk, into ``copied``, which has all other files.

        Raises:
            InputError: a chunk is missing or damaged.
        """
        changed = dict(self.storage)
        with (copied / _ADDED).open("wb") as added:
            for chunk in self.chunks:
                try:
                    moved = self._anew(chunk, added) if chunk.expert is None else self._relabelled(chunk)
                except (pickle.UnpicklingError, RuntimeError, LookupError, OSError, EOFError) as error:
                    what = f"{chunk.index.fqn} of layer {chunk.layer}"
                    raise InputError(f"checkpoint {self.folder}: {what} is missing or damaged: {error}") from error
                changed[chunk.index] = moved
        self.metadata.storage_data = changed
        with (copied / METADATA).open("wb") as file:
            pickle.dump(self.metadata, file)

    def _relabelled(self, chunk: _Chunk) -> Any:
        """Where the expert that comes to this place lies."""
        import torch

        assert chunk.expert is not None
        old = int(self.permutations[chunk.layer][chunk.expert])
        kind = type(chunk.index)
        if chunk.index.offset is not None:
            place = list(chunk.index.offset)
            place[chunk.axis] = old
            return self.storage[kind(chunk.index.fqn, torch.Size(place))]
        head, numbered, tail = _OBJECT.fullmatch(chunk.index.fqn).groups()  # type: ignore[union-attr]
        numbers = numbered.split(".")
        numbers[chunk.axis] = str(old)
        return self.storage[kind(head + ".".join(numbers) + tail)]

    def _anew(self, chunk: _Chunk, added: Any) -> Any:
        """The chunk with its experts in their new order, at the end of the added file."""
        import torch

        place = self.storage[chunk.index]
        if getattr(place, "transform_descriptors", None):
            raise ExportError(f"checkpoint: {chunk.index.fqn} is compressed; save it without")
        with (self.folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            tensor = torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
        order_E = torch.as_tensor(self.permutations[chunk.layer], dtype=torch.int64)
        permuted = tensor.reshape(chunk.sizes).index_select(chunk.axis, order_E).reshape(tensor.shape)
        begin = added.tell()
        stream = io.BytesIO()
        torch.save(permuted, stream)
        added.write(stream.getbuffer())
        return type(place)(_ADDED, begin, added.tell() - begin)
