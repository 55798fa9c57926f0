"""``moeplan validate silicon``: served latencies predicted from kernel tables, against measured rows of others."""

from __future__ import annotations

import csv
import datetime
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from moeplan.artifacts.profile import HardwareProfile, ProfileMeta
from moeplan.costs.closed_loop import PassTimes
from moeplan.costs.engine import EngineCosts, EngineSetup, Exchange
from moeplan.costs.exchange import NVLINK_MODES
from moeplan.costs.served import CALIBRATED, Constants, ServedPool, pass_times, served
from moeplan.errors import MoeplanError
from moeplan.files import write_text
from moeplan.pipeline.aic import read_system
from moeplan.profiling import aic
from moeplan.progress import Progress, no_progress
from moeplan.specs.attention_layers import attention_layers
from moeplan.specs.clusters import find_accelerator
from moeplan.specs.model import Dtype, ModelSpec
from moeplan.specs.models import find_model
from moeplan.validation.scoring import Features, nearest, scores
from moeplan.validation.silicon_rows import FAMILIES, Measured, Workers, read_measured

__all__ = ["PEER_FILE", "TARGETS", "SiliconModel", "measured_rows", "told_apart", "validate_silicon"]

PEER_FILE = Path("baselines", "aiconfigurator_0.12.0_on_silicon_sample.csv")
TARGETS: dict[str, dict[str, float]] = {
    "b": {"tpot_median": 0.10, "tpot_mape": 0.18, "tpot_spearman": 0.95, "ttft_median": 0.25, "coverage": 0.90},
    "c": {"tpot_median": 0.15, "coverage": 0.85},
}
_DEEPEP: tuple[Exchange, ...] = ("gathered", "sent", "sent_normal")  # by Launch.deepep
_AT_LEAST = frozenset(["tpot_spearman", "coverage"])


@dataclass(frozen=True, slots=True)
class Prediction:
    """Milliseconds of one row, or why there are none."""

    ttft_ms: float | None
    tpot_ms: float | None
    reason: str = ""


class SiliconModel:
    """Predictions of rows; profiles are read when first needed, passes of equal engines are computed once."""

    def __init__(self, constants: Constants = CALIBRATED) -> None:
        self.constants = constants
        self._root = aic.systems_root()
        self._profiles: dict[str, HardwareProfile] = {}
        self._shared: dict[Any, Any] = {}
        self._times: dict[Any, PassTimes] = {}
        self._models = {name: find_model(name) for _, name, _ in FAMILIES.values()}

    def _profile(self, system: str) -> HardwareProfile:
        if system not in self._profiles:
            # GB300's NVLink is GB200's, where the exchange was measured.
            like = self._profile("gb200") if system == "gb300" else None
            models = []
            for model in self._models.values():
                layers = attention_layers(model)[0].spec
                models.append(model if model.attention else model.model_copy(update={"attention": layers}))
            self._shared.clear()  # tables of the system before
            self._profiles = {}
            tables, sources, _ = read_system(self._root, system, {}, models, hybrid=True)
            tables["experts"] = _unmarked(tables["experts"])
            meta = ProfileMeta(name=system, accelerator=system, date="", command="", sources=sources)
            profile = HardwareProfile(meta, tables)
            if like is not None:
                profile = profile.with_rows("alltoall", like.select("alltoall", mode=NVLINK_MODES))
            self._profiles[system] = profile
        return self._profiles[system]

    def _passes(self, row: Measured, decode: EngineSetup, prefill: EngineSetup) -> PassTimes:
        where = (row.registry_name, row.system, row.backend, row.precision)
        key = (*where, decode, prefill, row.isl, row.osl)
        if key not in self._times:
            profile = self._profile(row.system)
            first, second = (EngineCosts(setup, profile, self._shared) for setup in (decode, prefill))
            self._times[key] = pass_times(first, second, row.isl, row.osl)
        return self._times[key]

    def predict(self, row: Measured) -> Prediction:
        """Time to first token and per output token of one row; of one set aside only where its recipe is known."""
        if row.why_not and not row.recipe:
            return Prediction(None, None, row.why_not)
        model = self._models[row.registry_name]
        decode, prefill = pools_of(row, model)
        try:
            times = self._passes(row, decode.setup, (prefill or decode).setup)
            found = served(times, decode, prefill, self.constants, row.isl, row.osl, row.concurrency)
        except MoeplanError as error:
            return Prediction(None, None, str(error))
        return Prediction(found.ttft_mean_s * 1e3, found.tpot_mean_s * 1e3)


