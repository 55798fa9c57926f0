"""A model so small that a step takes milliseconds, and text for it."""

from __future__ import annotations

import numpy as np

from moeplan.execution.options import TrainOptions
from moeplan.execution.text import Corpus
from moeplan.specs.model import AttentionSpec, ModelSpec

SPEC = ModelSpec(
    name="tiny",
    num_layers=4,
    moe_layer_ids=(1, 2, 3),
    hidden_size=32,
    num_experts=8,
    top_k=2,
    expert_intermediate_size=32,
    num_shared_experts=1,
    shared_intermediate_size=32,
    dense_intermediate_size=64,
    attention=AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=16),
    vocab_size=256,
)


def tiny_corpus() -> Corpus:
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, size=rng.integers(2, 8), dtype=np.uint8)) for _ in range(60)]

    def text(count: int) -> np.ndarray:
        return np.frombuffer(b" ".join(words[i] for i in rng.zipf(1.5, count) % 60), np.uint8)

    return Corpus({"a": text(4000), "b": text(4000)}, {"a": text(800), "b": text(800)}, "random words", "0" * 64)


def tiny_options(**changes) -> TrainOptions:
    return TrainOptions(**{"model": SPEC, "batch": 8, "length": 16, "warmup": 2, **changes})
