"""A MoE language model from a :class:`ModelSpec`: pre-norm transformer, rotary positions, experts over the EP ranks.

``B`` sequences of this rank, ``T`` positions, ``H`` hidden, ``A`` attention heads, ``G`` key/value heads, ``D`` head
size, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy, rms_norm, scaled_dot_product_attention

from moeplan.artifacts.placement import Placement
from moeplan.errors import SpecError
from moeplan.execution.clock import Clock
from moeplan.execution.dispatch import make_dispatcher
from moeplan.execution.experts import initial_row
from moeplan.execution.groups import Mesh
from moeplan.execution.layer import ExpertLayer, MoELayer, SharedExpert
from moeplan.execution.options import RouterOptions
from moeplan.execution.router import Router
from moeplan.specs.model import ModelSpec
from moeplan.specs.workload import DispatchKind, ReplicaSplit

__all__ = ["LanguageModel", "ModelOptions"]

Cache = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What a :class:`ModelSpec` leaves open. ``router`` fields that the spec has (top-k, groups) are the spec's."""

    dispatch: DispatchKind = "per_expert"
    split: ReplicaSplit = "even"
    router: RouterOptions = field(default_factory=lambda: RouterOptions(aux_loss=0.01))
    dtype: torch.dtype = torch.float32
    seed: int = 0


