"""From a plan, and a recording where there is one, to all that a picture shows (`View`).

How: the plan is simulated once, on its own machine or on the one that was asked for; lanes, memory, rows, lines and the
curve are made of that, each in its ``show_*`` file. The odd case: where nothing is known of the machine there is no
simulation, and the picture shows steps and slots instead of times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spcompile.ir import Machine, Plan
from spcompile.lanes import Recording
from spcompile.planner.machine import find_machine
from spcompile.planner.simulate import Simulation, simulate
from spcompile.text import format_bytes
from spcompile.viz import show_figures
from spcompile.viz.find_rows import RowIndex, index_rows, make_rows, work_of
from spcompile.viz.show_curve import show_curve
from spcompile.viz.show_graph import show_graph
from spcompile.viz.show_lanes import (
    measured_lanes,
    planned_lanes,
    predicted_lanes,
    shown_iterations,
)
from spcompile.viz.show_memory import planned_stays, show_memory, simulated_stays
from spcompile.viz.view import Lanes, View, Work
from spcompile.viz.words import used_causes, used_words
from spcompile.wording import count


def make_view(
    plan: Plan,
    *,
    machine: str | Machine | None = None,
    recording: Recording | None = None,
    remarks: Sequence[str] = (),
) -> View:
    """Everything that a picture of the plan shows.

    Args:
        plan: one that the verifier accepts.
        machine: what copies are timed on, a profile's name or a machine; None: the plan's own.
        recording: of a run of this plan.
        remarks: sentences to show above the figures.

    Raises:
        OptionError: no profile has this name.
    """
    rows = index_rows(plan)
    timed_on = plan.machine if machine is None else find_machine(machine)
    shown = _planned(plan, rows) if timed_on is None else _simulated(plan, rows, timed_on, recording)
    measured = () if recording is None else (measured_lanes(plan, rows, recording),)
    lanes = (shown.lanes, *measured)
    peak_bytes = None if recording is None else recording.peak_bytes
    simulation = shown.simulation
    curve = () if timed_on is None or simulation is None else show_curve(plan, timed_on, simulation.iteration_us)
    causes = (wait.cause for each in lanes for wait in each.waits)
    is_emulated = recording is not None and recording.is_emulated
    return View(
        title=f"Plan for {plan.device}: {count(len(plan.pages), 'page')}, {count(len(plan.layers), 'layer')}, "
        f"{count(len(plan.steps), 'step')}",
        summary=show_figures.summary(plan, simulation),
        notes=(*remarks, *_notes(plan, timed_on, recording)),
        unit="step" if simulation is None else "us",
        figures=tuple(show_figures.figures(plan, timed_on, simulation, recording)),
        lanes=lanes,
        memory=show_memory(plan, shown.lanes, shown.stays, peak_bytes),
        rows=make_rows(plan, rows, shown.work, None if recording is None else _measured_work(rows, recording)),
        lines=tuple(show_graph(plan, rows)),
        curve=curve,
        causes=used_causes(causes),
        words=tuple(used_words(plan, has_times=simulation is not None, is_emulated=is_emulated)),
    )


@dataclass(frozen=True)
class _Shown:
    """What is predicted: lanes, stays in slots (start, end, bytes), and times by row."""

    lanes: Lanes
    stays: tuple[tuple[float, float, int], ...]
    work: list[Work] | None
    simulation: Simulation | None


def _planned(plan: Plan, rows: RowIndex) -> _Shown:
    lanes = planned_lanes(plan, rows)
    return _Shown(lanes, tuple(planned_stays(lanes.bars)), None, None)


def _simulated(plan: Plan, rows: RowIndex, machine: Machine, recording: Recording | None) -> _Shown:
    simulation = simulate(plan, machine)
    iterations = shown_iterations(plan, simulation, recording)
    lanes = predicted_lanes(plan, rows, simulation, iterations)
    zero_us = simulation.iteration_starts_us[iterations.start]
    stays = tuple(simulated_stays(plan, simulation.stays, zero_us))
    return _Shown(lanes, stays, work_of(rows, simulation.spans, simulation.stalls, simulation.typical), simulation)


def _measured_work(rows: RowIndex, recording: Recording) -> list[Work]:
    index = recording.typical
    return work_of(rows, recording.spans, recording.stalls_of(index), index)


def _notes(plan: Plan, machine: Machine | None, recording: Recording | None) -> Iterator[str]:
    if plan.note:
        yield f"{plan.note[0].upper()}{plan.note[1:]}."
    if machine is None:
        yield (
            "Nothing is known of the machine, so there are no times: the axis counts steps, and each page is shown "
            "from the step before which its copy may start. For times, choose a machine: visualize(machine='h100')."
        )
    elif plan.machine is None:
        yield f"The plan has no times for its steps; copies are timed on {machine.name}."
    elif plan.machine != machine:
        yield f"Copies are timed on {machine.name}; the times of steps are those of the plan, on {plan.machine.name}."
    if recording is not None and recording.is_emulated:
        yield "Measured on the emulated device: its times mean nothing but an order."
    if recording is not None and recording.plan != plan:
        yield "What was recorded is a run of another plan than the one that is shown."
    if plan.other_bytes:
        yield f"Other tensors of the process held {format_bytes(plan.other_bytes)} when the plan was made."
