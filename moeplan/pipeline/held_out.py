"""Will a plan pay? The planner judged on routing it has not seen. ``B`` before, after; ``H`` parts, ``W`` windows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.plan import Migration, Verdict
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs.evaluation import aggregate
from moeplan.pipeline.job import Job, place, with_shares
from moeplan.planning.problem import PlanningResult
from moeplan.planning.verdict import judge
from moeplan.routing.loads import expert_load, split_trace, without_stretches

__all__ = ["judged"]

HELD_OUT_STRETCHES = 4
LOW = "a low estimate: half of the routing plans less well than all of it"
MIN_HELD_OUT_TOKENS = 512


def judged(
    job: Job, result: PlanningResult, best_possible: float, migration: Migration | None
) -> tuple[PlanningResult, Verdict]:
    """The planner judged on routing it has not seen; where that is interrupted, the plan on what it was made on."""
    if result.status != "interrupted":
        try:
            split = _split(job)
            scored = result.placement if split.first is None else _unseen(job, split.first)
            return result, _verdict(job, split, scored, best_possible, migration)
        except KeyboardInterrupt:
            result = replace(result, status="interrupted")
    why = "interrupted before the held-out check", "planning was interrupted before the check: let it end"
    return result, _verdict(job, _all(job, *why), result.placement, best_possible, migration)


def _unseen(job: Job, first: ExpertLoad) -> Placement:
    """The plan of the first part alone."""
    problem = job.problem(first)
    result = place(job, problem)
    if result.status == "interrupted":
        raise KeyboardInterrupt
    return with_shares(problem, result.placement)


@dataclass(frozen=True, slots=True, eq=False)
class _Split:
    """What to plan on, None where nothing can be held out; what to score on, and that in words; in how many parts it is
    cut for the interval, stretches of its tokens or else its windows; why nothing was held out and what to do.
    """

    first: ExpertLoad | None
    rest: ExpertLoad
    words: str
    parts: int
    stretches: bool = False
    unchecked: str = ""


def _verdict(
    job: Job, split: _Split, placement: Placement, best_possible: float, migration: Migration | None
) -> Verdict:
    """What a placement gains on all that it is scored on, and there without each part."""

    def seconds(load: ExpertLoad) -> NDArray[np.float64]:  # before and after, per window
        return np.stack([job.evaluate(plan, load).time_WL.sum(axis=1) for plan in (job.baseline, placement)])

    def steps(seconds_BW: NDArray[np.float64]) -> tuple[float, float]:
        before_W, after_W = seconds_BW
        return aggregate(before_W, job.objective), aggregate(after_W, job.objective)

    rest_BW = seconds(split.rest)
    if split.stretches:
        others = [seconds(load) for load in without_stretches(split.rest, split.parts)]
    else:
        groups = np.array_split(np.arange(rest_BW.shape[1]), split.parts)
        others = [np.delete(rest_BW, group, axis=1) for group in groups if split.parts > 1]
    before_s, after_s = steps(rest_BW)
    without_H = np.array([1.0 - after / before for before, after in map(steps, others)])
    return judge(
        job.baseline_name, before_s, 1.0 - after_s / before_s, without_H, best_possible, split.words, split.unchecked,
        migration,
    )  # fmt: skip


def _all(job: Job, why: str, remedy: str) -> _Split:
    parts = len(job.load.windows) if job.objective.aggregate == "mean" else 1
    return _Split(None, job.load, f"the data planned on ({why})", parts, unchecked=remedy)


def _split(job: Job) -> _Split:
    """Half to plan on and half to score on; where there is not enough for both, all of it."""
    routing, load, least = job.routing, job.load, 2 * MIN_HELD_OUT_TOKENS
    unchecked = "record token-level routing or several windows to have it checked"
    if isinstance(routing, RoutingTrace) and routing.num_tokens >= least:
        seen, unseen = split_trace(routing)
        rest = expert_load(unseen, job.windows)
        fewest = unseen.num_tokens if rest.window_T is None else int(np.bincount(rest.window_T).min())
        count = min(HELD_OUT_STRETCHES, unseen.num_tokens // (MIN_HELD_OUT_TOKENS // HELD_OUT_STRETCHES), fewest)
        if count > 1:
            each = "" if len(rest.windows) == 1 else f" in {len(rest.windows)} windows"
            words = f"the second half of the trace{each}, planned on the first ({LOW})"
            return _Split(expert_load(seen, job.windows), rest, words, count, stretches=True)
        unchecked = "a window has too few tokens to hold some out: record more"
    elif isinstance(routing, RoutingTrace):
        unchecked = f"the trace has {routing.num_tokens:,} tokens, holding out needs {least:,}: record more"
    else:
        half = len(load.windows) // 2
        parts = slice(half), slice(half, None)
        if half > 1 and all((load.load_WLE[part].sum(axis=(0, 2)) > 0).all() for part in parts):
            first, rest = (
                replace(load, load_WLE=load.load_WLE[part], windows=load.windows[part], trace=None, window_T=None)
                for part in parts
            )
            count = len(rest.windows)
            words = f"the last {count} windows, planned on the first {half}"
            # Where not the mean counts, two windows at least make a part.
            return _Split(first, rest, words, count if job.objective.aggregate == "mean" else max(2, count // 2))
    return _all(job, "nothing could be held out", unchecked)