def _unmarked(experts: pa.Table) -> pa.Table:
    """With rows that are faster than the balanced ones beside them: of such a pair either may be the wrong one, and
    without the skewed rows a table would end at the batch from which they are compared."""
    mark = pc.if_else(pc.equal(experts["mark"], "skew_faster"), "", experts["mark"])
    return experts.set_column(experts.column_names.index("mark"), "mark", mark)


def pools_of(row: Measured, model: ModelSpec) -> tuple[ServedPool, ServedPool | None]:
    """The pools of a row. SGLang polls for requests every so many decode steps, in each unless it is told, so half of
    them pass on average before a prompt is seen. It streams every so many tokens but sends the first one at once."""
    launch = row.launch
    kernels = ("", "") if launch is None else (launch.prefill_kernels, launch.decode_kernels)
    drafts = 0 if _drafts_stall(row, model) else row.draft_tokens
    decode = ServedPool(setup_of(row, row.decode, model, drafts, kernels[1]), row.decode.count, late=row.late)
    if launch is not None:
        decode = replace(decode, prompt_tokens=launch.prompt_tokens or None, max_running=launch.max_running)
    if row.backend == "sglang":
        decode = replace(decode, first_steps=(1 if launch is None else launch.poll_steps) / 2)
    if row.prefill is None:
        return decode, None
    prefill = ServedPool(setup_of(row, row.prefill, model, 0, kernels[0]), row.prefill.count, decode.prompt_tokens)
    return decode, prefill


def _drafts_stall(row: Measured, model: ModelSpec) -> bool:
    """Whether drafts bring nothing: SGLang planned FlashInfer's latent attention of drafts and their check on the host,
    which waited for the device each time, so that DeepSeek-R1 with two drafts on H200 was "no faster than standard
    decoding" (sgl-project/sglang, pull request 27689, which mended it in June 2026, after every row)."""
    latent = model.attention is not None and model.attention.is_mla
    return latent and row.backend == "sglang" and row.launch is not None and row.launch.decode_attention == "flashinfer"


def setup_of(row: Measured, workers: Workers, model: ModelSpec, drafts: int, kernels: str) -> EngineSetup:
    """The engine of a row. Of a quantised checkpoint attention stays in bf16 but in fp8 ones, and of 4-bit ones only
    DeepSeek's has 4-bit dense and shared parts (hf_quant_config.json of nvidia's NVFP4 checkpoints). The cache of
    fp8 and fp4 checkpoints is fp8 on TensorRT-LLM and on Blackwell, else bf16, as the benchmark's scripts set it.

    TensorRT-LLM sends tokens to experts over NVLink where a rack has it, through DeepEP between nodes, and gathers
    them in a node, in 4 bits where the experts are; else a launch file says that they go through DeepEP.
    Redundant experts balance the load."""
    precision: Dtype = row.precision  # type: ignore[assignment]
    plain: Dtype = "fp8" if precision == "fp8" else "bf16"
    deepseek = model.name == "DeepSeek-V3" and precision == "fp4"
    ranks = workers.tp * workers.dp
    exchange: Exchange = "gathered" if row.launch is None else _DEEPEP[row.launch.deepep]
    if row.backend == "trtllm" and exchange == "gathered":
        exchange = "fastest" if row.system.startswith("gb") else "sent" if ranks > 8 else "gathered"
    balanced = row.launch is not None and row.launch.redundant_experts > 0
    small_cache = precision in ("fp8", "fp4") and (row.backend == "trtllm" or not row.system.startswith("h"))
    return EngineSetup(
        model=model,
        accelerator=find_accelerator(row.system.replace("_", "-")),
        backend=row.backend,
        tp=workers.tp,
        dp=workers.dp,
        ep=workers.ep,
        expert_dtype=precision,
        dense_dtype="fp4" if deepseek else plain,
        attention_dtype=plain,
        kv_dtype="fp8" if small_cache else "bf16",
        draft_tokens=drafts,
        exchange=exchange,
        gather_dtype="fp4" if precision == "fp4" and row.backend == "trtllm" else "bf16",
        distribution="balanced" if balanced else "power_law_1.01",
        expert_kernels=kernels,
    )


