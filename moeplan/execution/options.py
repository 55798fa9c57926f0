"""What a run is asked to do, as plain values: read without torch, handed to every rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moeplan.artifacts.plan import Plan
from moeplan.execution.text import Corpus
from moeplan.specs.model import ModelSpec
from moeplan.specs.workload import DispatchKind, ReplicaSplit

__all__ = ["LiveJob", "RouterOptions", "TrainOptions"]


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """How experts are chosen.

    - ``score``: ``softmax`` over all experts, or ``sigmoid`` of each (DeepSeek-V3, arXiv 2412.19437).
    - ``normalize``: weights of a token's choices sum to 1; then times ``scale``.
    - ``n_group``, ``topk_group``: only experts of the best groups serve a token; a group is judged by the sum of its
      best ``group_top`` scores (1: DeepSeek-V2, 2: DeepSeek-V3).
    - ``capacity_factor``: an expert takes at most ``ceil(factor * T * K / E)`` of a rank's tokens, the rest are
      dropped, last come (``position``) or least liked (``score``) first. None: dropless.
    - ``aux_loss``: coefficient of the Switch Transformer's balance loss (arXiv 2101.03961, eq. 4-6).
    - ``bias_rate``: step of the loss-free balancing bias (arXiv 2408.15664), see :meth:`Router.update_bias`.
    - ``expert_choice``: experts choose their ``ceil(factor * T * K / E)`` best tokens (arXiv 2202.09368).
    """

    top_k: int = 2
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    group_top: int = 1
    capacity_factor: float | None = None
    drop: Literal["position", "score"] = "score"
    aux_loss: float = 0.0
    bias_rate: float = 0.0
    expert_choice: bool = False


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """A training run. ``batch``: sequences of ``length`` bytes per step, over all data-parallel ranks together."""

    model: ModelSpec
    batch: int = 16
    length: int = 128
    lr: float = 3e-3
    warmup: int = 20
    seed: int = 0
    tp: int = 1
    edp: int = 1
    ranks_per_node: int | None = None
    dispatch: DispatchKind = "per_expert"
    split: ReplicaSplit = "even"
    dtype: str = "fp32"
    zero: bool = False
    router: RouterOptions = field(default_factory=lambda: RouterOptions(aux_loss=0.01))


@dataclass(frozen=True, slots=True)
class LiveJob:
    """What a live run is to do; see the options of ``moeplan live``.

    ``plan`` is in force from the start, or from the end of step ``apply_at`` on. ``record_tokens``: held-out text to
    route after training, of each domain.
    """

    options: TrainOptions
    corpus: Corpus
    steps: int
    plan: Plan | None = None
    apply_at: int | None = None
    reference: bool = True
    budget_s: float | None = None
    out: Path | None = None
    checkpoint: Path | None = None
    checkpoint_every: int = 0
    resume: Path | None = None
    skip_damaged: bool = False
    control: Path | None = None
    window: int = 64
    prometheus: int | None = None
    generate: str | None = None
    new_tokens: int = 200
    record_tokens: int = 0
