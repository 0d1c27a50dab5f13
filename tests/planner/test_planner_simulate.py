"""The simulation: by hand on small chains, against the runtime's own events, and by what must always hold.

`timed` is the second opinion: it knows no plan, only what the runtime did with which slot in which order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from typing import TypeVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import spcompile
from spcompile.ir import Interval, Machine, Plan, Slot, Step, Weight
from spcompile.lanes import Span, Stall, Stay
from spcompile.planner import simulate as simulate_module
from spcompile.planner.machine import PROFILES
from spcompile.planner.make_plan import make_plan
from spcompile.planner.simulate import Simulation, predict_iteration_us, simulate
from spcompile.planner.streaming import stream_in_room
from tests.hand_plans import PLANS, page
from tests.planner.planner_cases import READS, Reads, chain
from tests.random_plans import graphs
from tests.running import Event, Run, compile_offloaded, expected_events, with_steps
from tests.slow_device import SlowStreams, Wait
from tests.slow_device import Work as SlowWork

MACHINE = replace(PROFILES["h100"], name="one byte per us", copy_us=0.0, h2d_bytes_per_s=1e6)
"""A page of n bytes takes n us."""

T = TypeVar("T")

Work = tuple[str, str, float, float]
"""Lane, page or segment, start and end in us."""


def plan_of(
    reads: Sequence[Sequence[int]],
    page_us: Sequence[int],
    step_us: Sequence[float],
    k: int,
    m: int = 1,
    *,
    wraps: bool = True,
    activations_bytes: int = 0,
) -> Plan:
    """A plan for `MACHINE`: one weight for each page."""
    return make_plan(
        device="cpu",
        pages=tuple(page(f"p{index}", nbytes) for index, nbytes in enumerate(page_us)),
        leftovers=(Weight("leftover", 7),),
        steps=tuple(
            Step(f"s{index}", None, tuple(pages), float(compute_us), activations_bytes)
            for index, (pages, compute_us) in enumerate(zip(reads, step_us, strict=True))
        ),
        wraps=wraps,
        k=k,
        m=m,
    )


def chain_of(n: int, copy_us: int, compute_us: float, k: int, m: int = 1, *, wraps: bool = True) -> Plan:
    return plan_of(chain(n), [copy_us] * n, [compute_us] * n, k, m, wraps=wraps)


def lane(simulation: Simulation, name: str) -> list[Span]:
    return [span for span in simulation.spans if span.lane == name]


def work_of(simulation: Simulation, name: str) -> list[Work]:
    return [(each.lane, each.label, each.start_us, each.end_us) for each in lane(simulation, name)]


def timed(events: Iterable[Event], plan: Plan, machine: Machine) -> tuple[list[Work], list[Work]]:
    """Copies and runs, from the runtime's events: what its streams make of each call, with times in place of events.

    ``events``: as `PageStore.log` has them, runs by the index of their step.
    """
    nbytes = {page.name: page.nbytes for page in plan.pages}
    copies, runs = list[Work](), list[Work]()
    now_us = link_us = wait_us = began_us = 0.0
    arrived_us: dict[int, float] = {}  # by slot
    freed_us: dict[int, float] = {}
    for event in events:
        match event:
            case ("begin", _):
                began_us = now_us
            case ("prefetch" | "load" as why, str(name), int(slot), str(how)):
                if how == "copy":
                    waits_us = [freed_us[other] for other in freed_us if meet(plan.slots[slot], plan.slots[other])]
                    start_us = max([link_us, began_us, *waits_us])
                    link_us = arrived_us[slot] = start_us + machine.copy_time_us(nbytes[name])
                    copies.append(("H2D", name, start_us, link_us))
                if why == "load":
                    wait_us = max(wait_us, arrived_us[slot])
            case ("evict", _, int(slot)):
                freed_us[slot] = now_us
            case ("run", int(step)):
                start_us = max(now_us, wait_us)
                now_us = start_us + plan.steps[step].compute_us
                runs.append(("compute", plan.steps[step].segment, start_us, now_us))
            case _:
                raise AssertionError(event)
    return copies, runs


def meet(one: Slot, other: Slot) -> bool:
    return one.offset_bytes < other.offset_bytes + other.nbytes and other.offset_bytes < one.offset_bytes + one.nbytes


def assert_same_work(found: Sequence[Work], expected: Sequence[Work]) -> None:
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    assert [each[2:] for each in found] == [pytest.approx(each[2:]) for each in expected]


@st.composite
def plans(draw: st.DrawFn, wraps: bool | None = None) -> Plan:
    """Any order of reading, and pages and steps of any length."""
    reads: Reads = draw(READS)
    n_pages = len({page for pages in reads for page in pages})
    least = max((1, *map(len, reads)))
    k = draw(st.integers(least, max(least, n_pages)))
    times = st.sampled_from([0, 1, 2, 3, 10, 50, 300])
    return plan_of(
        reads,
        [draw(times) for _ in range(n_pages)],
        [draw(times) for _ in reads],
        k,
        draw(st.integers(1, k)),
        wraps=draw(st.booleans()) if wraps is None else wraps,
        activations_bytes=draw(st.sampled_from([0, 5])),
    )


def packed(plan: Plan) -> Plan:
    """The same stays with an address for each, fixed for all iterations, so that ranges overlap that are not equal.

    Where a page is still in place when the next iteration's would come there, that copy waits until it is gone.
    """
    starts, places, end_bytes = dict[int, int](), list[Slot](), 0
    earliest = 1 - len(plan.steps)
    intervals: list[Interval] = []
    for index, interval in enumerate(plan.intervals):
        nbytes = plan.pages[interval.page].slot_bytes
        taken = [places[other] for other, each in enumerate(plan.intervals[:index]) if is_beside(each, interval)]
        offset_bytes = min(
            (
                candidate
                for candidate in (0, *(slot.offset_bytes + slot.nbytes for slot in taken))
                if not any(meet(Slot(candidate, nbytes), slot) for slot in taken)
            ),
        )
        places.append(Slot(offset_bytes, nbytes))
        end_bytes = max(end_bytes, offset_bytes + nbytes)
    for index, interval in enumerate(plan.intervals):
        starts[index] = interval.start_step
        if interval.start_step <= 0 and plan.wraps:
            ends = [each.end_step for other, each in enumerate(plan.intervals) if meet(places[other], places[index])]
            same = [each.end_step for each in plan.intervals if each.page == interval.page]
            earliest = max(earliest, interval.start_step, *(end - len(plan.steps) for end in (*ends, *same)))
            starts[index] = min(earliest, 0)
        intervals.append(replace(interval, start_step=starts[index], slots=(index,)))
    return replace(plan, slots=tuple(places), intervals=tuple(intervals), period=1)


def is_beside(one: Interval, other: Interval) -> bool:
    """Whether two stays of one iteration meet."""
    return max(one.start_step, other.start_step, 0) < min(one.end_step, other.end_step)


# By hand. Pages of 10 us unless a line says otherwise; a prime marks the next iteration.


def test_k_1_overlaps_nothing() -> None:
    simulation = simulate(chain_of(3, 10, 4, k=1), MACHINE)
    assert simulation.iteration_us == pytest.approx(3 * (10 + 4))
    assert simulation.cold_us == pytest.approx(42)
    assert [(stall.step, stall.page, stall.cause) for stall in simulation.stalls] == [
        (0, "p0", "room"),
        (1, "p1", "room"),
        (2, "p2", "room"),
    ]
    assert [stall.us for stall in simulation.stalls] == pytest.approx([10, 10, 10])


def test_link_bound() -> None:
    """Copies stand end to end: 0 to 10, 10 to 20, ...; each step waits for its own, 10 us after the one before."""
    simulation = simulate(chain_of(5, 10, 4, k=2), MACHINE)
    assert [simulation.iteration_us, simulation.link_us, simulation.bound_us] == pytest.approx([50] * 3)
    assert simulation.compute_us == 20
    assert simulation.cold_us == pytest.approx(54)
    assert {stall.cause for stall in simulation.stalls} == {"link"}
    assert [stall.us for stall in simulation.stalls] == pytest.approx([6] * 5)
    copies = lane(simulation, "H2D")
    assert [(span.label, span.step, span.iteration) for span in copies[:7]] == [
        *((f"p{index}", index, 0) for index in range(5)),
        ("p0", 0, 1),
        ("p1", 1, 1),
    ]
    assert [span.start_us for span in copies[:7]] == pytest.approx([0, 10, 20, 30, 40, 50, 60])


def test_compute_bound() -> None:
    """Only the cold iteration waits, for its first page."""
    simulation = simulate(chain_of(5, 10, 25, k=2), MACHINE)
    assert [simulation.iteration_us, simulation.compute_us, simulation.bound_us] == pytest.approx([125] * 3)
    assert simulation.stalls == ()
    assert simulation.cold_us == pytest.approx(135)


def test_room_is_the_cause_where_the_link_waits_for_a_slot() -> None:
    """During step 2 page 0 comes into the slot of page 1; pages 1 and 2 come too late.

    Say that step 2 ends at 0 us. Its slot goes to page 1, which comes at 10; step 0 has ended at 2, so page 2 could
    start then, but starts at 10.
    """
    plan = plan_of(chain(3), [10, 10, 10], [2, 2, 40], k=2)
    simulation = simulate(plan, MACHINE)
    assert [(stall.step, stall.page, stall.cause) for stall in simulation.stalls] == [
        (1, "p1", "room"),
        (2, "p2", "link"),
    ]
    assert [stall.us for stall in simulation.stalls] == pytest.approx([8, 8])
    assert simulation.iteration_us == pytest.approx(60)


def test_link_idled_on_behalf_of_a_copy_before() -> None:
    """Page 3 has a slot of its own, but stands in the queue behind page 2, which waits for that of page 0.

    Step 0 ends at 110 us, pages 2 and 3 come at 120 and 130.
    """
    plan = plan_of(chain(4), [10] * 4, [100, 1, 1, 1], k=3, wraps=False)
    slots = (Slot(0, 256), Slot(256, 256), Slot(512, 256))
    spans = ((0, 0, 1, 0), (1, 0, 2, 1), (2, 1, 3, 0), (3, 1, 4, 2))
    intervals = tuple(Interval(page, start, end, (slot,)) for page, start, end, slot in spans)
    simulation = simulate(replace(plan, slots=slots, intervals=intervals), MACHINE)
    assert [(stall.step, stall.page, stall.cause) for stall in simulation.stalls] == [
        (0, "p0", "late"),
        (2, "p2", "room"),
        (3, "p3", "room"),
    ]


def test_nothing_is_prefetched_across_iterations_without_wrapping() -> None:
    """Each iteration begins cold: its copies wait for the end of the one before."""
    simulation = simulate(chain_of(4, 10, 12, k=2, wraps=False), MACHINE)
    assert [simulation.iteration_us, simulation.cold_us] == pytest.approx([10 + 4 * 12] * 2)
    assert [(stall.step, stall.cause) for stall in simulation.stalls] == [(0, "late")]
    first = [span for span in lane(simulation, "H2D") if span.label == "p0"]
    assert [span.start_us for span in first] == pytest.approx([index * 58 for index in range(len(first))])


def test_a_stall_names_the_last_page_to_arrive() -> None:
    """The iteration that begins at 45 us copies p0 until 55 and p1 until 85."""
    plan = replace(
        plan_of(((0, 1),), [10, 30], [5], k=2, wraps=False),
        residents=(),
        slots=(Slot(0, 256), Slot(256, 256)),
        intervals=(Interval(0, 0, 1, (0,)), Interval(1, 0, 1, (1,))),
    )
    (stall,) = simulate(plan, MACHINE, iterations=2).stalls
    assert (stall.start_us, stall.us) == pytest.approx((45, 40))
    assert stall == Stall(0, stall.start_us, stall.us, "p1", "link")


def test_all_resident() -> None:
    simulation = simulate(chain_of(3, 10, 4, k=3), MACHINE)
    assert (simulation.iteration_us, simulation.cold_us, simulation.link_us) == (12, 12, 0)
    assert lane(simulation, "H2D") == [] == list(simulation.stalls)
    assert simulation.memory == ((0, 37),)


def test_no_steps() -> None:
    simulation = simulate(plan_of((), [], [], k=1), MACHINE)
    assert (simulation.iteration_us, simulation.spans, simulation.memory) == (0, (), ((0, 7),))
    assert predict_iteration_us(plan_of((), [], [], k=1), MACHINE) == 0


def test_memory_is_a_staircase() -> None:
    """k = 1: the page from the start of its copy to the end of its step, activations only during the step."""
    plan = plan_of(chain(2), [10, 20], [4, 5], k=1, activations_bytes=100)
    memory = simulate(plan, MACHINE, iterations=2).memory
    assert [nbytes for _, nbytes in memory[:6]] == [17, 117, 27, 127, 17, 117]
    assert [time_us for time_us, _ in memory[:6]] == pytest.approx([0, 10, 14, 34, 39, 49])


def test_stays_in_slots() -> None:
    """The same, page by page: copied, there, evicted; the last one is for an iteration that is not simulated."""
    plan = plan_of(chain(2), [10, 20], [4, 5], k=1)
    simulation = simulate(plan, MACHINE, iterations=2)
    assert simulation.iteration_starts_us == pytest.approx((0, 39, 78))
    assert simulation.stays == (
        Stay(0, 0, 0.0, 10.0, 14.0),
        Stay(1, 0, 14.0, 34.0, 39.0),
        Stay(0, 1, 39.0, 49.0, 53.0),
        Stay(1, 1, 53.0, 73.0, 78.0),
        Stay(0, 2, 78.0, 88.0, None),
    )


def test_stalls_of_every_iteration() -> None:
    """The cold iteration waits for its first page, which the warm ones have been prefetched."""
    simulation = simulate(chain_of(3, 10, 40, k=2), MACHINE)
    assert simulation.stalls_by_iteration[0] == (Stall(0, 0.0, 10.0, "p0", "late"),)
    assert set(simulation.stalls_by_iteration[1:]) == {()} == {simulation.stalls}


def test_copies_for_the_iteration_that_would_follow_are_shown() -> None:
    simulation = simulate(chain_of(5, 10, 4, k=2), MACHINE, iterations=3)
    assert [(span.label, span.iteration) for span in lane(simulation, "H2D")[-2:]] == [("p0", 3), ("p1", 3)]
    assert max(span.iteration for span in lane(simulation, "compute")) == 2


def test_slots_that_change_places_are_one_phase() -> None:
    """Seven pages in three slots come round after three iterations, but in time each is as the one before."""
    plan = chain_of(7, 10, 9, k=3)
    assert plan.period == 3
    simulation = simulate(plan, MACHINE)
    assert simulation.iteration_us == pytest.approx(70)
    assert max(span.iteration for span in lane(simulation, "compute")) == 3


def test_phases_that_differ_in_time() -> None:
    """In every other iteration the two pages share a place, and the copy of page 1 waits for step 0.

    Say that page 0 comes at 0 us in phase 0. Page 1 comes at 10, step 1 ends at 16; page 0 for phase 1 comes at 20,
    step 0 ends at 24, page 1 comes at 34, step 1 ends at 40, and page 0 for phase 0 comes at 50.
    """
    plan = replace(
        plan_of(chain(2), [10, 10], [4, 6], k=1),
        k=2,
        slots=(Slot(0, 256), Slot(256, 256)),
        period=2,
        intervals=(Interval(0, 0, 1, (0, 0)), Interval(1, 1, 2, (1, 0))),
    )
    simulation = simulate(plan, MACHINE)
    ends = [span.end_us for span in lane(simulation, "compute") if span.step == 1]
    assert [after - before for before, after in pairwise(ends)] == pytest.approx([24, 26, 24, 26, 24])
    assert simulation.iteration_us == pytest.approx(25)


@pytest.mark.parametrize("iterations", [-1, 0, 1])
def test_too_few_iterations(iterations: int) -> None:
    with pytest.raises(ValueError, match=f"a cold iteration and a warm one are 2 iterations, not {iterations}"):
        simulate(chain_of(3, 10, 4, k=2), MACHINE, iterations=iterations)


def test_copies_that_take_many_iterations_to_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies take 90 us, steps 91: page by page the link gets ahead, though iterations do not become shorter."""
    plan = plan_of(chain(5), [20, 1, 30, 10, 29], [20, 31, 10, 1, 29], k=4)
    simulation = simulate(plan, MACHINE)
    assert max(span.iteration for span in lane(simulation, "compute")) == 12
    assert simulation.iteration_us == pytest.approx(91)
    monkeypatch.setattr(simulate_module, "MOST_ITERATIONS", 3)
    assert predict_iteration_us(plan, MACHINE) == pytest.approx(91)


