"""DeepSpeed: rank r owns experts ``r * E / R`` onwards (``expert // num_local_experts``): a permutation."""

from moeplan.exports.permutation import PermutationExporter

__all__ = ["exporter"]

exporter = PermutationExporter("deepspeed", "DeepSpeed")
