"""Recording routing from a live model into a trace file."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.artifacts.routing_trace import PHASES, RoutingTrace
from moeplan.errors import MissingExtraError, MoeplanError, RunError, SpecError, TraceError
from moeplan.progress import Progress, no_progress
from moeplan.routing.io import read_trace, save_trace
from moeplan.routing.overhead import slowdown
from moeplan.specs.hf_config import model_from_hf_config

__all__ = ["record_routing"]

_OWN_CODE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # else transformers asks on stdout
_TOLD = ("rank_files", "ranks", "overhead", "overhead_spread")  # of the origin, in the answer


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
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Record from a Hugging Face model (``hf``) or a running server (``sglang``); what was written.

    ``overhead`` of the answer and of the trace's origin is the slowdown by recording as a part of the time without,
    ``overhead_spread`` the 90th less the 10th percentile of its pairs of passes; None of a single pair. Of a server
    both also have ``rank_files``, the dumps read, and ``ranks``, those it has; None where it does not tell.

    Raises:
        SpecError: neither or both sources, a missing option, or a model that does not fit into memory.
        TraceError: nothing was recorded. MissingExtraError: torch or transformers is not installed.
        RunError, KeyboardInterrupt: a prompt failed or was interrupted, or a rank's dump did not come; the message says
            what ``out`` keeps.
    """
    if (hf is None) == (sglang is None):
        raise SpecError("routing is recorded from either --hf or --sglang; give one of them")
    if out.suffix not in (".npz", ".parquet"):
        raise SpecError(f"out ({out}) must end in .npz or .parquet")
    lines = _prompts(prompts) if prompts else []
    if sglang is not None:
        trace, ended = _from_server(sglang, dump_dir, lines, max_new_tokens)
    else:
        assert hf is not None
        trace, ended = _from_model(hf, random_init, lines, max_new_tokens, device, seed, progress)
    save_trace(trace, out)
    if ended is not None:
        kept = f"what was recorded until then is kept: {out}, {trace.num_tokens:,} tokens"
        raise type(ended)(f"{ended}; {kept}") from ended
    phases = {} if trace.phase_T is None else dict(enumerate(np.bincount(trace.phase_T, minlength=2).tolist()))
    return {
        "out": str(out),
        "tokens": trace.num_tokens,
        "layers": trace.num_layers,
        "top_k": trace.top_k,
        "num_experts": trace.num_experts,
        "phases": {PHASES[i]: int(n) for i, n in phases.items()},
        **{name: trace.origin[name] for name in _TOLD if name in trace.origin},
    }


def _prompts(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise SpecError(f"prompts ({path}) cannot be read: {why}") from error
    if not lines:
        raise SpecError(f"prompts ({path}) holds no line")
    return lines


def _ended(error: BaseException, done: int, count: int, prompts: Sequence[str]) -> RunError | KeyboardInterrupt:
    """What to tell of a recording that ``error`` ended after ``done`` of ``count`` prompts."""
    where = f"prompt {done + 1} of {count}" + (f" ({prompts[done][:40]!r})" if prompts else "")
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(f"{where} was interrupted")
    said = str(error) if isinstance(error, MoeplanError) else repr(error).splitlines()[0]
    return RunError(f"{where} failed: {said}")


_Recorded = tuple[RoutingTrace, RunError | KeyboardInterrupt | None]
"""The trace, its overhead in the origin, and what ended the recording early."""


def _from_server(url: str, dump_dir: Path | None, prompts: list[str], max_new_tokens: int) -> _Recorded:
    from moeplan.profiling.sglang_recorder import SglangServer

    if dump_dir is None or not prompts:
        raise SpecError("--sglang needs --dump-dir, where the server writes, and --prompts to send")
    server = SglangServer(url, dump_dir)
    server.require_tokens()

    def send(times_s: list[float]) -> RunError | KeyboardInterrupt | None:
        try:
            for prompt in prompts:
                times_s.append(server.generate(prompt, max_new_tokens))
        except (Exception, KeyboardInterrupt) as error:  # the server is to stop and dump whatever happens
            return _ended(error, len(times_s), len(prompts), prompts)
        return None

    plain_s: list[float] = []
    recorded_s: list[float] = []
    if (ended := send(plain_s)) is not None:
        raise type(ended)(f"{ended}; recording had not begun") from ended

    def drive() -> None:
        nonlocal ended
        ended = send(recorded_s)

    try:
        dumps = server.record(drive)
        trace = _read_dumps(dumps.files)
    except TraceError as error:
        if ended is None:
            raise
        raise type(ended)(f"{ended}; nothing is kept: {error}") from error
    if dumps.troubles:
        said = "; ".join(dumps.troubles)
        ended = RunError(said) if ended is None else type(ended)(f"{ended}; {said}")
    done = len(recorded_s)
    overhead, spread = slowdown(plain_s[:done], recorded_s) if done else (None, None)
    origin = {
        "recorded_from": "sglang",
        "prompts": done,
        "rank_files": len(dumps.files),
        "ranks": dumps.ranks,
        "overhead": overhead,
        "overhead_spread": spread,
    }
    return replace(trace, origin=origin), ended


def _read_dumps(files: Sequence[Path]) -> RoutingTrace:
    """The dumps of one recording together: tokens that several ranks ran count once, and a rank may have run none."""
    folder = files[0].parent
    with tempfile.TemporaryDirectory() as alone:  # away from older dumps
        for file in files:
            (Path(alone) / file.name).symlink_to(file.resolve())
        try:
            trace = read_trace(Path(alone), format="sglang")
        except TraceError as error:
            raise TraceError(str(error).replace(alone, str(folder))) from error
    if not isinstance(trace, RoutingTrace):
        raise TraceError(
            f"{folder} got counts only; start the server with --expert-distribution-recorder-mode per_token"
        )
    return trace


def _token_ids(transformers: Any, path: Path, prompts: list[str]) -> list[Any]:
    """The tokens of each prompt, a batch of one. Of missing files transformers 5 makes tokenizers that know none."""
    folder = path if path.is_dir() else path.parent
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_OWN_CODE)
        batches = [tokenizer(text, return_tensors="pt")["input_ids"] for text in prompts]
        for text, ids in zip(prompts, batches, strict=True):
            if not ids.numel():
                raise ValueError(f"it makes no token of the prompt {text[:40]!r}")
        return batches
    except Exception as error:  # whatever transformers meets in half a directory
        raise SpecError(
            f"hf ({folder}) has no tokenizer that can be loaded, and --prompts needs one; bring the model's tokenizer"
            f" files: {_said(error)}"
        ) from error


