"""Hugging Face models with their experts spread over ranks answer as they do in one process."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="live runs need torch")

from dense_reference import random_placement
from torch import nn

from moeplan.artifacts.placement import Placement
from moeplan.errors import PlanError, SpecError
from moeplan.execution.foreign import ForeignExperts, expert_modules, parallelise
from moeplan.execution.groups import build_mesh, single_mesh
from moeplan.execution.launch import Launch, Rank, run_ranks
from moeplan.execution.migrate import Migrator

E, L = 8, 2
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": L, "num_attention_heads": 4, "vocab_size": 50,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": E, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_hidden_layers": L + 1, "kv_lora_rank": 16, "q_lora_rank": None,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 4, "topk_group": 2,
}  # fmt: skip
FAMILIES = {
    "MixtralForCausalLM": {"num_local_experts": E},
    "OlmoeForCausalLM": {"num_experts": E},
    "Qwen2MoeForCausalLM": {"num_experts": E, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "Qwen3MoeForCausalLM": {"num_experts": E, "moe_intermediate_size": 32, "head_dim": 8},
    "DeepseekV2ForCausalLM": DEEPSEEK | {"topk_method": "group_limited_greedy"},
    "DeepseekV3ForCausalLM": DEEPSEEK,
}


def build(family: str) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    kind = getattr(transformers, family)
    torch.manual_seed(5)
    model = kind(kind.config_class(**(SIZES | FAMILIES[family])))
    for module in model.modules():
        if isinstance(module, nn.Module) and hasattr(module, "e_score_correction_bias"):
            nn.init.normal_(module.e_score_correction_bias, std=0.1)
    for name, weight in model.named_parameters():
        if "gate.weight" in name:
            nn.init.normal_(weight, std=1.0)  # choices that tokens disagree on
    return model


def _family_case(me: Rank, family: str) -> dict[str, float]:
    mesh = build_mesh()
    rng = np.random.default_rng(2)
    first, second = (random_placement(rng, L, E, mesh.ep.size, mesh.ranks_per_node, extra, False, 0)
                     for extra in (2, 2))  # fmt: skip
    whole, spread = build(family), build(family)
    layers = parallelise(spread, mesh, first)
    generator = torch.Generator().manual_seed(me.rank)
    words = torch.randint(0, 50, (2, 6 + me.rank), generator=generator)  # unequal batches
    errors = {}
    for name in ("first", "moved"):
        ours, theirs = spread(words).logits, whole(words).logits
        errors[name] = float((ours - theirs).abs().max() / theirs.abs().max())
        if name == "first":
            ours.square().sum().backward()
            theirs.square().sum().backward()
            grads = zip(spread.get_input_embeddings().parameters(), whole.get_input_embeddings().parameters(),
                        strict=True)  # fmt: skip
            errors["gradient"] = max(float((a.grad - b.grad).abs().max() / b.grad.abs().max()) for a, b in grads)
            errors["experts seen"] = len({int(e) for m in spread.modules() if isinstance(m, ForeignExperts)
                                          for e in m.last.experts_TK.flatten()})  # fmt: skip
            migrator = Migrator(layers, mesh, first)
            migrator.submit(second)
            report = migrator.at_step_boundary()
            errors["moves"] = report.moved_experts
    return errors


def _every_family(me: Rank) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    return {family: _family_case(me, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def answers() -> list[dict[str, dict[str, float]]]:
    pytest.importorskip("transformers", minversion="5", reason="needs the 'hf' extra")
    return run_ranks(Launch(2), _every_family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_runs_on_a_foreign_model(family, answers):
    for errors in (answer[family] for answer in answers):
        assert errors["experts seen"] > 4
        assert errors["moves"] > 0
        for name in ("first", "gradient", "moved"):
            assert errors[name] < 2e-5, (name, errors)


class _Experts(nn.Module):
    def __init__(self, act_fn: object = nn.functional.silu, bias: bool = False, transposed: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros((E, 4, 12) if transposed else (E, 12, 4)))
        self.down_proj = nn.Parameter(torch.zeros(E, 4, 6))
        self.act_fn = act_fn
        if bias:
            self.down_proj_bias = nn.Parameter(torch.zeros(E, 4))


def _placement(layers: int, experts: int = E) -> Placement:
    row = np.arange(experts, dtype=np.int32)
    return Placement(np.tile(row, (layers, 1)), np.zeros(experts, np.int32), experts, 1, 1)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (_Experts(nn.functional.gelu), "its activation is not SiLU"),
        (_Experts(bias=True), "has weights beside gate_up_proj and down_proj"),
        (_Experts(transposed=True), r"are not \[E, 2F, H\]"),
        (nn.Linear(2, 2), "has no routed experts"),
    ],
)
def test_other_families_are_refused(module, match):
    with pytest.raises(SpecError, match=match):
        expert_modules(nn.Sequential(module))


def test_a_plan_of_another_model_is_refused_and_changes_nothing():
    model = nn.Sequential(_Experts(), _Experts())
    for placement, match in ((_placement(3), "3 layers, Sequential 2"), (_placement(2, 9), "9 experts, 0 8")):
        with pytest.raises(PlanError, match=match):
            parallelise(model, single_mesh(), placement)
        assert all(isinstance(module, _Experts) for module in model)