# What always holds.


@settings(max_examples=200)
@given(plans())
def test_times_are_those_of_the_events_of_the_runtime(plan: Plan) -> None:
    simulation = simulate(plan, MACHINE, iterations=4)
    copies, runs = timed(expected_events(plan, 4), plan, MACHINE)
    assert_same_work(work_of(simulation, "H2D"), copies)
    assert_same_work(work_of(simulation, "compute"), runs)


@settings(max_examples=200)
@given(plans())
def test_places_that_overlap_in_part(plan: Plan) -> None:
    plan = packed(plan)
    simulation = simulate(plan, MACHINE, iterations=4)
    copies, runs = timed(expected_events(plan, 4), plan, MACHINE)
    assert_same_work(work_of(simulation, "H2D"), copies)
    assert_same_work(work_of(simulation, "compute"), runs)


@st.composite
def plans_in_room(draw: st.DrawFn) -> Plan:
    """Any order of use streamed through any room, pages kept between their uses or not."""
    graph = draw(graphs())
    sizes_bytes = [each.slot_bytes for each in graph.pages]
    room_bytes = draw(st.integers(max(sizes_bytes), sum(sizes_bytes)))
    reserve_bytes = draw(st.none() | st.sampled_from([0, max(sizes_bytes)]))
    try:
        plan = stream_in_room(graph, (), room_bytes, reserve_bytes=reserve_bytes)
    except ValueError:
        assume(False)
    times = st.sampled_from([1.0, 300.0, 5000.0])
    return replace(plan, steps=tuple(replace(step, compute_us=draw(times)) for step in plan.steps))


