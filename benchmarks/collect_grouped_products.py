"""Adds grouped products of training, as SimuMax measured them on B200, to the shipped profile of B200.

    git clone https://github.com/MooreThreads/SimuMax && python benchmarks/collect_grouped_products.py SimuMax

Its ``configs/system/b200_bf16_ceperm.json`` has Transformer Engine's ``general_grouped_gemm`` in bf16, forward, as
shares of 2250 TFLOP/s: ``ng`` experts with ``M`` tokens each, up and gate together and down. Both together are a row,
once with gradients kept in fp32 and once in bf16, which a forward does not touch. Rows added before are replaced.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from moeplan.artifacts.profile import HardwareProfile, Source, load_profile

SOURCE = "simumax-1.2/b200/general_grouped_gemm"
SHAPES = {(5120, 1536): (160, 6), (7168, 2048): (256, 8)}  # DeepSeek-V2 and V3: experts, top-k
PROFILE = Path(__file__).parents[1] / "moeplan/data/profiles/b200-sxm"


def rows(checkout: Path) -> list[dict[str, object]]:
    """One row per number of experts, tokens of each, and type of gradients."""
    document = json.loads((checkout / "configs/system/b200_bf16_ceperm.json").read_text())
    measured = document["accelerator"]["op"]["group_matmul"]
    found: dict[tuple[int, int, str, int, int], float] = {}
    for name, share in measured["accurate_efficient_factor"].items():
        fields = dict(part.split("=") for part in name.split(", "))
        if fields["stage"] == "fwd":
            ng, m, n, k = (int(fields[x]) for x in ("ng", "M", "N", "K"))
            flops = 2 * ng * m * n * k
            found[ng, m, fields["main_grad_dtype"], n, k] = 1e6 * flops / (1e12 * measured["tflops"] * share)
    answer: list[dict[str, object]] = []
    for (ng, m, gradients, n, hidden), up_us in sorted(found.items()):
        shape = (hidden, n // 2)
        down_us = found.get((ng, m, gradients, hidden, n // 2))
        if shape in SHAPES and down_us is not None:
            experts, top_k = SHAPES[shape]
            answer.append(
                {
                    "hidden": hidden, "inter": n // 2, "num_experts": experts, "num_slots": 0, "top_k": top_k,
                    "ep": experts // ng, "tp": 1, "dtype": "bf16", "distribution": "balanced",
                    "tokens": experts * m // top_k, "rank_pairs": ng * m, "active_experts": ng, "rank_tokens": -1,
                    "vector": "", "direction": "forward", "scope": "experts", "backend": "transformer_engine",
                    "kernel": "general_grouped_gemm", "latency_us": up_us + down_us, "spread": float("nan"),
                    "min_us": float("nan"), "p20_us": float("nan"), "samples": 0, "source": SOURCE, "mark": "",
                }
            )  # fmt: skip
    return answer


def main() -> None:
    """Write the profile with the rows of the checkout that the command line names."""
    profile = load_profile(PROFILE)
    before = profile.table("experts")
    kept = before.filter(pc.not_equal(before["source"].cast(pa.string()), SOURCE))
    tables = {name: profile.table(name) for name in profile.table_names}
    added = HardwareProfile(profile.meta, {"experts": pa.Table.from_pylist(rows(Path(sys.argv[1])))}).table("experts")
    tables["experts"] = pa.concat_tables((kept, added)).unify_dictionaries()
    source = Source(
        kind="imported",
        title="MooreThreads/SimuMax release 1.2, configs/system/b200_bf16_ceperm.json, group_matmul, stage fwd",
        version="Transformer Engine 2.11.0",
        device="NVIDIA B200",
        licence="Apache-2.0, Copyright (c) 2023-2024 Moore Threads Technology Co., Ltd",
        note="shares of 2250 TFLOP/s turned into times",
    )
    more = "; then python benchmarks/collect_grouped_products.py CHECKOUT_OF_SIMUMAX"
    meta = profile.meta.model_copy(
        update={
            "sources": {**profile.meta.sources, SOURCE: source},
            "command": re.sub(r"; then python benchmarks/collect_grouped_products.*", "", profile.meta.command) + more,
        }
    )
    written = HardwareProfile(meta, tables).save(PROFILE)
    print(f"{added.num_rows} rows of {SOURCE}; experts now has {written.meta.tables['experts'].rows}")


if __name__ == "__main__":
    main()
