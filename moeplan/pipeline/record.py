"""Recording routing from a live model into a trace file."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.artifacts.routing_trace import PHASES, RoutingTrace
from moeplan.errors import MissingExtraError, SpecError, TraceError
from moeplan.routing.io import read_trace, save_trace

__all__ = ["record_routing"]

Progress = Callable[[str, float], None]


def record_routing(
    out: Path,
    hf: Path | None = None,
    random_init: bool = False,
    sglang: str | None = None,
    dump_dir: Path | None = None,
    prompts: Path | None = None,
    max_new_tokens: int = 16,
    device: str | None = None,
    seed: int = 0,
    progress: Progress = lambda _w, _d: None,
) -> dict[str, Any]:
    """Record from a Hugging Face model (``hf``) or a running server (``sglang``); what was written.

    Raises:
        SpecError: neither or both sources, or a missing option; TraceError: nothing was recorded.
        MissingExtraError: torch or transformers is not installed.
    """
    if (hf is None) == (sglang is None):
        raise SpecError("routing is recorded from either --hf or --sglang; give one of them")
    if out.suffix not in (".npz", ".parquet"):
        raise SpecError(f"out ({out}) must end in .npz or .parquet")
    lines = _prompts(prompts) if prompts else []
    if sglang is not None:
        trace, overhead = _from_server(sglang, dump_dir, lines, max_new_tokens)
    else:
        assert hf is not None
        trace, overhead = _from_model(hf, random_init, lines, max_new_tokens, device, seed, progress)
    save_trace(trace, out)
    phases = {} if trace.phase_T is None else dict(enumerate(np.bincount(trace.phase_T, minlength=2).tolist()))
    return {
        "out": str(out),
        "tokens": trace.num_tokens,
        "layers": trace.num_layers,
        "top_k": trace.top_k,
        "num_experts": trace.num_experts,
        "phases": {PHASES[i]: int(n) for i, n in phases.items()},
        "overhead": overhead,
    }


def _prompts(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"prompts ({path}) cannot be read: {error}") from error
    if not lines:
        raise SpecError(f"prompts ({path}) holds no line")
    return lines


def _from_server(
    url: str, dump_dir: Path | None, prompts: list[str], max_new_tokens: int
) -> tuple[RoutingTrace, float | None]:
    from dataclasses import replace

    from moeplan.profiling.sglang_recorder import SglangServer
    from moeplan.routing.joining import join_traces

    if dump_dir is None or not prompts:
        raise SpecError("--sglang needs --dump-dir, where the server writes, and --prompts to send")
    files, overhead = SglangServer(url, dump_dir).record(prompts, max_new_tokens)
    parts = []
    for file in files:
        trace = read_trace(file, format="sglang")
        if not isinstance(trace, RoutingTrace):
            raise TraceError(
                f"{file} holds counts only; start the server with --expert-distribution-recorder-mode per_token"
            )
        parts.append(trace)
    joined = parts[0] if len(parts) == 1 else join_traces(parts)
    return replace(joined, origin={"recorded_from": "sglang", "prompts": len(prompts)}), overhead


def _token_ids(transformers: Any, path: Path, prompts: list[str]) -> list[Any]:
    """The tokens of each prompt, a batch of one. Of missing files transformers 5 makes tokenizers that know none."""
    folder = path if path.is_dir() else path.parent
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        batches = [tokenizer(text, return_tensors="pt")["input_ids"] for text in prompts]
        for text, ids in zip(prompts, batches, strict=True):
            if not ids.numel():
                raise ValueError(f"it makes no token of the prompt {text[:40]!r}")
        return batches
    except Exception as error:  # whatever transformers meets in half a directory
        raise SpecError(
            f"hf ({folder}) has no tokenizer that can be loaded, and --prompts needs one; bring the model's tokenizer"
            f" files: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error


def _from_model(
    path: Path,
    random_init: bool,
    prompts: list[str],
    new_tokens: int,
    device: str | None,
    seed: int,
    progress: Progress,
) -> tuple[RoutingTrace, float | None]:
    from moeplan.profiling.device import find_device, torch_module
    from moeplan.profiling.routing import cache_name, hook_model, measure_overhead

    torch = torch_module()
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError("recording a Hugging Face model", "hf") from error
    if not path.exists():
        raise SpecError(f"hf ({path}) is not there; models are read from disk only, download it first")
    if not path.is_dir() and not random_init:
        raise SpecError(f"hf ({path}) is a file: a config.json needs --random-init; give the model's directory")
    if not (prompts or random_init):
        raise SpecError("--hf needs --prompts: routing of random tokens says nothing about real text")
    where = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu")).kind
    torch.manual_seed(seed)
    batches = _token_ids(transformers, path, prompts) if prompts else []
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        if random_init:
            model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype="auto")
    except (OSError, ValueError, KeyError) as error:
        raise SpecError(f"hf ({path}) cannot be loaded: {str(error).splitlines()[0]}") from error
    model = model.to(where).eval()
    if not batches:
        generator = torch.Generator().manual_seed(seed)
        batches = [torch.randint(0, model.config.vocab_size, (1, 64), generator=generator) for _ in range(4)]
    batches = [ids.to(where) for ids in batches]

    def prefill() -> object:
        with torch.inference_mode():
            return model(input_ids=batches[0])

    overhead = measure_overhead(prefill, model)
    cache = cache_name(model)
    with hook_model(model) as recorder, torch.inference_mode():
        for number, ids in enumerate(batches):
            progress("recording", number / len(batches))
            past, step = None, ids
            for _ in range(new_tokens + 1):
                answer = model(input_ids=step, use_cache=True, **{cache: past})
                past, step = answer[cache], answer.logits[:, -1:].argmax(-1)
    progress("recording", 1.0)
    kind = type(model).__name__
    return recorder.trace(recorded_from=kind, random_init=random_init, prompts=len(batches)), overhead
