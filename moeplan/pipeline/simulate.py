"""``moeplan simulate``: a scenario, or every case of its sweep, over seeds and both ends of the costs' interval.

A service is simulated once per seed, and again (first seed) at the low and at the high end of its costs' interval:
every step, and each part of the costs alone. A headline's interval joins both: ``value +- sqrt(costs^2 + seeds^2)``,
with ``costs`` how far the further runs lie from the first seed's (:func:`moeplan.pipeline.intervals.cost_sides`) and
``seeds`` how far the seeds lie from their mean. In training nothing is drawn: one run stands for every seed, and brings
both ends of its figures. A figure into which no measured time enters says so and has no interval. The figures of every
run are kept: :mod:`moeplan.pipeline.compare` takes two results run by run.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moeplan import __version__
from moeplan.artifacts.event_log import EventLog
from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.artifacts.simulation_result import (
    Assumption,
    Headline,
    MemoryTrack,
    RankBytes,
    Replays,
    SimulationResult,
)
from moeplan.costs.serving import COST_PARTS
from moeplan.errors import InfeasibleError, InputError, MoeplanError, SpecError
from moeplan.files import (
    atomic_directory,
    canonical_json,
    require_place,
    sha256_bytes,
    sha256_file,
    write_text,
)
from moeplan.pipeline.executor import Executor, Failure, InlineExecutor, executor_for
from moeplan.pipeline.inputs import read_routing
from moeplan.pipeline.intervals import cost_sides
from moeplan.pipeline.serving import build_service, serving_costs_sha256
from moeplan.pipeline.threads import single_threaded
from moeplan.pipeline.training import (
    TRAINING_DIRECTIONS,
    TRAINING_EXACT,
    simulate_training,
    training_costs_sha256,
)
from moeplan.progress import Progress, no_progress
from moeplan.simulation.detailed_costs import SAMPLED_LAYERS, first_layers
from moeplan.simulation.outcome import DIRECTIONS, Outcome, outcome_of
from moeplan.simulation.service import simulate_service
from moeplan.specs.catalogue import names_a_file
from moeplan.specs.model import ModelSpec
from moeplan.specs.scenario import Scenario

__all__ = ["SIMULATION_PLACE", "Simulated", "Sweep", "cases_of", "simulate", "sweep", "write_simulation"]

SIMULATION_PLACE = ("a simulation", ("result.json", "events.parquet"))
"""What ``--out`` may hold before: see :func:`moeplan.files.require_place`."""

_FIELDS_OF_FILES = ("trace", "current", "model", "cluster", "profile")
_INSIDE = {"current": "plan.json", "prefill placement": "plan.json", "model": "config.json"}  # of a directory, one file


@dataclass(frozen=True, slots=True)
class _Run:
    """One run of a case: a seed, and parts of the costs that are at an ``end`` of their interval, -1 or 1. A case of a
    sweep is not ``alone``, and looks for no remedies."""

    scenario: Scenario
    seed: int
    keep_log: bool
    alone: bool = True
    ends: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class _Answer:
    outcome: Outcome
    log: EventLog | None
    model: str
    cluster: str
    num_ranks: int
    num_nodes: int
    assumptions: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    memory: tuple[MemoryTrack, ...] = ()
    rank_memory: RankBytes | None = None
    parts: tuple[str, ...] = COST_PARTS
    ends: dict[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Simulated:
    """A result and the log of its first seed."""

    result: SimulationResult
    log: EventLog | None


@dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """Every case of a sweep: its values, and its result or why there is none; ``resumed`` were there already.

    ``impossible``: cases that no engine or job could run, as they do not fit into memory or their fields do not fit
    each other; others without a result failed.
    """

    cases: tuple[dict[str, Any], ...]
    results: tuple[SimulationResult | None, ...]
    failures: dict[int, str] = field(default_factory=dict)
    impossible: frozenset[int] = frozenset()
    resumed: int = 0

    @property
    def failed(self) -> int:
        """How many cases failed that are not impossible; all, where none has a result."""
        return len(self.failures) - len(self.impossible) * any(result is not None for result in self.results)

    @property
    def ranked(self) -> list[int]:
        """Cases that have a result: of training those with most tokens per second and rank first."""
        found = {number: result for number, result in enumerate(self.results) if result is not None}
        if any(result.kind != "training" for result in found.values()):
            return list(found)
        return sorted(found, key=lambda number: -found[number].headlines["tokens_per_s_per_gpu"].value)

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "schema_version": 1,
            "cases": [
                {"case": case, "result": None if result is None else result.model_dump(mode="json")}
                | ({"failure": self.failures[number]} if number in self.failures else {})
                for number, (case, result) in enumerate(zip(self.cases, self.results, strict=True))
            ],
            "ranked": self.ranked,
            "impossible": sorted(self.impossible),
            "failed": self.failed,
            "resumed": self.resumed,
        }


# ---------------------------------------------------------------------- one case


@lru_cache(maxsize=1)
def _routing(path: Path, model: ModelSpec, *, format: str | None) -> RoutingTrace | ExpertLoad:
    """Kept for the other runs of a case, till these end: a large trace takes longer to read than many a run."""
    return read_routing(path, model, format=format)


def _run(run: _Run, progress: Progress = no_progress) -> _Answer:
    scenario = run.scenario
    if scenario.training is not None:
        return _trained(run, progress)
    with single_threaded():
        service = build_service(scenario, run.seed, run.ends, _routing)
        served = simulate_service(
            service.spec, service.requests, service.pools,
            keep_log=run.keep_log, seed=run.seed, progress=progress,
            origin={"seed": run.seed, "scenario_sha256": _digest(scenario), "moeplan": __version__,
                    "fidelity": scenario.fidelity},
        )  # fmt: skip
        log = served.log
        inside = first_layers(served.instances[-1]) if scenario.fidelity == "step" else None
        if log is not None and inside is not None:
            log = replace(log.joined(inside), origin={**log.origin, "played_layers": SAMPLED_LAYERS})
    sources: dict[str, str] = {}
    extrapolated: set[str] = set()
    for instance in served.instances:
        sources |= instance.costs.source
        extrapolated |= instance.costs.extrapolated
    rows = [*service.assumptions, *((f"costs of {name}", "", source) for name, source in sorted(sources.items()))]
    notes = [*service.notes, *(f"extrapolated beyond measurements: {name}" for name in sorted(extrapolated))]
    if scenario.objective.return_mode == "stay":
        notes.append("costs are of return_home: tokens go back to their rank after each layer")
    return _Answer(
        outcome_of(served, service.spec), log, service.model.name, service.cluster.name,
        sum(len(i.stats.busy_R) for i in served.instances), served.num_nodes, tuple(rows), tuple(notes),
        rank_memory=service.memory,
    )  # fmt: skip


def _trained(run: _Run, progress: Progress) -> _Answer:
    """A training run; nothing in it is drawn, so seeds do not differ."""
    origin = {"seed": run.seed, "scenario_sha256": _digest(run.scenario), "moeplan": __version__}
    with single_threaded():
        found = simulate_training(run.scenario, origin, intervals=True, remedies=run.alone)
    progress("simulate", 1.0)
    result, cluster = found.result, found.cluster
    counts = {"steps": float(len(result.steps_s)), "micro_batches": float(result.micro_batches)}
    traffic = (found.traffic,) if run.keep_log else ()
    outcome = Outcome(found.headlines, counts, {}, None, None, sum(result.steps_s), traffic)
    return _Answer(
        outcome, result.log if run.keep_log else None, found.model.name, cluster.name, cluster.num_ranks,
        cluster.num_nodes, found.assumptions, found.notes, found.memory, parts=found.parts, ends=found.ends,
    )  # fmt: skip


def _runs(scenario: Scenario, seeds: int, keep_log: bool, alone: bool = True) -> list[_Run]:
    first = scenario.seed
    if scenario.training is not None:
        return [_Run(scenario, first, keep_log, alone)]
    runs = [_Run(scenario, first + number, keep_log and number == 0) for number in range(seeds)]
    ways = (COST_PARTS, *((part,) for part in COST_PARTS))  # all together, then each alone
    return runs + [_Run(scenario, first, False, ends=dict.fromkeys(way, end)) for way in ways for end in (-1, 1)]


def _digest(scenario: Scenario) -> str:
    fields = scenario.model_dump(mode="json", exclude={"out", "sweep"})
    return sha256_bytes(canonical_json(fields).encode())


def _provenance(scenario: Scenario, seeds: int) -> dict[str, str]:
    """Hashes of all that a case is made from; ``case_sha256`` is that of all of them."""
    files: dict[str, Any] = {name: getattr(scenario, name) for name in _FIELDS_OF_FILES}
    if scenario.serving is not None:
        files["requests"] = scenario.serving.requests.file
        files["prefill placement"] = scenario.serving.prefill.placement if scenario.serving.prefill else None
    hashes = {f"{name}_sha256": digest for name, given in files.items() if (digest := _contents(name, given))}
    hashes |= {"scenario_sha256": _digest(scenario), "moeplan": __version__}
    return hashes | {"case_sha256": sha256_bytes(canonical_json({**hashes, "seeds": seeds}).encode())}


def _contents(name: str, given: Any) -> str:
    """Digest of the file or the directory that a field names; empty where it names none."""
    if not isinstance(given, (str, Path)) or not names_a_file(given):
        return ""
    path = Path(given)
    if path.is_dir() and name in _INSIDE:
        path /= _INSIDE[name]
    if path.is_dir():
        inside = sorted(part for part in path.rglob("*") if part.is_file())
        return sha256_bytes(canonical_json({str(p.relative_to(path)): sha256_file(p) for p in inside}).encode())
    return sha256_file(path) if path.is_file() else ""


def _replays(scenario: Scenario, seeds: int, answers: Sequence[_Answer]) -> Replays:
    """Figures of all runs: of a service those of the seeds, then pairs at the ends of the costs' interval."""
    first = answers[0]
    if scenario.training is not None:
        once = {name: (value,) for name, value in first.outcome.headlines.items()}
        digest = training_costs_sha256(scenario)
        return Replays(costs_sha256=digest, parts=first.parts, seeds=once, ends=first.ends)
    runs = [answer.outcome.headlines for answer in answers]
    mine = [name for name in DIRECTIONS if all(name in run for run in runs[:seeds])]
    at_ends = list(zip(runs[seeds::2], runs[seeds + 1 :: 2], strict=True))
    return Replays(
        costs_sha256=serving_costs_sha256(scenario),
        parts=first.parts,
        seeds={name: tuple(run[name] for run in runs[:seeds]) for name in mine},
        ends={
            name: tuple((low.get(name, runs[0][name]), high.get(name, runs[0][name])) for low, high in at_ends)
            for name in mine
        },
    )