# ---------------------------------------------------------------------- baselines


def _features(row: Measured) -> Features:
    per_rank = row.concurrency / (row.decode.count * row.decode.tp * row.decode.dp)
    family = row.group.split("|", 1)[0]
    names = (family, row.system, row.backend, row.mode, row.precision, str(row.draft_tokens))
    return Features(names, (row.isl, row.osl, per_rank, row.decode.tp, row.decode.dp))


def _lookup(rows: Sequence[Measured]) -> dict[str, Prediction]:
    known = [row for row in rows if row.part == "a"]
    features = [_features(row) for row in known]
    answer = {}
    for row in rows:
        if row.part != "a":
            found = known[nearest(_features(row), features)]
            answer[row.id] = Prediction(found.ttft_ms, found.tpot_ms)
    return answer


def _peer() -> dict[str, Prediction]:
    """The peer's predictions by row id; empty where the public data is not at hand."""
    root = os.environ.get("MOEPLAN_DATA")
    path = Path(root) / PEER_FILE if root else None
    if path is None or not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {
            line["id"]: Prediction(float(line["p_ttft"]), float(line["p_tpot"]))
            for line in csv.DictReader(file)
            if line["p_tpot"] and not line["err"]
        }


# ---------------------------------------------------------------------- drafted or not

_APART = 1.2  # drafts gain more than this, repeated runs differ by less


def told_apart(rows: Sequence[Measured]) -> dict[str, Measured]:
    """Undecided rows that their twins give away as undrafted, by id: of rows with equal inputs, some drafted and some
    not, the slower ones. This reads measured latencies, if only their order, and so serves no figure with a target."""
    twins: dict[Any, list[Measured]] = defaultdict(list)
    for row in rows:
        if row.undrafted is not None:
            same = (row.group, row.mode, row.precision, row.isl, row.osl, row.concurrency, row.decode, row.prefill)
            twins[same].append(row)
    answer: dict[str, Measured] = {}
    for alike in twins.values():
        low, high = min(row.tpot_ms for row in alike), max(row.tpot_ms for row in alike)
        if high >= _APART * low:
            slow = [row for row in alike if row.tpot_ms**2 > low * high]
            answer |= {row.id: row.undrafted for row in slow if row.undrafted is not None}
    return answer


# ---------------------------------------------------------------------- all of it


def _scores(rows: Sequence[Measured], predictions: dict[str, Prediction]) -> dict[str, Any]:
    found = [predictions.get(row.id, Prediction(None, None)) for row in rows]
    return scores(
        [p.tpot_ms for p in found], [r.tpot_ms for r in rows], [p.ttft_ms for p in found], [r.ttft_ms for r in rows]
    )


