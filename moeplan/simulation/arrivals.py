"""Requests of a simulation: recorded or drawn lengths, recorded or drawn times. ``Q`` requests.

Gaps between arrivals: exponential (poisson), gamma with the coefficient of variation ``cv``, all alike (constant), or
``burst_size`` at one instant with exponential gaps between bursts; the mean rate is ``rate`` in each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.request_trace import RequestTrace
from moeplan.errors import SpecError, TraceError
from moeplan.specs.serving import LengthSpec, RequestsSpec

__all__ = ["make_requests"]

CLOSED_LOOP_DRAWS = 1_000_000  # most requests of a closed loop that ends by time


def make_requests(spec: RequestsSpec, recorded: RequestTrace | None, rng: np.random.Generator) -> RequestTrace:
    """The requests to simulate; ``arrival_s_Q`` is None for a closed loop.

    A recording that is shorter than ``count`` is repeated where times are drawn, and refused where its own are used.

    Raises:
        SpecError, TraceError: zero requests are left, or the recording lacks what the scenario asks for.
    """
    arrivals = spec.arrivals or ("file" if recorded is not None and recorded.arrival_s_Q is not None else "poisson")
    closed = arrivals == "closed-loop"
    if arrivals == "file" and (recorded is None or recorded.arrival_s_Q is None):
        raise TraceError("requests.file has no arrival times; choose requests.arrivals: poisson, with a rate")
    if not closed and arrivals != "file" and not spec.rate:
        raise SpecError(f"requests.rate is missing, which arrivals ({arrivals}) needs; write it as in '12 /s'")
    if arrivals == "file" and recorded is not None and recorded.arrival_s_Q is not None:
        at = recorded.arrival_s_Q / spec.time_scale
        if spec.count is not None and spec.count > len(at):
            raise SpecError(f"requests.count ({spec.count}) is more than the recording holds ({len(at)})")
        at = at[: spec.count]
    elif closed:
        at = np.zeros(_closed_count(spec, recorded))
    else:
        at = _draw_times(spec, arrivals, rng, len(recorded) if recorded is not None else None)
    if spec.duration is not None:
        at = at[at <= spec.duration]
    if len(at) == 0:
        raise SpecError(
            "requests: zero arrivals"
            + (f" within duration ({spec.duration:g} s)" if spec.duration is not None else "")
            + "; raise rate, duration or count"
        )
    inputs, outputs = (
        _lengths(given, recorded, name, len(at), rng)
        for given, name in ((spec.input_tokens, "input_tokens_Q"), (spec.output_tokens, "output_tokens_Q"))
    )
    prefix = None
    if recorded is not None and recorded.prefix_Q is not None and spec.input_tokens is None:
        prefix = tuple(recorded.prefix_Q[q % len(recorded)] for q in range(len(at)))
    tokens = recorded.prefix_tokens if recorded is not None and prefix is not None else 0
    return RequestTrace(inputs, outputs, None if closed else at, prefix, tokens)


def _closed_count(spec: RequestsSpec, recorded: RequestTrace | None) -> int:
    if spec.count is not None:
        return spec.count
    if spec.duration is not None:
        return CLOSED_LOOP_DRAWS
    return len(recorded) if recorded is not None else 0


def _draw_times(
    spec: RequestsSpec, arrivals: str, rng: np.random.Generator, recorded: int | None
) -> NDArray[np.float64]:
    rate = spec.rate or 1.0
    count = spec.count
    if count is None and spec.duration is None:
        count = recorded
    size = count or int(rate * (spec.duration or 0.0) * 1.2 + 10 * np.sqrt(rate * (spec.duration or 0.0)) + 100)
    at = np.cumsum(_gaps(spec, arrivals, rng, size))
    while count is None and at[-1] <= (spec.duration or 0.0):
        at = np.concatenate([at, at[-1] + np.cumsum(_gaps(spec, arrivals, rng, size))])
    return at


def _gaps(spec: RequestsSpec, arrivals: str, rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    mean = 1.0 / (spec.rate or 1.0)
    if arrivals == "poisson":
        return rng.exponential(mean, size)
    if arrivals == "gamma":
        shape = 1.0 / spec.cv**2
        return rng.gamma(shape, mean / shape, size)
    if arrivals == "constant":
        return np.full(size, mean)
    gaps = np.zeros(size)
    starts = np.arange(0, size, spec.burst_size)
    gaps[starts] = rng.exponential(mean * spec.burst_size, len(starts))
    return gaps


def _lengths(
    given: LengthSpec | None, recorded: RequestTrace | None, name: str, size: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    if given is None:
        values: NDArray[np.int64] = getattr(recorded, name)  # the spec holds that there is one
        return values[np.arange(size) % len(values)]
    if given.fixed is not None:
        return np.full(size, given.fixed, np.int64)
    if given.low is not None and given.high is not None:
        return rng.integers(given.low, given.high + 1, size)
    mean, cv = given.mean or 1.0, given.cv or 1.0
    sigma2 = np.log1p(cv**2)
    drawn = rng.lognormal(np.log(mean) - sigma2 / 2, np.sqrt(sigma2), size)
    return np.maximum(1, np.rint(drawn)).astype(np.int64)