def _headline(name: str, replays: Replays) -> Headline:
    values, ends = replays.seeds[name], replays.ends.get(name)
    value = float(np.mean(values))
    costs = (0.0, 0.0) if ends is None else cost_sides(np.array(ends) - values[0])
    low = value - float(np.hypot(costs[0], value - min(values)))
    high = value + float(np.hypot(costs[1], max(values) - value))
    unit, better = (DIRECTIONS | TRAINING_DIRECTIONS)[name]
    if unit == "1" and "queue" not in name:  # a share
        high = min(high, max(1.0, value))
    way: Literal["lower", "higher"] = "lower" if better == "lower" else "higher"
    exact = TRAINING_EXACT.get(name, "")
    return Headline(value=value, low=max(0.0, low), high=high, unit=unit, better=way, exact=exact)


def _joined(scenario: Scenario, case: dict[str, Any], seeds: int, answers: Sequence[_Answer]) -> Simulated:
    first = answers[0]
    replays = _replays(scenario, seeds, answers)
    headlines = {name: _headline(name, replays) for name in replays.seeds}
    notes = list(first.notes)
    if scenario.training is None:
        if seeds == 1:
            notes.append("one seed: intervals hold the costs' residuals only")
        elif all(answer.outcome.headlines == first.outcome.headlines for answer in answers[1:seeds]):
            notes.append("seeds do not differ, as nothing here is drawn: intervals hold the costs' residuals only")
    if scenario.training is not None:
        notes.append("nothing in training is drawn: intervals hold the costs' residuals, seeds do not differ")
    result = SimulationResult(
        kind="serving" if scenario.training is None else "training",
        case=case,
        model=first.model,
        cluster=first.cluster,
        num_ranks=first.num_ranks,
        num_nodes=first.num_nodes,
        seeds=tuple(scenario.seed + number for number in range(seeds if scenario.training is None else 1)),
        simulated_s=first.outcome.end_s,
        headlines=headlines,
        replays=replays,
        counts=first.outcome.counts,
        distributions=first.outcome.distributions,
        ranks=first.outcome.ranks,
        timeline=first.outcome.timeline,
        memory=first.memory,
        rank_memory=first.rank_memory,
        traffic=first.outcome.traffic,
        assumptions=tuple(Assumption(name=n, value=v, source=s) for n, v, s in first.assumptions),
        notes=tuple(notes),
        provenance=_provenance(scenario, seeds),
    )
    return Simulated(result, first.log)