class _Attention(nn.Module):
    """Causal attention with rotary positions and grouped key/value heads."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__()
        a = spec.attention
        if a is None or a.is_mla:
            raise SpecError(f"{spec.name}: live runs need an attention with heads (not latent); give one in the model")
        self.heads, self.kv_heads, self.size = a.num_heads, a.num_kv_heads, a.head_dim
        width = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
        self.qkv_proj = nn.Linear(spec.hidden_size, width, bias=False, dtype=dtype)
        self.o_proj = nn.Linear(a.num_heads * a.head_dim, spec.hidden_size, bias=False, dtype=dtype)
        frequency = 10_000.0 ** (-torch.arange(0, a.head_dim, 2).float() / a.head_dim)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, x_BTH: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, ...]:
        """Attend to all positions before; the keys and values of all positions come back too."""
        B, T, _ = x_BTH.shape
        q, k, v = self.qkv_proj(x_BTH).unflatten(-1, (-1, self.size)).transpose(1, 2).split(
            (self.heads, self.kv_heads, self.kv_heads), 1
        )  # fmt: skip
        begin = 0 if past is None else past[0].shape[2]
        angle = torch.outer(torch.arange(begin, begin + T, device=x_BTH.device).float(), self.frequency)
        q, k = _rotate(q, angle), _rotate(k, angle)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        out = scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=self.heads != self.kv_heads)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1)), k, v


def _rotate(x: torch.Tensor, angle_TD: torch.Tensor) -> torch.Tensor:
    cos, sin = angle_TD.cos().to(x.dtype), angle_TD.sin().to(x.dtype)
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


class _Norm(nn.Module):
    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


class _Block(nn.Module):
    def __init__(self, spec: ModelSpec, mlp: nn.Module, layer: int, clock: Clock, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = _Norm(spec.hidden_size, dtype)
        self.self_attn = _Attention(spec, dtype)
        self.post_attention_layernorm = _Norm(spec.hidden_size, dtype)
        self.mlp, self.layer, self.clock = mlp, layer, clock

    def forward(self, x_BTH: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, ...]:
        with self.clock.span("attention", self.layer):
            attended, k, v = self.self_attn(self.input_layernorm(x_BTH), past)
        x_BTH = x_BTH + attended
        normed_BTH = self.post_attention_layernorm(x_BTH)
        if isinstance(self.mlp, MoELayer):  # has spans of its own
            return x_BTH + self.mlp(normed_BTH), k, v
        with self.clock.span("dense", self.layer):
            out_BTH = self.mlp(normed_BTH)
        return x_BTH + out_BTH, k, v


class LanguageModel(nn.Module):
    """The model of ``spec``, its experts where ``placement`` says.

    The same seed gives the same weights whatever the placement and the number of ranks.

    Raises:
        SpecError: the spec cannot be run live (latent attention or latent experts, ungated FFN, layers that differ).
        PlanError: the placement is not for this many ranks.
    """

    def __init__(
        self, spec: ModelSpec, mesh: Mesh, placement: Placement, options: ModelOptions, clock: Clock | None = None
    ) -> None:
        super().__init__()
        if not spec.gated_ffn or spec.expert_hidden_size is not None or spec.experts_per_layer is not None:
            raise SpecError(
                f"{spec.name}: live runs need gated experts of the model's hidden size, equally many in every layer"
            )
        self.spec, self.mesh, self.options = spec, mesh, options
        self.clock = clock or Clock()
        o, H = options, spec.hidden_size
        router = replace(
            o.router, top_k=spec.top_k, n_group=spec.n_group or 1, topk_group=spec.topk_group or 1
        )
        dispatcher = make_dispatcher(o.dispatch, mesh, self.clock)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(o.seed)
            self.embed_tokens = nn.Embedding(spec.vocab_size, H, dtype=o.dtype)
            nn.init.normal_(self.embed_tokens.weight, std=0.02)
            blocks = []
            for layer in range(spec.num_layers):
                if layer in spec.moe_layer_ids:
                    row = spec.moe_layer_ids.index(layer)
                    experts = ExpertLayer(
                        mesh, H, spec.expert_intermediate_size, placement, row, layer_id=layer, split=o.split,
                        dispatcher=dispatcher, clock=self.clock, dtype=o.dtype,
                    )  # fmt: skip
                    size = spec.shared_intermediate_size
                    shared = SharedExpert(H, size, o.dtype) if size else None
                    mlp: nn.Module = MoELayer(Router(H, spec.num_experts, router), experts, shared)
                else:
                    mlp = SharedExpert(H, spec.dense_intermediate_size, o.dtype)
                blocks.append(_Block(spec, mlp, layer, self.clock, o.dtype))
            self.layers = nn.ModuleList(blocks)
            self.norm = _Norm(H, o.dtype)
            self.lm_head = nn.Linear(H, spec.vocab_size, bias=False, dtype=o.dtype)
            nn.init.normal_(self.lm_head.weight, std=0.02)
            if spec.tie_word_embeddings:
                self.lm_head.weight = self.embed_tokens.weight
        self.to(mesh.device)
        for moe in self.moe_layers:
            moe.experts.load(partial(initial_row, H, spec.expert_intermediate_size, o.seed, moe.experts.layer_id))

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, in the order of the placement's rows."""
        return [block.mlp for block in self.layers if isinstance(block.mlp, MoELayer)]

    def forward(self, ids_BT: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Logits ``[B, T, V]``. A ``cache`` is read and extended in place."""
        with self.clock.span("dense"):
            x = self.embed_tokens(ids_BT)
        for number, block in enumerate(self.layers):
            past = cache[number] if cache else None
            x, k, v = block(x, past if past is not None and past[0].shape[2] else None)
            if cache is not None:
                cache[number] = (k, v)
        with self.clock.span("dense"):
            logits: torch.Tensor = self.lm_head(self.norm(x))
        return logits

    def loss(self, rows_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean next-token loss of ``[B, T + 1]`` ids in nats, and the same with the routers' auxiliary losses."""
        logits = self(rows_BT[:, :-1])
        plain = cross_entropy(logits.flatten(0, 1).float(), rows_BT[:, 1:].flatten())
        total = plain
        for moe in self.moe_layers:
            if moe.last is not None:
                total = total + moe.last.aux_loss
        return plain.detach(), total

    def new_cache(self) -> Cache:
        """An empty cache for :meth:`forward`."""
        empty = torch.empty(0, 0, 0, 0)
        return [(empty, empty)] * len(self.layers)

    @torch.no_grad()
    def generate(
        self, ids_BT: torch.Tensor, new_tokens: int, generator: torch.Generator, temperature: float = 0.8
    ) -> torch.Tensor:
        """Extend ``[B, T]`` by sampling; every EP rank must call it for as many tokens."""
        cache, step, out = self.new_cache(), ids_BT, ids_BT
        for _ in range(new_tokens):
            probability_BV = (self(step, cache)[:, -1].float() / max(temperature, 1e-6)).softmax(-1)
            step = torch.multinomial(probability_BV.cpu(), 1, generator=generator).to(out.device)
            out = torch.cat([out, step], 1)
        return out
