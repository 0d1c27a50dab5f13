"""The placement that a number of bytes, or a slowdown, leads to.

What: residents and window without k and m: the fastest plan that fits (`choose_fastest`), the smallest that is fast
enough (`choose_leanest`), and the whole curve between them (`find_tradeoff`).

How: memory is divided between residents, which need no copies, and slots, which let copies run ahead. Where the link
is the limit each resident saves its bytes, and two slots keep the link busy; where compute is, a copy only has to be
early enough. So for each of a few numbers of slots the rest of the memory is filled with residents, spread evenly
(``residents.py``), each such plan is replayed on the machine (``simulate.py``), and the best one is taken. A single
slot, in which nothing overlaps, is the last resort of a small budget: where the link is the limit it would save some
bytes, but where the prediction errs it costs all overlap. All this is tried with and without reading embedding tables
in place: a token needs one row of a table that is as large as a layer, but its kernel then waits for the link.

The bound: for equal pages of one use each, and a given number of slots, no choice of residents moves fewer bytes; and
no schedule takes less than the longer of its compute and its copies (`Simulation.bound_us`), which tests compare with.

Without a machine nothing can be replayed: then the usual two slots are taken.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from spcompile.errors import OptionError
from spcompile.ir import Plan, align
from spcompile.planner.residents import smallest_capacity_bytes, spread_residents
from spcompile.planner.simulate import predict_iteration_us
from spcompile.planner.streaming import stream, stream_in_room

SLOT_COUNTS = (2, 3, 4, 6, 8, 12)
"""Numbers of slots that are tried: what a window gains from one more slot shrinks with their number."""

ROOM_PERCENTS = (100, 105, 110, 120, 140, 170)
"""Room that is tried for the smallest plan, in percent of what its steps read at once."""

NEXT_TO_NOTHING = 1 / 16
"""A table whose rows are read in this part of the time of its copy is always read in place."""

CURVE_POINTS = 32
"""Capacities for which the trade-off curve is worked out."""


@dataclass(frozen=True)
class TradeoffPoint:
    """One plan on the curve of memory against time.

    Attributes:
        peak_bytes: as `Plan.peak_bytes`: the budget that leads to this plan.
        iteration_us: predicted time of an iteration.
        plan: the plan.
    """

    peak_bytes: int
    iteration_us: float
    plan: Plan


def choose_fastest(graph: Plan, capacity_bytes: int, preferred: Collection[int] = ()) -> Plan:
    """The plan with the shortest predicted iteration whose weights fit; of equally fast ones the one that moves least.

    Args:
        graph: what is to be placed; where it is placed so far does not matter.
        capacity_bytes: device memory for weights, leftovers included.
        preferred: pages to keep resident before all others.

    Raises:
        OptionError: even the smallest plan does not fit.
    """
    plans = list(_candidates(graph, capacity_bytes, preferred))
    if not plans:
        raise OptionError(
            f"{capacity_bytes:,} bytes of device memory for weights are too few: the smallest plan for this model "
            f"needs {least_capacity_bytes(graph):,} bytes"
        )
    return min(plans, key=_cost)


def choose_leanest(
    graph: Plan, max_slowdown: float, capacity_bytes: int | None = None, preferred: Collection[int] = ()
) -> Plan:
    """The plan that needs least memory among those that are predicted to be fast enough.

    Args:
        graph: what is to be placed, with a machine; where it is placed so far does not matter.
        max_slowdown: times the compute of an iteration with all weights in place.
        capacity_bytes: device memory for weights; None: as much as they take.
        preferred: pages to keep resident before all others.

    Raises:
        OptionError: no plan that fits is fast enough.
    """
    compute_us = sum(step.compute_us for step in graph.steps)
    fitting = [
        point
        for point in find_tradeoff(graph, preferred)
        if capacity_bytes is None or point.plan.peak_weight_bytes <= capacity_bytes
    ]
    quick = [point for point in fitting if point.iteration_us <= max_slowdown * compute_us * (1 + 1e-9)]
    if quick:
        return min(quick, key=lambda point: (point.peak_bytes, point.iteration_us)).plan
    reached = min((point.iteration_us / compute_us for point in fitting), default=None)
    fastest = "no plan fits" if reached is None else f"the fastest plan that fits takes {reached:.2f} times as long"
    raise OptionError(f"option 'max_slowdown' = {max_slowdown} cannot be kept in the memory that is free: {fastest}")


def find_tradeoff(graph: Plan, preferred: Collection[int] = ()) -> tuple[TradeoffPoint, ...]:
    """Memory against time: no point is both larger and slower than another one. From the smallest plan up.

    Args:
        graph: what is to be placed, with a machine; where it is placed so far does not matter.
        preferred: pages to keep resident before all others.
    """
    assert graph.machine is not None, "times need a machine"
    least_bytes = least_capacity_bytes(graph)
    tried: dict[Plan, TradeoffPoint] = {}
    for index in range(CURVE_POINTS + 1):
        capacity_bytes = least_bytes + (graph.weights_bytes - least_bytes) * index // CURVE_POINTS
        for plan in _candidates(graph, capacity_bytes, preferred):
            if plan not in tried:
                tried[plan] = TradeoffPoint(plan.peak_bytes(), predict_iteration_us(plan, graph.machine), plan)
    curve: list[TradeoffPoint] = []
    for point in sorted(tried.values(), key=lambda each: (each.peak_bytes, each.iteration_us)):
        if not curve or point.iteration_us < curve[-1].iteration_us * (1 - 1e-9):
            curve.append(point)
    return tuple(curve)


def least_capacity_bytes(graph: Plan) -> int:
    """Device memory for weights that the smallest plan needs."""
    return min(_smallest(each).peak_weight_bytes for each in _mappings(graph))


def _smallest(graph: Plan) -> Plan:
    """Everything streamed through as little as its steps read at once; or all resident where that is less, as room for
    what is streamed is rounded up."""
    everything = stream(graph, range(len(graph.pages)), len(graph.pages), 1)
    widest_bytes = max((sum(graph.pages[page].slot_bytes for page in pages) for pages in _needs(graph)), default=0)
    plans = [everything, stream(graph, (), max(1, _widest(graph, ())), 1)]
    for percent in ROOM_PERCENTS:
        try:
            plans.append(stream_in_room(graph, (), align(widest_bytes * percent // 100)))
            break
        except ValueError:  # too much is lost between pages of different sizes
            continue
    return min(plans, key=lambda plan: plan.peak_weight_bytes)


def _candidates(graph: Plan, capacity_bytes: int, preferred: Collection[int]) -> Iterator[Plan]:
    if graph.weights_bytes <= capacity_bytes:
        yield stream(graph, range(len(graph.pages)), len(graph.pages), 1)
        return
    for each in _mappings(graph, preferred):
        yield from _placements(each, capacity_bytes, preferred)


def _mappings(graph: Plan, preferred: Collection[int] = ()) -> Iterator[Plan]:
    """The graph with no page read in place, and with all those whose rows come sooner than a copy of all of them.

    Where the rows take next to nothing, not reading in place is no choice.
    """
    machine = graph.machine
    parts: dict[int, float] = {}  # of the time that a copy of the whole page takes
    for page, nbytes in (each for step in graph.steps for each in step.gathers):
        if machine is not None and page not in preferred:
            copy_us = machine.copy_time_us(graph.pages[page].nbytes)
            parts[page] = parts.get(page, 0.0) + (machine.gather_time_us(nbytes) / copy_us if copy_us else 1.0)
    tables = tuple(sorted(page for page, part in parts.items() if part < 1))
    if tables:
        yield replace(graph, mapped=tables)
    if any(parts[page] > NEXT_TO_NOTHING for page in tables) or not tables:
        yield replace(graph, mapped=())


def _placements(graph: Plan, capacity_bytes: int, preferred: Collection[int]) -> Iterator[Plan]:
    page_bytes = [page.slot_bytes for page in graph.pages]
    reads = _needs(graph)
    room_bytes = capacity_bytes - graph.leftovers_bytes
    possible = [count for count in SLOT_COUNTS if smallest_capacity_bytes(page_bytes, reads, count) <= room_bytes]
    counts = possible if graph.machine is not None else possible[:1]
    if not possible and smallest_capacity_bytes(page_bytes, reads, 1) <= room_bytes:
        counts = [1]
    if not counts:
        smallest = _smallest(graph)
        yield from [smallest] if smallest.peak_weight_bytes <= capacity_bytes else []
    seen: set[tuple[int, ...]] = set()
    for n_slots in counts:
        residents = spread_residents(page_bytes, reads, room_bytes, preferred, n_slots)
        if residents in seen:
            continue
        seen.add(residents)
        try:
            yield stream_in_room(graph, residents, room_bytes - sum(page_bytes[page] for page in residents))
        except ValueError:  # too much is lost between pages of different sizes: equal slots always fit
            yield stream(graph, residents, max(n_slots, _widest(graph, residents)), 1)


def _widest(graph: Plan, residents: Collection[int]) -> int:
    """Most streamed pages that one step reads."""
    kept = frozenset(residents)
    return max((sum(page not in kept for page in pages) for pages in _needs(graph)), default=0)


def _needs(graph: Plan) -> list[tuple[int, ...]]:
    return [graph.needs(step) for step in range(len(graph.steps))]


def _cost(plan: Plan) -> tuple[float, int]:
    if plan.machine is None:
        return 0.0, plan.bytes_moved
    # Predictions are not that exact: what agrees in three digits counts as equally fast.
    return float(f"{predict_iteration_us(plan, plan.machine):.3g}"), plan.bytes_moved
