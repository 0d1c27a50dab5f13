"""The lanes of a picture: from a simulation, from a recording, or from the plan alone where nothing has a time.

How: all three come down to bars with a start and an end. A simulation shows the last iteration before its last period
ends, and the one before it where iterations reach into each other; a recording shows its typical iteration.
Both begin at 0, so that one can be compared with the other.

The odd case: a plan with no known times has no order of copies to show. There a page's stay in its slot is a bar, from
the step before which its copy may start to the step after which it is evicted, and one step is one unit of time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from spcompile.ir import Plan
from spcompile.lanes import Recording, Span, Stall
from spcompile.planner.simulate import Simulation
from spcompile.viz.find_rows import RowIndex
from spcompile.viz.view import Bar, Lanes, Part, Wait

LANES = ("compute", "H2D", "D2H", "slots")
"""From top to bottom."""

MOST_STEPS_TWICE = 200
"""Of plans with more steps one iteration is shown, as two could no longer be told apart."""


def shown_iterations(plan: Plan, simulation: Simulation, recording: Recording | None) -> range:
    """Which iterations of a simulation are shown."""
    is_twice = plan.wraps and recording is None and len(plan.steps) <= MOST_STEPS_TWICE and simulation.typical > 1
    return range(simulation.typical - is_twice, simulation.typical + 1)


def predicted_lanes(plan: Plan, rows: RowIndex, simulation: Simulation, shown: range) -> Lanes:
    """What is predicted to happen in these iterations of a simulation."""
    stalls = [(index, stall) for index, stalls in enumerate(simulation.stalls_by_iteration) for stall in stalls]
    starts_us = simulation.iteration_starts_us
    return _timed_lanes("predicted", plan, rows, simulation.spans, stalls, starts_us, starts_us[1:], shown)


def measured_lanes(plan: Plan, rows: RowIndex, recording: Recording) -> Lanes:
    """What happened in one recorded iteration."""
    index = recording.typical
    starts_us, ends_us = recording.iteration_starts_us, recording.iteration_ends_us
    stalls = [(index, stall) for stall in recording.stalls_of(index)]
    return _timed_lanes("measured", plan, rows, recording.spans, stalls, starts_us, ends_us, range(index, index + 1))


def planned_lanes(plan: Plan, rows: RowIndex) -> Lanes:
    """Steps, and the stays of pages in slots, with the step as the unit of time."""
    n_steps = len(plan.steps)
    n_shown = 2 if plan.wraps and plan.intervals and n_steps <= MOST_STEPS_TWICE else 1
    bars = [
        Bar(
            "compute",
            each.segment,
            rows.of_step[step],
            step,
            None,
            iteration,
            at,
            at + 1,
            at,
            plan.gathered_bytes(step),
        )
        for iteration in range(n_shown)
        for step, each in enumerate(plan.steps)
        for at in (float(iteration * n_steps + step),)
    ]
    stays = []
    for iteration in range(n_shown + 1):
        for index, interval in enumerate(plan.intervals):
            load_step, first = plan.load_step(interval), iteration * n_steps
            start, end = float(first + interval.start_step), float(first + interval.end_step)
            if start >= n_shown * n_steps or end <= 0:
                continue
            arrives = float(first + load_step) if load_step >= 0 else end
            label, nbytes = plan.pages[interval.page].name, plan.pages[interval.page].nbytes
            row = rows.of_page[interval.page]
            stays.append(Bar("slots", label, row, load_step, index, iteration, start, end, arrives, nbytes))
    starts = [float(iteration * n_steps) for iteration in range(n_shown + 1)]
    parts = tuple(_parts(plan, bars, starts[:-1], starts[1:], range(n_shown)))
    return _lanes("planned", [*bars, *_on_tracks(stays)], (), parts)


def _timed_lanes(
    title: str,
    plan: Plan,
    rows: RowIndex,
    spans: Iterable[Span],
    stalls: Iterable[tuple[int, Stall]],
    starts_us: Sequence[float],
    ends_us: Sequence[float],
    shown: range,
) -> Lanes:
    """Lanes of the iterations ``shown``: all spans that reach into them, and their own stalls."""
    zero_us, end_us = starts_us[shown.start], ends_us[shown.stop - 1]
    intervals = {(plan.pages[each.page].name, plan.load_step(each)): index for index, each in enumerate(plan.intervals)}
    bars = [
        _bar(plan, rows, intervals, span, zero_us, shown.start)
        for span in spans
        if (span.start_us < end_us and span.end_us > zero_us)
        or (span.lane == "compute" and span.iteration in shown)  # also where it takes no time
    ]
    waits = tuple(
        Wait(
            rows.of_stall(stall),
            stall.step,
            iteration - shown.start,
            stall.start_us - zero_us,
            stall.start_us + stall.us - zero_us,
            stall.page,
            stall.cause,
        )
        for iteration, stall in stalls
        if iteration in shown
    )
    starts, ends = ([times[index] - zero_us for index in shown] for times in (starts_us, ends_us))
    return _lanes(title, bars, waits, tuple(_parts(plan, bars, starts, ends, range(len(shown)))))


def _bar(
    plan: Plan, rows: RowIndex, intervals: Mapping[tuple[str, int], int], span: Span, zero_us: float, first: int
) -> Bar:
    interval = intervals.get((span.label, span.step)) if span.lane == "H2D" else None
    if interval is not None:
        nbytes = plan.pages[plan.intervals[interval].page].nbytes
    elif span.lane == "H2D":
        nbytes = 0  # for another graph of the model
    else:
        nbytes = plan.steps[span.step].gradients_bytes if span.lane == "D2H" else plan.gathered_bytes(span.step)
    row = rows.of_span(span)
    start, end = span.start_us - zero_us, span.end_us - zero_us
    return Bar(span.lane, span.label, row, span.step, interval, span.iteration - first, start, end, start, nbytes)


def _lanes(title: str, bars: Sequence[Bar], waits: tuple[Wait, ...], parts: tuple[Part, ...]) -> Lanes:
    used = {bar.lane for bar in bars}
    order = tuple(sorted(bars, key=lambda bar: (LANES.index(bar.lane), bar.start, bar.end)))
    return Lanes(title, tuple(lane for lane in LANES if lane in used), order, waits, parts)


def _parts(
    plan: Plan, bars: Iterable[Bar], starts: Sequence[float], ends: Sequence[float], iterations: range
) -> Iterator[Part]:
    """Iterations; in training each as forward and backward."""
    begins = {bar.iteration: bar.start for bar in bars if bar.lane == "compute" and bar.step == plan.backward_step}
    for iteration, start, end in zip(iterations, starts, ends, strict=True):
        which = f" {iteration + 1}" if len(iterations) > 1 else ""
        if iteration not in begins:
            yield Part(f"iteration{which}", start, end)
            continue
        yield Part(f"forward{which}", start, begins[iteration])
        yield Part(f"backward{which}", begins[iteration], end)


def _on_tracks(stays: Iterable[Bar]) -> Iterator[Bar]:
    """Bars that overlap one below the other, as few tracks as that takes."""
    free_from: list[float] = []
    for bar in sorted(stays, key=lambda each: (each.start, each.end)):
        track = next((index for index, time in enumerate(free_from) if time <= bar.start), len(free_from))
        free_from[track : track + 1] = [bar.end]
        yield replace(bar, track=track)
