"""The trade-off curve: what other budgets would buy, each point in words.

The plan that is shown is a point of its own, also where it lies above the curve, as a plan of explicit k and m may.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from spcompile.ir import Machine, Plan
from spcompile.planner.simulate import ROUNDING, predict_iteration_us
from spcompile.text import format_bytes
from spcompile.viz.view import CurvePoint
from spcompile.wording import count, format_us


def show_curve(plan: Plan, machine: Machine, iteration_us: float) -> tuple[CurvePoint, ...]:
    """The curve from the smallest plan up, and the plan that is shown, which takes ``iteration_us``."""
    plan = replace(plan, machine=machine)
    points = [CurvePoint(plan.peak_bytes(), iteration_us, describe(plan, iteration_us), is_chosen=True)]
    for each in plan.tradeoff():
        is_same = each.plan == plan or (each.peak_bytes, each.iteration_us) == (plan.peak_bytes(), iteration_us)
        if not is_same:
            meaning = describe(each.plan, predict_iteration_us(each.plan, machine), each.iteration_us)
            points.append(CurvePoint(each.peak_bytes, each.iteration_us, meaning, is_chosen=False))
    return tuple(sorted(points, key=lambda point: (point.peak_bytes, -point.iteration_us)))


def describe(plan: Plan, iteration_us: float, counted_us: float | None = None) -> str:
    """What a plan means, in words.

    Args:
        plan: the plan.
        iteration_us: as predicted.
        counted_us: more than that where no copy has anything to hide behind, see `TradeoffPoint`.
    """
    times = f"{format_us(iteration_us)} per iteration"
    if counted_us is not None and counted_us > iteration_us * (1 + ROUNDING):
        times += f", counted as {format_us(counted_us)}, as no copy overlaps with compute"
    return (
        f"{format_bytes(plan.peak_bytes())} of device memory: {times}. "
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
