"""Lanes and memory in the Chrome trace format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Source of the format: "Trace Event Format", by the Chromium project. Each graph, predicted or measured, is a process
and each lane a thread of it; work is complete events (``"X"``), stalls are on a lane of their own, device memory is
counters (``"C"``), and the names are metadata (``"M"``). Times are in microseconds, from 0 on: what began before the
first iteration that is shown is cut there. Where nothing has a time, one step counts as one millisecond.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from spcompile.viz.view import Bar, Lanes, Row, View

STEP_US = 1000.0
"""What a step counts as where no times are known."""

STALLS = "stalls"

Event = dict[str, Any]


def make_trace(views: Sequence[View]) -> str:
    """The text of the file, for all graphs."""
    events: list[Event] = []
    n_processes = 0
    for index, view in enumerate(views, start=1):
        graph = f"graph {index}, " if len(views) > 1 else ""
        for number, lanes in enumerate(view.lanes):
            n_processes += 1
            events.extend(_metadata(n_processes, f"{graph}{lanes.title}: {view.title}", _threads(lanes)))
            events.extend(_work(view, lanes, n_processes))
            if number == 0:
                events.extend(_memory(view, n_processes))
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, allow_nan=False)


def _threads(lanes: Lanes) -> list[str]:
    """Names of threads; where bars of a lane overlap, of one for each track. Their places are their numbers."""
    names = [
        name for lane in lanes.lanes for name in dict.fromkeys(_thread(bar) for bar in lanes.bars if bar.lane == lane)
    ]
    return [*names, STALLS] if lanes.waits else names


def _thread(bar: Bar) -> str:
    return bar.lane if bar.lane != "slots" else f"slots {bar.track}"


def _metadata(process: int, title: str, threads: Sequence[str]) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": title}}
    for number, name in enumerate(threads, start=1):
        thread = {"ph": "M", "pid": process, "tid": number}
        yield {**thread, "name": "thread_name", "args": {"name": name}}
        yield {**thread, "name": "thread_sort_index", "args": {"sort_index": number}}


def _work(view: View, lanes: Lanes, process: int) -> Iterator[Event]:
    scale = STEP_US if view.unit == "step" else 1.0
    threads = {name: number for number, name in enumerate(_threads(lanes), start=1)}
    for bar in lanes.bars:
        row: Row = view.rows[bar.row]
        details = {"layer": row.name, "step": bar.step, "bytes": bar.nbytes, "iteration": bar.iteration}
        thread = threads[_thread(bar)]
        yield _complete(bar.label, bar.lane, process, thread, bar.start * scale, bar.end * scale, details)
    causes = dict(view.causes)
    for wait in lanes.waits:
        details = {"layer": view.rows[wait.row].name, "step": wait.step, "cause": causes[wait.cause]}
        name = f"waits for {wait.page} ({wait.cause})"
        yield _complete(name, "stall", process, threads[STALLS], wait.start * scale, wait.end * scale, details)


def _complete(
    name: str, category: str, process: int, thread: int, start_us: float, end_us: float, details: Event
) -> Event:
    start_us, end_us = max(0.0, start_us), max(0.0, end_us)
    times = {"ts": start_us, "dur": end_us - start_us}
    return {"ph": "X", "name": name, "cat": category, "pid": process, "tid": thread, **times, "args": details}


def _memory(view: View, process: int) -> Iterator[Event]:
    scale = STEP_US if view.unit == "step" else 1.0
    shares = view.memory.shares
    for index, time in enumerate(view.memory.times):
        nbytes = {share.name: share.nbytes[index] for share in shares}
        yield {"ph": "C", "name": "device memory", "pid": process, "tid": 0, "ts": time * scale, "args": nbytes}