def _said(error: Exception) -> str:
    """The first paragraph of what a library says, on one line."""
    return " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__


@contextmanager
def _loadable(path: Path, device: str, does: str) -> Iterator[None]:
    """One error for whatever transformers and torch raise of a config or weights in the block; our own errors stand."""
    try:
        with _fitting(path, device):
            yield
    except MoeplanError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise SpecError(
                f"hf ({path}) comes with its own code (auto_map in its config.json), which is not run; give a model of"
                " transformers, or record it in your own program through RoutingRecorder.record"
            ) from error
        raise SpecError(
            f"hf ({path}) {does}: {_said(error)}; correct its config.json, or give a model that this transformers has"
        ) from error


@contextmanager
def _fitting(path: Path, device: str) -> Iterator[None]:
    """Say what helps where the memory does not hold the block; the CPU's allocator raises a bare RuntimeError."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        said = (str(error).splitlines() or [""])[0]
        signs = ("out of memory", "allocate memory", "bad_alloc")
        if not isinstance(error, MemoryError) and not any(sign in said.lower() for sign in signs):
            raise
        raise SpecError(
            f"hf ({path}) does not fit into the memory of {device} ({said}); set a smaller dtype or fewer"
            " num_hidden_layers in its config.json, give shorter prompts, or choose another --device"
        ) from error


def _from_model(
    path: Path,
    random_init: bool,
    prompts: list[str],
    new_tokens: int,
    device: str | None,
    seed: int,
    progress: Progress,
) -> _Recorded:
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
    with _loadable(path, where, "cannot be loaded"):
        config = transformers.AutoConfig.from_pretrained(path, **_OWN_CODE)
        model_from_hf_config(config.to_dict(), str(path))  # says what of the sizes cannot be
    batches = _token_ids(transformers, path, prompts) if prompts else []
    with _loadable(path, where, "cannot be loaded"):
        if random_init:
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", **_OWN_CODE)
        model = model.to(where).eval()
    if not batches:
        generator = torch.Generator().manual_seed(seed)
        batches = [torch.randint(0, model.config.vocab_size, (1, 64), generator=generator) for _ in range(4)]
    batches = [ids.to(where) for ids in batches]

    def prefill() -> object:
        with torch.inference_mode():
            return model(input_ids=batches[0])

    with _loadable(path, where, "fails in its first pass"):
        overhead, spread = measure_overhead(prefill, model)
    cache = cache_name(model)
    done, ended = 0, None
    with hook_model(model) as recorder, torch.inference_mode():
        try:
            for ids in batches:
                progress("recording", done / len(batches))
                past, step = None, ids
                with _fitting(path, where):
                    for _ in range(new_tokens + 1):
                        answer = model(input_ids=step, use_cache=True, **{cache: past})
                        past, step = answer[cache], answer.logits[:, -1:].argmax(-1)
                done += 1
        except (Exception, KeyboardInterrupt) as error:  # what is recorded outlives whatever the model does
            ended = _ended(error, done, len(batches), prompts)
            if not done:
                raise type(ended)(f"{ended}; nothing was recorded before it") from error
    progress("recording", done / len(batches))
    trace = recorder.trace(
        recorded_from=type(model).__name__,
        random_init=random_init,
        prompts=done,
        overhead=overhead,
        overhead_spread=spread,
    )
    if ended is not None:  # no token of the prompt that was cut short
        trace = trace.tokens(slice(sum(ids.numel() + new_tokens for ids in batches[:done])))
    return trace, ended
