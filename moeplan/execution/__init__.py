"""Run a plan on real ranks: an expert-parallel MoE on torch.distributed that loads, moves and measures.

From the ground up: :mod:`launch` starts ranks, :mod:`groups` says who works together, :mod:`router` chooses experts,
:mod:`table` their copies, :mod:`dispatch` carries tokens, :mod:`experts` computes, :mod:`layer` joins these into
``ExpertLayer`` (routed experts under a placement) and ``MoELayer`` (with router and shared experts).
"""
