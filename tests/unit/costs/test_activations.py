"""What training keeps of a layer, by hand."""

from __future__ import annotations

import pytest

from moeplan.costs.activations import activation_bytes
from moeplan.specs.models import find_model
from moeplan.specs.training import RecomputeModule


@pytest.mark.parametrize(
    ("name", "output", "queries_keys_values"),
    [("mixtral-8x7b", 32 * 128, None), ("deepseek-v3", 128 * 128, 128 * (192 + 192 + 128))],
)
def test_attention_that_runs_again_frees_its_output_alone(
    name: str, output: int, queries_keys_values: int | None
) -> None:
    model = find_model(name)
    assert activation_bytes(model, True, "none") - activation_bytes(model, True, "attention") == 2 * output
    if queries_keys_values is not None:  # products from latents run again too: the two free each its own
        both: tuple[RecomputeModule, ...] = ("mla_up_proj",)
        freed = activation_bytes(model, True, "none") - activation_bytes(model, True, "attention", modules=both)
        assert freed == 2 * (output + queries_keys_values)
