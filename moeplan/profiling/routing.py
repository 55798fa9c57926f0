"""Recording which experts real tokens choose, from a live model. ``T`` tokens, ``L`` layers, ``K`` top-k.

:class:`RoutingRecorder` is the callback that any torch model can feed; :func:`hook_model` feeds it from the
routers of Hugging Face MoE models.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.routing_trace import PHASES, RoutingTrace
from moeplan.errors import TraceError
from moeplan.profiling.device import torch_module
from moeplan.routing.overhead import paired_slowdown

__all__ = ["RoutingRecorder", "cache_name", "find_routers", "hook_model", "measure_overhead"]

_CACHE_NAMES = ("cache", "past_key_values")  # of the KV cache, since transformers 5.24 and before


class RoutingRecorder:
    """Collects the choices of each forward pass.

    ::

        with recorder.step("prefill", seq_lens=[5, 7]):
            ...                                     # each MoE layer calls
            recorder.record(layer_id, experts_TK, scores_TK)
        trace = recorder.trace()

    Tensors stay on their device until :meth:`trace`, so that recording does not wait for it.

    Raises:
        TraceError: ``num_experts``, the experts of a layer, is below 1.
    """

    def __init__(self, num_experts: int) -> None:
        if num_experts < 1:
            raise TraceError(f"num_experts ({num_experts}) must be 1 or above: the experts of a layer")
        self.num_experts = num_experts
        self._steps: list[tuple[str, NDArray[np.int64] | None, Any, dict[int, tuple[Any, Any]]]] = []
        self._open: dict[int, tuple[Any, Any]] | None = None
        self._outside = 0  # calls of hooked routers that belong to no step

    @contextmanager
    def step(self, phase: str, seq_lens: Sequence[int] | None = None, keep_T: Any = None) -> Iterator[None]:
        """One forward pass. ``keep_T`` is a mask of the tokens that are no padding.

        Raises:
            TraceError: an unknown phase, or a step inside a step.
        """
        if phase not in PHASES:
            raise TraceError(f"phase ({phase}) must be one of {', '.join(PHASES)}")
        if self._open is not None:
            raise TraceError("a step is already being recorded; end it before the next")
        self._open = {}
        try:
            yield
            if self._open:
                lens = None if seq_lens is None else np.asarray(seq_lens, np.int64)
                self._steps.append((phase, lens, keep_T, self._open))
        finally:
            self._open = None

    def record(self, layer_id: int, experts_TK: Any, scores_TK: Any = None) -> None:
        """The choices of one layer for all tokens of the step, as tensors or arrays: whole numbers ``[T, K]``, and
        their scores ``[T, K]``. ``layer_id`` counts all layers of the model, from 0.

        Raises:
            TraceError: outside a step, twice for one layer, a layer below 0, or another form than that, or than the
                step's other layers have.
        """
        if self._open is None:
            raise TraceError("record() belongs inside 'with recorder.step(phase)'")
        if layer_id in self._open:
            raise TraceError(f"layer {layer_id} was recorded twice in one step; one step is one forward pass")
        if layer_id < 0:
            raise TraceError(f"layer_id ({layer_id}) must be 0 or above: layers count from the model's first")
        # Clones: the model may reuse its buffers before the trace is asked for.
        experts, scores = _copy(experts_TK), None if scores_TK is None else _copy(scores_TK)
        if experts.ndim != 2 or "int" not in str(experts.dtype):
            raise TraceError(
                f"experts of layer {layer_id} ({experts.dtype} {list(experts.shape)}) must be whole numbers of"
                " [tokens, top_k]; give the ids that the router chose"
            )
        first = next(iter(self._open.values()), (experts, None))[0]
        for what, part, like in (("experts", experts, first), ("scores", scores, experts)):
            if part is not None and part.shape != like.shape:
                raise TraceError(
                    f"{what} of layer {layer_id} ({list(part.shape)}) must be [tokens, top_k] of the step's first layer"
                    f" ({list(like.shape)}); one step is one forward pass of the same tokens"
                )
        self._open[layer_id] = experts, scores

    def drop_step(self) -> None:
        """Forget what the open step recorded."""
        if self._open is not None:
            self._open.clear()

    @property
    def num_tokens(self) -> int:
        """Tokens recorded so far, padding included."""
        return sum(len(next(iter(layers.values()))[0]) for *_, layers in self._steps)

    def trace(self, **origin: Any) -> RoutingTrace:
        """All steps as one trace; ``origin`` is kept in it.

        Raises:
            TraceError: nothing recorded, or steps differ in layers or top-k.
        """
        if not self._steps:
            if self._outside:
                raise TraceError(
                    f"nothing was recorded: {self._outside} calls of routers came outside a pass of the hooked model;"
                    " call that model itself, or hook the inner one that is called"
                )
            raise TraceError("nothing was recorded; did the model run inside a step, and has it MoE layers?")
        layer_ids = tuple(sorted(self._steps[0][3]))
        experts, scores, phases, lens = [], [], [], []
        for number, (phase, seq_lens, keep, layers) in enumerate(self._steps):
            if tuple(sorted(layers)) != layer_ids:
                raise TraceError(f"step {number} recorded layers {sorted(layers)}, step 0 {list(layer_ids)}")
            chosen_TLK = np.stack([_array(layers[layer][0]) for layer in layer_ids], 1)
            score_TLK = None
            if all(layers[layer][1] is not None for layer in layer_ids):
                score_TLK = np.stack([_array(layers[layer][1]) for layer in layer_ids], 1)
            if keep is not None:
                mask_T = _array(keep).astype(bool).ravel()
                chosen_TLK = chosen_TLK[mask_T]
                score_TLK = None if score_TLK is None else score_TLK[mask_T]
            experts.append(chosen_TLK.astype(np.int32))
            scores.append(score_TLK)
            phases.append(np.full(len(chosen_TLK), PHASES.index(phase), np.uint8))
            lens.append(seq_lens)
        if len({part.shape[2] for part in experts}) > 1:
            raise TraceError(f"steps differ in top-k: {sorted({part.shape[2] for part in experts})}")
        known = [part for part in scores if part is not None]
        known_lens = [part for part in lens if part is not None]
        return RoutingTrace(
            experts_TLK=np.concatenate(experts),
            num_experts=self.num_experts,
            layer_ids=layer_ids,
            scores_TLK=np.concatenate(known).astype(np.float32) if len(known) == len(scores) else None,
            seq_lens_S=np.concatenate(known_lens) if len(known_lens) == len(lens) else None,
            phase_T=np.concatenate(phases),
            origin=origin,
        )


def _copy(value: Any) -> Any:
    return value.detach().clone() if hasattr(value, "detach") else np.array(value)


def _array(value: Any) -> NDArray[Any]:
    if hasattr(value, "detach"):
        value = value.float() if value.is_floating_point() else value
        return np.asarray(value.cpu().numpy())
    return np.asarray(value)


# ---------------------------------------------------------------------- Hugging Face models


def find_routers(model: Any) -> dict[int, Any]:
    """Layer id -> router module: ``layers.<id>...`` with a child ``gate`` or ``router`` beside ``experts``.

    Raises:
        TraceError: the model has none, so it is no MoE model of a known layout.
    """
    routers = {}
    for name, module in model.named_modules():
        layer = re.search(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.", f"{name}.")
        if layer is None or not hasattr(module, "experts"):
            continue
        router = getattr(module, "gate", None) or getattr(module, "router", None)
        if router is not None:
            routers[int(layer.group(1))] = (module, router)
    if not routers:
        raise TraceError(
            f"{type(model).__name__} has no module with 'experts' and a 'gate' or 'router' in numbered layers;"
            " record it through RoutingRecorder.record instead"
        )
    return routers


def cache_name(model: Any) -> str:
    """What a Hugging Face model calls its KV cache, as an argument and in what it returns."""
    return next((name for name in _CACHE_NAMES if name in inspect.signature(model.forward).parameters), _CACHE_NAMES[1])


def _choice(output: Any, block: Any, top_k: int | None) -> tuple[Any, Any]:
    """(experts_TK, scores_TK) of a router's output: the integer tensor and its scores, or top-k of bare logits, or of
    the scores of all experts that come before these (Llama 4: 0 where not chosen)."""
    torch = torch_module()
    parts = [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, torch.Tensor)]
    chosen = [x for x in parts if not x.is_floating_point()]
    if chosen:
        experts = chosen[0].flatten(0, -2)
        for score in (x.flatten(0, -2) for x in parts if x.is_floating_point()):
            if score.shape == experts.shape:
                return experts, score
        return experts, None
    k = getattr(block, "top_k", None) or top_k
    if k is None or len(parts) not in (1, 2) or parts[0].shape != parts[-1].shape:
        shapes = ", ".join(str(list(x.shape)) for x in parts)
        raise TraceError(
            f"router of {type(block).__name__} returns ({shapes or type(output).__name__}), neither expert ids nor"
            f" logits with a known top-k ({k}); record it through RoutingRecorder.record instead"
        )
    score_TE = parts[0].flatten(0, -2).float()
    top = (score_TE if len(parts) == 2 else score_TE.softmax(-1)).topk(int(k), -1)
    return top.indices, top.values


def _arguments(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a pass by name, also those of a model that takes any; the first one is the tokens."""
    signature = inspect.signature(model.forward)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and len(args) > 1 and name in given:
            raise TraceError(
                f"{type(model).__name__} takes *{name}: name its arguments (input_ids=, attention_mask=) in a pass"
            )
    if args and given.get("inputs_embeds") is None:
        given.setdefault("input_ids", args[0])
    return given


