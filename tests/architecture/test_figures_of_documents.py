"""Tables of pages against the committed results that they cite: every number is the result's, rounded as it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def _results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def _rows(page: str, first: str) -> Iterator[tuple[str, str]]:
    """Name and rest of the table rows that begin so."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(rf"^\| ((?:{first})[^|]*)\|(.*)\|$", text, re.MULTILINE)
    assert found, first
    return ((name.strip(" *"), rest) for name, rest in found)


def _stands(text: str, values: Sequence[float]) -> bool:
    """Whether the numbers of a text are these values, each rounded to its digits."""
    numbers = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", re.sub(r"(\d)-(\d)", r"\1 \2", text))
    near = (
        abs(float(number) - value) <= 0.5 * 10.0 ** -len(number.partition(".")[2]) + 1e-9
        for number, value in zip(numbers, values, strict=True)
    )
    return all(near)


def _percent(found: dict[str, Any], *names: str) -> list[float]:
    return [100 * found[name] for name in names]


def test_laws_of_a_step() -> None:
    systems = _results("step_laws")["systems"]
    rows = list(_rows("guides/costs.md", "experts, |exchanges, "))
    assert len(rows) == 16
    for name, rest in rows:
        part, system, framework, count = re.fullmatch(r"(\w+), (\w+), ([\w-]+) \(([\d,]+)\)", name).groups()  # type: ignore[union-attr]
        key = {"H100": "h100_sxm", "GB200": "gb200"}[system]
        found = systems[key][part][{"SGLang": "sglang", "TensorRT-LLM": "trtllm", "vLLM": "vllm"}.get(framework, "all")]
        law, table = (_percent(found[kind], "median", "p90") for kind in ("law", "table"))
        step = _percent(found["step"], "median", "p90") if part == "experts" else law
        assert int(count.replace(",", "")) == found["rows"], name
        assert _stands(rest, [*law, *step, *table]), name


def test_held_out_rows_of_tables() -> None:
    figures = {figure["figure"]: figure for figure in _results("validate_kernels")["figures"]}
    page = "decisions/0009-kriging-for-measured-tables.md"
    for name, rest in _rows(page, "GEMM, |MoE GEMM, |attention, |all-to-all, "):
        kind, of = name.split(", ")
        kinds = {system: figures.get(f"held-out grid points, {kind}, {system}") for system in
                 ("a100-sxm", "b200-sxm", "gb200", "h100-sxm", "h200-sxm")}  # fmt: skip
        found = [one for system, one in kinds.items() if one and ("systems" in of or system.startswith(of.lower()))]
        keys = ("median", "p90", "plain_median", "plain_p90")
        ends = (min, max) if "systems" in of else (min,)
        assert _stands(rest, [100 * end(one[key] for one in found) for key in keys for end in ends]), name


def test_shares_of_published_runs() -> None:
    found = {figure["figure"].rpartition(", ")[2]: figure for figure in _results("validate_published")["figures"]}
    found["all"] = found.pop("all rows")
    for name, rest in _rows("background/published.md", "all, |serving|training, |exchange, "):
        section, _, count = name.rpartition(", ")
        figure = found[section.removesuffix(" runs") if section not in found else section]
        assert int(count) == figure["rows"]
        assert _stands(rest, _percent(figure, "value", "median_error")), name


def test_served_latencies() -> None:
    results = _results("silicon")
    keys = ("tpot_median", "tpot_mape", "tpot_bias", "tpot_spearman", "ttft_median", "coverage")
    for name, rest in _rows("background/silicon.md", r"\**\([abc]\), "):
        part = name[1]
        if "peer" in name:
            both = results["peer_on_identical_rows"][part]
            found = {key: [both[who][key] for who in ("ours", "peer")] for key in keys}
        else:
            one = results["nearest_row_of_a" if "nearest" in name else "parts"][part]
            found = {key: [one[key]] for key in keys}
            assert "nearest" in name or f"{one['rows']:,}" in name
        for key, cell in zip(keys, rest.split("|"), strict=False):
            scale = 1 if key == "tpot_spearman" else 100
            text = cell.partition("(")[0].strip(" *")  # the target stands in brackets
            assert not text or _stands(text, [scale * value for value in found[key]]), (name, key)
