"""Is this trace what it claims to be? One function per way it can be wrong; each finding shows its evidence.

``T`` tokens, ``L`` layers, ``E`` experts, ``K`` top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.progress import Progress, no_progress
from moeplan.routing.loads import count_selections
from moeplan.routing.pairs import lag_overlap, transition_pairs
from moeplan.routing.statistics import mutual_information

__all__ = ["Finding", "validate"]

MAX_LAG = 64
MAX_SHIFT = 4
_SAMPLE = 4096
_FEW = 20  # selections per expert below which loads are noisy: sqrt(20) / 20 is 22 %


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong (``error``: the trace must not be planned on) or doubtful (``warning``)."""

    code: str
    severity: Literal["error", "warning"]
    message: str
    evidence: dict[str, Any] = field(default_factory=dict)


def validate(source: RoutingTrace | ExpertLoad, progress: Progress = no_progress) -> list[Finding]:
    """All findings, errors first. Counts are checked for what counts can show."""
    if isinstance(source, ExpertLoad):
        return list(_loads(source.load_LE, source.layer_ids, source.origin.get("num_experts_from")))
    checks = (
        _duplicates,
        _constant_layers,
        _repeated_layers,
        _misaligned_layers,
        _interleaved,
        _repeated_sequences,
    )
    findings: list[Finding] = []
    for number, check in enumerate(checks):
        findings += check(source)
        progress("validation", (number + 1) / (len(checks) + 1))
    load_LE = count_selections(source.experts_TLK, source.num_experts)
    findings += _loads(load_LE, source.layer_ids, source.origin.get("num_experts_from"))
    padding = int((source.experts_TLK < 0).sum())
    if padding or source.dropped_padding:
        findings.append(
            Finding(
                "padding",
                "warning",
                f"{source.dropped_padding} padding ids (-1) were dropped, {padding} stand beside real ids of"
                " a token; neither is counted as load",
                {"dropped": source.dropped_padding, "inside_tokens": padding},
            )
        )
    progress("validation", 1.0)
    return sorted(findings, key=lambda finding: finding.severity)


def _duplicates(trace: RoutingTrace) -> Iterator[Finding]:
    """A token that names an expert twice in one layer."""
    worst, total, place = 0, 0, None
    for layer in range(trace.num_layers):
        ordered_TK = np.sort(trace.experts_TLK[:, layer], axis=1)
        twice_T = ((ordered_TK[:, 1:] == ordered_TK[:, :-1]) & (ordered_TK[:, 1:] >= 0)).any(axis=1)
        count = int(twice_T.sum())
        total += count
        if count > worst:
            worst, place = count, (int(twice_T.argmax()), layer)
    if place is not None:
        token, layer = place
        yield Finding(
            "duplicate-experts",
            "error",
            f"{total} times a token names an expert twice in one layer (most in layer"
            f" {trace.layer_ids[layer]}: token {token}"
            f", {trace.experts_TLK[token, layer].tolist()}); a top-k has k different experts",
            {"count": total, "layer": trace.layer_ids[layer], "token": token},
        )


def _constant_layers(trace: RoutingTrace) -> Iterator[Finding]:
    """A layer where all tokens choose the same experts: an unwritten buffer, not routing."""
    if trace.num_tokens < 16 or trace.top_k == trace.num_experts:
        return
    for layer, layer_id in enumerate(trace.layer_ids):
        ordered_TK = np.sort(trace.experts_TLK[:, layer], axis=1)
        if (ordered_TK == ordered_TK[0]).all():
            yield Finding(
                "constant-layer",
                "error",
                f"in layer {layer_id} all {trace.num_tokens} tokens choose {ordered_TK[0].tolist()}; the"
                " recorder did not write this layer",
                {"layer": layer_id, "experts": ordered_TK[0].tolist()},
            )


