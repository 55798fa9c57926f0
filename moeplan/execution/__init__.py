"""Run a plan on real ranks: an expert-parallel MoE on torch.distributed that loads, moves and measures."""
