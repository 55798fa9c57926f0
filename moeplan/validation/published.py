"""``moeplan validate published``: predictions beside published measurements of serving and training.

Rows are in ``moeplan/data/published.json``: figure, configuration, source, quality (A: the configuration is complete;
B: it is not). Rows of quality A and A+ count, and the one of the 144-rank decode unit; peaks of memory stand beside.
A row that cannot be predicted counts as missed. docs/background/published.md says what was changed after seeing rows.
"""

from __future__ import annotations

import datetime
import json
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from moeplan.progress import Progress, no_progress
from moeplan.validation.published_predict import CONSTANTS, eplb_ratio, predict, step_s

__all__ = ["published_rows", "validate_published"]

_WITHIN, _SHARE = 0.15, 0.70


@cache
def published_rows() -> tuple[dict[str, Any], ...]:
    """All rows of the data file."""
    text = files("moeplan").joinpath("data", "published.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["rows"])


# What drives what is left, by the first part of a row's name that fits.
_DRIVERS = {
    "deepseek-prefill-ep32": "phases of two batches go in the order they become ready, the exchange is that of"
    " SGLang's tables, attention TensorRT-LLM's of a year later; DeepSeek's schedule and kernels are its own",
    "deepseek-prefill-production": "how busy the units were is not published",
    "trtllm-": "tables are of releases a year newer than the run; none of its age is public",
    "sglang-h20": "roofline: kernels reach less than the data sheet's arithmetic, and this way of exchanging tokens"
    " brings kernels of its own (sorting, copies, masked products) that are not counted",
    "infersim": "roofline of a device without tables",
    "llmservingsim": "vLLM schedules one step ahead (pull request 19970): a first token waits for one step more",
    "imbalance": "planned and drawn load differ by more than chance: requests are few, and each chooses alike (on the"
    " public V2-Lite trace the scatter is 1.0 to 2.1 times that of independent draws, the more the fewer documents)",
    "nvlink": "dispatch was measured in 4 bits only: of 16 bits the kernel is not yet bound by bytes at 128 tokens",
    "dsv3-gb300-mxfp8-2602": "two sequences per micro-batch hide launches that the constant adds",
    "gptoss": "the all-to-all is taken at full speed of the links; biases and clamped activations are not counted",
    "qwen30-b200": "launches bound a step of one sequence, though router and preprocessing are in graphs",
    "qwen30-h100": "launch gaps are larger than the constant where the schedule overlaps exchanges",
    "qwen235-b300": "launch gaps are larger than the constant where the schedule overlaps exchanges",
    "qwen235-b200": "the launch gap is smaller here than the one that all rows share",
    "sglang-gb200": "which of several measured kernels ran is not published: the fastest serves",
    "dsv3-gb200-tokendrop": "no table has NCCL's all-to-all of so many ranks: DeepEP's, scaled by copies, stands in",
    "qwen235-h100-tokendrop": "no table has NCCL's all-to-all between nodes: DeepEP's, scaled by copies, stands in",
    "dsv3-gb200-mxfp8": "not known",
    "dsv3-report": "not known",
    "dsv3-gb200-bf16": "an older container: newer ones are faster at the same layout",
    "dsv3-b200": "an older container: newer ones are faster at the same layout",
    "dsv3-h100": "an older container: newer ones are faster at the same layout",
    "simumax": "launches and passes over activations take longer than counted",
}


def _driver(name: str) -> str:
    return next((text for start, text in _DRIVERS.items() if name.startswith(start)), "")


# ---------------------------------------------------------------------- ablations


def _ablations() -> list[dict[str, Any]]:
    """Ratios of two predictions: with over without."""
    rows = {row["id"]: row["config"] for row in published_rows()}
    answer = []
    for name in ("deepseek-prefill-ep32", "deepseek-decode-ep128"):
        c = rows[name]
        ratio = step_s(c, "none") / step_s(c)
        answer.append({"ablation": f"two-batch overlap, {name}", "predicted_ratio": ratio, "published": None})
    published = {"deepseek-prefill-ep32": 1.49, "deepseek-decode-ep128": 2.54}
    for name, ratio in published.items():
        c = rows[name]
        answer.append(
            {
                "ablation": f"EPLB, {name}",
                "predicted_ratio": eplb_ratio(c),
                "published": ratio,
                "note": "published for SGLang's deployment of this size, on a load that is not: here the experts' skew"
                " is that of the imbalance rows",
            }
        )
    return answer


# ---------------------------------------------------------------------- all of it


def validate_published(progress: Progress = no_progress) -> dict[str, Any]:
    """Every row with its prediction and error, the share within 15 %, and whether the target is reached."""
    answer = []
    rows = published_rows()
    for number, row in enumerate(rows):
        progress("predict", number / len(rows))
        predicted, why = predict(row)
        error = None if predicted is None else predicted / row["measured"] - 1
        within = error is not None and abs(error) <= _WITHIN
        counted = row["quality"] in ("A", "A+", "A/B") and row["section"] != "memory"
        answer.append(
            {
                **{name: row[name] for name in ("id", "section", "quality", "measured", "unit", "source", "note")},
                "predicted": predicted,
                "error": error,
                "within": within if counted else None,
                "explanation": "" if within else why or _driver(row["id"]),
            }
        )
    progress("predict", 1.0)
    figures = []
    parts = {
        "all rows": ("serving", "training", "exchange"),
        "serving and training runs": ("serving", "training"),
        "serving": ("serving",),
        "training": ("training",),
        "exchange": ("exchange",),
    }
    for name, sections in parts.items():
        mine = [r for r in answer if r["within"] is not None and r["section"] in sections]
        errors = [abs(r["error"]) for r in mine if r["error"] is not None]
        share = sum(r["within"] for r in mine) / len(mine)
        figures.append(
            {
                "figure": f"share within 15 %, {name}",
                "value": share,
                "rows": len(mine),
                "median_error": float(np.median(errors)) if errors else None,
                "target": _SHARE if name == "all rows" else None,
                "reached": share >= _SHARE if name == "all rows" else None,
            }
        )
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "moeplan validate published",
        "constants": CONSTANTS,
        "figures": figures,
        "ablations": _ablations(),
        "rows": answer,
        "reached": figures[0]["reached"],
    }
