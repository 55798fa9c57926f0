"""One rank of ``moeplan live``: train, apply a plan at a step, save, generate, record."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moeplan.artifacts.placement import Placement
from moeplan.errors import InputError, RunError, SpecError
from moeplan.execution.apply import PlanCallback
from moeplan.execution.checkpoint import CheckpointReader, load_checkpoint, newest_whole, save_checkpoint
from moeplan.execution.closed_loop import ClosedLoop
from moeplan.execution.groups import Mesh, build_mesh
from moeplan.execution.launch import Rank, most_restarts, restarts
from moeplan.execution.metrics import MetricsSink
from moeplan.execution.migrate import MigrationReport
from moeplan.execution.monitor import LoadMonitor
from moeplan.execution.moves import require_fits
from moeplan.execution.options import LiveJob
from moeplan.execution.router import Routing
from moeplan.execution.train import StepMetrics, Trainer, gather_events
from moeplan.files import write_text
from moeplan.routing.overhead import paired_slowdown

__all__ = ["RoutingSink", "live_rank", "record_held_out", "recording_overhead"]

_DECODE_TOKENS = 16  # recorded after the first batch of held-out text
_WARM_STEPS = 2  # left out of rates: first touches of memory and connections


class RoutingSink(Protocol):
    """What takes the routing of forward passes: ``moeplan.profiling.routing.RoutingRecorder`` is one."""

    def step(self, phase: str, seq_lens: Sequence[int] | None = None) -> AbstractContextManager[None]:
        """A context for one forward pass."""
        ...

    def record(self, layer_id: int, experts_TK: Any, scores_TK: Any = None) -> None:
        """The choices of one layer."""
        ...


def latest(folder: Path) -> Path:
    """The checkpoint that ``folder`` is, or the latest in it.

    Raises:
        InputError: it holds none.
    """
    named = folder / "latest"
    if named.is_file():
        return folder / named.read_text(encoding="utf-8", errors="replace").strip()
    if not folder.is_dir():
        raise InputError(f"checkpoint {folder} does not exist; give a directory that --checkpoint wrote")
    return folder


def _reader(folder: Path, mesh: Mesh, job: LiveJob, tell: Callable[[str], None]) -> CheckpointReader:
    """The checkpoint that ``folder`` is, or the latest in it; where that is damaged and the job skips those, the newest
    whole one before it, and ``tell`` hears so.

    Raises:
        InputError: it is damaged; the message names the file, and the newest checkpoint that is whole.
    """
    path = latest(folder)
    try:
        return CheckpointReader(path, mesh.world)
    except InputError as error:
        if path.name.startswith("step-"):
            whole = newest_whole(path.parent, path.name, mesh.world)
        else:
            whole = newest_whole(folder, None, mesh.world)
        if whole is None:
            raise
        if not job.skip_damaged:
            offer = f"the newest whole checkpoint there: --resume {whole.path}, or --skip-damaged takes it"
            raise InputError(f"{error}; {offer}") from error
        tell(f"{error}; goes on from the newest whole checkpoint there, {whole.path} ({whole.step} steps)")
        return whole


def live_rank(me: Rank, job: LiveJob, record: Callable[[Trainer, int], Any]) -> dict[str, Any]:
    """Run ``job`` as one rank; the answer is rank 0's, other ranks return the same figures.

    Raises:
        MoeplanError: bad input, the same on every rank, before anything has moved. RunError: the loss is not finite.
    """
    job = _from_one_checkpoint(job)
    sink = MetricsSink(
        None if job.out is None or me.rank else job.out / "metrics.jsonl",
        None if me.rank else job.prometheus,
        go_on=restarts() > 0,
    )
    mesh = build_mesh(job.options.tp, job.options.edp, job.options.ranks_per_node, me.device)
    notes: list[str] = []

    def tell(note: str) -> None:
        notes.append(note)
        if me.rank == 0:
            me.send({"note": note})

    try:
        trainer, callback, first = _set_up(job, mesh, tell)
        answer = _train(me, job, trainer, callback, sink, first)
        callback.close()  # what follows takes no plans
    finally:
        sink.close()
    answer["notes"] = notes
    if job.generate is not None:
        answer["text"] = _generate(trainer, job.generate, job.new_tokens)
    if job.record_tokens:
        answer["recorded"] = record(trainer, job.record_tokens)
    events = gather_events(trainer, {"model": job.options.model.name, "seed": job.options.seed, "steps": job.steps})
    if job.out is not None and events is not None:
        events.write(job.out / "events.parquet")
    if job.plan is not None and job.apply_at is not None and job.reference and not restarts():
        reference, _ = _fresh(job, mesh, None, lambda _note: None)
        reference.clock.enabled = False
        answer["reference_losses"] = [reference.step().loss for _ in range(job.steps)]
        pairs = zip(answer["losses"], answer["reference_losses"], strict=True)
        answer["largest_difference"] = max(abs(a - b) for a, b in pairs) if job.steps else 0.0
    return answer


def _from_one_checkpoint(job: LiveJob) -> LiveJob:
    """A job that resumes from the checkpoint which is the latest now: it may write later ones to the same folder.

    Raises:
        SpecError: ranks that torchrun starts again would take one of those for the beginning.
    """
    if job.resume is None:
        return job
    found = latest(job.resume)
    shared = job.checkpoint is not None and job.resume.resolve() == job.checkpoint.resolve()
    if found != job.resume and shared and most_restarts():
        raise SpecError(
            f"resume and checkpoint are one folder ({job.resume}): ranks that torchrun starts again could not tell"
            f" where the run began; name the checkpoint, --resume {found}"
        )
    return replace(job, resume=found)


def _fresh(
    job: LiveJob, mesh: Mesh, placement: Placement | None, tell: Callable[[str], None]
) -> tuple[Trainer, int]:
    """A trainer where the job begins, or at the last checkpoint if torchrun starts it again; and its first step."""
    reader = None if job.resume is None else _reader(job.resume, mesh, job, tell)
    first = 0 if reader is None else reader.step
    if restarts() and job.checkpoint is not None and (job.checkpoint / "latest").is_file():
        reader = _reader(job.checkpoint, mesh, job, tell)
        placement = None  # as it was saved: with the plan if it had been applied by then
    if reader is not None:
        reader.require_model(job.options.model.name)
        if placement is None:
            placement = reader.placement(mesh.ep.size, mesh.ranks_per_node)
    trainer = Trainer(job.options, job.corpus, placement, mesh)
    if reader is not None:
        load_checkpoint(trainer, reader)
    return trainer, first


def _set_up(job: LiveJob, mesh: Mesh, tell: Callable[[str], None]) -> tuple[Trainer, PlanCallback, int]:
    plan = job.plan
    if plan is not None:
        require_fits(plan, job.options.model, mesh)
        if job.apply_at is not None and not 0 <= job.apply_at < job.steps:
            raise SpecError(f"apply_at ({job.apply_at}) must be a step of 0..{job.steps - 1} (steps - 1)")
    placement = plan.placement if plan is not None and job.apply_at is None else None
    trainer, first = _fresh(job, mesh, placement, tell)
    if job.checkpoint is not None and mesh.world.rank == 0 and not restarts():
        _forget_others(job.checkpoint, job.resume)
    trainer.clock.origin_s = mesh.world.all_of(time.perf_counter())[0]
    return trainer, PlanCallback(trainer.migrator, job.options.model, mesh, job.control, job.budget_s), first


def _forget_others(folder: Path, begun: Path | None) -> None:
    """Restarts of a run go on from the latest checkpoint in ``folder``: it is not to be one of another run, or a later
    one than the run has ``begun`` from."""
    named = folder / "latest"
    if named.is_file() and (begun is None or latest(folder).resolve() != begun.resolve()):
        named.unlink()


def _train(
    me: Rank, job: LiveJob, trainer: Trainer, callback: PlanCallback, sink: MetricsSink, first: int
) -> dict[str, Any]:
    steps: list[StepMetrics] = []
    reports: list[MigrationReport] = []
    loop = _watching(job, trainer, callback)
    for number in range(trainer.steps_done - first, job.steps):
        metrics = trainer.step()
        _require_finite(metrics.loss, f"step {trainer.steps_done - 1}", job)
        steps.append(metrics)
        if me.rank == 0:
            sink.add(metrics)
            me.send({"step": number + 1, "of": job.steps, **metrics.to_json()})
        if job.plan is not None and number == job.apply_at:
            callback.submit(job.plan)
        left = job.steps - number - 1
        report = callback.after_step() if loop is None else loop.after_step(metrics, left)
        if report is not None:
            reports.append(report)
            if report.layers:
                trainer.clock.placed_anew()
        if job.checkpoint is not None and _due(number + 1, job):
            _save(trainer, job.checkpoint)
    while trainer.migrator.under_way:  # a stall budget spread it beyond the last step
        report = callback.after_step()
        if report is not None:
            reports.append(report)
    held_out = trainer.evaluate()
    _require_finite(held_out, "held-out text", job)
    warm = steps[_WARM_STEPS:] or steps
    median = statistics.median
    return {
        "model": job.options.model.name,
        "ranks": trainer.mesh.world.size,
        "first_step": first,
        "steps": job.steps,
        "losses": [m.loss for m in steps],
        "tokens_per_s": median(m.tokens_per_s for m in warm) if warm else None,
        "imbalance": median(m.imbalance for m in warm) if warm else None,
        "expert_s": np.median([m.expert_R for m in warm], axis=0).tolist() if warm else [],
        "alltoall_s": np.median([m.alltoall_R for m in warm], axis=0).tolist() if warm else [],
        "exposed_s": np.median([m.exposed_R for m in warm], axis=0).tolist() if warm else [],
        "held_out_loss": held_out,
        **_moved(reports),
    }


def _require_finite(loss: float, of: str, job: LiveJob) -> None:
    """The same on every rank."""
    if not math.isfinite(loss):
        raise RunError(
            f"the loss of {of} is {loss}: training diverged; give a lower --lr than {job.options.lr:g}"
            + ("" if job.checkpoint is None else _kept(job.checkpoint))
        )


def _watching(job: LiveJob, trainer: Trainer, callback: PlanCallback) -> ClosedLoop | None:
    """With a control folder each window of steps goes there, for ``moeplan control`` to plan from."""
    if job.control is None or not job.window:
        return None
    spec = job.options.model
    monitor = LoadMonitor(trainer.mesh, spec.num_moe_layers, spec.num_experts, steps=job.window)
    return ClosedLoop(trainer.moe_layers, callback, monitor, folder=job.control)


def _moved(reports: list[MigrationReport]) -> dict[str, Any]:
    return {
        "moved_experts": sum(r.moved_experts for r in reports),
        "moved_bytes": sum(r.moved_bytes for r in reports),
        "stall_s": sum(r.stall_s for r in reports),
        "stalls_s": [s for r in reports for s in r.stalls_s],
        "applied": all(r.finished for r in reports) if reports else None,
        "failure": next((r.failure for r in reports if r.failure), None),
    }


def _due(done: int, job: LiveJob) -> bool:
    return done == job.steps or bool(job.checkpoint_every and done % job.checkpoint_every == 0)


def _kept(folder: Path) -> str:
    """Words for the last checkpoint in ``folder``, which holds finite numbers; none where there is none."""
    return f"; the last checkpoint: --resume {latest(folder)}" if (folder / "latest").is_file() else ""


def _save(trainer: Trainer, folder: Path) -> None:
    name = f"step-{trainer.steps_done:06d}"
    try:
        save_checkpoint(trainer, folder / name)
    except RunError as error:
        raise RunError(f"{error}{_kept(folder)}") from error
    if trainer.mesh.world.rank == 0:
        write_text(folder / "latest", name + "\n")


def _generate(trainer: Trainer, prompt: str, new_tokens: int) -> str:
    """Continue ``prompt``; every rank does so with the same numbers, as all must take part in the experts' exchange."""
    ids = torch.tensor([list(prompt.encode())], device=trainer.mesh.device)
    generator = torch.Generator().manual_seed(trainer.options.seed)
    out = trainer.model.generate(ids, new_tokens, generator)[0].tolist()
    return bytes(out).decode("utf-8", errors="replace")


