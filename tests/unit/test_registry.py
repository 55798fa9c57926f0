from __future__ import annotations

import pytest

from moeplan import registry
from moeplan.errors import InputError, UnknownNameError
from moeplan.registry import load_plugin, plugin_names


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package with one entry point and one module on the path."""

    def put(name: str, group: str, entry: str, code: str) -> None:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
        (tmp_path / f"{name}.py").write_text(code)

    monkeypatch.syspath_prepend(str(tmp_path))
    registry._group.cache_clear()
    yield put
    registry._group.cache_clear()


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("planners", {"joint", "greedy"}),
        ("trace_readers", {"npz", "sglang"}),
        ("exporters", {"sglang", "eplb"}),
    ],
)
def test_built_ins_come_in_by_the_plugin_door(kind, some):
    names = plugin_names(kind)
    assert names == sorted(names)
    assert some <= set(names)


def test_a_wrong_name_is_answered_with_the_list():
    with pytest.raises(UnknownNameError, match=r"trace reader 'sglng' is not known; did you mean 'sglang'\?"):
        load_plugin("trace_readers", "sglng")
    with pytest.raises(UnknownNameError, match=r"planner 'EPLB' is not known; did you mean 'greedy'\?"):
        load_plugin("planners", "EPLB")


def test_a_plugin_is_the_object_its_entry_point_names():
    from moeplan.routing.readers.npz import reader

    assert load_plugin("trace_readers", "npz") is reader


def test_two_packages_with_one_name_are_refused_whoever_comes_first(install):
    install("rival_planner", "moeplan.planners", "joint = rival_planner:planner", "planner = None\n")
    said = r"planner 'joint' is registered by package rival_planner \(rival_planner:planner\) and by package moeplan"
    with pytest.raises(InputError, match=said):
        load_plugin("planners", "joint")


def test_a_plugin_that_cannot_be_imported_is_named_with_its_package(install):
    install("lost_reader", "moeplan.trace_readers", "lost = lost_reader:reader", "import not_there\n")
    said = r"trace reader 'lost' of package lost_reader .*No module named 'not_there'; repair or uninstall"
    with pytest.raises(InputError, match=said):
        load_plugin("trace_readers", "lost")
