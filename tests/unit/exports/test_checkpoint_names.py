from __future__ import annotations

import numpy as np
import pytest

from moeplan.errors import ExportError
from moeplan.exports.checkpoint_names import expert_part, is_stacked, source_name

NUMBERED = [
    "model.layers.3.block_sparse_moe.experts.{}.w1.weight",
    "model.layers.3.mlp.experts.{}.gate_proj.weight",
    "model.layers.3.mlp.experts.{}.down_proj.weight_scale_inv",
    "model.layers.3.feed_forward.experts.{}.up_proj.weight",
    "layers.3.ffn.experts.{}.w2.weight",
    "backbone.layers.3.mixer.experts.{}.up_proj.weight",
    "decoder.layers.3.mlp.experts.local_experts.{}.linear_fc1.weight",
    "decoder.layers.3.mlp.experts.linear_fc2.weight{}",
    "decoder.layers.3.mlp.experts.linear_fc1._extra_state{}",
    "optimizer.state.exp_avg.decoder.layers.3.mlp.experts.linear_fc1.weight{}",
    "transformer.h.3.mlp.deepspeed_moe.experts.deepspeed_experts.{}.dense_h_to_4h.weight",
    "model.layers.3.mlp.experts.w1.{}",
    ".state.model.layers.3.mlp.experts.{}.up_proj.weight.exp_avg",
]
ROUTER = [
    "model.layers.3.mlp.gate.weight",
    "model.layers.3.mlp.gate.e_score_correction_bias",
    "model.layers.3.block_sparse_moe.gate.weight",
    "model.layers.3.mlp.router.bias",
    "model.layers.3.mlp.moe_statics.e_score_correction_bias",
    "model.layers.3.block_sparse_moe.e_score_correction_bias",
    "model.layers.3.feed_forward.expert_bias",
    "model.layers.3.mlp.router_bias",
    "decoder.layers.3.mlp.router.expert_bias",
    "transformer.h.3.mlp.deepspeed_moe.gate.wg.weight",
    "optimizer.state.exp_avg_sq.decoder.layers.3.mlp.router.weight",
]
STACKED = [
    "model.layers.3.mlp.experts.gate_up_proj",
    "model.layers.3.mlp.experts.down_proj_blocks",
    "model.layers.3.block_sparse_moe.input_linear.weight",
    "decoder.layers.3.mlp.experts.experts.linear_fc1.weight",
    "transformer.blocks.3.ffn.experts.mlp.w1",
]
ELSEWHERE = [
    "model.embed_tokens.weight",
    "model.layers.3.mlp.gate_proj.weight",
    "model.layers.3.mlp.shared_experts.gate_proj.weight",
    "model.layers.3.mlp.shared_expert.up_proj.weight",
    "model.layers.3.mlp.shared_expert_gate.weight",
    "model.layers.3.self_attn.gate.weight",
    "mtp.layers.3.mlp.experts.5.gate_proj.weight",
    "mtp.layers.3.mlp.gate.weight",
]


@pytest.mark.parametrize("pattern", NUMBERED)
def test_a_new_expert_takes_the_old_ones_content(pattern):
    part = expert_part(pattern.format(1))
    assert part is not None
    assert (part.layer, part.router, part.expert) == (3, False, 1)
    assert source_name(pattern.format(1), part, {3: np.array([2, 12, 0])}) == pattern.format(12)


@pytest.mark.parametrize("name", ROUTER)
def test_router_parts(name):
    assert expert_part(name) == (3, True, None, (0, 0))


@pytest.mark.parametrize("name", STACKED)
def test_stacked_experts(name):
    assert expert_part(name) == (3, False, None, (0, 0))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_no_part_of_the_routed_experts(name):
    assert expert_part(name) is None


def test_stacked_shapes():
    assert is_stacked("model.layers.3.mlp.gate.weight", (8, 64), 8)
    assert is_stacked("model.layers.3.mlp.moe_statics.e_score_correction_bias", (1, 8), 8)
    assert is_stacked("decoder.layers.3.mlp.experts.weight1", (64, 80), 8)
    assert is_stacked("transformer.blocks.3.ffn.experts.mlp.w1", (80, 64), 8)
    assert not is_stacked("state.model.layers.3.mlp.gate.weight.step", (), 8)
    assert not is_stacked("decoder.layers.3.mlp.experts.linear_fc1._extra_state", (0,), 8)
    for name, shape in (
        ("model.layers.3.mlp.gate.weight", (16, 64)),
        ("model.layers.3.mlp.gate.tid2eid", (1000, 6)),
        ("model.layers.3.mlp.gate.weight.exp_avg_sq_col", (8,)),
        ("encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight", (64, 64)),
    ):
        with pytest.raises(ExportError, match="cannot be permuted"):
            is_stacked(name, shape, 8)
