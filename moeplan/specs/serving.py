"""What a serving simulation is asked: requests, engine, routing of requests, objectives, re-balancing, faults.

A service has ``instances`` equal engine instances of ``ranks`` accelerators each (the scenario's). An instance holds
``ranks / (tp * pcp * pp)`` attention data-parallel groups, and each group a queue, a batch and a KV cache of its own;
all groups of an instance step together, because every MoE layer exchanges tokens among all of them.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from moeplan.specs.base import Spec
from moeplan.units import BytesPerSecond, Fraction, PerSecond, Price, Seconds

__all__ = [
    "Arrivals",
    "EngineSpec",
    "ExpertLoadSpec",
    "FaultSpec",
    "LengthSpec",
    "PrefillPoolSpec",
    "RebalanceSpec",
    "RequestsSpec",
    "RouterPolicy",
    "ServingSpec",
    "SloSpec",
    "SpeculativeSpec",
]

Arrivals = Literal["file", "poisson", "gamma", "constant", "bursts", "closed-loop"]
RouterPolicy = Literal["round-robin", "least-loaded", "prefix-aware"]


class LengthSpec(Spec):
    """Tokens of a prompt or an answer: one number, uniform between two, or log-normal by mean and cv."""

    fixed: int | None = Field(None, gt=0)
    low: int | None = Field(None, gt=0, description="uniform from low to high, both included")
    high: int | None = Field(None, gt=0)
    mean: float | None = Field(None, ge=1, description="log-normal, rounded, at least 1")
    cv: float | None = Field(None, gt=0, description="standard deviation over mean")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = {name for name in ("fixed", "low", "high", "mean", "cv") if getattr(self, name) is not None}
        if given not in ({"fixed"}, {"low", "high"}, {"mean", "cv"}):
            raise ValueError("give a number, or low and high, or mean and cv")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


def _length(value: Any) -> Any:
    return {"fixed": value} if isinstance(value, int) and not isinstance(value, bool) else value


Length = Annotated[LengthSpec, BeforeValidator(_length)]


class RequestsSpec(Spec):
    """Which requests come, and when."""

    file: Path | None = Field(None, description="recorded requests: lengths, and arrival times where it has them")
    format: str | None = Field(None, description="name of a request reader; left out: recognised from the file")
    arrivals: Arrivals | None = Field(None, description="left out: the file's times where it has them, else poisson")
    rate: PerSecond | None = Field(None, description="mean arrivals, as in '12 /s'; poisson, gamma, constant, bursts")
    cv: float = Field(1.0, gt=0, description="gamma: standard deviation of the gaps over their mean; above 1 bursty")
    burst_size: int = Field(10, gt=0, description="bursts: requests that come at one instant")
    concurrency: int | None = Field(None, gt=0, description="closed-loop: requests in the system at any time")
    think_time: Seconds = Field("0 s", description="closed-loop: from an answer to the next request")  # type: ignore[assignment]
    input_tokens: Length | None = Field(None, description="instead of the file's")
    output_tokens: Length | None = Field(None, description="instead of the file's")
    count: int | None = Field(None, description="requests simulated; left out: all of the file, or those of duration")
    duration: Seconds | None = Field(None, description="no request comes after this time")
    time_scale: float = Field(1.0, gt=0, description="file: arrival times are divided by this; 2 doubles the load")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.count is not None and self.count < 1:
            raise ValueError(f"count ({self.count}) leaves no request to simulate; give 1 or more")
        if self.file is None and (self.input_tokens is None or self.output_tokens is None):
            raise ValueError("without a file give both input_tokens and output_tokens")
        if self.file is None and self.arrivals in (None, "file"):
            raise ValueError("arrivals: without a file choose poisson, gamma, constant, bursts or closed-loop")
        open_loop = self.arrivals in ("poisson", "gamma", "constant", "bursts")
        if open_loop and not self.rate:
            raise ValueError(f"arrivals ({self.arrivals}) needs rate, above 0, as in '12 /s'")
        if self.arrivals == "closed-loop" and self.concurrency is None:
            raise ValueError("arrivals (closed-loop) needs concurrency")
        if self.file is None and self.count is None and self.duration is None:
            raise ValueError("give count or duration, or the simulation never ends")
        return self


class SpeculativeSpec(Spec):
    """Drafts by the model's own prediction layer (MTP), checked by the next step: a chain, no tree."""

    num_speculative_tokens: int = Field(
        gt=0,
        description="drafts per sequence and step: vLLM's num_speculative_tokens, SGLang's --speculative-num-steps with"
        " --speculative-eagle-topk 1",
    )
    accept_length: float | None = Field(
        None,
        description="mean tokens per sequence and step, the model's own among them: SGLang's accept len, vLLM's mean"
        " acceptance length; every draft is then as likely after an accepted one",
    )
    acceptance_rates: tuple[float, ...] | None = Field(
        None, description="part of the steps in which each draft was accepted: vLLM's per-position acceptance rate"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        drafts, length, rates = self.num_speculative_tokens, self.accept_length, self.acceptance_rates
        if (length is None) == (rates is None):
            raise ValueError("give either accept_length or acceptance_rates")
        if length is not None and not 1 <= length <= 1 + drafts:
            raise ValueError(
                f"accept_length ({length:g}) is outside 1..{1 + drafts} (1 + num_speculative_tokens): it counts the"
                " model's own token of each step, too"
            )
        if rates is not None:
            if len(rates) != drafts:
                raise ValueError(
                    f"acceptance_rates has {len(rates)} entries for num_speculative_tokens ({drafts}); give one each"
                )
            if not all(0 <= rate <= 1 for rate in rates) or any(b > a for a, b in pairwise(rates)):
                raise ValueError(
                    f"acceptance_rates {list(rates)} must lie within 0..1 and not rise: a draft is accepted only after"
                    " those before it"
                )
        return self


class EngineSpec(Spec):
    """One engine instance. Limits are per attention data-parallel group, as engines set them."""

    max_num_seqs: int = Field(256, gt=0, description="sequences that run at once; of each of pp batches, an even part")
    max_num_batched_tokens: int = Field(8192, gt=0, description="tokens of one step")
    chunked_prefill: bool = Field(
        True, description="prompts are cut to fit a step beside decodes; off: whole prompts first, decodes wait"
    )
    block_size: int = Field(16, gt=0, description="tokens of one KV-cache block")
    memory_fraction: Fraction = Field("90 %", description="of device memory that weights and KV cache take")  # type: ignore[assignment]
    kv_dtype: Literal["bf16", "fp8"] = "bf16"
    preemption: Literal["recompute", "swap"] = Field("recompute", description="of the newest, in a full KV cache")
    prefix_caching: bool = Field(False, description="finished prompts' blocks serve later prompts that begin alike")
    max_waiting: int | None = Field(None, gt=0, description="waiting requests per group; one more is rejected")
    tp: int = Field(1, gt=0, description="ranks that split attention and dense parts")
    dcp: int = Field(
        1,
        gt=0,
        description="decode context parallelism: ranks of a tp group that keep one KV cache together, each every dcp-th"
        " token of it; divides the copies there would be, tp / num_kv_heads, with a latent (MLA) tp",
    )
    pcp: int = Field(
        1,
        gt=0,
        description="prefill context parallelism: a group is pcp times tp ranks, among which a prompt's tokens are cut;"
        " keys are gathered and each tp ranks keep the whole cache. Of instances that only prefill",
    )
    pp: int = Field(
        1,
        gt=0,
        description="pipeline stages; each holds its layers' experts on ranks / pp, the last one the prediction layer",
    )
    expert_tp: int = Field(
        1,
        gt=0,
        description="neighbouring ranks that split each expert, with dispatch allgather; all ranks: tensor parallelism"
        " without expert parallelism. A placement is of a stage's ranks / expert_tp",
    )
    overlap: Literal["none", "shared_expert", "two_batch", "shortcut"] = "none"
    backend: str | None = Field(
        None,
        description="kernels of this framework: sglang, trtllm, vllm, or one that the profile has rows of; left out:"
        " the fastest measured",
    )
    launches_per_layer: int = Field(0, ge=0, description="times the profile's launch latency: host overhead")
    step_overhead: Seconds = Field("0 s", description="of the host between steps: scheduling, sampling")  # type: ignore[assignment]
    speculative: SpeculativeSpec | None = Field(None, description="left out: one token per sequence and step")

    @property
    def tokens_per_sequence(self) -> int:
        """Of a decoding sequence in one step: its newest token and the drafts after it."""
        return 1 + (self.speculative.num_speculative_tokens if self.speculative is not None else 0)

    @model_validator(mode="after")
    def _drafts_fit(self) -> Self:
        if self.speculative is None:
            return self
        most = self.max_num_seqs * self.tokens_per_sequence
        if most > self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is less than the {most} tokens of max_num_seqs"
                f" ({self.max_num_seqs}) sequences with speculative.num_speculative_tokens"
                f" ({self.tokens_per_sequence - 1}) drafts each; raise the one or lower the others"
            )
        return self

    @property
    def group_ranks(self) -> int:
        """Ranks of an attention data-parallel group in a stage."""
        return self.tp * self.pcp

    @property
    def block_tokens(self) -> int:
        """Tokens that one block of each of ``dcp`` ranks holds between them."""
        return self.block_size * self.dcp