@given(plans_in_room())
def test_places_by_lifetime(plan: Plan) -> None:
    simulation = simulate(plan, MACHINE, iterations=4)
    copies, runs = timed(expected_events(plan, 4), plan, MACHINE)
    assert_same_work(work_of(simulation, "H2D"), copies)
    assert_same_work(work_of(simulation, "compute"), runs)


@given(plans())
def test_steady_state_is_what_many_iterations_come_to(plan: Plan) -> None:
    simulation = simulate(plan, MACHINE)
    assert simulation.iteration_us == pytest.approx(predict_iteration_us(plan, MACHINE))
    assert simulation.iteration_us >= simulation.bound_us * (1 - 1e-9)
    ends = [span.end_us for span in lane(simulate(plan, MACHINE, iterations=181), "compute")]
    if ends:
        many_us = (ends[-1] - ends[-1 - 60 * len(plan.steps)]) / 60
        assert simulation.iteration_us == pytest.approx(many_us)
    assert simulation.link_us == pytest.approx(plan.bytes_moved)


@given(plans())
def test_runs_wait_for_their_pages_and_copies_for_their_readers(plan: Plan) -> None:
    spans = simulate(plan, MACHINE).spans
    assert list(spans) == sorted(spans, key=lambda span: span.start_us)
    runs = {(span.iteration, span.step): span for span in spans if span.lane == "compute"}
    copies = {(span.iteration, span.label, span.step): span for span in spans if span.lane == "H2D"}
    assert len(runs) + len(copies) == len(spans)
    taken: list[tuple[Slot, float, float]] = []
    for name in ("compute", "H2D"):
        for before, after in pairwise(span for span in spans if span.lane == name):
            assert before.start_us <= before.end_us <= after.start_us
    for iteration in range(1 + max((span.iteration for span in runs.values()), default=-1)):
        for interval in plan.intervals:
            copy = copies[iteration, plan.pages[interval.page].name, plan.load_step(interval)]
            steps = range(max(interval.start_step, 0), interval.end_step)
            readers = [runs[iteration, step] for step in steps if interval.page in plan.steps[step].reads]
            assert all(copy.end_us <= reader.start_us for reader in readers)
            slot = plan.slots[interval.slots[iteration % plan.period]]
            taken.append((slot, copy.start_us, readers[-1].end_us))
    for index, (slot, start_us, end_us) in enumerate(taken):
        for other, other_start_us, other_end_us in taken[:index]:
            assert not meet(slot, other) or max(start_us, other_start_us) >= min(end_us, other_end_us)


