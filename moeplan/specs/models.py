"""Models by name, or from a file."""

from __future__ import annotations

from pathlib import Path

from moeplan.errors import SpecError
from moeplan.specs.base import read_document
from moeplan.specs.catalogue import Catalogue, names_a_file
from moeplan.specs.hf_config import model_from_hf_config
from moeplan.specs.model import ModelSpec

__all__ = ["find_model", "model_aliases", "model_names"]

_MODELS = Catalogue("model", "models.json", ModelSpec)


def model_names() -> list[str]:
    """Slugs of the built-in models."""
    return _MODELS.names()


def model_aliases(name: str) -> list[str]:
    """Other names under which a built-in model is found."""
    return _MODELS.aliases(name)


def find_model(name: str | Path) -> ModelSpec:
    """A model by slug, Hugging Face id, or path.

    A path names a ``config.json`` as Hugging Face writes it, a directory that holds one, or a file with the
    fields of :class:`ModelSpec`. Built-in names win over files of the same name; write
    ``./name`` for the file.

    Raises:
        UnknownNameError: neither a built-in model nor a path.
        InputError: the file cannot be read; SpecError: it does not describe a Mixture-of-Experts model.
    """
    if _MODELS.knows(str(name)) or not names_a_file(name):
        return _MODELS.find(str(name))
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    document = read_document(path)
    if not isinstance(document, dict):
        raise SpecError(f"{path} holds a {type(document).__name__}; a model is a mapping of fields")
    if "moe_layer_ids" in document:
        return ModelSpec.parse(document, str(path))
    label = path.parent.resolve().name if path.name == "config.json" else path.stem
    return model_from_hf_config(document, str(path), name=label)
