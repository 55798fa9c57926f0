"""The folder through which other processes talk to a run, seen from both sides; read without torch.

``run.json`` says what runs there. Rank 0 locks ``run.lock`` as long as it lives, and the kernel lifts that lock
however the process ends, by SIGKILL too. The lock speaks to processes on the same machine; from another one, and on
file systems without locks, a run that has not said that it ended counts as running.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moeplan.errors import InputError, RunError
from moeplan.files import hold, is_held, read_json, write_text

__all__ = ["LEFT_BY_RUNS", "Watcher", "say_ended", "take_folder", "watcher"]

LEFT_BY_RUNS = ("plan.json", "window.npz", "answer.json")
_ABOUT, _LOCK = "run.json", "run.lock"
_PATIENCE_S = 2.0  # those who look whether the lock is held hold it for a moment


@dataclass(frozen=True, slots=True)
class Watcher:
    """The run of a folder: what ``run.json`` says of it, and how it is. ``down``: it died, and torchrun may start it
    again; ``died``: it did not say that it ended, and will not start again.
    """

    about: dict[str, Any]
    state: Literal["running", "down", "ended", "died"]

    @property
    def under_way(self) -> bool:
        """Whether plans may reach it."""
        return self.state in ("running", "down")


def watcher(control: Path) -> Watcher | None:
    """The latest run that watches ``control``; None where there was none.

    Raises:
        InputError: ``run.json`` cannot be read.
    """
    if not (control / _ABOUT).is_file():
        return None
    about = read_json(control / _ABOUT)
    if not isinstance(about, dict):
        raise InputError(f"{control / _ABOUT} does not say what runs; start the run again")
    if about.get("ended"):
        return Watcher(about, "ended")
    here = set(_machine()) & set(about.get("machine", ()))
    if not here or is_held(control / _LOCK) is not False:
        return Watcher(about, "running")
    return Watcher(about, "down" if about.get("restarts_left") else "died")


def take_folder(control: Path, about: dict[str, Any], restarts_left: int, forget: bool) -> int | None:
    """Say in ``control`` what runs, and that it lives for as long as this process, or until the answer is closed.

    ``forget`` removes what a run before left for its own readers.

    Raises:
        InputError: it cannot be written. RunError: another run watches it.
    """
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            lock = hold(control / _LOCK)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                other = watcher(control)
                pid = "" if other is None else f" (process {other.about.get('pid')})"
                raise RunError(
                    f"{control} is watched by another live run{pid}; give this one a --control folder of its own"
                ) from None
            time.sleep(0.01)
    for name in LEFT_BY_RUNS if forget else ():
        (control / name).unlink(missing_ok=True)
    alive = {"pid": os.getpid(), "machine": [] if lock is None else _machine(), "restarts_left": restarts_left}
    write_text(control / _ABOUT, json.dumps(about | alive) + "\n")
    return lock


def say_ended(control: Path) -> None:
    """Leave in ``control`` that its run has ended; nothing where none began.

    Where that cannot be written (a full disk), the run will seem to have died: no reason to lose what it has to say.
    """
    with suppress(InputError):
        if (run := watcher(control)) is not None and run.state != "ended":
            write_text(control / _ABOUT, json.dumps(run.about | {"ended": True}) + "\n")


def _machine() -> list[str]:
    """Its name, and where there is one the number of its boot, which containers share."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return [socket.gethostname(), *([boot.read_text().strip()] if boot.is_file() else [])]