class PrefillPoolSpec(Spec):
    """Instances that only prefill; their KV cache travels to the decode instances."""

    ranks: int = Field(gt=0, description="accelerators of one prefill instance")
    nodes: int | None = Field(None, gt=0)
    instances: int = Field(1, gt=0)
    engine: EngineSpec = EngineSpec()
    placement: Path | None = Field(None, description="plan or engine's file; left out: contiguous")
    link: BytesPerSecond | None = Field(
        None, description="KV cache out of one rank and into one; left out: the accelerator's NIC bandwidth"
    )

    @model_validator(mode="after")
    def _one_draft(self) -> Self:
        if self.engine.speculative is not None:
            raise ValueError(
                "engine.speculative: both pools hold the prediction layer of serving.engine.speculative; give it there"
                " alone"
            )
        return self


class ExpertLoadSpec(Spec):
    """How the recorded routing is played while the service runs."""

    mode: Literal["replay", "sample", "mean", "balanced"] = Field(
        "replay",
        description="windows of the trace in their order; draws with the trace's statistics; all of it together;"
        " or every expert alike",
    )
    windows: int = Field(8, gt=0, description="replay: parts the trace is cut into; sample: different draws")
    window: Seconds = Field("10 s", description="replay, sample: how long one of them lasts; the drift")  # type: ignore[assignment]
    sample_tokens: int = Field(4096, gt=0, description="sample: tokens of one draw")