def simulate(
    scenario: Scenario,
    *,
    seeds: int = 3,
    workers: int = 1,
    keep_log: bool = True,
    progress: Progress = no_progress,
) -> Simulated:
    """Simulate one case; ``seeds`` runs from ``scenario.seed`` on, and eight for the costs' interval.

    Raises:
        InputError: an input is wrong. InfeasibleError: the model or a request does not fit.
    """
    _require_seeds(seeds)
    if scenario.sweep:
        raise SpecError("the scenario has a sweep; call sweep, or give --out on the command line")
    runs = _runs(scenario, seeds, keep_log)
    answers: list[_Answer | None] = [None] * len(runs)

    def done(number: int, answer: Any) -> None:
        if isinstance(answer, Failure):
            raise answer.error or InputError(f"seed {runs[number].seed}: {answer.reason}")
        answers[number] = answer
        progress("simulate", sum(a is not None for a in answers) / len(runs))

    def within(_what: str, part: float) -> None:
        progress("simulate", (sum(a is not None for a in answers) + part) / len(runs))

    executor = executor_for(workers, len(runs))
    try:
        executor.run(partial(_run, progress=within) if isinstance(executor, InlineExecutor) else _run, runs, done)
    finally:
        _routing.cache_clear()
    return _joined(scenario, {}, seeds, [answer for answer in answers if answer is not None])