def _figures(part: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    answer = []
    for name, target in TARGETS[part].items():
        value = found[name]
        good = value is not None and (value >= target if name in _AT_LEAST else value <= target)
        answer.append({"figure": f"({part}) {name}", "value": value, "target": target, "reached": good})
    return answer


def _against_peer(part: str, rows: Sequence[Measured], ours: dict[str, Prediction]) -> dict[str, Any]:
    found = _peer()
    peer = {row.id: found[name] for row in rows for name in (*row.repeats, row.id) if name in found}
    both = [row for row in rows if row.part == part and row.id in peer and ours[row.id].tpot_ms is not None]
    return {"rows": len(both), "ours": _scores(both, ours), "peer": _scores(both, peer)}


def _details(rows: Sequence[Measured], ours: dict[str, Prediction]) -> list[dict[str, Any]]:
    """Scores by what may drive errors: backend and phase, batch per rank, drafts, whether a recipe was known."""

    def load(row: Measured) -> str:
        per_group = row.concurrency / (row.decode.count * row.decode.dp)
        return "batch <= 8" if per_group <= 8 else "batch <= 64" if per_group <= 64 else "batch > 64"

    cuts: tuple[tuple[str, Callable[[Measured], str]], ...] = (
        ("group", lambda row: row.group),
        ("backend and mode", lambda row: f"{row.backend} {row.mode}"),
        ("sequences per attention group", load),
        ("lengths", lambda row: f"{row.isl} in, {row.osl} out"),
        ("drafts", lambda row: f"{row.draft_tokens} drafts"),
        ("recipe", lambda row: "recipe known" if row.recipe else "columns only"),
    )
    return [
        {"part": part, "cut": cut, "value": value, **_scores(mine, ours)}
        for part in "abc"
        for cut, of in cuts
        for value in sorted({of(row) for row in rows if row.part == part})
        if (mine := [row for row in rows if row.part == part and of(row) == value])
    ]


@cache
def measured_rows() -> list[Measured]:
    """All distinct rows of the installed package.

    Raises:
        MissingExtraError: the package is not installed.
    """
    return read_measured(aic.systems_root() / "silicon_sample.csv")


def validate_silicon(
    rows_out: Path | None = None, progress: Progress = no_progress
) -> dict[str, Any]:
    """Every figure with its target; ``rows_out`` gets id, split and prediction of each row, also of those set aside
    (split ``dropped``) and of repeated ones (``duplicate``).

    Raises:
        MissingExtraError: the package with the tables is not installed; InputError: ``rows_out`` cannot be written.
    """
    everything = measured_rows()
    rows = [row for row in everything if not row.why_not]
    slow = told_apart(rows)
    model = SiliconModel()
    ours: dict[str, Prediction] = {}
    told: dict[str, Prediction] = {}
    jobs = [(row, ours) for row in everything] + [(row, told) for row in slow.values()]
    for number, (row, into) in enumerate(sorted(jobs, key=lambda job: job[0].system)):  # tables are read once
        progress(f"predict {row.system}", number / len(jobs))
        into[row.id] = model.predict(row)
    if rows_out is not None:
        _write_rows(rows_out, everything, ours)
    parts = {part: _scores([row for row in rows if row.part == part], ours) for part in "abc"}
    lookup = _lookup(rows)
    nearest_scores = {part: _scores([row for row in rows if row.part == part], lookup) for part in "bc"}
    peers = {part: _against_peer(part, rows, ours) for part in "bc"}
    figures = _figures("b", parts["b"]) + _figures("c", parts["c"])
    for name, value in _scores([row for row in rows if row.part == "b"], ours | told).items():
        if name in ("tpot_median", "tpot_mape", "tpot_spearman"):
            figure = f"beside: (b) {name}, drafted or not told by which of equal rows is slower"
            figures.append({"figure": figure, "value": value, "target": TARGETS["b"][name], "reached": None})
    mine, other = peers["c"]["ours"]["tpot_median"], peers["c"]["peer"]["tpot_median"]
    half = other / 2 if other is not None else None
    figures.append(
        {
            "figure": "(c) tpot_median on the peer's rows, at most half the peer's",
            "value": mine,
            "target": half,
            "reached": bool(mine is not None and half is not None and mine <= half),
        }
    )
    progress("done", 1.0)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "moeplan validate silicon",
        "inputs": {
            "package": f"aiconfigurator-core {aic.VERSION}",
            "distinct_rows": len(everything),
            "set_aside": dict(Counter(_kind(row.why_not) for row in everything if row.why_not)),
            "rows": {part: sum(row.part == part for row in rows) for part in "abc"},
            "undecided": {part: sum(row.part == part and row.undrafted is not None for row in rows) for part in "abc"},
            "told_undrafted": {part: sum(row.part == part for row in slow.values()) for part in "abc"},
            "not_predicted": dict(Counter(ours[row.id].reason for row in rows if ours[row.id].reason)),
        },
        "constants": asdict(CALIBRATED),
        "figures": figures,
        "parts": parts,
        "nearest_row_of_a": nearest_scores,
        "peer_on_identical_rows": peers,
        "detail": _details(rows, ours),
        "reached": all(figure["reached"] is not False for figure in figures),
    }


def _kind(reason: str) -> str:
    if "not moe_tp" in reason:
        return "tp x dp is not moe_tp x moe_ep"
    if "ranks in a server" in reason:
        return "more ranks than the node has"
    return "widths do not divide the model" if "do not divide" in reason else reason


def _write_rows(path: Path, rows: Sequence[Measured], ours: dict[str, Prediction]) -> None:
    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.6g}"

    lines = ["id,split,predicted_ttft_ms,predicted_tpot_ms"]
    for row in rows:
        values = f"{text(ours[row.id].ttft_ms)},{text(ours[row.id].tpot_ms)}"
        lines.append(f"{row.id},{'dropped' if row.why_not else row.part},{values}")
        lines += [f"{name},duplicate,{values}" for name in row.repeats]
    write_text(path, "\n".join(lines) + "\n")
