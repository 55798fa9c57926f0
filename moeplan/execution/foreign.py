"""Hugging Face models under expert parallelism: their routed experts are replaced, all else stays theirs.

Every MoE block of transformers 5 (Mixtral, OLMoE, Qwen2/3-MoE, DeepSeek-V2/V3 and their kin) calls a module
``experts(hidden_states, top_k_index, top_k_weights)`` that keeps ``gate_up_proj [E, 2F, H]`` and ``down_proj
[E, H, F]``. That module gives way to an :class:`ExpertLayer`, which answers the same call from experts on all ranks;
router, shared experts, attention and the model's own code are untouched.

``E`` experts, ``T`` tokens, ``K`` choices, ``H`` hidden, ``F`` expert FFN size, ``L`` MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from moeplan.artifacts.placement import Placement
from moeplan.errors import PlanError, SpecError
from moeplan.execution.clock import Clock
from moeplan.execution.dispatch import make_dispatcher
from moeplan.execution.groups import Mesh
from moeplan.execution.layer import ExpertLayer
from moeplan.execution.router import Routing
from moeplan.specs.workload import DispatchKind, ReplicaSplit

__all__ = ["ForeignExperts", "expert_modules", "parallelise"]


class ForeignExperts(nn.Module):
    """An :class:`ExpertLayer` in the place of a Hugging Face experts module.

    ``last`` holds the latest choices, for :meth:`moeplan.execution.monitor.LoadMonitor.watch`.
    """

    def __init__(self, layer: ExpertLayer, num_experts: int) -> None:
        super().__init__()
        self.layer, self.num_experts = layer, num_experts
        self.last: Routing | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts; an index of ``num_experts`` means none, as in transformers."""
        experts_TK = top_k_index.masked_fill(top_k_index >= self.num_experts, -1)
        load_E = torch.bincount(experts_TK.flatten() + 1, minlength=self.num_experts + 1)[1:]
        self.last = Routing(experts_TK, top_k_weights, load_E, top_k_weights.new_zeros(()))
        out: torch.Tensor = self.layer(hidden_states, experts_TK, top_k_weights)
        return out


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules of routed experts by name, in the order of its layers.

    Raises:
        SpecError: there are none, or they are not understood: biases, transposed weights, another activation.
    """
    found = {}
    for name, module in model.named_modules():
        gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        if isinstance(gate_up, nn.Parameter) and gate_up.ndim == 3 and isinstance(down, nn.Parameter):
            _require_plain(name, module, gate_up, down)
            found[name] = module
    if not found:
        raise SpecError(
            f"{type(model).__name__} has no routed experts as transformers 5 keeps them (experts.gate_up_proj,"
            " experts.down_proj); is it a MoE model, and of that version?"
        )
    return found


def _require_plain(name: str, module: nn.Module, gate_up: nn.Parameter, down: nn.Parameter) -> None:
    experts, hidden, inter = down.shape
    if gate_up.shape != (experts, 2 * inter, hidden):
        raise SpecError(
            f"{name}: gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)} are not [E, 2F, H] and"
            " [E, H, F]; this family cannot be run here"
        )
    if any(parameter is not gate_up and parameter is not down for parameter in module.parameters()):
        raise SpecError(f"{name} has weights beside gate_up_proj and down_proj; this family cannot be run here")
    probe = torch.linspace(-4, 4, 65)
    activation: Callable[[torch.Tensor], torch.Tensor] | None = getattr(module, "act_fn", None)
    if activation is None or not torch.allclose(activation(probe), nn.functional.silu(probe), atol=1e-6):
        raise SpecError(f"{name}: its activation is not SiLU; this family cannot be run here")


def parallelise(
    model: nn.Module,
    mesh: Mesh,
    placement: Placement,
    *,
    dispatch: DispatchKind = "per_expert",
    split: ReplicaSplit = "even",
    clock: Clock | None = None,
) -> list[ExpertLayer]:
    """Spread the routed experts of ``model`` over the EP ranks of ``mesh``, in place; the layers come back in order.

    Every rank calls it with the same whole model, and then runs its own tokens; it keeps the experts of its slots.
    A :class:`moeplan.execution.migrate.Migrator` over the layers applies later plans.

    Raises:
        PlanError: the placement is of another model or number of ranks. SpecError: see :func:`expert_modules`.
    """
    modules = expert_modules(model)
    clock = clock or Clock(mesh.world.rank)
    if placement.num_layers != len(modules):
        raise PlanError(
            f"placement has {placement.num_layers} layers, {type(model).__name__} {len(modules)} with experts"
        )
    for name, module in modules.items():
        if len(module.down_proj) != placement.num_experts:
            raise PlanError(
                f"placement has {placement.num_experts} experts, {name} {len(module.down_proj)}; plan for this model"
            )
    layers = []
    for row, (name, module) in enumerate(modules.items()):
        gate_up, down = module.gate_up_proj, module.down_proj
        assert isinstance(gate_up, torch.Tensor)
        assert isinstance(down, torch.Tensor)
        experts, hidden, inter = down.shape
        layer = ExpertLayer(
            mesh, hidden, inter, placement, row, split=split, clock=clock, dtype=down.dtype,
            dispatcher=make_dispatcher(dispatch, mesh, clock),
        )  # fmt: skip
        layer.load(lambda e, a=gate_up, b=down: torch.cat([a[e].flatten(), b[e].flatten()]))  # type: ignore[misc]
        layer.train(model.training)
        layer.requires_grad_(down.requires_grad)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, ForeignExperts(layer, experts))
        layers.append(layer)
    return layers
