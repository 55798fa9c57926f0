"""The front door opens at once, and nothing heavy stands behind it until it is used."""

from __future__ import annotations

import ast
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moeplan
import moeplan.errors

PACKAGE = Path(moeplan.__file__).parent
HEAVY = {"numpy", "scipy", "numba", "torch", "pydantic", "matplotlib", "networkx", "pulp", "pyarrow", "rich", "yaml"}


def loaded_after(code: str, *arguments: str) -> set[str]:
    """Modules of a fresh interpreter after ``code``; what it prints otherwise goes to standard error."""
    script = f"import sys\n{code}\nprint('\\n' + ' '.join(sys.modules), file=sys.__stdout__)"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def cpu_seconds(*words: str) -> float:
    """The least CPU time of five fresh interpreters: other programs hardly move it, another machine moves all alike."""
    found = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def test_every_public_name_is_there() -> None:
    assert sorted(set(moeplan.__all__)) == sorted(moeplan.__all__)
    for name in moeplan.__all__:
        assert getattr(moeplan, name) is not None
        assert name in dir(moeplan)
    assert set(moeplan._ROOM_OF) == set(moeplan.__all__) - {"load_scenario", "__version__"}
    assert set(moeplan.errors.__all__) <= set(moeplan.__all__)


def test_names_are_the_things_of_the_rooms() -> None:
    from moeplan.pipeline.optimize import optimize
    from moeplan.specs.scenario import Scenario

    assert moeplan.optimize is optimize
    assert moeplan.Scenario is Scenario


def test_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = moeplan.optimise


def test_load_scenario_reads_a_file_from_its_own_directory(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("model: mixtral-8x7b\ntrace: routing.npz\nranks: 4\n")
    scenario = moeplan.load_scenario(str(tmp_path / "job.yaml"))
    assert scenario.trace == tmp_path / "routing.npz"
    assert scenario.ranks == 4


def test_import_loads_nothing_heavy() -> None:
    loaded = loaded_after("import moeplan")
    assert not loaded & HEAVY
    assert not {name for name in loaded if name.startswith("moeplan.")}


def test_import_is_quicker_than_that_of_click() -> None:
    assert cpu_seconds("-c", "import moeplan") < cpu_seconds("-c", "import click")


def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_after(
        "from moeplan.cli import main\nsys.argv = ['moeplan', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code"
    )
    assert "click" in loaded
    assert not loaded & HEAVY


def test_the_version_is_told_where_the_package_is_not_installed() -> None:
    code = (
        "import sys, importlib.metadata as metadata\n"
        "def absent(name):\n    raise metadata.PackageNotFoundError(name)\n"
        "metadata.distribution = absent\n"
        "from moeplan.cli import main\nsys.argv = ['moeplan', '--version']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[-1] == moeplan.__version__


def test_help_is_quicker_than_the_import_of_numpy() -> None:
    assert cpu_seconds("-m", "moeplan", "--help") < cpu_seconds("-c", "import numpy")


def test_planning_needs_no_torch(tmp_path: Path) -> None:
    experts = np.argsort(np.random.default_rng(0).random((256, 32, 8)), axis=2)[:, :, :2]
    np.savez(tmp_path / "routing.npz", experts=experts.astype(np.int16), num_experts=8)
    words = ["optimize", "--model", "mixtral-8x7b", "--trace", str(tmp_path / "routing.npz"), "--ranks", "2"]
    words += ["--planner", "greedy", "--out", str(tmp_path / "plan"), "--quiet"]
    loaded = loaded_after(
        "from moeplan.cli import main\nsys.argv[0] = 'moeplan'\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code",
        *words,
    )
    assert json.loads((tmp_path / "plan" / "plan.json").read_text())["num_ranks"] == 2
    assert "moeplan.planning.greedy" in loaded
    assert not {"torch", "triton"} & loaded


def test_torch_is_loaded_inside_functions_outside_its_rooms() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "torch" for name in names):
                found.append(str(path.relative_to(PACKAGE)))
    assert not [path for path in found if not path.startswith(("profiling", "execution"))]