@given(plans())
def test_an_iteration_is_compute_and_stalls(plan: Plan) -> None:
    simulation = simulate(plan, MACHINE)
    runs = lane(simulation, "compute")
    lost_us = sum(stall.us for stall in simulation.stalls)
    # Copies of no bytes take no time: through them the link may be busy without a break since the cold iteration.
    is_late = {stall.cause == "late" for stall in simulation.stalls if all(page.nbytes for page in plan.pages)}
    assert not plan.wraps or True not in is_late
    for stall in simulation.stalls:
        assert plan.wraps or (stall.step, stall.cause) != (0, "room")
        after = [run for run in runs if (run.step, run.start_us) == (stall.step, stall.start_us + stall.us)]
        (iteration,) = {run.iteration for run in after}
        ends = [run.end_us for run in runs if run.iteration in (iteration - 1, iteration)]
        assert ends[-1] - ends[len(plan.steps) - 1] == pytest.approx(simulation.compute_us + lost_us)


@given(plans())
def test_stalls_of_every_iteration_fill_it(plan: Plan) -> None:
    simulation = simulate(plan, MACHINE)
    assert simulation.stalls == simulation.stalls_by_iteration[simulation.typical]
    for (start_us, end_us), stalls in zip(
        pairwise(simulation.iteration_starts_us), simulation.stalls_by_iteration, strict=True
    ):
        assert end_us - start_us == pytest.approx(simulation.compute_us + sum(stall.us for stall in stalls))
        assert all(start_us <= stall.start_us <= end_us for stall in stalls)


