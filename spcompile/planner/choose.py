"""The placement that a number of bytes, or a slowdown, leads to.

What: residents and window without k and m: the fastest plan that fits (`choose_fastest`), the smallest that is fast
enough (`choose_leanest`), and the whole curve between them (`find_tradeoff`).

How: memory is divided between residents, which need no copies, and slots, which let copies run ahead. Where the link
is the limit each resident saves its bytes, and two slots keep the link busy; where compute is, a copy only has to be
early enough. So for each of a few numbers of slots the rest of the memory is filled with residents, spread evenly
(``residents.py``), each such plan is replayed on the machine (``simulate.py``), and the best one is taken. A single
slot, in which nothing overlaps, has to be faster even if compute takes three times as long as predicted: it saves a
slot's bytes, but where the prediction errs it costs all overlap. Where pages are read again in one iteration, they are
kept between their uses (``gaps.py``) as far as there is room, or as there is beside one copy, or not at all. And all
this with and without reading embedding tables in place: a token needs one row of a table that is as large as a layer,
but its kernel then waits for the link.

The bound: for equal pages of one use each, and a given number of slots, no choice of residents moves fewer bytes; and
no schedule takes less than the longer of its compute and its copies (`Simulation.bound_us`), which tests compare with.
Elsewhere it is a heuristic, improved by exchanging single residents: of 300 small graphs of unequal pages that are read
again, tried in all ways, it found the fastest plan (within 0.5 %) for 296, and at worst one that takes 1.09 times as
long.

Without a machine nothing can be replayed: then the usual two slots are taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from spcompile.errors import OptionError
from spcompile.ir import Machine, Plan, align
from spcompile.planner.early import visits_of
from spcompile.planner.residents import smallest_capacity_bytes, spread_residents
from spcompile.planner.simulate import predict_iteration_us
from spcompile.planner.streaming import stream, stream_in_room

SLOT_COUNTS = (1, 2, 3, 4, 6, 8, 12)
"""Numbers of slots that are tried: what a window gains from one more slot shrinks with their number."""

UNSURE = 3
"""How many times as long as predicted compute may take for a plan without overlap to be still the faster one."""

ROOM_PERCENTS = (100, 105, 110, 120, 140, 170)
"""Room that is tried for the smallest plan, in percent of what its steps read at once."""

NEXT_TO_NOTHING = 1 / 16
"""A table whose rows are read in this part of the time of its copy is always read in place."""

EXCHANGES = 24
"""Exchanges of residents that are tried where pages are not all alike."""

CURVE_POINTS = 32
"""Capacities for which the trade-off curve is worked out."""


@dataclass(frozen=True)
class TradeoffPoint:
    """One plan on the curve of memory against time.

    Attributes:
        peak_bytes: as `Plan.peak_bytes`: the budget that leads to this plan.
        iteration_us: predicted time of an iteration; more where no copy overlaps with anything.
        plan: the plan.
    """

    peak_bytes: int
    iteration_us: float
    plan: Plan


def choose_fastest(
    graph: Plan, capacity_bytes: int, preferred: Collection[int] = (), *, share_bytes: int | None = None
) -> Plan:
    """The plan with the shortest predicted iteration whose weights fit; of equally fast ones the one that moves least.

    Args:
        graph: what is to be placed; where it is placed so far does not matter.
        capacity_bytes: device memory for weights, leftovers included.
        preferred: pages to keep resident before all others.
        share_bytes: the part of it that is for this graph; it takes more only for the smallest plan, and all of it
            unless given. Where not all weights fit into it, some are streamed.

    Raises:
        OptionError: even the smallest plan does not fit.
    """
    if share_bytes is not None and share_bytes < min(capacity_bytes, graph.weights_bytes):
        return _choose_within_share(graph, capacity_bytes, preferred, share_bytes)
    plans = list(_candidates(graph, capacity_bytes, preferred))
    if not plans:
        raise OptionError(
            f"{capacity_bytes:,} bytes of device memory for weights are too few: the smallest plan for this model "
            f"needs {least_capacity_bytes(graph):,} bytes"
        )
    best = min(plans, key=_cost)
    return _improve(best, capacity_bytes, preferred) if best.machine is not None and _is_irregular(best) else best


def _choose_within_share(graph: Plan, capacity_bytes: int, preferred: Collection[int], share_bytes: int) -> Plan:
    """The fastest plan that fits into a share which is too small for all weights; the smallest that streams at all
    where none does."""
    with suppress(OptionError):
        return choose_fastest(graph, share_bytes, preferred)
    smallest = min(_all_streamed(graph), key=lambda plan: plan.peak_weight_bytes)
    return smallest if smallest.peak_weight_bytes <= capacity_bytes else choose_fastest(graph, capacity_bytes)


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

    Addresses are not searched for, which would take nearly all of the time (19 s of 20 for a T5 of 24 layers) and
    moved no point of its curve down.

    Args:
        graph: what is to be placed, with a machine; where it is placed so far does not matter.
        preferred: pages to keep resident before all others.
    """
    assert graph.machine is not None, "times need a machine"
    least_bytes = least_capacity_bytes(graph)
    tried: dict[Plan, TradeoffPoint] = {}
    for index in range(CURVE_POINTS + 1):
        capacity_bytes = least_bytes + (graph.weights_bytes - least_bytes) * index // CURVE_POINTS
        for plan in _candidates(graph, capacity_bytes, preferred, search=False):
            if plan not in tried:
                tried[plan] = TradeoffPoint(plan.peak_bytes(), _careful_us(plan, graph.machine), plan)
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
    return min(everything, *_all_streamed(graph), key=lambda plan: plan.peak_weight_bytes)


