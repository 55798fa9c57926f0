"""Megatron-Core: rank r owns experts ``r * E / R`` onwards (``moe_layer.py``): a permutation."""

from moeplan.exports.permutation import PermutationExporter

__all__ = ["exporter"]

exporter = PermutationExporter("megatron", "Megatron-Core")