@given(plans())
def test_stays_are_copies_and_never_meet_in_a_place(plan: Plan) -> None:
    simulation = simulate(plan, MACHINE)
    copies = [(span.start_us, span.end_us, span.iteration) for span in lane(simulation, "H2D")]
    assert sorted(copies) == sorted((stay.start_us, stay.arrived_us, stay.iteration) for stay in simulation.stays)
    for index, one in enumerate(simulation.stays):
        for other in simulation.stays[index + 1 :]:
            places = [
                plan.slots[plan.intervals[stay.interval].slots[stay.iteration % plan.period]] for stay in (one, other)
            ]
            # Where all phases are one in time, the simulation is of the first one: places are compared within it.
            if meet(*places) and one.iteration == other.iteration:
                assert one.end_us is None or one.end_us <= other.start_us or other.start_us == other.arrived_us


@given(plans())
def test_memory_stays_within_the_plan(plan: Plan) -> None:
    memory = simulate(plan, MACHINE).memory
    assert memory[0][0] == 0
    assert all(before < after and low != high for (before, low), (after, high) in pairwise(memory))
    least_bytes = plan.residents_bytes + plan.leftovers_bytes
    assert all(least_bytes <= nbytes <= plan.peak_weight_bytes + plan.activations_bytes for _, nbytes in memory)


