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
_MOST_REQUESTS, _MOST_TOKENS = 100_000_000, 10**12
_LAST_S = 9e9  # nanoseconds are counted in 64 bits
_DRAWN = ("poisson", "gamma", "constant", "bursts")
_CONCERNS = {"rate": _DRAWN, "concurrency": ("closed-loop",), "think_time": ("closed-loop",), "time_scale": ("file",)}


def make_requests(spec: RequestsSpec, recorded: RequestTrace | None, rng: np.random.Generator) -> RequestTrace:
    """The requests to simulate; ``arrival_s_Q`` is None for a closed loop.

    A recording that is shorter than ``count`` is repeated where times are drawn, and refused where its own are used.
    Prompts that are repeated begin like each other, not like those of an earlier time.

    Raises:
        SpecError, TraceError: zero requests are left, or more than can be simulated; the recording lacks what the
            scenario asks for, or the scenario gives what its arrivals do not take.
    """
    arrivals = spec.arrivals or ("file" if recorded is not None and recorded.arrival_s_Q is not None else "poisson")
    _require_used(spec, arrivals)
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
    if at[-1] > _LAST_S:
        raise SpecError(f"requests: the last one comes after {at[-1]:.3g} s, time ends at {_LAST_S:g} s; raise rate")
    inputs, outputs = (
        _lengths(given, recorded, name, len(at), rng)
        for given, name in ((spec.input_tokens, "input_tokens_Q"), (spec.output_tokens, "output_tokens_Q"))
    )
    prefix = None
    if recorded is not None and recorded.prefix_Q is not None and spec.input_tokens is None:
        prefix = _chains(recorded.prefix_Q, len(at))
    tokens = recorded.prefix_tokens if recorded is not None and prefix is not None else 0
    return RequestTrace(inputs, outputs, None if closed else at, prefix, tokens)


def _require_used(spec: RequestsSpec, arrivals: str) -> None:
    """Nothing is given that these arrivals would leave out."""
    for name, concerned in _CONCERNS.items():
        if arrivals not in concerned and name in spec.model_fields_set and getattr(spec, name) is not None:
            why = ", as the recording has times" if spec.arrivals is None and arrivals == "file" else ""
            raise SpecError(
                f"requests.{name} is for arrivals {', '.join(concerned)}, but they are {arrivals}{why}; choose"
                f" requests.arrivals, or leave {name} out"
            )


def _chains(recorded: tuple[tuple[int, ...], ...], size: int) -> tuple[tuple[int, ...], ...]:
    """The recorded ids, other ones each time that the recording is repeated."""
    first = min((min(chain) for chain in recorded if chain), default=0)
    span = max((max(chain) for chain in recorded if chain), default=0) - first + 1
    again = (divmod(q, len(recorded)) for q in range(size))
    return tuple(tuple(item + time * span for item in recorded[q]) for time, q in again)


def _closed_count(spec: RequestsSpec, recorded: RequestTrace | None) -> int:
    if spec.count is not None:
        return _bounded(spec.count)
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
    expected = rate * (spec.duration or 0.0)
    size = _bounded(count or expected * 1.2 + 10 * np.sqrt(expected) + 100)
    at = np.cumsum(_gaps(spec, arrivals, rng, size))
    while count is None and at[-1] <= (spec.duration or 0.0):
        at = np.concatenate([at, at[-1] + np.cumsum(_gaps(spec, arrivals, rng, size))])
    return at


def _bounded(count: float) -> int:
    if count > _MOST_REQUESTS:
        raise SpecError(f"requests: {count:.3g} are more than {_MOST_REQUESTS:,}; lower count, rate or duration")
    return int(count)


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
    if not drawn.max() <= _MOST_TOKENS:
        raise SpecError(
            f"requests.{name.removesuffix('_Q')}: mean ({mean:g}) and cv ({cv:g}) draw {drawn.max():.3g} tokens, more"
            f" than {_MOST_TOKENS:.0e}; lower them"
        )
    return np.maximum(1, np.rint(drawn)).astype(np.int64)
