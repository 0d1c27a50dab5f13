"""The trade-off curve: what other budgets would buy, each point in words.

The plan that is shown is a point of its own, also where it lies above the curve, as a plan of explicit k and m may.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from spcompile.ir import Machine, Plan
from spcompile.text import format_bytes
from spcompile.viz.view import CurvePoint
from spcompile.viz.words import count, format_time


def show_curve(plan: Plan, machine: Machine, iteration_us: float) -> tuple[CurvePoint, ...]:
    """The curve from the smallest plan up, and the plan that is shown, which takes ``iteration_us``."""
    curve = replace(plan, machine=machine).tradeoff()
    points = [
        CurvePoint(point.peak_bytes, point.iteration_us, describe(point.plan, point.iteration_us), is_chosen=False)
        for point in curve
    ]
    chosen = CurvePoint(plan.peak_bytes(), iteration_us, describe(plan, iteration_us), is_chosen=True)
    same = [point for point in points if (point.peak_bytes, point.iteration_us) != (chosen.peak_bytes, iteration_us)]
    return tuple(sorted([*same, chosen], key=lambda point: (point.peak_bytes, -point.iteration_us)))


def describe(plan: Plan, iteration_us: float) -> str:
    """What a plan means, in a sentence."""
    return (
        f"{format_bytes(plan.peak_bytes())} of device memory: {format_time(iteration_us)} per iteration. "
        f"{', '.join(_placed(plan))}; {format_bytes(plan.bytes_moved)} are copied to the device per iteration."
    )


def _placed(plan: Plan) -> Iterator[str]:
    streamed = {interval.page for interval in plan.intervals}
    yield f"{count(len(plan.residents), 'page')} resident"
    if streamed:
        yield f"{len(streamed)} streamed, at most {plan.k} of them in slots"
    in_place = set(plan.mapped) - streamed
    if in_place:
        yield f"{len(in_place)} read in place"
