"""The simple form: an ``.npz`` file with ``experts`` [tokens, layers, k], read and written.

Arrays: ``experts`` (integer ids), and where known ``scores`` (or ``scores_x1e4``, ten-thousandths),
``seq_lens``, ``moe_layers`` (absolute layer numbers), ``num_experts``, ``phase`` and ``domain`` (per
token: an index into prefill, decode and into ``domains``; or one name for all), ``source_rank`` (per
token), ``domains`` (names). ``padding`` = -1 declares that -1 ids are padding, ``dropped_padding`` how
many were dropped before.

A file may hold several tasks, ``<task>_experts`` with ``<task>_scores`` and so on: each is a domain; all
are joined unless one is asked for. A task named ``prefill`` or ``decode`` (or starting so) also sets the
phase.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.routing_trace import PHASES, RoutingTrace
from moeplan.errors import TraceError
from moeplan.routing.arrays import npz_names, read_npz, write_npz
from moeplan.routing.joining import join_traces
from moeplan.routing.readers.base import ReadOptions, compact_ids, count_experts, drop_padding

__all__ = ["NpzReader", "reader", "save_npz"]

_PARTS = ("experts", "scores", "scores_x1e4", "seq_lens", "phase", "source_rank", "domain")
_SHARED = ("moe_layers", "num_experts", "domains", "padding", "dropped_padding", "origin")


class NpzReader:
    """Reads the simple ``.npz`` form."""

    name = "npz"
    description = "experts [tokens, layers, k] in an .npz file, one or several tasks"
    has_domains = True

    def sniff(self, path: Path) -> bool:
        """Whether ``path`` is an ``.npz`` file with an ``experts`` array."""
        if path.suffix != ".npz" or not path.is_file():
            return False
        try:
            return bool(_tasks(path))
        except TraceError:
            return True  # let read() say what is wrong with it

    def read(self, path: Path, options: ReadOptions) -> RoutingTrace:
        """Read one task or all of them joined.

        Raises:
            TraceError: damaged, empty, ragged, ids out of range, NaN scores, or no such domain.
        """
        tasks = _tasks(path)
        if not tasks:
            names = sorted(npz_names(path))[:12]
            raise TraceError(f"{path} has no array 'experts' (or '<task>_experts'); it has {names}")
        picked = tasks
        if tasks != [""] and options.domain is not None:
            names = [_domain_of(task)[0] for task in tasks]
            both = zip(tasks, names, strict=True)
            picked = [task for task, name in both if options.domain in (name, task.removesuffix("_"))]
            if not picked:
                raise TraceError(f"{path} has no domain '{options.domain}'; it has {', '.join(names)}")
        arrays = read_npz(path, {*_SHARED, *(task + part for task in picked for part in _PARTS)})
        ids = [arrays[f"{task}experts"] for task in picked]
        highest = max((int(a.max()) for a in ids if a.size and a.dtype.kind in "iu"), default=0)
        stated = _scalar(path, arrays, "num_experts") if "num_experts" in arrays else None
        num_experts, note = count_experts(str(path), stated, options, highest)
        trace = join_traces([_one_task(path, arrays, task, num_experts, note) for task in picked])
        if options.domain is not None and tasks == [""]:
            return _one_domain(path, trace, options.domain)
        return trace


def _tasks(path: Path) -> list[str]:
    """Prefixes of the tasks in a file; the plain form is the one task ``""``."""
    names = (n for n in npz_names(path) if n not in ("num_experts", "routed_experts"))
    return [n.removesuffix("experts") for n in names if n == "experts" or n.endswith("_experts")]


def _domain_of(task: str) -> tuple[str, str | None]:
    """Domain name and phase that a task prefix (``law_``, ``prefill_``, ``decode_law_``) stands for."""
    name = task.removesuffix("_")
    for phase in PHASES:
        if name == phase or name.startswith(f"{phase}_"):
            return name.removeprefix(phase).removeprefix("_") or phase, phase
    return name, None


def _scalar(path: Path, arrays: dict[str, NDArray[Any]], name: str) -> int:
    value = arrays[name]
    if value.size != 1 or not np.issubdtype(value.dtype, np.integer):
        raise TraceError(f"{path}: {name} has shape {value.shape} {value.dtype}; it must be one integer")
    return int(value.reshape(()))


def _one_task(
    path: Path, arrays: dict[str, NDArray[Any]], task: str, num_experts: int, note: dict[str, Any]
) -> RoutingTrace:
    where = f"{path}: {task}experts"
    experts = arrays[f"{task}experts"]
    if not np.issubdtype(experts.dtype, np.integer):
        raise TraceError(f"{where} holds {experts.dtype}; it must hold integer expert ids")
    if experts.ndim < 3 or experts.size == 0:
        raise TraceError(f"{where} has shape {experts.shape}; it must be [tokens, layers, k] and not empty")
    shape = (int(np.prod(experts.shape[:-2])), *experts.shape[-2:])  # (request, step) are all tokens
    padded = "padding" in arrays
    if padded and _scalar(path, arrays, "padding") != -1:
        mark = _scalar(path, arrays, "padding")
        raise TraceError(f"{path}: padding ({mark}) must be -1, the only padding mark")
    if not padded and int(experts.min()) < 0:
        place = [int(i[0]) for i in np.nonzero(experts < 0)]
        raise TraceError(
            f"{where} has a negative id at {place}; if -1 marks padding, add an array 'padding' holding -1"
        )
    layer_ids = arrays.get("moe_layers", np.arange(shape[1]))
    if layer_ids.ndim != 1 or not np.issubdtype(layer_ids.dtype, np.integer):
        raise TraceError(
            f"{path}: moe_layers has shape {layer_ids.shape} {layer_ids.dtype}; it must be a list of integers"
        )
    seq_lens = arrays.get(f"{task}seq_lens")
    if seq_lens is not None and not np.issubdtype(seq_lens.dtype, np.integer):
        raise TraceError(f"{path}: {task}seq_lens holds {seq_lens.dtype}; it must hold integers")
    domain, phase = _domain_of(task) if task else (None, None)
    domains = tuple(str(d) for d in arrays["domains"].reshape(-1)) if "domains" in arrays and not task else ()
    domain_T, domains = _per_token(path, arrays.get(f"{task}domain"), shape[0], domains, "domain")
    if domain and domain != phase:
        domain_T, domains = np.zeros(shape[0], np.int32), (domain,)
    phase_T, _ = _per_token(path, arrays.get(f"{task}phase"), shape[0], PHASES, "phase")
    if phase:
        phase_T = np.full(shape[0], PHASES.index(phase), np.int32)
    source_T, _ = _per_token(path, arrays.get(f"{task}source_rank"), shape[0], (), "source_rank")
    trace = RoutingTrace(
        experts_TLK=compact_ids(experts.reshape(shape), num_experts, where),
        num_experts=num_experts,
        layer_ids=tuple(int(i) for i in layer_ids),
        scores_TLK=_scores(path, arrays, task, shape),
        seq_lens_S=None if seq_lens is None else seq_lens.astype(np.int64),
        phase_T=None if phase_T is None else phase_T.astype(np.uint8),
        source_rank_T=source_T,
        domain_T=domain_T,
        domains=domains,
        dropped_padding=_scalar(path, arrays, "dropped_padding") if "dropped_padding" in arrays else 0,
        origin=_origin(path, arrays) | note,
    )
    return drop_padding(trace) if padded and trace.dropped_padding == 0 else trace


def _scores(
    path: Path, arrays: dict[str, NDArray[Any]], task: str, shape: tuple[int, ...]
) -> NDArray[np.floating[Any]] | None:
    scores = arrays.get(f"{task}scores")
    if scores is None and f"{task}scores_x1e4" in arrays:
        scores = arrays[f"{task}scores_x1e4"].astype(np.float32) / np.float32(1e4)
    if scores is None:
        return None
    if not np.issubdtype(scores.dtype, np.floating):
        raise TraceError(f"{path}: {task}scores holds {scores.dtype}; it must hold floating point numbers")
    if scores.size != np.prod(shape):
        raise TraceError(f"{path}: {task}scores has shape {scores.shape}; experts has {shape}")
    return scores.reshape(shape)


def _per_token(
    path: Path, value: NDArray[Any] | None, tokens: int, names: tuple[str, ...], what: str
) -> tuple[NDArray[np.int32] | None, tuple[str, ...]]:
    """A per-token index array from an index array or from one name (or number) for all tokens."""
    if value is None:
        return None, names
    if value.dtype.kind in "US":
        words = value.reshape(-1)
        names = names or tuple(dict.fromkeys(str(w) for w in words))
        unknown = [str(w) for w in np.unique(words) if str(w) not in names]
        if unknown:
            raise TraceError(f"{path}: {what} '{unknown[0]}' is not one of {', '.join(names)}")
        value = np.array([names.index(str(w)) for w in words]).reshape(value.shape)
    if not np.issubdtype(value.dtype, np.integer):
        raise TraceError(f"{path}: {what} holds {value.dtype}; it must hold integers or names")
    if value.ndim == 0:
        value = np.full(tokens, int(value))
    limit = len(names) if names else np.iinfo(np.int32).max
    if value.size and (int(value.min()) < 0 or int(value.max()) >= limit):
        known = f" (there are {len(names)}: {', '.join(names)})" if names else ""
        found = f"{int(value.min())}..{int(value.max())}"
        raise TraceError(f"{path}: {what} holds {found}, outside 0..{limit - 1}{known}")
    if what == "domain" and not names:
        names = tuple(f"domain {i}" for i in range(int(value.max()) + 1))
    return value.astype(np.int32), names


def _origin(path: Path, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    if "origin" not in arrays:
        return {}
    try:
        origin = json.loads(str(arrays["origin"].reshape(())))
    except ValueError as error:
        raise TraceError(f"{path}: origin is not a JSON object; leave it out or save it again") from error
    return origin if isinstance(origin, dict) else {}


def _one_domain(path: Path, trace: RoutingTrace, domain: str) -> RoutingTrace:
    if domain not in trace.domains or trace.domain_T is None:
        has = "it names no domains; leave the domain out"
        if trace.domains:
            has = f"it has {', '.join(trace.domains)}"
        raise TraceError(f"{path} has no domain '{domain}'; {has}")
    from moeplan.routing.loads import pick_tokens

    keep_T = trace.domain_T == trace.domains.index(domain)
    if not keep_T.any():
        raise TraceError(f"{path}: domain '{domain}' has no tokens")
    return pick_tokens(trace, keep_T)


def save_npz(trace: RoutingTrace, path: Path) -> None:
    """Write ``trace`` in the simple form; equal traces give equal bytes.

    Raises:
        InputError: ``path`` cannot be written.
    """
    arrays: dict[str, NDArray[Any]] = {
        "experts": trace.experts_TLK,
        "num_experts": np.array(trace.num_experts),
        "moe_layers": np.array(trace.layer_ids, dtype=np.int64),
        "dropped_padding": np.array(trace.dropped_padding),
        "origin": np.array(json.dumps(dict(trace.origin), sort_keys=True)),
    }
    optional: dict[str, NDArray[Any] | None] = {
        "scores": trace.scores_TLK,
        "seq_lens": trace.seq_lens_S,
        "phase": trace.phase_T,
        "source_rank": trace.source_rank_T,
        "domain": trace.domain_T,
        "domains": np.array(trace.domains) if trace.domains else None,
        "padding": np.array(-1) if int(trace.experts_TLK.min()) < 0 else None,
    }
    write_npz(path, arrays | {name: array for name, array in optional.items() if array is not None})


reader = NpzReader()
