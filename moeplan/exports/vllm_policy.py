"""The Python module that makes vLLM hold a fixed plan: an ``AbstractEplbPolicy`` that always answers it."""

from __future__ import annotations

from moeplan.artifacts.plan import Plan

__all__ = ["MAP_NAME", "policy_module"]

MAP_NAME = "PHYSICAL_TO_LOGICAL_MAP"

_TEMPLATE = '''\
"""Fixed expert placement for vLLM, written by moeplan (model {model}, plan {digest}).

vLLM has no input for a static map; this policy answers every rebalance with the planned one. Put this file
where Python finds it and call ``register()`` in every process before the engine starts, e.g. as an entry
point of the group ``vllm.general_plugins``. Then start vLLM with expert parallelism over {num_ranks} ranks
and

    --enable-expert-parallel --enable-eplb
    --eplb-config '{{"policy": "default", "num_redundant_experts": {redundant}, "step_interval": 100}}'

The map is applied at the first rearrangement; later ones move nothing, because the answer stays the same.
"""

import torch
from vllm.distributed.eplb.policy import EPLB_POLICIES, AbstractEplbPolicy

NUM_EXPERTS = {num_experts}
NUM_RANKS = {num_ranks}
LAYER_IDS = {layer_ids}
# [MoE layer][slot] -> expert; the slots of a rank stand together, in rank order.
{map_name} = [
{rows}
]


class FixedPlanPolicy(AbstractEplbPolicy):
    """Answers the planned placement, whatever the load."""

    @classmethod
    def rebalance_experts(cls, weight, num_replicas, num_groups, num_nodes, num_ranks, *args, **kwargs):
        """Return phy2log [L, P]; to vLLM 0.13 to 0.18, which declares a tuple, (phy2log,
        log2phy [L, E, P - E + 1] padded with -1, logcnt [L, E]).

        Raises:
            ValueError: the engine's layers, experts, slots or ranks are not those of the plan.
        """
        plan = (len({map_name}), NUM_EXPERTS, len({map_name}[0]), NUM_RANKS)
        engine = (int(weight.shape[0]), int(weight.shape[1]), int(num_replicas), int(num_ranks))
        if plan != engine:
            raise ValueError(
                "the plan's (MoE layers, experts, slots, ranks) %r are not the engine's %r" % (plan, engine)
            )
        phy2log = torch.tensor({map_name}, dtype=torch.int64)
        if "tuple" not in str(AbstractEplbPolicy.rebalance_experts.__annotations__.get("return")):
            return phy2log
        logcnt = torch.stack([torch.bincount(row, minlength=NUM_EXPERTS) for row in phy2log])
        log2phy = torch.full((plan[0], NUM_EXPERTS, plan[2] - NUM_EXPERTS + 1), -1, dtype=torch.int64)
        for layer, row in enumerate({map_name}):
            seen = [0] * NUM_EXPERTS
            for slot, expert in enumerate(row):
                log2phy[layer, expert, seen[expert]] = slot
                seen[expert] += 1
        return phy2log, log2phy, logcnt


def register():
    """Make the fixed plan vLLM's default EPLB policy."""
    EPLB_POLICIES["default"] = FixedPlanPolicy
'''


def policy_module(plan: Plan) -> str:
    """Source of a self-contained module with class ``FixedPlanPolicy`` and ``register()``."""
    rows = "\n".join(f"    [{', '.join(map(str, row))}]," for row in plan.physical_to_logical_map)
    source = _TEMPLATE.format(
        model="".join(letter if letter.isalnum() or letter in "-._/ " else "?" for letter in plan.model),
        digest=plan.sha256[:12],
        num_ranks=plan.num_ranks,
        redundant=len(plan.rank_of_slot) - plan.num_experts,
        num_experts=plan.num_experts,
        layer_ids=list(plan.layer_ids),
        map_name=MAP_NAME,
        rows=rows,
    )
    compile(source, "<vllm policy>", "exec")
    return source
