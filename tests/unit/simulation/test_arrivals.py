from __future__ import annotations

import numpy as np
import pytest

from moeplan.artifacts.request_trace import RequestTrace
from moeplan.errors import SpecError, TraceError
from moeplan.simulation.arrivals import make_requests
from moeplan.specs.serving import RequestsSpec

LENGTHS = {"input_tokens": 10, "output_tokens": 5}


def make(recorded: RequestTrace | None = None, seed: int = 0, **fields: object) -> RequestTrace:
    given = fields if recorded is not None else {**LENGTHS, **fields}
    spec = RequestsSpec.parse(given if recorded is None else {"file": "x", **given}, "requests")
    return make_requests(spec, recorded, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("fields", "cv"),
    [({"arrivals": "poisson"}, 1.0), ({"arrivals": "gamma", "cv": 3.0}, 3.0), ({"arrivals": "gamma", "cv": 0.2}, 0.2),
     ({"arrivals": "constant"}, 0.0), ({"arrivals": "bursts", "burst_size": 4}, np.sqrt(2 * 4 - 1))],
)  # fmt: skip
def test_gaps_have_the_mean_and_the_spread(fields: dict[str, object], cv: float) -> None:
    found = make(rate="50 /s", count=40_000, **fields)
    assert found.arrival_s_Q is not None
    gaps = np.diff(found.arrival_s_Q, prepend=0.0)
    assert gaps.mean() == pytest.approx(0.02, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-6)


def test_lengths_follow_what_is_asked() -> None:
    found = make(
        arrivals="poisson", rate="1 /s", count=50_000, input_tokens={"low": 3, "high": 9},
        output_tokens={"mean": 200, "cv": 1.5},
    )  # fmt: skip
    assert set(np.unique(found.input_tokens_Q)) == set(range(3, 10))
    assert found.output_tokens_Q.mean() == pytest.approx(200, rel=0.03)
    assert found.output_tokens_Q.std() / found.output_tokens_Q.mean() == pytest.approx(1.5, rel=0.06)


def test_duration_ends_arrivals() -> None:
    found = make(arrivals="poisson", rate="100 /s", duration="20 s")
    assert found.arrival_s_Q is not None
    assert found.arrival_s_Q.max() <= 20
    assert len(found) == pytest.approx(2000, rel=0.1)


def test_same_seed_same_requests() -> None:
    one, two, other = (make(seed=s, arrivals="gamma", rate="5 /s", count=100) for s in (1, 1, 2))
    assert (one.arrival_s_Q == two.arrival_s_Q).all()
    assert (one.arrival_s_Q != other.arrival_s_Q).any()


def test_a_recording_gives_times_lengths_and_prefixes() -> None:
    recorded = RequestTrace(
        np.array([4, 5, 6]), np.array([1, 2, 3]), np.array([0.0, 1.0, 4.0]), ((1,), (1, 2), (3,)), 4
    )
    found = make(recorded, time_scale=2.0, count=2)
    assert found.arrival_s_Q is not None
    assert found.arrival_s_Q.tolist() == [0.0, 0.5]
    assert found.prefix_Q == ((1,), (1, 2))
    repeated = make(recorded, arrivals="constant", rate="1 /s", count=5)
    assert repeated.output_tokens_Q.tolist() == [1, 2, 3, 1, 2]
    closed = make(recorded, arrivals="closed-loop", concurrency=2)
    assert closed.arrival_s_Q is None
    assert len(closed) == 3
    with pytest.raises(SpecError, match=r"requests.count \(9\) is more than the recording holds \(3\)"):
        make(recorded, count=9)
    with pytest.raises(SpecError, match=r"zero arrivals within duration"):
        make(arrivals="constant", rate="1 /h", duration="5 s")
    untimed = RequestTrace(np.array([4]), np.array([1]))
    with pytest.raises(TraceError, match="no arrival times"):
        make(untimed, arrivals="file")
    with pytest.raises(SpecError, match=r"requests.rate is missing"):
        make(untimed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arrivals": "poisson", "rate": "0 /s", "count": 3}, r"arrivals \(poisson\) needs rate, above 0"),
        ({"arrivals": "poisson", "rate": "5", "count": 3}, r"rate \('5'\): '5' is not a quantity in events per second"),
        ({"arrivals": "poisson", "rate": "5 /s", "count": 0}, r"count \(0\) leaves no request"),
        ({"arrivals": "closed-loop", "count": 3}, "needs concurrency"),
        ({"arrivals": "poisson", "rate": "5 /s"}, "give count or duration"),
        ({"count": 3}, "arrivals: without a file choose"),
        ({"arrivals": "poisson", "rate": "5 /s", "count": 3, "input_tokens": {"mean": 5}}, "or mean and cv"),
        ({"arrivals": "constant", "rate": "5 /s", "count": 3, "input_tokens": {"low": 5, "high": 2}}, "low .5. is"),
    ],
)
def test_wrong_requests_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make(**fields)


TIMED = RequestTrace(np.array([4, 5]), np.array([1, 2]), np.array([0.0, 1.0]), ((1,), (1, 2)), 4)


@pytest.mark.parametrize(
    ("recorded", "fields", "message"),
    [
        (TIMED, {"rate": "5 /s"}, r"requests.rate is for arrivals poisson, .*, but they are file, as the rec"),
        (TIMED, {"concurrency": 5}, r"requests.concurrency is for arrivals closed-loop, but they are file"),
        (TIMED, {"arrivals": "constant", "rate": "1 /s", "time_scale": 2.0}, r"time_scale is for arrivals file, but"),
        (None, {"arrivals": "poisson", "rate": "1 /s", "count": 1, "think_time": "1 s"}, r"think_time is for arrivals"),
        (None, {"arrivals": "poisson", "rate": "1e12 /s", "duration": "1 h"}, r"requests: 4.32e\+15 are more than"),
        (None, {"arrivals": "closed-loop", "concurrency": 1, "count": 10**12}, r"requests: 1e\+12 are more than"),
        (None, {"arrivals": "constant", "rate": "1e-15 /s", "count": 3}, r"the last one comes after 3e\+15 s"),
        (None, {"arrivals": "constant", "rate": "1 /s", "count": 3, "input_tokens": {"mean": 1e300, "cv": 1}},
         r"requests.input_tokens: mean \(1e\+300\) and cv \(1\) draw .* tokens, more than"),
    ],
)  # fmt: skip
def test_what_arrivals_do_not_take_or_cannot_be_is_refused(
    recorded: RequestTrace | None, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        make(recorded, **fields)


def test_prompts_of_a_repeated_recording_begin_like_each_other_only() -> None:
    found = make(TIMED, arrivals="constant", rate="1 /s", count=5)
    assert found.prefix_Q is not None
    firsts = [chain[0] for chain in found.prefix_Q]
    assert firsts[0] == firsts[1] == 1
    assert firsts[2] == firsts[3]
    assert len({firsts[0], firsts[2], firsts[4]}) == 3
    assert len({item for chain in found.prefix_Q for item in chain}) == 5
