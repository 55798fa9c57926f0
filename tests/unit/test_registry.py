from __future__ import annotations

import pytest

from moeplan.errors import UnknownNameError
from moeplan.registry import load_plugin, plugin_names


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