def _repeated_layers(trace: RoutingTrace) -> Iterator[Finding]:
    """Two layers with the same choices: one was written twice."""
    head = np.sort(trace.experts_TLK[:: max(1, trace.num_tokens // 512)], axis=2)
    for a, b in combinations(range(trace.num_layers), 2):
        if (head[:, a] == head[:, b]).all(axis=1).mean() < 0.9:
            continue
        a_TK, b_TK = (np.sort(trace.experts_TLK[:, layer], axis=1) for layer in (a, b))
        same = float((a_TK == b_TK).all(axis=1).mean())
        if same >= 0.99 and (a_TK != a_TK[0]).any():
            first, second = trace.layer_ids[a], trace.layer_ids[b]
            yield Finding(
                "repeated-layers",
                "error",
                f"layers {first} and {second} hold the same choices for {same:.1%} of tokens; one of them was"
                " recorded twice",
                {"layers": [first, second], "share": same},
            )


def _sample(trace: RoutingTrace) -> NDArray[Any]:
    """Neighbouring tokens from the middle of the trace."""
    start = max(0, (trace.num_tokens - _SAMPLE) // 2)
    return trace.experts_TLK[start : start + _SAMPLE]


def _misaligned_layers(trace: RoutingTrace) -> Iterator[Finding]:
    """Layers whose token axes are shifted: the next layer then depends on a token some places away."""
    experts_TLK = _sample(trace)
    T, E = len(experts_TLK), trace.num_experts
    if trace.num_layers < 2 or T < 16 * MAX_SHIFT:
        return
    shifts = [0, *(s for n in range(1, MAX_SHIFT + 1) for s in (n, -n))]
    core = slice(MAX_SHIFT, T - MAX_SHIFT)
    noise = (E - 1) ** 2 / (2 * np.log(2) * (T - 2 * MAX_SHIFT) * trace.top_k**2)  # bias of the plug-in estimate
    for layer in range(trace.num_layers - 1):
        first_TK = np.ascontiguousarray(experts_TLK[core, layer])
        bits = []
        for shift in shifts:
            next_TK = np.ascontiguousarray(experts_TLK[core.start + shift : core.stop + shift, layer + 1])
            bits.append(mutual_information(transition_pairs(first_TK, next_TK, E)))
        best = int(np.argmax(bits))
        if best and bits[best] - bits[0] > 0.2 * bits[best] and bits[best] - bits[0] > 2 * noise:
            a, b = trace.layer_ids[layer], trace.layer_ids[layer + 1]
            yield Finding(
                "misaligned-layers",
                "error",
                f"layer {b} at token t + ({shifts[best]}) depends on layer {a} at token t ({bits[best]:.2f} bits)"
                f" more than at the same token ({bits[0]:.2f} bits); their token axes are shifted",
                {"layers": [a, b], "shift": shifts[best], "bits": bits[best], "bits_unshifted": bits[0]},
            )


def _interleaved(trace: RoutingTrace) -> Iterator[Finding]:
    """Lag-overlap test: neighbours share most experts; where tokens n apart share more, n are interleaved."""
    start = max(0, (trace.num_tokens - _SAMPLE) // 2)
    experts_TLK = np.ascontiguousarray(_sample(trace)[:, :: max(1, trace.num_layers // 8)])
    sequence_T = np.zeros(trace.num_tokens, np.int64)
    if trace.seq_lens_S is not None:
        sequence_T = np.repeat(np.arange(len(trace.seq_lens_S)), trace.seq_lens_S)
    total, squares, pairs = lag_overlap(experts_TLK, sequence_T[start : start + _SAMPLE], MAX_LAG)
    known = pairs >= 64
    if not known[1] or known.sum() < 2:
        return
    mean = np.divide(total, pairs, out=np.zeros(len(total)), where=known)
    error = np.sqrt(
        np.divide(np.maximum(squares / np.maximum(pairs, 1) - mean**2, 0), pairs, where=known, out=mean * 0)
    )
    best = int(np.argmax(np.where(known, mean, -1.0)))
    if best > 1 and mean[best] > 1.1 * mean[1] and mean[best] - mean[1] > 5 * np.hypot(error[best], error[1]):
        yield Finding(
            "interleaved-sequences",
            "warning",
            f"tokens {best} apart share {mean[best]:.1%} of their experts, neighbours {mean[1]:.1%}"
            f" (standard error {error[best]:.1%}): {best}"
            f" sequences look interleaved; order tokens by sequence",
            {
                "lag": best,
                "overlap": mean[best],
                "overlap_of_neighbours": mean[1],
                "standard_error": error[best],
            },
        )


def _repeated_sequences(trace: RoutingTrace) -> Iterator[Finding]:
    """The same sequence more than once: ranks that computed the same tokens, or a file given twice."""
    if trace.seq_lens_S is None:
        return
    ends = np.cumsum(trace.seq_lens_S)
    seen: dict[bytes, int] = {}
    repeated = [0, 0]
    example = (0, 0)
    for number, (length, end) in enumerate(zip(trace.seq_lens_S, ends, strict=True)):
        if length < 8:  # short sequences may well agree by chance
            continue
        first = seen.setdefault(trace.experts_TLK[end - length : end].tobytes(), number)
        if first != number:
            repeated = [repeated[0] + 1, repeated[1] + int(length)]
            example = (first, number)
    if repeated[0]:
        yield Finding(
            "repeated-sequences",
            "warning",
            f"{repeated[0]} sequences ({repeated[1]} tokens) repeat another exactly (sequence {example[1]} is"
            f" {example[0]}); were tensor-parallel copies, or one request many times, recorded?",
            {"sequences": repeated[0], "tokens": repeated[1]},
        )


def _loads(load_LE: NDArray[Any], layer_ids: tuple[int, ...], inferred: Any) -> Iterator[Finding]:
    """What counts alone can show."""
    E = load_LE.shape[1]
    if inferred == "highest id":
        yield Finding(
            "experts-inferred",
            "warning",
            f"the file does not say how many experts the model has; {E} was taken from the highest id seen",
            {"num_experts": E},
        )
    least = float(load_LE.sum(axis=1).min()) / E
    if least < _FEW:
        yield Finding(
            "few-tokens",
            "warning",
            f"a layer has {least:.1f} selections per expert; below {_FEW} loads are noise: record more",
            {"selections_per_expert": least},
        )
        return
    unused_L = (load_LE == 0).sum(axis=1)
    if unused_L.any():
        worst = int(unused_L.argmax())
        yield Finding(
            "unused-experts",
            "warning",
            f"{int(unused_L.sum())} experts were never chosen (most in layer {layer_ids[worst]}:"
            f" {int(unused_L[worst])} of {E}); another domain may need them",
            {"count": int(unused_L.sum()), "layer": layer_ids[worst]},
        )
    totals_L = load_LE.sum(axis=1)
    if totals_L.max() > 1.01 * totals_L.min():
        low, high = int(totals_L.argmin()), int(totals_L.argmax())
        yield Finding(
            "unequal-layers",
            "warning",
            f"layer {layer_ids[high]} has {totals_L[high]:.0f} selections, layer {layer_ids[low]} has"
            f" {totals_L[low]:.0f}; layers of one model see the same tokens:"
            " some were not recorded all the time",
            {
                "layers": [layer_ids[high], layer_ids[low]],
                "selections": [float(totals_L[high]), float(totals_L[low])],
            },
        )
