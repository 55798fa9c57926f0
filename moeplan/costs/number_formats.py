"""Under which names measured tables hold a number format."""

from __future__ import annotations

from moeplan.specs.model import Dtype

__all__ = ["WEIGHT_BYTES", "table_dtypes"]

# A model's spec does not say which of them it is published in, so the order does: fp8 scaled by blocks, as DeepSeek and
# Qwen publish it; 4 bits whose products the device computes narrow, before those that it widens to 16 bits. Both kinds
# of 16 bits move and compute alike.
_NAMES: dict[str, tuple[str, ...]] = {
    "bf16": ("bf16", "fp16"),
    "fp16": ("fp16", "bf16"),
    "fp8": ("fp8_block", "fp8"),
    "fp4": ("nvfp4", "w4a8_mxfp4_mxfp8", "w4a16_mxfp4"),
    "int8": ("int8_wo", "int8"),
}

WEIGHT_BYTES: dict[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0,
    "int8": 1.0,
    "int8_wo": 1.0,
    "int4": 0.5,
    "nvfp4": 0.5,
    "w4a16_mxfp4": 0.5,
    "w4a8_mxfp4_mxfp8": 0.5,
}
"""Bytes of a weight in a table's format, without scales."""


def table_dtypes(dtype: Dtype) -> tuple[str, ...]:
    """Names that ``dtype`` has in tables: the first of them that was measured serves, and serves alone."""
    return _NAMES.get(dtype, (dtype,))