@given(plans(), st.sampled_from([2.0, 3.0]))
def test_a_machine_that_is_faster_in_all_halves_all_times(plan: Plan, factor: float) -> None:
    steps = tuple(replace(step, compute_us=step.compute_us / factor) for step in plan.steps)
    machine = replace(MACHINE, h2d_bytes_per_s=MACHINE.h2d_bytes_per_s * factor)
    slow, fast = simulate(plan, MACHINE, iterations=5), simulate(replace(plan, steps=steps), machine, iterations=5)
    assert fast.iteration_us == pytest.approx(slow.iteration_us / factor)
    for name in ("compute", "H2D"):
        ends = [span.end_us for span in lane(slow, name)]
        assert [span.end_us for span in lane(fast, name)] == pytest.approx([end_us / factor for end_us in ends])


@given(plans(), st.data())
def test_more_work_makes_nothing_end_earlier(plan: Plan, data: st.DataObject) -> None:
    """Of single ends from the cold start on, and of the steady state; a single iteration may well become shorter."""
    more = [data.draw(st.sampled_from([0, 1, 40])) for _ in plan.steps]
    steps = (replace(step, compute_us=step.compute_us + us) for step, us in zip(plan.steps, more, strict=True))
    busier, slower = replace(plan, steps=tuple(steps)), replace(MACHINE, copy_us=3.0)
    for name in ("compute", "H2D"):
        ends = [span.end_us for span in lane(simulate(plan, MACHINE, iterations=5), name)]
        for other, machine in ((busier, MACHINE), (plan, slower)):
            later = [span.end_us for span in lane(simulate(other, machine, iterations=5), name)]
            assert all(end <= late + 1e-6 for end, late in zip(ends, later, strict=True))


@pytest.mark.parametrize("name", PLANS)
def test_plans_of_which_no_times_are_known(name: str) -> None:
    simulation = simulate(PLANS[name], MACHINE)
    assert simulation.compute_us == 0
    assert simulation.iteration_us == pytest.approx(simulation.link_us)


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 1), (3, 2), (4, 1), (4, 4)])
def test_emulated_device_copies_and_runs_in_this_order(k: int, m: int) -> None:
    """What an iteration really did, event by event, timed: the same copies and runs at the same moments."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    run = compile_offloaded(model, k=k, m=m)
    with torch.no_grad():
        for _ in range(4):
            run.model(torch.ones(2, 16))
    for compute, link in SPEEDS:
        assert_same_times(run, compute, link)


SPEEDS = [(1.0, 1.0), (30.0, 1.0), (1.0, 0.1)]
"""As it is; slow compute; a slow link: how many times as long a step takes, and how fast copies are."""


def assert_same_times(run: Run, compute: float, link: float) -> None:
    """The copies and runs of four iterations, by the events of the emulated device and by the simulation."""
    compute_us = [500.0, 3000.0, 100.0, 700.0, 2000.0]
    steps = (replace(step, compute_us=compute * compute_us[index % 5]) for index, step in enumerate(run.plan.steps))
    plan = replace(run.plan, steps=tuple(steps))
    machine = replace(MACHINE, h2d_bytes_per_s=link * MACHINE.h2d_bytes_per_s)
    simulation = simulate(plan, machine, iterations=4)
    copies, runs = timed(with_steps(run.events), plan, machine)
    assert_same_work(work_of(simulation, "H2D"), copies)
    assert_same_work(work_of(simulation, "compute"), runs)
    assert copies


class Uneven(nn.Module):
    """Layers of different sizes; the first one is used again behind the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, width), nn.Linear(width, 16)) for width in (64, 16, 32, 128, 16, 64)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.layers[0], self.layers[2]):
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("part", [0.0, 0.25, 0.5, 0.75])
def test_emulated_device_within_a_budget(part: float) -> None:
    """Places of different sizes, pages that are kept between their uses, residents: the same moments all the same."""
    x = torch.ones(2, 16)
    with torch.no_grad():
        curve = spcompile.plan(Uneven(), (x,), device="cpu", compiler="eager", k=3).tradeoff()
        smallest, largest = curve[0].peak_bytes, curve[-1].peak_bytes
        run = compile_offloaded(Uneven(), budget=int(smallest + part * (largest - smallest)))
        for _ in range(4):
            run.model(x)
    for compute, link in SPEEDS:
        assert_same_times(run, compute, link)