def _all_streamed(graph: Plan) -> list[Plan]:
    """Everything streamed through as little as its steps read at once: in equal slots, and packed."""
    widest_bytes = max((sum(graph.pages[page].slot_bytes for page in pages) for pages in _needs(graph)), default=0)
    plans = [stream(graph, (), max(1, _widest(graph, ())), 1)]
    for percent in ROOM_PERCENTS:
        try:
            plans.append(stream_in_room(graph, (), align(widest_bytes * percent // 100)))
            break
        except ValueError:  # too much is lost between pages of different sizes
            continue
    return plans


def _candidates(graph: Plan, capacity_bytes: int, preferred: Collection[int], *, search: bool = True) -> Iterator[Plan]:
    if graph.weights_bytes <= capacity_bytes:
        yield stream(graph, range(len(graph.pages)), len(graph.pages), 1)
        return
    for each in _mappings(graph, preferred):
        yield from _placements(each, capacity_bytes, preferred, search)


def _mappings(graph: Plan, preferred: Collection[int] = ()) -> Iterator[Plan]:
    """The graph with no page read in place, and with all those whose rows come sooner than a copy of all of them.

    Where the rows take next to nothing, and nothing else reads the page, not reading it in place is no choice.
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
    elsewhere = {page for step in graph.steps for page in step.reads if page not in dict(step.gathers)}
    if not tables or any(parts[page] > NEXT_TO_NOTHING or page in elsewhere for page in tables):
        yield replace(graph, mapped=())


def _placements(graph: Plan, capacity_bytes: int, preferred: Collection[int], search: bool) -> Iterator[Plan]:
    page_bytes = [page.slot_bytes for page in graph.pages]
    reads = _needs(graph)
    room_bytes = capacity_bytes - graph.leftovers_bytes
    possible = [count for count in SLOT_COUNTS if smallest_capacity_bytes(page_bytes, reads, count) <= room_bytes]
    counts = possible if graph.machine is not None else [count for count in possible if count > 1][:1] or possible[:1]
    if not counts:
        smallest = _smallest(graph)
        yield from [smallest] if smallest.peak_weight_bytes <= capacity_bytes else []
    choices: dict[tuple[int, ...], int] = {}  # residents, and how many of the largest pages surely fit beside them
    for n_slots in counts:
        choices.setdefault(spread_residents(page_bytes, reads, room_bytes, preferred, n_slots), n_slots)
    if graph.machine is not None and _is_irregular(graph):
        # All other room for smaller pages beside the large ones, or for keeping pages between their uses.
        choices.setdefault(tuple(sorted(preferred)), 0)
    for residents, n_slots in choices.items():
        found = list(_streamed_beside(graph, residents, capacity_bytes, search=search))
        yield from found
        if not found and n_slots:  # too much is lost between pages of different sizes, but equal slots fit
            yield stream(graph, residents, max(n_slots, _widest(graph, residents)), 1)


def _streamed_beside(
    graph: Plan, residents: Collection[int], capacity_bytes: int, *, search: bool = True
) -> Iterator[Plan]:
    """The plans with these residents: without keeping pages between their uses, and with that if there are any."""
    room_bytes = capacity_bytes - graph.leftovers_bytes - sum(graph.pages[page].slot_bytes for page in residents)
    if room_bytes < 0:
        return
    visits = Counter(visit.page for visit in visits_of(_needs(graph)) if visit.page not in residents)
    reserves: list[int | None] = [None]
    if max(visits.values(), default=0) > 1:
        reserves += [max(graph.pages[page].slot_bytes for page in visits), 0]
    for reserve_bytes in reserves:
        with suppress(ValueError):
            yield stream_in_room(graph, residents, room_bytes, reserve_bytes=reserve_bytes, search=search)


def _is_irregular(graph: Plan) -> bool:
    """Whether pages differ in size, or are read again after others."""
    visits = visits_of(_needs(graph))
    pages = {visit.page for visit in visits}
    return len(pages) < len(visits) or len({graph.pages[page].slot_bytes for page in pages}) > 1


def _improve(best: Plan, capacity_bytes: int, preferred: Collection[int]) -> Plan:
    """Exchange single residents as long as that helps."""
    tries_left = EXCHANGES
    cost = _cost(best)
    while True:
        streamed = sorted({each.page for each in best.intervals}, key=lambda page: -best.pages[page].nbytes)
        loose = [page for page in best.residents if page not in preferred]
        sets = [{*best.residents, page} for page in streamed]
        sets += [{*best.residents, page} - {other} for other in loose for page in streamed]
        sets += [set(best.residents) - {other} for other in loose]
        for residents in sets:
            if not tries_left:
                return best
            found = min(_streamed_beside(best, sorted(residents), capacity_bytes), key=_cost, default=None)
            if found is None:
                continue
            tries_left -= 1
            if _cost(found) < cost:
                best, cost = found, _cost(found)
                break
        else:
            return best


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
    return float(f"{_careful_us(plan, plan.machine):.3g}"), plan.bytes_moved


def _careful_us(plan: Plan, machine: Machine) -> float:
    """The predicted time; more where no copy has anything to hide behind if compute takes longer than predicted."""
    has_overlap = plan.k > 1 or not plan.intervals
    compute_us = 0.0 if has_overlap else sum(step.compute_us for step in plan.steps)
    return predict_iteration_us(plan, machine) + (UNSURE - 1) * compute_us
