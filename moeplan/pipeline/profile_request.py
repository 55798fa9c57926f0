"""What to measure, as the command line says it: options over a preset over what suits the device."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moeplan.artifacts.profile_tables import DIRECTIONS
from moeplan.errors import UnknownNameError
from moeplan.specs.model import DTYPE_BYTES

__all__ = ["MAIN_MODELS", "PARTS", "PRESETS", "ProfileRequest", "Sizes", "profile_request"]

PARTS = ("system", "memory", "experts", "attention", "dense", "collectives")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Explicit sizes in place of a model; 0 where not given."""

    hidden: int = 0
    inter: int = 0
    experts: int = 0
    top_k: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    n: int = 0
    k: int = 0


@dataclass(frozen=True, slots=True)
class ProfileRequest:
    """What to measure, as the command line says it."""

    parts: tuple[str, ...] = PARTS
    models: tuple[str, ...] = ()
    sizes: Sizes = field(default_factory=Sizes)
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("bf16",)
    kernels: tuple[str, ...] = ()
    ep: tuple[int, ...] = (1,)
    tp: tuple[int, ...] = (1,)
    directions: tuple[str, ...] = ("forward",)
    max_tokens: int = 16384
    budget_s: float = 60.0
    threads: int = 0
    realtime: bool = False
    ops: tuple[str, ...] = ()
    max_bytes: int = 2**24
    ranks: int = 0
    ranks_per_node: int = 0
    trace: str = ""
    seed: int = 0

    @property
    def command(self) -> str:
        """The command that measures the same again."""
        name = "all" if len(self.parts) > 1 else self.parts[0]
        words = [f"moeplan profile {name}"]
        for option, default in _DEFAULTS.items():
            value = getattr(self, option)
            if value == default:
                continue
            if option == "budget_s":
                words.append(f"--budget {value:g}s")
            elif option == "sizes":
                words += [
                    f"--{part.replace('_', '-')} {size}" for part in Sizes.__slots__ if (size := getattr(value, part))
                ]
            elif option == "trace":
                words.append(f"--trace {Path(value).name}")
            elif option == "realtime":
                words.append("--realtime")
            elif option != "parts":
                text = ",".join(map(str, value)) if isinstance(value, tuple) else value
                words.append(f"--{_FLAG.get(option, option.replace('_', '-'))} {text}")
        return " ".join([*words, "--out DIR"])


_FLAG = {"dtypes": "dtype", "kernels": "kernel", "ops": "op", "directions": "direction"}
_DEFAULTS: dict[str, Any] = {name: getattr(ProfileRequest(), name) for name in ProfileRequest.__slots__} | {
    "budget_s": None,
    "device": None,
    "dtypes": None,
}

MAIN_MODELS = (
    "mixtral-8x7b",
    "deepseek-v2-lite",
    "deepseek-v3",
    "qwen3-30b-a3b",
    "qwen3-235b-a22b",
    "gpt-oss-120b",
    "olmoe-1b-7b",
)
_GPU = ("system", "memory", "experts", "attention", "dense")
PRESETS: dict[str, dict[str, Any]] = {
    "h200": {
        "parts": _GPU,
        "models": MAIN_MODELS,
        "device": "cuda",
        "dtypes": ("bf16", "fp8"),
        "ep": (1, 8),
        "budget_s": 1200.0,
    },
    "cpu": {
        "models": (),
        "sizes": Sizes(hidden=512, inter=1024, experts=16, top_k=2, heads=8, kv_heads=2, head_dim=64),
        "device": "cpu",
        "dtypes": ("fp32",),
        "ep": (1, 2, 4),
        "max_tokens": 2048,
        "max_bytes": 2**22,
        "ranks": 2,
        "threads": 1,
        "budget_s": 300.0,
    },
}


def profile_request(part: str, preset: str | None, options: dict[str, Any]) -> ProfileRequest:
    """What is asked: the options over the preset over what suits the device.

    Raises:
        UnknownNameError: no such direction or type.
    """
    chosen = {**(PRESETS[preset] if preset else {}), **options}
    sizes = {name: chosen.pop(name) for name in Sizes.__slots__ if name in chosen}
    if sizes:
        chosen["sizes"] = replace(chosen.get("sizes", Sizes()), **sizes)
    if part != "all":
        chosen["parts"] = (part,)
    if "device" not in chosen:
        from moeplan.profiling.device import torch_module

        chosen["device"] = "cuda" if torch_module().cuda.is_available() else "cpu"
    for option, kind, known in (("directions", "direction", DIRECTIONS), ("dtypes", "dtype", DTYPE_BYTES)):
        for name in chosen.get(option, ()):
            if name not in known:
                raise UnknownNameError(kind, name, known)
    asked = {name: value for name, value in chosen.items() if name in ProfileRequest.__slots__}
    if part == "all" and "parts" not in chosen and not (asked.get("models") or asked.get("sizes")):
        asked["parts"] = ("system", "memory", "collectives")
    return ProfileRequest(**asked)
