"""Training with a re-plan every 200 steps and ranks that are killed at random, some in the middle of a move.

::

    python benchmarks/live/soak.py                  # 10,000 steps
    python benchmarks/live/soak.py --steps 1000     # shorter; soak.json says how many were run

A run that is killed starts again from its last checkpoint. Held against the same training without a move or a kill:
the loss of every step and every expert's norm must be the same, bit for bit. Then processes and sockets are counted.
(With ``--copies`` gradients of an expert's copies are summed in another order, so that losses part by rounding; the
largest difference is then reported and not judged.)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from nodes import Nodes

from moeplan.errors import MoeplanError, RunError

HERE = Path(__file__).resolve().parent
RANKS, EXPERTS = 2, 16
KEPT_CHECKPOINTS = 2
LOST = 7  # exit code of a rank whose peer was killed


# ---------------------------------------------------------------------- a rank


def rank_main(folder: Path, steps: int, every: int, save_every: int, moves: bool, copies: int) -> None:
    """Train to ``steps``, from the last checkpoint if there is one; rank 0 writes the losses."""
    import torch
    import torch.distributed as dist

    from moeplan.execution.checkpoint import CheckpointReader, load_checkpoint, save_checkpoint
    from moeplan.execution.groups import Axis, build_mesh
    from moeplan.execution.parcels import Message, send_batch
    from moeplan.execution.text import Corpus
    from moeplan.execution.train import Trainer, TrainOptions
    from moeplan.specs.model import AttentionSpec, ModelSpec

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    spec = ModelSpec(
        name="soak", num_layers=3, moe_layer_ids=(1, 2), hidden_size=32, num_experts=EXPERTS, top_k=2,
        expert_intermediate_size=32, dense_intermediate_size=64, vocab_size=256,
        attention=AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=16),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, size=rng.integers(2, 8), dtype=np.uint8)) for _ in range(200)]
    text = np.frombuffer(b" ".join(words[i] for i in rng.zipf(1.4, 40_000) % 200), np.uint8)
    corpus = Corpus({"words": text}, {"words": text[:4000]}, "random words", "0" * 64)
    mesh = build_mesh()
    saved = folder / "latest"
    reader = CheckpointReader(folder / saved.read_text()) if saved.is_file() else None
    placement = None if reader is None else reader.placement(mesh.ep.size, mesh.ranks_per_node)
    trainer = Trainer(TrainOptions(spec, batch=8, length=32, lr=1e-3), corpus, placement, mesh)
    if reader is not None:
        load_checkpoint(trainer, reader)
    trainer.clock.enabled = False

    def deadly_send(out: Sequence[Message], into: Sequence[Message], axis: Axis) -> None:
        """Every fourth re-plan one rank dies with half of its messages sent; only the first time."""
        number = trainer.steps_done // every
        mark = folder / f"died-{number}"
        if number % 4 == 1 and mesh.world.rank == number // 4 % RANKS and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        send_batch(list(out), list(into), axis)

    if moves:
        trainer.migrator.send = deadly_send
    with (folder / "losses.jsonl" if mesh.world.rank == 0 else Path(os.devnull)).open("a", encoding="utf-8") as log:
        while trainer.steps_done < steps:
            loss = trainer.step().loss
            log.write(f"[{trainer.steps_done}, {loss!r}]\n")
            if moves and trainer.steps_done % every == 0:
                trainer.migrator.submit(_placement(trainer.steps_done // every, spec.num_moe_layers, copies))
            report = trainer.migrator.at_step_boundary(0.01)
            if report is not None:
                entry = {"step": trainer.steps_done, "moved": report.moved_experts, "failure": report.failure}
                log.write(json.dumps(entry | {"longest_stall_s": max(report.stalls_s)}) + "\n")
            if trainer.steps_done % save_every == 0 and not trainer.migrator.under_way:
                _save(trainer, folder, save_checkpoint)
            log.flush()
        while trainer.migrator.under_way:
            trainer.migrator.at_step_boundary()
    norms = trainer.expert_norms().tolist()
    if mesh.world.rank == 0:
        (folder / "norms.json").write_text(json.dumps(norms))
    dist.barrier()
    dist.destroy_process_group()


def _placement(number: int, layers: int, most: int) -> Any:
    """A random placement, at most so many experts of a rank with a copy on the other, other ones each time."""
    from moeplan.artifacts.placement import Placement

    rng = np.random.default_rng((9, number))
    copies = int(rng.integers(0, most + 1))
    size = EXPERTS // RANKS + copies
    rows = []
    for _ in range(layers):
        order = rng.permutation(EXPERTS)
        first, second = order[: EXPERTS // 2], order[EXPERTS // 2 :]
        rows.append(np.concatenate([first, second[:copies], second, first[:copies]]))
    ranks = np.repeat(np.arange(RANKS, dtype=np.int32), size)
    return Placement(np.stack(rows).astype(np.int32), ranks, EXPERTS, RANKS, RANKS)


def _save(trainer: Any, folder: Path, save: Any) -> None:
    name = f"step-{trainer.steps_done:06d}"
    save(trainer, folder / name)
    if trainer.mesh.world.rank == 0:
        draft = folder / "latest.draft"
        draft.write_text(name)
        draft.replace(folder / "latest")
        for old in sorted(folder.glob("step-*"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)


# ---------------------------------------------------------------------- the one who starts them


def _train(folder: Path, given: argparse.Namespace, moves: bool, seed: int = 0) -> dict[str, int]:
    """Run to the end, however often ranks are killed."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    command = [sys.executable, str(Path(__file__).resolve()), "--rank", str(folder), str(given.steps), str(given.every),
               str(given.save_every), str(int(moves)), str(given.copies)]  # fmt: skip
    starts = kills = 0
    next_kill = time.monotonic() + rng.expovariate(1 / given.kill_s)

    def maybe_kill(ranks: list[subprocess.Popen[bytes]]) -> None:
        nonlocal kills, next_kill
        alive = [process for process in ranks if process.poll() is None]
        if moves and time.monotonic() > next_kill and len(alive) == RANKS:
            rng.choice(alive).kill()
            kills += 1
            next_kill = time.monotonic() + rng.expovariate(1 / given.kill_s)

    while not (folder / "norms.json").exists():
        starts += 1
        if starts > 20 + given.steps // 50:
            raise RunError(f"still not at step {given.steps} after {starts} starts")
        try:
            with Nodes(1, RANKS, priority=10 if os.geteuid() == 0 else 0) as node:
                node.run(command, while_running=maybe_kill, timeout_s=3600)
        except RunError as error:
            if "by signal 9" not in str(error) and f"code {LOST}" not in str(error):
                raise
            next_kill = max(next_kill, time.monotonic() + 5)  # let it come up
    return {"starts": starts, "killed_at_random": kills, "killed_while_moving": len(list(folder.glob("died-*")))}


