from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_plans import LAYERS, RANKS, bare_plan, contiguous, evaluations, full_plan, load_LE

from moeplan.reports.figures import colour_limits, load_heat_map
from moeplan.reports.plan_page import plan_svg, render_plan_page
from moeplan.reports.summary import Evidence

HOSTILE = "<script>alert(1)</script>\"'$x_{$ &amp; </title></svg>{{ 7*7 }}"
VOID = {"meta", "br", "image", "path", "use", "rect", "line", "img", "link"}


class _Page(HTMLParser):
    """Tags, identifiers, the balance of open and close tags, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.open: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "svg":
            self.labels += [value or "" for name, value in attrs if name == "aria-label"]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def both() -> Evidence:
    return Evidence(before=contiguous(), load_LE=load_LE())


@cache
def rich_page() -> str:
    traffic = np.arange(RANKS * RANKS, dtype=float).reshape(RANKS, RANKS) * 1e9
    return render_plan_page(
        full_plan(),
        Evidence(
            before=contiguous(),
            load_LE=load_LE(),
            before_name="contiguous",
            evaluation_before=evaluations(1.5, 1.9),
            traffic_before_RR=traffic.T,
            traffic_after_RR=traffic,
            traffic_note="Homes are those of the trace.",
        ),
    )


@cache
def bare_page() -> str:
    return render_plan_page(bare_plan(), Evidence())


@pytest.mark.parametrize("draw", [rich_page, bare_page], ids=["full", "plan only"])
def test_page_stands_alone(draw: Callable[[], str]) -> None:
    page = draw()
    assert not re.findall(r"https?:|//[a-z]|src=|@import|<link|<script|<iframe|<object", page)
    assert set(re.findall(r'href="(data:|#|.)', page)) == {"data:", "#"}
    assert not re.findall(r"url\((?!#)", page)


@pytest.mark.parametrize("draw", [rich_page, bare_page], ids=["full", "plan only"])
def test_page_is_well_formed_and_accessible(draw: Callable[[], str]) -> None:
    page = draw()
    parsed = _Page(page)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.labels.count("") == 0
    assert parsed.tags.count("svg") == len(parsed.labels)
    assert parsed.tags.count("h1") == 1
    assert 'name="viewport"' in page
    assert "prefers-color-scheme:dark" in page
    assert "@media print" in page


def test_references_inside_a_page_resolve() -> None:
    page = rich_page()
    wanted = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page))
    assert {a or b for a, b in wanted} <= set(_Page(page).ids)


def test_same_plan_same_bytes_in_two_processes() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_plan_page import rich_page, plan_svg, full_plan, both\n"
        "sys.stdout.buffer.write((rich_page() + plan_svg(full_plan(), both())).encode())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    assert other.stdout.decode() == rich_page() + plan_svg(full_plan(), both())


def test_hostile_strings_stay_text() -> None:
    prediction, verdict = full_plan().prediction, full_plan().verdict
    assert prediction is not None
    assert verdict is not None
    plan = full_plan(
        model=HOSTILE,
        planner=HOSTILE,
        notes=(HOSTILE,),
        provenance={HOSTILE: HOSTILE},
        prediction=prediction.model_copy(update={"baseline": HOSTILE, "source": {HOSTILE: HOSTILE}}),
        verdict=verdict.model_copy(update={"reason": HOSTILE, "held_out": HOSTILE}),
    )
    hostile = replace(both(), before_name=HOSTILE, evaluation_before=evaluations(1.5, 1.9))
    page = render_plan_page(plan, hostile)
    parsed = _Page(page)
    assert "script" not in parsed.tags
    assert parsed.open == []
    assert parsed.text.count(HOSTILE) >= 7
    assert not {name for name in parsed.attributes if name.startswith("on")}
    ElementTree.fromstring(plan_svg(plan, both()))


def test_full_page_says_what_the_plan_says() -> None:
    text = " ".join(_Page(rich_page()).text.replace("\N{NO-BREAK SPACE}", " ").split())
    for words in (
        "Apply this plan",
        "It pays.",
        "20.0 % expected gain",
        "18.0 % to 22.0 %",
        "no placement can gain more than 25.0 %",
        "pays for itself after 4,500 steps, 90.0 s of MoE work",
        "migration takes 1.50 s",
        "the second half",
        "1 expert copy (44.0 MB) in 1 layer changes",
        "averages",
        "measured on a GPU",
        "modelled by the roofline",
        "contiguous",
        "1.90 → 1.40",
        "Homes are those of the trace.",
        "All 12 layers as a table",
        "max imbalance default",
        "ab" * 32,
        full_plan().sha256,
    ):
        assert words in text
    assert _Page(rich_page()).tags.count("svg") == 11  # load 2, layers 4, traffic 2, moves 2, replicas 1


def test_plan_alone_says_what_is_missing_and_why() -> None:
    text = " ".join(_Page(bare_page()).text.split())
    for words in (
        "No verdict in this plan",
        "No heat map: a plan file holds where experts lie",
        "No traffic matrix",
        "No moves: the plan was made without a current placement",
        "No bound: nothing is proven",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ((0.0, 0.0, 0.0, 0.0), "Do not apply this plan"),
        ((-0.02, -0.05, -0.01, 0.0), "Do not apply this plan"),
    ],
)
def test_refusals(gains: tuple[float, float, float, float], words: str) -> None:
    verdict = full_plan().verdict
    assert verdict is not None
    expected, low, high, largest = gains
    changes = {"expected_gain": expected, "expected_gain_low": low, "expected_gain_high": high}
    refused = verdict.model_copy(update=changes | {"apply": False, "largest_possible_gain": largest})
    page = render_plan_page(full_plan(verdict=refused), Evidence())
    assert words in page
    for place in re.findall(r"(?:left|width):([-\d.]+)%", page):
        assert 0 <= float(place) <= 100


def test_maps_share_one_scale() -> None:
    page = rich_page()
    bars = re.findall(r"load of a rank / mean of the layer", page)
    assert len(bars) == 2
    low, high = colour_limits(np.array([[0.5, 1.0]]), np.array([[2.0, np.nan]]))
    assert (low, high) == (0.5, 2.0)
    flat = np.ones((3, 3))
    assert colour_limits(flat)[1] > 1.0
    outlier = np.concatenate([np.linspace(0.9, 1.1, 999), [50.0]])
    assert colour_limits(outlier)[1] < 1.2


@pytest.mark.parametrize("with_load", [True, False])
def test_picture_is_xml_and_stands_alone(with_load: bool) -> None:
    svg = plan_svg(full_plan(), both()) if with_load else plan_svg(bare_plan(), Evidence())
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.attrib["aria-label"].startswith("tiny: ")
    assert "var(--" not in svg.replace("var(--muted)", "")
    assert set(re.findall(r"https?://[^\"' ]+", svg)) == {"http://www.w3.org/2000/svg"}


def test_a_rank_without_slots_is_drawn_empty() -> None:
    plan = bare_plan(num_ranks=6, rank_of_slot=(0, 0, 0, 1, 1, 2, 2, 3, 3, 3), ranks_per_node=3)
    assert "12 layers by 6 ranks" in render_plan_page(plan, Evidence(load_LE=load_LE()))
    assert len(plan.layer_ids) == LAYERS


def test_the_smallest_plan() -> None:
    plan = bare_plan(
        num_experts=1,
        num_ranks=1,
        ranks_per_node=1,
        num_redundant_experts=0,
        layer_ids=(0,),
        physical_to_logical_map=((0,),),
        rank_of_slot=(0,),
        replicas=((1,),),
    )
    one = np.array([[5.0]])
    page = render_plan_page(plan, Evidence(before=plan.placement, load_LE=one, traffic_after_RR=one))
    assert "Every expert has one copy." in page
    assert page.count("<svg") == 4  # load before and after, max/mean by layer, traffic
    assert ElementTree.fromstring(plan_svg(plan, Evidence())).tag.endswith("svg")


@pytest.mark.parametrize(("nodes", "drawn"), [(36, True), (40, False)])
def test_lines_between_nodes_are_named_where_they_are_drawn(nodes: int, drawn: bool) -> None:
    picture = load_heat_map(np.ones((2, 8 * nodes)), (0, 1), 8, (0.0, 2.0), "Load")
    assert ("lines part nodes of 8" in picture) is drawn
