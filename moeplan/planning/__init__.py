"""Planners by name, the bounds that prove their plans, migration and the verdict: load and costs in, placement out."""