def _require_seeds(seeds: int) -> None:
    if seeds < 1:
        raise SpecError(f"seeds ({seeds}) must be 1 or more")


def write_simulation(found: Simulated, out: Path) -> list[Path]:
    """Write ``result.json`` and ``events.parquet``; those of an older simulation are replaced, other files stay.

    Raises:
        InputError: the directory holds something else, or cannot be written.
    """
    with atomic_directory(out, *SIMULATION_PLACE) as directory:
        found.result.save(directory / "result.json")
        if found.log is not None:
            found.log.write(directory / "events.parquet")
    return [out / "result.json", *([out / "events.parquet"] if found.log is not None else [])]


# ---------------------------------------------------------------------- sweeps


def cases_of(scenario: Scenario) -> list[tuple[dict[str, Any], Scenario | MoeplanError]]:
    """Every combination of the sweep's values, with the scenario it makes, or why it makes none.

    Raises:
        SpecError: a name is no field, or no combination makes a scenario.
    """
    fields = scenario.model_dump(mode="json", exclude_unset=True, exclude={"sweep", "out"})
    names = list(scenario.sweep)
    found: list[tuple[dict[str, Any], Scenario | MoeplanError]] = []
    first: MoeplanError | None = None
    for values in itertools.product(*scenario.sweep.values()):
        case = dict(zip(names, values, strict=True))
        changed = json.loads(json.dumps(fields))
        for name, value in case.items():
            *way, last = name.split(".")
            inner = changed
            for part in way:
                inner = inner.setdefault(part, {})
                if not isinstance(inner, dict):
                    raise SpecError(f"sweep: {name} is not a field that can be set; {part} is no section")
            inner[last] = value
        where = f"sweep {', '.join(f'{k}={v}' for k, v in case.items())}"
        try:
            found.append((case, Scenario.parse(changed, where)))
        except MoeplanError as error:
            first = first or error
            found.append((case, SpecError(str(error).removeprefix(f"{where}: "), error.fields)))
    if first is not None and not any(isinstance(one, Scenario) for _, one in found):
        raise first
    return found


