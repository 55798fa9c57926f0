"""DeepSpeed: rank r owns the experts ``r * E / R`` onwards (``expert // num_local_experts``); the plan is a permutation."""

from moeplan.exports.permutation import PermutationExporter

__all__ = ["exporter"]

exporter = PermutationExporter("deepspeed", "DeepSpeed")