# The emulated device with a clock: who waits for whom is what the runtime has queued, and nothing else.

LINK_BYTES_PER_S = 2.0**20
STEP_US = (500.0, 3000.0, 125.0, 750.0, 2000.0)
"""With these, and pages of whole kilobytes, all times are sums of binary fractions: orders are exact."""

SLOW = {
    "slow link": ((1.0,), 0.125),
    "slow compute": ((32.0,), 1.0),
    "slow link, one slow step": ((1.0, 1.0, 64.0), 0.25),
    "both slow": ((8.0, 1.0), 0.25),
}
SPEEDS_OF = SLOW | {"very slow compute": ((1024.0,), 1.0)}
"""How many times as long steps take, in turn, and how many times as fast copies are."""

Order = list[tuple[str, str, str | int]]


def order_of(copies: Iterable[SlowWork], runs: Iterable[SlowWork]) -> Order:
    """Every start and end in one row; at the same moment, what ends comes first, and compute before copies."""
    moments = []
    for rank, (name, works) in enumerate((("compute", runs), ("H2D", copies))):
        for each in works:
            moments += [
                (each.end_us, 0, rank, "ends", name, each.what),
                (each.start_us, 1, rank, "starts", name, each.what),
            ]
    moments.sort(key=lambda moment: moment[:3])
    return [(verb, name, what) for *_, verb, name, what in moments]


def waits_of(plan: Plan, simulations: Iterable[Simulation]) -> set[Wait]:
    """The stalls of all iterations that are told of, with the iteration that they are in."""
    waits = set()
    for simulation in simulations:
        for stall in simulation.stalls:
            n_runs = sum(span.end_us <= stall.start_us for span in lane(simulation, "compute"))
            assert n_runs % len(plan.steps) == stall.step
            waits.add(Wait(n_runs // len(plan.steps), stall.step, stall.page, stall.cause))
    return waits


class SlowRun:
    """Some iterations on the slow device, and how the simulator sees them."""

    def __init__(self, model: nn.Module, slow: str, iterations: int = 5, **options: int) -> None:
        factors, link = SPEEDS_OF[slow]
        step_us = [STEP_US[index % 5] * factors[index % len(factors)] for index in range(5 * len(factors))]
        x = torch.ones(2, 16)
        with torch.no_grad():
            expected = model(x)
        run = compile_offloaded(model, **options)
        self.streams = SlowStreams(run.events, step_us, link * LINK_BYTES_PER_S)
        run.store.arena.streams = self.streams
        with torch.no_grad():
            assert all(torch.equal(run.model(x), expected) for _ in range(iterations))
        self.streams.synchronize()
        steps = (replace(each, compute_us=step_us[at % len(step_us)]) for at, each in enumerate(run.plan.steps))
        self.plan = replace(run.plan, steps=tuple(steps))
        self.iterations = iterations
        self.machine = replace(MACHINE, h2d_bytes_per_s=link * LINK_BYTES_PER_S)

    def assert_as_simulated(self) -> None:
        """The same copies and runs in the same order, and the same waits for the same reasons."""
        plan, n_steps = self.plan, len(self.plan.steps)
        simulation = simulate(plan, self.machine, iterations=self.iterations)
        found = order_of((each.work for each in self.streams.copies), self.streams.runs)
        copies = (SlowWork(span.label, span.start_us, span.end_us) for span in lane(simulation, "H2D"))
        runs = (SlowWork(span.step, span.start_us, span.end_us) for span in lane(simulation, "compute"))
        assert found == order_of(copies, runs)
        simulations = [simulate(plan, self.machine, iterations=count) for count in range(2, self.iterations + 1)]
        expected = waits_of(plan, simulations)
        # The simulation tells of one iteration of its last period, never of the cold one.
        told_of = max((wait.iteration for wait in expected), default=0) if plan.period > 1 else self.iterations - 1
        waits = [wait for wait in self.streams.waits(n_steps) if 0 < wait.iteration <= told_of]
        assert set(waits) == expected
        assert len(waits) == len(set(waits))
        n_copies = sum(interval.start_step <= 0 for interval in plan.intervals) if plan.wraps else 0
        assert len(self.streams.copies) == self.iterations * len(plan.intervals) + n_copies
        assert len(self.streams.runs) == self.iterations * n_steps


class Widths(nn.Module):
    """Layers of whole kilobytes, used in any order, one of them as often as is said."""

    def __init__(self, widths: Sequence[int], order: Sequence[int]) -> None:
        super().__init__()
        self.order = order
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, width, bias=False), nn.Linear(width, 16, bias=False)) for width in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = torch.tanh(self.layers[index](x))
        return x


