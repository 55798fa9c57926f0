"""Jobs on routing traces: inspect, convert, validate, synthesise. ``L`` layers, ``E`` experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.routing_trace import PHASES, RoutingTrace
from moeplan.errors import SpecError, TraceError
from moeplan.files import atomic_directory, require_other, require_place
from moeplan.progress import Progress, no_progress
from moeplan.reports.trace_figures import (
    coactivation_picture,
    dependency_picture,
    drift_picture,
    skew_picture,
)
from moeplan.routing.io import convert_trace, read_trace, save_trace
from moeplan.routing.pairs import coactivation_pairs
from moeplan.routing.statistics import Statistics, coactivation_lift, describe
from moeplan.routing.synthesis import synthesise
from moeplan.routing.targets import SynthSpec, targets_like
from moeplan.routing.validation import Finding, validate
from moeplan.specs.models import find_model

__all__ = [
    "Inspection",
    "convert",
    "inspect_trace",
    "synthesise_trace",
    "validate_trace",
]

_OF_LIKE = frozenset((
    "model", "layers", "experts", "top_k", "profile", "skew", "max_over_mean", "hot", "hot_layer", "coactivation",
    "dependency", "domains", "domain_cosine", "windows", "drift_cosine",
))  # fmt: skip
_PICTURES_PLACE = ("pictures of a trace", ("skew.svg", "drift.svg", "coactivation.svg", "dependency.svg"))


@dataclass(frozen=True, slots=True)
class Inspection:
    """What ``inspect`` found; ``written`` are the pictures."""

    statistics: Statistics
    origin: dict[str, Any]
    dropped_padding: int
    written: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "origin": self.origin,
            "dropped_padding": self.dropped_padding,
            **self.statistics.to_json(),
            "pictures": [str(path) for path in self.written],
        }


def inspect_trace(
    path: Path,
    *,
    format_name: str | None = None,
    domain: str | None = None,
    num_experts: int | None = None,
    windows: str | None = None,
    out: Path | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Inspection:
    """Measure a trace or a load; with ``out``, a directory of pictures takes its place.

    Raises:
        TraceError: the file cannot be used, or ``windows`` does not fit it; InputError: ``out`` holds something
        else, or cannot be written.
    """
    if out is not None:
        require_place(out, *_PICTURES_PLACE)
    source = read_trace(path, format=format_name, domain=domain, num_experts=num_experts)
    statistics = describe(source, windows, seed, progress)
    written: tuple[Path, ...] = ()
    if out is not None:
        with atomic_directory(out, *_PICTURES_PLACE) as folder:
            pictures = _pictures(source, statistics)
            for name, svg in pictures.items():
                (folder / name).write_text(svg, encoding="utf-8")
        written = tuple(out / name for name in pictures)
    dropped = source.dropped_padding if isinstance(source, RoutingTrace) else 0
    return Inspection(statistics, dict(source.origin), dropped, written)


def _pictures(source: RoutingTrace | ExpertLoad, found: Statistics) -> dict[str, str]:
    pictures = {
        "skew.svg": skew_picture(found.layer_ids, found.max_over_mean_L, found.contiguous_ep8_L),
        "drift.svg": drift_picture(found.windows, found.cosine_WW),
    }
    if isinstance(source, RoutingTrace) and found.coactivation_bits_L is not None and source.top_k > 1:
        layer = int(found.coactivation_bits_L.argmax())
        pairs_EE = coactivation_pairs(np.ascontiguousarray(source.experts_TLK[:, layer]), source.num_experts)
        pictures["coactivation.svg"] = coactivation_picture(found.layer_ids[layer], coactivation_lift(pairs_EE))
    bits = (found.mutual_information_M, found.control_information_M)
    share = (found.top_share_M, found.control_share_M)
    if bits[0] is not None and bits[1] is not None and share[0] is not None and share[1] is not None and len(bits[0]):
        pictures["dependency.svg"] = dependency_picture(found.layer_ids, (bits[0], bits[1]), (share[0], share[1]))
    return pictures


def convert(
    path: Path,
    out: Path,
    *,
    format_name: str | None = None,
    domain: str | None = None,
    num_experts: int | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write any readable trace as ``.npz`` or ``.parquet``, by suffix.

    Raises:
        TraceError: unreadable, counts only, or another suffix; InputError: ``out`` cannot be written.
    """
    require_other(out, path)
    return convert_trace(path, out, format=format_name, domain=domain, num_experts=num_experts, progress=progress)


def validate_trace(
    path: Path,
    *,
    format_name: str | None = None,
    domain: str | None = None,
    num_experts: int | None = None,
    progress: Progress = no_progress,
) -> list[Finding]:
    """What is wrong or doubtful about a trace or load, errors first.

    Raises:
        TraceError: the file cannot be read at all.
    """
    return validate(read_trace(path, format=format_name, domain=domain, num_experts=num_experts), progress)


def synthesise_trace(
    out: Path,
    *,
    model: str | None = None,
    like: Path | None = None,
    options: dict[str, Any],
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Make a trace and write it; a summary of what it came out as.

    The shape is ``options``', else the model's. With ``like``, shape, domains, loads, co-activation and dependency are
    those of that trace, and its phases where ``options`` name none; options that ask for other ones are refused.

    Raises:
        SpecError: options contradict each other or cannot be had; TraceError: ``like`` is unusable;
        InputError: ``out`` cannot be written.
    """
    require_other(out, like)
    fields = dict(options)
    targets = None
    if like is not None:
        asked = sorted(_OF_LIKE & (set(fields) | ({"model"} if model is not None else set())))
        if asked:
            raise SpecError(f"--like and {asked[0]} both say what to make; give one")
        source = read_trace(like)
        if not isinstance(source, RoutingTrace):
            raise TraceError(f"{like} holds counts only; --like needs a trace with tokens")
        targets = targets_like(source)
        shape = {"layers": source.num_layers, "experts": source.num_experts, "top_k": source.top_k}
        fields = {"tokens": source.num_tokens, "layer_ids": source.layer_ids, **fields, **shape}
        if source.phase_T is not None:
            present = np.unique(source.phase_T)
            fields.setdefault("phase", "mix" if len(present) > 1 else PHASES[present[0]])
        if source.domain_T is not None:
            fields["domains"] = source.domains
    elif model is not None:
        spec = find_model(model)
        fields = {
            "layers": len(spec.moe_layer_ids),
            "layer_ids": spec.moe_layer_ids,
            "experts": spec.num_experts,
            "top_k": spec.top_k,
            "n_group": spec.n_group or 1,
            "topk_group": spec.topk_group or spec.n_group or 1,
            **fields,
        }
        if fields["layers"] != len(fields["layer_ids"]):
            del fields["layer_ids"]
    trace = synthesise(SynthSpec.parse(fields, "synth"), targets, progress)
    save_trace(trace, out)
    return {"out": str(out), "spec": trace.origin["spec"], **describe(trace).to_json()}
