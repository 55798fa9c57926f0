"""What to measure, as the command line says it: options over a preset over what suits the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moeplan.artifacts.profile_tables import DIRECTIONS
from moeplan.errors import SpecError, UnknownNameError
from moeplan.specs.model import DTYPE_BYTES

__all__ = ["MAIN_MODELS", "PARTS", "PRESETS", "ProfileRequest", "Sizes", "changes", "profile_request"]

PARTS = ("system", "memory", "experts", "attention", "dense", "collectives")

_HEADS = ("heads", "kv_heads", "head_dim")
_LAYERS = ("experts", "attention", "dense")
_CHANGES = {  # the parts that a field changes; one that is not here changes all
    **dict.fromkeys(("models", "dtypes", "max_tokens"), (*_LAYERS, "collectives")),
    **dict.fromkeys(("hidden", "experts", "top_k"), ("experts", "dense", "collectives")),
    **dict.fromkeys(_HEADS, ("attention", "dense")),
    **dict.fromkeys(("n", "k"), ("dense",)),
    "windows": ("attention",),
    **dict.fromkeys(("tp", "directions"), _LAYERS),
    **dict.fromkeys(("kernels", "ep"), ("experts",)),
    **dict.fromkeys(("ops", "max_bytes", "ranks", "ranks_per_node", "trace"), ("collectives",)),
    **dict.fromkeys(("budget_s", "seed"), PARTS[1:]),
    "inter": ("experts", "dense"),
    "threads": PARTS[:-1],  # a rank of an exchange has one
}


def changes(name: str, part: str) -> bool:
    """Whether the field ``name`` of a request or of its sizes changes what ``part`` measures."""
    return part in _CHANGES.get(name, PARTS)


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
    """What to measure, as the command line says it.

    ``windows`` in tokens, besides those of the models' layers.

    Raises:
        UnknownNameError: no such part, type, kernel, direction or collective; SpecError: a window that hides nothing.
    """

    parts: tuple[str, ...] = PARTS
    models: tuple[str, ...] = ()
    sizes: Sizes = field(default_factory=Sizes)
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("bf16",)
    kernels: tuple[str, ...] = ()
    ep: tuple[int, ...] = (1,)
    tp: tuple[int, ...] = (1,)
    windows: tuple[int, ...] = ()
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

    def __post_init__(self) -> None:
        known: list[tuple[str, tuple[str, ...], Iterable[str]]] = [
            ("part", self.parts, PARTS),
            ("dtype", self.dtypes, DTYPE_BYTES),
            ("direction", self.directions, DIRECTIONS),
        ]
        if self.kernels or self.ops:
            from moeplan.profiling.collectives import OPS
            from moeplan.profiling.expert_kernels import KERNELS

            known += [("kernel", self.kernels, KERNELS), ("op", self.ops, OPS)]
        for kind, names, choice in known:
            for name in names:
                if name not in choice:
                    raise UnknownNameError(kind, name, choice)
        for window in self.windows:
            if not 0 < window < self.max_tokens:
                raise SpecError(
                    f"window ({window}) must be above 0 and below --max-tokens ({self.max_tokens}), or it hides no"
                    " token; give another --window, or a larger --max-tokens"
                )

    @property
    def command(self) -> str:
        """The command that measures the same again."""
        name = "all" if len(self.parts) > 1 else self.parts[0]
        words = [f"moeplan profile {name}"]
        for option, default in _DEFAULTS.items():
            value = getattr(self, option)
            if value == default or not any(changes(option, part) for part in self.parts):
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
                words.append(f"{_flag(option)} {text}")
        return " ".join([*words, "--out DIR"])

    @property
    def task(self) -> str:
        """The command without its time: runs of one task share their points."""
        return self.command.replace(f" --budget {self.budget_s:g}s", "")


def _flag(name: str) -> str:
    short = {name: name[:-1] for name in ("dtypes", "kernels", "ops", "directions", "windows")} | {"budget_s": "budget"}
    return f"--{short.get(name, name.replace('_', '-'))}"


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
        "budget_s": 480.0,
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


def _require_together(sizes: Sizes, parts: tuple[str, ...]) -> None:
    """Raises SpecError where only some of the sizes of experts or of attention are given: none has a default."""
    for of, any_of, names in (
        (("experts",), ("inter",), ("hidden", "experts", "top_k")),
        (("attention", "dense"), _HEADS, _HEADS),
    ):
        given = [name for name in any_of if getattr(sizes, name)]
        missing = [_flag(name) for name in names if not getattr(sizes, name)]
        if given and missing and set(of) & set(parts):
            one = f"{_flag(given[0])} ({getattr(sizes, given[0])})"
            raise SpecError(f"{one} needs {' and '.join(missing)} too; give them")


def profile_request(part: str, preset: str | None, options: dict[str, Any]) -> ProfileRequest:
    """What is asked: the options over the preset over what suits the device. Options that are 0 or empty do not count.

    Raises:
        SpecError: an option changes nothing that is measured, or needs others beside it; UnknownNameError: no such
            name, as in :class:`ProfileRequest`.
    """
    options = {name: value for name, value in options.items() if value}
    sizes = {name: options.pop(name) for name in Sizes.__slots__ if name in options}
    layer = [name for name in sizes if name not in ("n", "k")]
    chosen: dict[str, Any] = {**(PRESETS[preset] if preset else {})}
    if "models" in options:
        if layer:
            raise SpecError(
                f"--models ({', '.join(options['models'])}) and {_flag(layer[0])} ({sizes[layer[0]]}) both give sizes;"
                " leave one out"
            )
        chosen.pop("sizes", None)
    elif layer:
        chosen.pop("models", None)
    chosen |= options
    if part != "all":
        chosen["parts"] = (part,)
    parts = chosen.get("parts", PARTS)
    if not ("parts" in chosen or sizes or chosen.get("models") or chosen.get("sizes")):
        parts = ("system", "memory", "collectives")  # the others are asked for too, and left out for want of sizes
    for name, value in {**options, **sizes}.items():
        if not any(changes(name, each) for each in parts):
            more = ", or give --models or sizes" if part == "all" and not preset else ""
            text = ", ".join(map(str, value)) if isinstance(value, tuple) else value
            raise SpecError(
                f"{_flag(name)} ({text}) changes nothing in what is measured ({', '.join(parts)}); leave it out{more}"
            )
    if bool(sizes.get("n")) != bool(sizes.get("k")):
        one, other = ("n", "k") if "n" in sizes else ("k", "n")
        raise SpecError(f"--{one} ({sizes[one]}) is one side of a dense product; give --{other} too")
    # A preset is for all parts: what does not change these is no part of the command.
    chosen = {name: value for name, value in chosen.items() if any(changes(name, each) for each in parts)}
    whole = replace(chosen.get("sizes", Sizes()), **sizes)
    names = [name for name in Sizes.__slots__ if any(changes(name, each) for each in parts)]
    chosen["sizes"] = Sizes(**{name: getattr(whole, name) for name in names})
    _require_together(chosen["sizes"], parts)
    if "device" not in chosen:
        from moeplan.profiling.device import torch_module

        chosen["device"] = "cuda" if torch_module().cuda.is_available() else "cpu"
    return ProfileRequest(**chosen)