CHAIN = tuple(range(5))
THERE_AND_BACK = (0, 1, 2, 3, 4, 3, 2, 1, 0)
ORDERS = {
    "chain": CHAIN,
    "tied ends": (*CHAIN, 0),
    "there and back": THERE_AND_BACK,
    "repeated": (0, 1, 2, 0, 1, 2, 3, 4),
}
EVEN, UNEVEN = (64,) * 5, (64, 16, 32, 128, 16)


def has_kept_gap(plan: Plan) -> bool:
    """Whether a page stays over steps that do not read it."""
    uses = [
        [step for step in range(max(0, each.start_step), each.end_step) if each.page in plan.needs(step)]
        for each in plan.intervals
    ]
    return any(two > one + 1 for steps in uses for one, two in pairwise(steps))


@cache
def peaks_of_tradeoff(order: tuple[int, ...]) -> tuple[int, int]:
    """Of the smallest and of the fastest plan."""
    with torch.no_grad():
        plan = spcompile.plan(Widths(UNEVEN, order), (torch.ones(2, 16),), device="cpu", compiler="eager", k=3)
    curve = plan.tradeoff()
    return curve[0].peak_bytes, curve[-1].peak_bytes


def in_turn(options: Sequence[T]) -> list[tuple[str, str, T]]:
    """Every order with every slowness, the options taken in turn: all combinations would take a minute."""
    return [
        (order, slow, options[(index + index // len(SLOW)) % len(options)])
        for index, (order, slow) in enumerate(product(ORDERS, SLOW))
    ]


@pytest.mark.parametrize(("order", "slow", "window"), in_turn([(1, 1), (2, 1), (3, 2), (4, 4)]))
def test_slow_device_with_k_and_m(order: str, slow: str, window: tuple[int, int]) -> None:
    k, m = window
    SlowRun(Widths(EVEN if k % 2 else UNEVEN, ORDERS[order]), slow, k=k, m=m).assert_as_simulated()


@pytest.mark.parametrize(("order", "slow", "part"), in_turn([0.0, 0.3, 0.6, 0.9]))
def test_slow_device_within_a_budget(order: str, slow: str, part: float) -> None:
    smallest, largest = peaks_of_tradeoff(ORDERS[order])
    run = SlowRun(Widths(UNEVEN, ORDERS[order]), slow, budget=int(smallest + part * (largest - smallest)))
    assert has_kept_gap(run.plan) == (order in ("repeated", "there and back"))
    run.assert_as_simulated()


def test_slow_device_waits_where_it_is_slow() -> None:
    """Five equal pages, k = 2. With a slow link every step waits for it, with slow compute only the first of all."""
    by_link = SlowRun(Widths(EVEN, CHAIN), "slow link", k=2).streams.waits(5)
    assert {(wait.iteration, wait.step) for wait in by_link} == set(product(range(5), range(5)))
    assert {wait.cause for wait in by_link if wait.iteration > 0} == {"link"}
    by_compute = SlowRun(Widths(EVEN, CHAIN), "very slow compute", k=2).streams.waits(5)
    assert by_compute == [Wait(0, 0, "layers.0", "late")]


def test_slow_device_shows_a_wait_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that do not wait for the last readers of their places come before these are done."""
    monkeypatch.setattr(SlowStreams, "side_wait", lambda *_: None)
    with pytest.raises(AssertionError):
        SlowRun(Widths(EVEN, CHAIN), "slow compute", k=2).assert_as_simulated()