@contextmanager
def _recorded(trainer: Trainer, sink: RoutingSink) -> Iterator[None]:
    def pass_on(layer: int, routing: Routing) -> None:
        sink.record(layer, routing.experts_TK, routing.weights_TK)

    for moe in trainer.moe_layers:
        moe.on_routing = pass_on
    try:
        yield
    finally:
        for moe in trainer.moe_layers:
            moe.on_routing = None


@torch.no_grad()
def recording_overhead(trainer: Trainer, sink: RoutingSink) -> tuple[float, float | None]:
    """:func:`~moeplan.routing.overhead.paired_slowdown` of a prefill pass by recording into ``sink``, a throwaway.

    A pass is the slowest rank's; every rank calls this.
    """
    mesh, length = trainer.mesh, trainer.options.length
    rows_BT = trainer.rows(1_000_000, held_out=True)[0][:, :length]

    def now() -> float:
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(record: bool) -> float:
        mesh.world.all_of(None)  # all start together
        begin = now()
        if record:
            with _recorded(trainer, sink), sink.step("prefill", [length] * len(rows_BT)):
                trainer.model(rows_BT, trainer.model.new_cache())
        else:
            trainer.model(rows_BT, trainer.model.new_cache())
        return float(max(mesh.world.all_of(now() - begin)))

    enabled, trainer.clock.enabled = trainer.clock.enabled, False  # these passes are no events of the run
    try:
        return paired_slowdown(seconds)
    finally:
        trainer.clock.enabled = enabled


@torch.no_grad()
def record_held_out(trainer: Trainer, sink: RoutingSink, tokens: int) -> NDArray[np.int64]:
    """Route ``tokens`` held-out bytes as prefill, then a few of each batch's as decode, into ``sink`` (a recorder).

    Returns the domain of each recorded token of this rank, in the order recorded.
    """
    length, domains = trainer.options.length, []
    batch = trainer.options.batch
    with _recorded(trainer, sink):
        for number in range(max(1, tokens // (batch * length))):
            rows_BT, domain_B = trainer.rows(1_000_000 + number, held_out=True)
            cache = trainer.model.new_cache()
            with sink.step("prefill", [length] * len(rows_BT)):
                logits = trainer.model(rows_BT[:, :length], cache)
            domains.append(np.repeat(domain_B, length))
            for _ in range(_DECODE_TOKENS if number == 0 else 0):
                step = logits[:, -1:].argmax(-1)
                with sink.step("decode", [1] * len(rows_BT)):
                    logits = trainer.model(step, cache)
                domains.append(np.asarray(domain_B))
    return np.concatenate(domains)
