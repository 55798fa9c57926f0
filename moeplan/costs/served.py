"""Time to first token and per output token of a served model under a closed loop, from passes of its engine.

:class:`Constants` are the only numbers that no table or data sheet gives. They are few, the same for every
model, machine, precision and width, and are chosen on calibration rows alone (see the validation of ``silicon``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from moeplan.costs.closed_loop import Latencies, PassTimes, Pools, closed_loop, lengths
from moeplan.costs.engine import EngineCosts, EngineSetup
from moeplan.errors import InputError
from moeplan.specs.attention_layers import attention_layers, kept_kv_bytes_per_token
from moeplan.specs.model import DTYPE_BYTES

__all__ = ["CALIBRATED", "Constants", "ServedPool", "kv_capacity_tokens", "pass_times", "served"]

Floats = NDArray[np.float64]

_BATCHES: Floats = np.exp2(np.arange(13.0))
_PARTS: Floats = np.array([0.25, 0.5])
_PROMPTS: Floats = np.array([1.0, 2, 4, 8, 16, 32])
_SEED = 0
# TensorRT-LLM with attention_dp_config: enable_balance, timeout_iters: 60, as the benchmark launches it.
_GATHER = {"trtllm": 60}


@dataclass(frozen=True, slots=True)
class Constants:
    """One set for all rows; mappings are by framework.

    ``prefill_factor``: how much longer a prompt's kernels take in a running server than measured alone (launches
    that no graph captures, other versions, what no table times: norms, quantisation, permutation); ``launch_s``:
    what the host takes per layer to launch such a pass, however few the tokens; ``fp8_prompt_s``: what a prompt of
    an fp8 model adds to its pass, however short it is; ``layer_gap_s``: kernels of one layer in decode that no
    table times, and its part of the host's work; ``linear_gap_s``: the same of a linear-attention layer besides
    (gates, norms, splits); ``early_latent_gap_s``: of a latent-attention (MLA) layer; ``late_``: for releases of
    about the tables' age instead, ``early_``: for those before alone, and on Hopper. ``first_steps``: decode steps
    that pass between a request and its prompt's pass, or between that and the first streamed token, besides those
    that a :class:`ServedPool` says; ``first_tokens`` of the answer besides; ``rank_s``: what a request waits for
    every further rank of the worker that takes its prompt, since all are told of it;
    ``prompt_latency``: part of its own prefill that a prompt's first token takes besides, without holding up others
    (pipelined scheduling, uncaptured launches).
    ``acceptance``: how likely a draft is accepted whose predecessors were (Leviathan et al., ICML 2023, equation 1,
    gives the tokens of a step); ``draft_host_s``: the host's work per running sequence of an attention group in a step
    with drafts. ``handover_s``: from prefill to decode worker.
    ``prompt_tokens``: taken into one pass. ``memory_share``: of device memory that weights and cache may fill.
    """

    prefill_factor: dict[str, float] = field(default_factory=dict)
    late_prefill_factor: dict[str, float] = field(default_factory=dict)
    launch_s: Mapping[str, float] = field(default_factory=dict)
    fp8_prompt_s: Mapping[str, float] = field(default_factory=dict)
    layer_gap_s: Mapping[str, float] = field(default_factory=dict)
    linear_gap_s: float = 0.0
    late_linear_gap_s: float = 0.0
    early_latent_gap_s: Mapping[str, float] = field(default_factory=dict)
    first_steps: Mapping[str, float] = field(default_factory=dict)
    first_tokens: Mapping[str, float] = field(default_factory=dict)
    rank_s: Mapping[str, float] = field(default_factory=dict)
    prompt_latency: float = 0.0
    acceptance: float = 0.7
    draft_host_s: Mapping[str, float] = field(default_factory=dict)
    handover_s: float = 0.0
    prompt_tokens: Mapping[str, float] = field(default_factory=dict)
    memory_share: float = 0.9

    def tokens_per_step(self, drafts: int) -> float:
        """Tokens that a step with so many drafts yields in the mean."""
        return sum(self.acceptance**accepted for accepted in range(drafts + 1))


@dataclass(frozen=True, slots=True)
class ServedPool:
    """Workers of one kind and how many.

    ``prompt_tokens`` that one attention group takes into a pass, None: as the constants say; ``first_steps`` of decode
    that pass before a prompt is seen; ``max_running`` sequences of a worker, 0: as the cache allows; ``late``: of a
    release of about the tables' age.
    """

    setup: EngineSetup
    workers: int = 1
    prompt_tokens: int | None = None
    first_steps: float = 0.0
    max_running: int = 0
    late: bool = False


# Chosen on the calibration rows (a) of silicon_sample.csv alone, by benchmarks/fit_silicon.py.
CALIBRATED = Constants(
    prefill_factor={"trtllm": 1.05, "sglang": 1.6, "vllm": 1.5},
    late_prefill_factor={"sglang": 1.0},
    launch_s={"sglang": 1.5e-3},
    fp8_prompt_s={"trtllm": 4e-3},
    layer_gap_s={"trtllm": 3e-6, "sglang": 5e-6, "vllm": 13e-6},
    linear_gap_s=35e-6,
    late_linear_gap_s=20e-6,
    early_latent_gap_s={"trtllm": 50e-6},
    first_steps={"trtllm": 5.0, "sglang": 2.0, "vllm": 2.0},
    first_tokens={"sglang": 9.0},
    rank_s={"trtllm": 8e-3, "vllm": 2e-3},
    prompt_latency=0.3,
    acceptance=0.66,
    draft_host_s={"sglang": 85e-6},
    handover_s=0.05,
    prompt_tokens={"sglang": 16384.0, "trtllm": 8448.0, "vllm": 8192.0},
)


def kv_capacity_tokens(setup: EngineSetup, memory_share: float, context: float) -> float:
    """Tokens of KV cache that one attention group holds beside the weights, of sequences of ``context`` tokens.

    Raises:
        InputError: the weights leave no room.
    """
    m = setup.model
    experts = sum(m.experts_L) * m.expert_bytes(setup.expert_dtype) / setup.ranks
    others = m.non_expert_parameters_on(setup.tp) * DTYPE_BYTES[setup.dense_dtype]
    free = memory_share * setup.accelerator.memory - experts - others
    if free <= 0:
        raise InputError(
            f"weights of {m.name} ({(experts + others) / 1e9:.0f} GB per rank) exceed {memory_share:.0%} of the memory"
            f" of {setup.accelerator.name} ({setup.accelerator.memory / 1e9:.0f} GB); use more than {setup.ranks} ranks"
        )
    per_token = kept_kv_bytes_per_token(m, context, setup.kv_dtype, setup.tp)
    return np.inf if per_token is None else free / per_token


def pass_times(decode: EngineCosts, prefill: EngineCosts, isl: int, osl: int) -> PassTimes:
    """Passes as the tables have them, without :class:`Constants`: decode over contexts from the prompt's end to the
    answer's, prefill of parts of a prompt, one, and several; at the mean lengths of the benchmark's draw."""
    start, end = 0.9 * isl, 0.9 * (isl + osl)
    context = np.array([start, end])
    seconds = decode.decode_s(_BATCHES[:, None], context[None, :])
    prompts = np.unique(np.concatenate([_PROMPTS, _PROMPTS * prefill.setup.dp]))
    tokens = np.concatenate([_PARTS, prompts]) * start
    took = np.concatenate([prefill.prefill_s(1.0, _PARTS * start), prefill.prefill_s(prompts, start)])
    return PassTimes(_BATCHES, context, seconds, tokens, np.maximum.accumulate(took))


def _with_constants(times: PassTimes, pool: ServedPool, c: Constants, prompt: float) -> PassTimes:
    """``times`` of a running server, whose prompts have ``prompt`` tokens in the mean."""
    setup = pool.setup
    gaps = setup.model.num_layers * c.layer_gap_s.get(setup.backend, 0.0)
    for part in attention_layers(setup.model):
        if part.kind == "gated_delta":
            gaps += part.count * (c.late_linear_gap_s if pool.late else c.linear_gap_s)
        elif part.spec.is_mla and (not pool.late or setup.accelerator.fp4 is None):
            gaps += part.count * c.early_latent_gap_s.get(setup.backend, 0.0)
    factors = c.prefill_factor | c.late_prefill_factor if pool.late else c.prefill_factor
    factor = factors.get(setup.backend, 1.0)
    host_b = times.batch_b * (c.draft_host_s.get(setup.backend, 0.0) if setup.draft_tokens else 0.0)
    decode_s_b2 = times.decode_s_b2 + gaps + host_b[:, None]
    launches = setup.model.num_layers * c.launch_s.get(setup.backend, 0.0)
    prefill_s_p = np.maximum(times.prefill_s_p * factor, launches)
    if setup.expert_dtype == "fp8":
        prefill_s_p = prefill_s_p + c.fp8_prompt_s.get(setup.backend, 0.0) * times.tokens_p / prompt
    return replace(times, decode_s_b2=decode_s_b2, prefill_s_p=prefill_s_p)


def served(
    times: PassTimes,
    decode: ServedPool,
    prefill: ServedPool | None,
    constants: Constants,
    isl: int,
    osl: int,
    concurrency: int,
    requests: int = 10,
) -> Latencies:
    """Latencies with ``concurrency`` requests in flight, ``requests`` times as many in all.

    ``times`` are :func:`pass_times` of the pools' engines at these lengths; ``prefill`` None: one pool does both.

    Raises:
        InputError: the weights, or the cache of one request, do not fit.
    """
    setup = decode.setup
    backend = setup.backend
    groups = decode.workers * setup.dp
    mean_in, mean_out = 0.9 * isl, 0.9 * osl
    held = mean_in + mean_out / 2  # tokens of cache per running sequence
    times = _with_constants(times, decode, constants, mean_in)
    drafts = setup.draft_tokens
    capacity = kv_capacity_tokens(setup, constants.memory_share, held)
    if capacity < held:
        raise InputError(
            f"KV cache of an attention group of {setup.accelerator.name} ({capacity:.0f} tokens) is below one request's"
            f" ({held:.0f}); use more ranks"
        )
    prompt_tokens = (prefill or decode).prompt_tokens or constants.prompt_tokens.get(backend, 8192.0)
    per_step = constants.tokens_per_step(drafts)
    pools = Pools(
        decode_groups=groups,
        prompt_tokens=max(prompt_tokens, mean_in),
        tokens_per_step=per_step,
        decode_workers=decode.workers,
        max_running=int(min(decode.max_running or 1 << 30, setup.dp * capacity / held)),
        query_tokens=0.0 if backend == "sglang" else 1.0 + drafts,
        alone=backend == "sglang" and prefill is None,
        gather_passes=_GATHER.get(backend, 0) if setup.dp > 1 else 0,
    )
    if prefill is not None:
        pools = replace(
            pools,
            prefill_workers=prefill.workers,
            prefill_groups=prefill.setup.dp,
            transfer_s=constants.handover_s,
        )
    rng = np.random.default_rng(_SEED)
    count = concurrency * requests
    found = closed_loop(times, pools, concurrency, lengths(isl, count, rng), lengths(osl, count, rng))
    alone = float(np.interp(mean_in, times.tokens_p, times.prefill_s_p))
    steps = decode.first_steps + constants.first_steps.get(backend, 0.0)
    tokens = steps * per_step + constants.first_tokens.get(backend, 0.0)
    told = constants.rank_s.get(backend, 0.0) * ((prefill or decode).setup.ranks - 1)
    late = constants.prompt_latency * alone + tokens * found.tpot_mean_s + told
    return replace(found, ttft_mean_s=found.ttft_mean_s + late, ttft_median_s=found.ttft_median_s + late)
