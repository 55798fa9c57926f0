"""Live runs: options to ranks that train, and back to one answer; plans handed to a run under way."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeplan.artifacts.plan import Plan
from moeplan.errors import InputError, PlanError, RunError, SpecError
from moeplan.execution.control_folder import say_ended, watcher
from moeplan.files import read_json, require_writable, write_text
from moeplan.progress import Progress, no_progress
from moeplan.routing.io import save_trace
from moeplan.routing.joining import join_traces
from moeplan.specs.catalogue import slug
from moeplan.specs.models import find_model
from moeplan.specs.workload import DispatchKind, ReplicaSplit

if TYPE_CHECKING:
    from moeplan.artifacts.routing_trace import RoutingTrace
    from moeplan.execution.launch import Rank
    from moeplan.execution.options import LiveJob
    from moeplan.execution.train import Trainer

__all__ = ["LiveRequest", "apply_plan", "run_live"]


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """The options of ``moeplan live``, as they were given."""

    model: str = "moeplan-20m"
    ranks: int | None = None
    nodes: int = 1
    tp: int = 1
    edp: int = 1
    steps: int = 40
    batch: int = 16
    length: int = 128
    lr: float = 3e-3
    seed: int = 0
    text: Path | None = None
    dtype: str = "fp32"
    zero: bool = False
    dispatch: DispatchKind | None = None
    split: ReplicaSplit | None = None
    aux_loss: float = 0.01
    bias_rate: float = 0.0
    capacity_factor: float | None = None
    plan: Path | None = None
    apply_at: int | None = None
    reference: bool = True
    budget_s: float | None = None
    out: Path | None = None
    checkpoint: Path | None = None
    checkpoint_every: int = 0
    resume: Path | None = None
    skip_damaged: bool = False
    control: Path | None = None
    window: int = 64
    prometheus: int | None = None
    generate: str | None = None
    new_tokens: int = 200
    record: Path | None = None
    record_tokens: int = 16_384
    device: str = "cpu"
    port: int = 0
    join_timeout_s: float = 60.0
    timeout_s: float = 300.0


def run_live(
    request: LiveRequest, progress: Progress = no_progress, tell: Callable[[str], None] = lambda _note: None
) -> dict[str, Any] | None:
    """Train on ranks started here, or as the rank that torchrun started; None on ranks other than 0.

    ``tell`` hears at once what the answer has under ``notes``.

    Raises:
        MoeplanError: bad input, or a rank failed; one message, from one rank.
    """
    from moeplan.execution.launch import Launch, run_ranks, run_torchrun, under_torchrun

    try:
        job = _job(request)
    except InputError as error:
        if int(os.environ.get("RANK", "0")):  # under torchrun every rank meets the same bad input; rank 0 says so
            raise RunError("") from error
        raise
    inside = under_torchrun()
    ranks = request.ranks if request.ranks is not None else (0 if inside else 4)
    launch = Launch(ranks, request.device, request.port, request.join_timeout_s, request.timeout_s)

    def hear(_rank: int, message: Any) -> None:
        if "note" in message:
            tell(message["note"])
            return
        progress(f"step {message['step']}: loss {message['loss']:.3f}", message["step"] / message["of"])

    if inside:
        answer = run_torchrun(launch, _rank, job, on_message=hear)  # if it fails, torchrun may start the ranks again
        if answer is None:
            return None
    else:
        try:
            answer = run_ranks(launch, _rank, job, on_message=hear)[0]
        finally:
            _end(request.control)
    return _finish(request, job, answer)


def _end(control: Path | None) -> None:
    """Leave in the control folder that a run whose ranks are gone will not come back; another run there goes on."""
    with suppress(InputError):
        if control is not None and (run := watcher(control)) is not None and run.state != "running":
            say_ended(control)


def _job(request: LiveRequest) -> LiveJob:
    """Everything that can be refused before a rank is started is refused here."""
    from moeplan.execution.options import LiveJob, RouterOptions, TrainOptions
    from moeplan.execution.text import library_text, text_of

    r = request
    if r.record is not None and r.record.suffix not in (".npz", ".parquet"):
        raise SpecError(f"record ({r.record}) must end in .npz or .parquet")
    model = find_model(r.model)
    for name in ("steps", "new_tokens", "record_tokens", "checkpoint_every", "seed", "aux_loss", "bias_rate"):
        if not getattr(r, name) >= 0:
            raise SpecError(f"{name} ({getattr(r, name)}) must not be negative")
    for name in ("batch", "length", "nodes", "tp", "edp"):
        if getattr(r, name) < 1:
            raise SpecError(f"{name} ({getattr(r, name)}) must be positive")
    if not 0 < r.lr < math.inf:
        raise SpecError(f"lr ({r.lr}) must be positive")
    if r.window < 0 or r.window % 8:
        raise SpecError(f"window ({r.window}) must be a multiple of 8 steps, or 0 for none")
    if r.record is not None and not r.record_tokens:
        raise SpecError(f"record ({r.record}) with record_tokens (0) would be empty; ask for tokens, or leave it out")
    if r.generate == "":
        raise SpecError("generate needs a prompt of at least one character")
    for folder in (r.out, r.checkpoint, r.control, None if r.record is None else r.record.parent):
        if folder is not None:
            require_writable(folder)
    if r.apply_at is not None and r.plan is None:
        raise SpecError(f"apply_at ({r.apply_at}) needs a plan to apply; give --plan")
    plan = None if r.plan is None else Plan.load(r.plan)
    ranks = r.ranks if r.ranks is not None else int(os.environ.get("WORLD_SIZE", "4"))
    ep = ranks // (r.tp * r.edp)
    if ranks < 1 or ranks % (r.tp * r.edp) or ep % r.nodes:
        raise SpecError(
            f"ranks ({ranks}) must divide by tp ({r.tp}) x edp ({r.edp}), and the rest of them by nodes ({r.nodes})"
        )
    corpus = library_text() if r.text is None else text_of(r.text)
    shortest = min(len(text) for side in (corpus.train, corpus.held_out) for text in side.values())
    if r.length >= shortest:
        raise SpecError(
            f"length ({r.length}) must be below the bytes of each text, held-out parts included ({shortest} in"
            f" {corpus.source}); give a shorter --length or more text"
        )
    options = TrainOptions(
        model=model,
        batch=r.batch,
        length=r.length,
        lr=r.lr,
        seed=r.seed,
        tp=r.tp,
        edp=r.edp,
        ranks_per_node=ep // r.nodes,
        dispatch=r.dispatch or "per_expert",
        split=r.split or (plan.objective.replica_split if plan is not None else "even"),
        dtype=r.dtype,
        zero=r.zero,
        router=RouterOptions(aux_loss=r.aux_loss, bias_rate=r.bias_rate, capacity_factor=r.capacity_factor),
    )
    return LiveJob(
        options=options,
        corpus=corpus,
        steps=r.steps,
        plan=plan,
        apply_at=r.apply_at,
        reference=r.reference,
        budget_s=r.budget_s,
        out=r.out,
        checkpoint=r.checkpoint,
        checkpoint_every=r.checkpoint_every,
        resume=r.resume,
        skip_damaged=r.skip_damaged,
        control=r.control,
        window=r.window,
        prometheus=r.prometheus,
        generate=r.generate,
        new_tokens=r.new_tokens,
        record_tokens=r.record_tokens if r.record is not None else 0,
    )


def _rank(me: Rank, job: LiveJob) -> dict[str, Any] | None:
    from moeplan.execution.run import live_rank

    answer = live_rank(me, job, _record)
    return answer if me.rank == 0 else None


def _record(trainer: Trainer, tokens: int) -> tuple[RoutingTrace, dict[str, float]] | None:
    """The held-out routing of all ranks as one trace, and what recording costs, on rank 0."""
    from moeplan.execution.run import record_held_out, recording_overhead
    from moeplan.profiling.routing import RoutingRecorder

    overhead, spread = recording_overhead(trainer, RoutingRecorder(trainer.options.model.num_experts))
    recorder = RoutingRecorder(trainer.options.model.num_experts)
    domain_T = record_held_out(trainer, recorder, tokens).astype(np.int32)
    mine = replace(recorder.trace(), domain_T=domain_T, domains=trainer.corpus.domains)
    parts = trainer.mesh.world.all_of(mine if trainer.mesh.tp.rank == 0 else None)
    if trainer.mesh.world.rank:
        return None
    joined = join_traces([part for part in parts if part is not None])
    return joined, {"overhead": overhead, "overhead_spread": spread}


def _finish(request: LiveRequest, job: LiveJob, answer: dict[str, Any]) -> dict[str, Any]:
    recorded = answer.pop("recorded", None)
    if request.record is not None and recorded is not None:
        trace, overhead = recorded
        origin = {
            "recorded_from": f"moeplan live: {answer['model']} after {answer['steps']} steps, seed {request.seed}",
            "text": job.corpus.source,
            "text_sha256": job.corpus.sha256,
        }
        save_trace(replace(trace, origin=origin, scores_TLK=None), request.record)
        answer["recorded"] = {"path": str(request.record), "tokens": trace.num_tokens, **overhead}
    answer["text_source"] = {"source": job.corpus.source, "sha256": job.corpus.sha256}
    if request.out is not None:
        write_text(request.out / "result.json", json.dumps(answer, indent=1) + "\n")
        answer["out"] = str(request.out)
    return answer


# ---------------------------------------------------------------------- a run under way


def apply_plan(plan_path: Path, control: Path, wait_s: float = 60.0) -> dict[str, Any]:
    """Hand a plan to the live run that watches ``control``; what came of it.

    Raises:
        InputError: no run watches the folder. PlanError: the plan is not for that run; nothing has moved.
        RunError: the run has ended or died, did not answer in time, or could not apply the plan.
    """
    plan = Plan.load(plan_path)
    if (run := watcher(control)) is None:
        raise InputError(f"{control} is not watched by a live run; start one with --control {control}")
    if not run.under_way:
        raise _over(control, run.state)
    for name, ours, theirs in (
        ("model", slug(plan.model), slug(str(run.about.get("model")))),
        ("num_ranks", plan.num_ranks, run.about.get("num_ranks")),
        ("ranks_per_node", plan.ranks_per_node, run.about.get("ranks_per_node")),
    ):
        if ours != theirs:
            raise PlanError(f"plan.{name} ({ours}) is not the live run's ({theirs}); plan for that run")
    (control / "answer.json").unlink(missing_ok=True)
    plan.save(control / "plan.json")
    said = _answer(control, plan.sha256, wait_s)
    if not said.get("applied"):
        raise RunError(f"the live run did not apply the plan: {said.get('error')}")
    return said


def _over(control: Path, state: str) -> RunError:
    died = state == "died"
    return RunError(
        f"the live run at {control} has {'died' if died else 'ended'}; start one with --control {control}, or with"
        f" --plan{', from its last checkpoint with --resume' if died else ''}"
    )


def _answer(control: Path, plan_sha256: str, wait_s: float) -> dict[str, Any]:
    """What the run says of a plan put into ``control``.

    Raises:
        RunError: nothing, in time or any more; or another plan was put in the place of this one.
    """
    path, answer = control / "plan.json", control / "answer.json"
    until = time.monotonic() + wait_s
    while True:
        run = watcher(control)  # looked at before the answer: a run answers before it ends
        if answer.is_file():
            said: dict[str, Any] = read_json(answer)
            if said.get("plan_sha256") in (plan_sha256, None):
                return said
        if run is None or not run.under_way:
            path.unlink(missing_ok=True)
            raise _over(control, "ended" if run is None else run.state)
        if time.monotonic() > until:
            raise RunError(_late(control, run.state, wait_s))
        time.sleep(0.02)


def _late(control: Path, state: str, wait_s: float) -> str:
    """Why there may be no answer yet; a plan that was not taken is taken back."""
    words = f"the live run at {control} did not answer within {wait_s:g} s"
    try:
        (control / "plan.json").unlink()
    except FileNotFoundError:
        return f"{words}: it has taken the plan and moves experts still; it applies it without --wait too"
    if state == "down":
        return f"{words}: it died, and torchrun has not started it again"
    return f"{words}; is it still running?"
