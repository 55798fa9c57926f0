"""Megatron-Core: rank r owns the experts ``r * E / R`` onwards (``moe_layer.py``); the plan is a permutation."""

from moeplan.exports.permutation import PermutationExporter

__all__ = ["exporter"]

exporter = PermutationExporter("megatron", "Megatron-Core")