def _losses(folder: Path) -> tuple[dict[int, list[float]], list[dict[str, Any]]]:
    """All losses seen of each step (more than one where steps were run again), and the migrations."""
    losses: dict[int, list[float]] = {}
    moves = []
    for line in (folder / "losses.jsonl").read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line in which the writer was killed
        if isinstance(entry, dict):
            moves.append(entry)
        else:
            losses.setdefault(entry[0], []).append(entry[1])
    return losses, moves


def _census() -> dict[str, int]:
    """Processes started from here that still live, and this process's open sockets and listening ports of all."""
    mine = subprocess.run(["pgrep", "-f", f"{HERE / 'soak.py'} --rank"], capture_output=True, text=True).stdout.split()
    handles = [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    sockets = sum(name.startswith("socket:") for name in handles)
    listening = sum(line.split()[3] == "0A" for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return {"processes": len(mine), "open_sockets": sockets, "listening_ports": listening}


def _stop(number: int, _frame: Any) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    """See the module."""
    if sys.argv[1:2] == ["--rank"]:
        folder, steps, every, save_every, moves, copies = sys.argv[2:]
        try:
            return rank_main(Path(folder), int(steps), int(every), int(save_every), moves == "1", int(copies))
        except (RuntimeError, RunError):  # the other rank is gone
            os._exit(LOST)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=200, help="steps between re-plans")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--kill-s", type=float, default=30.0, help="seconds between random kills, on average")
    parser.add_argument("--copies", type=int, default=0, help="experts of a rank with a copy, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the random kills")
    parser.add_argument("--out", type=Path, default=HERE / "soak.json")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    before, begun = _census(), time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            reference_s = time.monotonic()
            _train(Path(scratch) / "reference", given, moves=False)
            reference_s = time.monotonic() - reference_s
            soaked = _train(Path(scratch) / "soak", given, moves=True, seed=given.seed)
            expected, _ = _losses(Path(scratch) / "reference")
            found, moves = _losses(Path(scratch) / "soak")
            norms = [np.array(json.loads((Path(scratch) / name / "norms.json").read_text()))
                     for name in ("reference", "soak")]  # fmt: skip
    except MoeplanError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    after = _census()
    differing = [step for step in range(1, given.steps + 1) if set(found.get(step, ())) != set(expected[step])]
    apart = [abs(loss - expected[step][0]) / expected[step][0] for step in found for loss in found[step]]
    answer = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/live/soak.py --steps {given.steps}",
        "seed": given.seed,
        "steps": given.steps,
        "replan_every": given.every,
        **soaked,
        "replans_finished": sum(move["failure"] is None for move in moves),
        "experts_moved": sum(move["moved"] for move in moves),
        "longest_stall_s": max((move["longest_stall_s"] for move in moves), default=None),
        "steps_run_again": sum(len(losses) - 1 for losses in found.values()),
        "losses_differing_from_the_run_without_moves": len(differing),
        "largest_relative_difference_of_losses": max(apart),
        "copies": given.copies,
        "experts_lost": int((norms[1] == 0).sum()),
        "largest_difference_of_expert_norms": float(np.abs(norms[0] - norms[1]).max()),
        "last_loss": min(found[given.steps]),
        "first_loss": min(found[1]),
        "leaked": {name: after[name] - before[name] for name in after},
        "reference_s": reference_s,
        "wall_s": time.monotonic() - begun,
    }
    leaked = any(count > 0 for count in answer["leaked"].values())
    clean = (not differing or given.copies > 0) and not answer["experts_lost"] and not leaked
    answer["verdict"] = "clean" if clean else "not clean"
    given.out.write_text(json.dumps(answer, indent=1) + "\n")
    print(json.dumps(answer, indent=1))
    raise SystemExit(0 if clean else 1)


if __name__ == "__main__":
    main()
