"""The emulated nodes of benchmarks/live: real namespaces and a real slow link, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "live" / "nodes.py"
CAN = sys.platform == "linux" and os.geteuid() == 0 and all(shutil.which(t) for t in ("ip", "tc", "nsenter"))
needs_root = pytest.mark.skipif(not CAN, reason="two nodes need Linux, root, iproute2 and util-linux")


def nodes(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=600, **options)


def alive(mark: str) -> list[str]:
    """Command lines of living processes that hold ``mark``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if mark in words and "pytest" not in words:
            found.append(words)
    return found


@needs_root
@pytest.mark.parametrize("delay", ["0 ms", "2 ms"])
def test_the_link_is_as_slow_as_it_says(delay):
    pytest.importorskip("torch", reason="ranks that exchange need torch")
    done = nodes("--rate", "100 Mbit/s", "--delay", delay)
    assert done.returncode == 0, done.stderr
    inside, between, alone = (float(line.split(" in " if " in " in line else "takes ")[1].split()[0])
                              for line in done.stdout.splitlines())  # fmt: skip
    assert alone <= between * 1.02  # two ranks' MiB over 12.5 MB/s each way: 168 ms and the delay
    assert alone > 165
    assert inside < between / 2


@needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(number):
    mark = f"9{os.getpid()}{int(number)}"  # a time to sleep that nobody else sleeps
    script = subprocess.Popen([sys.executable, str(SCRIPT), "--delay", "1 ms", "--", "sleep", mark])
    try:
        until = time.monotonic() + 300
        while len(alive(f"sleep {mark}")) < 5:  # four ranks, and the script that names them
            assert time.monotonic() < until
            time.sleep(0.05)
        forwarders = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/stat")
                      if _parent(p) == script.pid]  # fmt: skip
        assert len(forwarders) >= 7  # two holders of namespaces, the link, four ranks
        script.send_signal(number)
        assert script.wait(300) in (130, 143, -signal.SIGKILL)
    finally:
        script.kill()
    until = time.monotonic() + 300
    while any(Path(f"/proc/{pid}").exists() for pid in forwarders):
        assert time.monotonic() < until
        time.sleep(0.05)


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return -1


@needs_root
def test_a_dead_rank_is_named_and_ends_the_others():
    done = nodes("--", "sh", "-c", 'if [ "$RANK" = 2 ]; then kill -9 $$; else sleep 6000; fi')
    assert done.returncode == 1
    assert "rank 2 died by signal 9; the other ranks were ended" in done.stderr


def test_missing_tools_are_named(tmp_path):
    done = nodes("--", "true", env={"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 1
    assert "ip, tc, nsenter missing: two nodes need iproute2 and util-linux" in done.stderr