class SloSpec(Spec):
    """Limits that a request must keep to count as goodput."""

    ttft: Seconds | None = Field(None, description="arrival to first token")
    tpot: Seconds | None = Field(None, description="mean time per further token")
    e2e: Seconds | None = Field(None, description="arrival to last token")


class RebalanceSpec(Spec):
    """Planning again while the service runs."""

    interval: Seconds = Field(description="from one re-balancing to the next")
    window: Seconds = Field(description="of the past whose load is planned for")
    planner: str = Field("greedy", description="any planner")
    apply: Literal["layer-wise", "bulk"] = Field(
        "layer-wise", description="one layer's experts move between two steps, or all in one stall"
    )
    delay: Seconds = Field("0 s", description="of planning, while the service goes on")  # type: ignore[assignment]


class FaultSpec(Spec):
    """Something breaks. Rank numbers count inside an instance, one pipeline stage after the other."""

    kind: Literal["rank-loss", "slow-rank", "slow-link"]
    pool: Literal["decode", "prefill"] = Field("decode", description="of a disaggregated service; else leave it out")
    at: Seconds
    until: Seconds | None = Field(None, description="left out: to the end")
    instance: int = Field(0, ge=0)
    rank: int = Field(ge=0)
    speed: float | None = Field(None, gt=0, description="slow-rank, slow-link: part of the usual speed that is left")
    detect: Seconds = Field("10 s", description="rank-loss: from the loss to the new plan, without service")  # type: ignore[assignment]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.kind == "rank-loss") == (self.speed is not None):
            raise ValueError(f"{self.kind} {'has no' if self.speed else 'needs'} speed")
        if self.until is not None and self.until <= self.at:
            raise ValueError(f"until ({self.until:g} s) is not after at ({self.at:g} s)")
        return self


class ServingSpec(Spec):
    """A serving simulation."""

    requests: RequestsSpec
    engine: EngineSpec = EngineSpec()
    role: Literal["both", "prefill", "decode"] = Field(
        "both", description="prefill: requests end with their first token; decode: they come with their KV cache"
    )
    instances: int = Field(1, gt=0, description="equal instances of scenario.ranks each")
    prefill: PrefillPoolSpec | None = Field(None, description="disaggregation: prefill on instances of their own")
    router: RouterPolicy = Field("least-loaded", description="which group of which instance a request goes to")
    experts: ExpertLoadSpec = ExpertLoadSpec()
    slo: SloSpec = SloSpec()
    rebalance: RebalanceSpec | None = None
    faults: tuple[FaultSpec, ...] = ()
    warmup: Seconds = Field("0 s", description="requests that come before are simulated, not reported")  # type: ignore[assignment]
    price: Price | None = Field(None, description="of one accelerator, as in '2 USD/h'")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.prefill is not None and self.role != "both":
            raise ValueError(f"role ({self.role}) is of one pool; leave it out with prefill, which makes two")
        if self.requests.duration is not None and self.warmup >= self.requests.duration:
            raise ValueError(
                f"warmup ({self.warmup:g} s) reaches requests.duration ({self.requests.duration:g} s): zero requests"
                " are left to report; shorten it"
            )
        return self
