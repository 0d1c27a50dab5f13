"""Traces in the Chrome format: the whole event list of a small plan, and what the format asks of any."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest

from spcompile.viz.chrome_trace import STEP_US, make_trace
from spcompile.viz.make_view import make_view
from spcompile.viz.view import View
from tests.hand_plans import PLANS
from tests.viz.recordings import recording_of
from tests.viz.timed_plans import MACHINE, inference, training

Event = dict[str, Any]


def events_of(*views: View) -> list[Event]:
    trace = json.loads(make_trace(views))
    assert trace["displayTimeUnit"] == "ms"
    events: list[Event] = trace["traceEvents"]
    return events


def test_events_of_one_slot() -> None:
    """Copies and runs take turns, so the lanes never overlap; names are metadata; memory is a counter."""
    events = events_of(make_view(inference(1, k=1), machine=MACHINE))
    assert [(event["name"], event["tid"], event["args"].get("name")) for event in events if event["ph"] == "M"] == [
        ("process_name", 0, "predicted: Plan for cuda:0: 1 page, 1 layer, 1 step"),
        ("thread_name", 1, "compute"),
        ("thread_sort_index", 1, None),
    ]
    runs = [event for event in events if event["ph"] == "X"]
    details = {"layer": "model.layers.0", "step": 0, "bytes": 0}
    where = {"ph": "X", "name": "model.layers.0", "cat": "compute", "pid": 1, "tid": 1}
    assert runs == [
        {**where, "ts": 0.0, "dur": 100.0, "args": {**details, "iteration": 0}},
        {**where, "ts": 100.0, "dur": 100.0, "args": {**details, "iteration": 1}},
    ]
    shares = {"workspace": 50, "inputs": 8, "weights that stay": 519, "activations": 30}
    assert [event for event in events if event["ph"] == "C"] == [
        {"ph": "C", "name": "device memory", "pid": 1, "tid": 0, "ts": time, "args": shares} for time in (0.0, 100.0)
    ]


@pytest.mark.parametrize(
    "view",
    [
        make_view(inference(4, k=2)),
        make_view(training(4, k=2)),
        make_view(inference(4, k=2), recording=recording_of(inference(4, k=2), MACHINE)),
        *(make_view(plan) for plan in PLANS.values()),
    ],
    ids=lambda view: f"{view.lanes[0].title}-{len(view.lanes)}",
)
def test_what_the_format_asks(view: View) -> None:
    """Every thread has a name, times are not negative, and no thread does two things at once."""
    events = events_of(view)
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    work: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            work[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert set(work) == named
    for spans in work.values():
        assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(sorted(spans)))
    n_bars = sum(len(lanes.bars) + len(lanes.waits) for lanes in view.lanes)
    assert len([event for event in events if event["ph"] == "X"]) == n_bars
    totals = [sum(event["args"].values()) for event in events if event["ph"] == "C"]
    assert tuple(totals) == view.memory.totals_bytes


def test_stalls_have_a_lane_of_their_own() -> None:
    events = events_of(make_view(training(1, k=2)))
    (stalls,) = [event["tid"] for event in events if event["ph"] == "M" and event["args"].get("name") == "stalls"]
    assert [(event["name"], event["ts"], event["dur"]) for event in events if event.get("cat") == "stall"] == [
        ("waits for model.embed (late)", 0, 512),
        ("waits for model.layers.0 (link)", 612, 412),
        ("waits for model.head (link)", 1124, 412),
        ("waits for model.head.backward (gradients)", 2036, 312),
        ("waits for model.embed.backward (gradients)", 2548, 824),
    ]
    assert {event["tid"] for event in events if event.get("cat") == "stall"} == {stalls}


def test_steps_count_as_milliseconds() -> None:
    runs = [event for event in events_of(make_view(PLANS["all_resident"])) if event["ph"] == "X"]
    assert [(event["ts"], event["dur"]) for event in runs] == [(index * STEP_US, STEP_US) for index in range(3)]


def test_graphs_are_processes() -> None:
    events = events_of(make_view(PLANS["all_resident"]), make_view(PLANS["tied_ends"]))
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == [
        "graph 1, planned: Plan for cuda:0: 3 pages, 3 layers, 3 steps",
        "graph 2, planned: Plan for cuda:0: 3 pages, 2 layers, 4 steps",
    ]
    assert {event["pid"] for event in events} == {1, 2}