def _kept(mask: Any, batch: int, length: int, cached: int) -> Any:
    """``[batch, length]``, False at padding, from an attention mask of 2 or 4 axes after ``cached`` tokens; None where
    there is no mask. Of masks by kind of layer, full attention's comes first.

    Raises:
        TraceError: another form, or one that does not cover these tokens.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    shape = tuple(getattr(mask, "shape", ()))
    if len(shape) == 2 and shape[0] == batch and shape[1] >= length:
        return mask[:, -length:] != 0
    if len(shape) == 4 and shape[0] in (1, batch) and shape[2] == length and shape[3] >= cached + length:
        # [batch, heads, queries, keys]: padding is hidden from all, itself included. Numbers are added to scores.
        own_BT = mask[:, 0, :, cached : cached + length].diagonal(dim1=-2, dim2=-1)
        shown_BT = own_BT > -1e4 if own_BT.is_floating_point() else own_BT != 0
        return shown_BT.expand(batch, length)
    raise TraceError(
        f"attention_mask ({type(mask).__name__} {list(shape)}) does not tell which of {batch} x {length} tokens after"
        f" {cached} cached ones are padding; give one of [batch, tokens], or prompts without padding"
    )


@contextmanager
def hook_model(model: Any, recorder: RoutingRecorder | None = None) -> Iterator[RoutingRecorder]:
    """Record every forward pass of a Hugging Face MoE model inside the block.

    A pass that extends a cache by one token per sequence is decode, any other is prefill; padding goes by
    ``attention_mask``, given by name or position. Routers that run outside a pass, as where backward recomputes a
    checkpointed layer, are not recorded. Layouts: routers that return expert ids (transformers 5: Mixtral, OLMoE,
    Qwen-MoE, DeepSeek-V2/V3, gpt-oss), scores of all experts and logits (Llama 4), or bare logits beside a ``top_k``
    (transformers 4).

    Raises:
        TraceError: the model has no routers that are understood; in a pass, a mask that does not tell the padding.
    """
    routers = find_routers(model)
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    if recorder is None:
        count = next((int(n) for name in names if (n := getattr(config, name, None))), 0)
        if not count:
            raise TraceError(f"config of {type(model).__name__} has none of {', '.join(names)}")
        recorder = RoutingRecorder(count)
    own = recorder
    top_k = getattr(config, "num_experts_per_tok", None)
    handles = []
    steps: list[Any] = []

    def begin(_module: Any, args: Any, kwargs: Any) -> None:
        given = _arguments(model, args, kwargs)
        tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
        if tokens is None:
            raise TraceError("the model was called without input_ids or inputs_embeds; their shape is needed")
        batch, length = tokens.shape[:2]
        past = next((given[name] for name in _CACHE_NAMES if given.get(name) is not None), None)
        cached = int(past.get_seq_length()) if past is not None and hasattr(past, "get_seq_length") else 0
        keep = _kept(given.get("attention_mask"), batch, length, cached)
        lens = [length] * batch if keep is None else keep.sum(1).tolist()
        phase = "decode" if length == 1 and cached else "prefill"
        step = own.step(phase, [int(n) for n in lens if n], None if keep is None else keep.clone())
        step.__enter__()
        steps.append(step)

    def end(_module: Any, _args: Any, output: Any) -> None:
        if steps:
            if output is None:  # the pass failed midway
                own.drop_step()
            steps.pop().__exit__(None, None, None)

    def routed(layer_id: int, block: Any) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            if own._open is None:
                own._outside += 1
            else:
                own.record(layer_id, *_choice(output, block, top_k))

        return hook

    handles.append(model.register_forward_pre_hook(begin, with_kwargs=True))
    handles.append(model.register_forward_hook(end, always_call=True))
    handles += [router.register_forward_hook(routed(i, block)) for i, (block, router) in routers.items()]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def measure_overhead(run: Callable[[], object], model: Any, pairs: int = 8) -> tuple[float, float | None]:
    """:func:`~moeplan.routing.overhead.paired_slowdown` of ``run`` by recording ``model``. Hooking is no part of a
    pass."""
    torch = torch_module()

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(record: bool) -> float:
        with hook_model(model) if record else nullcontext():
            begin = now()
            run()
            return now() - begin

    return paired_slowdown(seconds, pairs)
