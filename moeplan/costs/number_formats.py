"""Under which names measured tables hold a number format."""

from __future__ import annotations

from moeplan.specs.model import Dtype

__all__ = ["table_dtypes"]

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


def table_dtypes(dtype: Dtype) -> tuple[str, ...]:
    """Names that ``dtype`` has in tables: the first of them that was measured serves, and serves alone."""
    return _NAMES.get(dtype, (dtype,))
