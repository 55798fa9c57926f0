from __future__ import annotations

import re

import numpy as np

from moeplan.artifacts.event_log import EventRecorder
from moeplan.reports.run_figures import OPERATIONS, gantt
from moeplan.reports.trace_figures import skew_picture


def test_operations_of_one_picture_have_colours_of_their_own() -> None:
    recorder = EventRecorder()
    for number, kind in enumerate(OPERATIONS):
        recorder.add(kind, float(number), 1.0, rank=0, step=0)
    picture = gantt(recorder.build("measured", 1, 1, {}), "Step 0", 0, OPERATIONS)
    assert picture is not None
    assert len(set(re.findall(r"fill: (#[0-9a-f]{6})", picture))) >= len(OPERATIONS)


def test_the_legend_of_skew_stands_above_the_bars() -> None:
    picture = skew_picture(tuple(range(30)), np.full(30, 3.0), np.full(30, 2.9))
    bar = re.search(r'<g id="patch_3">\s*<path d="([^"]+)"', picture)
    assert bar is not None
    top = min(float(y) for y in re.findall(r"[ML] \S+ (\S+)", bar[1]))
    legend = [float(y) for y in re.findall(r' y="([\d.]+)"[^>]*>(?:experts|8 contiguous ranks)<', picture)]
    assert len(legend) == 2
    assert max(legend) < top