def sweep(
    scenario: Scenario,
    out: Path,
    *,
    seeds: int = 3,
    workers: int = 1,
    executor: Executor | None = None,
    progress: Progress = no_progress,
) -> Sweep:
    """Simulate every case into ``out/cases``; cases that are there already, made from the same inputs, are kept.

    Each case is written when its last run ends, so an interrupted sweep goes on where it stopped. A case that cannot
    be, whose input is wrong, or whose worker died twice, is listed with the reason; the others are not touched by it.

    Raises:
        InputError: where a case belongs there is something else.
    """
    _require_seeds(seeds)
    made = cases_of(scenario)
    cases = {number: (case, one) for number, (case, one) in enumerate(made) if isinstance(one, Scenario)}
    places: dict[int, Path] = {}
    results: list[SimulationResult | None] = [None] * len(made)
    for number, (_, one) in cases.items():
        digest = _provenance(one, seeds)["case_sha256"]
        places[number] = require_place(out / "cases" / digest[:16], *SIMULATION_PLACE)
        results[number] = _kept(places[number], digest)
    resumed = sum(result is not None for result in results)
    left = {number: one for number, (_, one) in cases.items() if results[number] is None}
    jobs = [(number, run) for number, one in left.items() for run in _runs(one, seeds, keep_log=False, alone=False)]
    runs_of = Counter(number for number, _ in jobs)
    answers: dict[int, dict[int, _Answer]] = {}
    failures = {number: str(error) for number, (_, error) in enumerate(made) if isinstance(error, MoeplanError)}
    impossible = set(failures)
    ended = 0

    def done(position: int, answer: Any) -> None:
        nonlocal ended
        ended += 1
        number = jobs[position][0]
        if isinstance(answer, Failure):
            failures.setdefault(number, answer.reason)
            if isinstance(answer.error, (InfeasibleError, SpecError)):
                impossible.add(number)
        else:
            answers.setdefault(number, {})[position] = answer
        if len(answers.get(number, {})) == runs_of[number] and number not in failures:
            case, one = cases[number]
            mine = answers.pop(number)
            ordered = [mine[place] for place in sorted(mine)]
            found = _joined(one, case, seeds, ordered)
            with atomic_directory(places[number], *SIMULATION_PLACE) as directory:
                found.result.save(directory / "result.json")
            results[number] = found.result
        progress("simulate", ended / len(jobs))

    try:
        (executor or executor_for(workers, len(jobs))).run(_run, [run for _, run in jobs], done)
    finally:
        _routing.cache_clear()
    answer = Sweep(tuple(case for case, _ in made), tuple(results), failures, frozenset(impossible), resumed)
    write_text(out / "sweep.json", _index(answer, places))
    return answer


def _index(swept: Sweep, places: dict[int, Path]) -> str:
    """Where the result of each case is, or why there is none."""
    rows = [
        {"case": case, "path": None if swept.results[number] is None else f"cases/{places[number].name}/result.json"}
        | ({"failure": swept.failures[number]} if number in swept.failures else {})
        for number, case in enumerate(swept.cases)
    ]
    return json.dumps({"schema_version": 1, "cases": rows}, indent=1) + "\n"


def _kept(place: Path, digest: str) -> SimulationResult | None:
    """A case's result from an earlier run of the same inputs."""
    if not (place / "result.json").is_file():
        return None
    try:
        found = SimulationResult.load(place)
    except MoeplanError:
        return None  # damaged: simulated again
    return found if found.provenance.get("case_sha256") == digest else None
