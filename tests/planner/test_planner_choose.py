"""Placements by memory and by slowdown: right, within their memory, and as fast as any other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spcompile.errors import OptionError
from spcompile.ir import Machine, Page, Plan, Step, Weight
from spcompile.planner import packing
from spcompile.planner.choose import _careful_us, choose_fastest, choose_leanest, find_tradeoff, least_capacity_bytes
from spcompile.planner.early import Visit, start_early, visits_of
from spcompile.planner.machine import PROFILES, find_machine
from spcompile.planner.packing import pack
from spcompile.planner.simulate import predict_iteration_us, simulate
from spcompile.planner.slots import most_held
from spcompile.planner.streaming import _at_offsets, stream
from spcompile.verify.plans import verify_plan
from tests.hand_plans import page
from tests.planner.planner_cases import READS, Reads, chain, there_and_back

MIB = 2**20

MACHINE = replace(PROFILES["h100"], copy_us=0.0, h2d_bytes_per_s=1e6 * MIB)  # one MiB in a microsecond


def graph_of(
    reads: Reads, mib: Sequence[int], step_us: Sequence[float], machine: Machine | None = MACHINE, wraps: bool = True
) -> Plan:
    """A graph of pages with these sizes, none of them placed."""
    pages = tuple(Page(f"p{index}", (Weight(f"w{index}", size * MIB),)) for index, size in enumerate(mib))
    steps = tuple(
        Step(f"s{index}", None, pages_read, us)
        for index, (pages_read, us) in enumerate(zip(reads, step_us, strict=True))
    )
    return Plan("cuda:0", 1, 1, wraps, pages, (), (), steps, (), 1, (), machine)


@st.composite
def graphs(draw: st.DrawFn) -> Plan:
    reads = draw(READS)
    n_pages = 1 + max((page for pages in reads for page in pages), default=-1)
    mib = draw(st.lists(st.integers(1, 4), min_size=n_pages, max_size=n_pages))
    step_us = draw(st.lists(st.sampled_from((0.5, 1.0, 3.0, 8.0)), min_size=len(reads), max_size=len(reads)))
    graph = graph_of(reads, mib, step_us, wraps=draw(st.booleans()))
    tables = draw(st.frozensets(st.integers(0, max(0, n_pages - 1)), max_size=2))
    return gathering(graph, tables, draw(st.sampled_from((0, 4096, MIB, 3 * MIB))))


def gathering(graph: Plan, tables: Collection[int], nbytes: int) -> Plan:
    """The graph in which each first reader of these pages only gathers so many bytes of their rows."""
    left, steps = set(tables), []
    for step in graph.steps:
        gathers = tuple((page, nbytes) for page in step.reads if page in left)
        left -= {page for page, _ in gathers}
        steps.append(replace(step, gathers=gathers))
    return replace(graph, steps=tuple(steps))


@given(graphs(), st.integers(1, 12))
def test_the_fastest_plan_is_right_and_fits(graph: Plan, mib: int) -> None:
    capacity_bytes = mib * MIB
    if capacity_bytes < least_capacity_bytes(graph):
        with pytest.raises(OptionError, match=f"needs {least_capacity_bytes(graph):,} bytes"):
            choose_fastest(graph, capacity_bytes)
        capacity_bytes = least_capacity_bytes(graph)
    plan = choose_fastest(graph, capacity_bytes)
    assert not verify_plan(plan, capacity_bytes)
    assert simulate(plan, MACHINE).iteration_us >= simulate(plan, MACHINE).bound_us * (1 - 1e-9)


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from((0.25, 0.5, 1.0, 1.5, 3.0)))
def test_alike_layers_against_all_choices(n_pages: int, slots: int, step_us: float) -> None:
    """Any set of residents, any window of two slots or more: none is faster."""
    graph = graph_of(chain(n_pages), [1] * n_pages, [step_us] * n_pages)
    best_us = min(
        predict_iteration_us(stream(graph, residents, k, 1), MACHINE)
        for count in range(n_pages + 1)
        for residents in combinations(range(n_pages), count)
        for k in range(min(2, n_pages, slots), n_pages + 1)
        if count == n_pages or count + k <= slots
        if count < n_pages or n_pages <= slots
    )
    found_us = predict_iteration_us(choose_fastest(graph, slots * MIB), MACHINE)
    assert found_us <= best_us * 1.005


@st.composite
def small_graphs(draw: st.DrawFn) -> Plan:
    n_pages = draw(st.integers(2, 4))
    again = draw(st.sampled_from((chain(n_pages), chain(n_pages)[::-1], chain(n_pages)[:1], ())))
    order = chain(n_pages) + again
    mib = draw(st.lists(st.integers(1, 3), min_size=n_pages, max_size=n_pages))
    step_us = draw(st.lists(st.sampled_from((0.25, 0.5, 2.0)), min_size=len(order), max_size=len(order)))
    return graph_of(order, mib, step_us, wraps=draw(st.booleans()))


def all_choices(graph: Plan, capacity_bytes: int) -> Iterator[Plan]:
    """Any residents, and of the others any pages kept between their uses."""
    for count in range(len(graph.pages)):
        for residents in combinations(range(len(graph.pages)), count):
            room_bytes = capacity_bytes - sum(graph.pages[page].slot_bytes for page in residents)
            visits = visits_of([[page for page in step.reads if page not in residents] for step in graph.steps])
            gaps = [at for at, visit in enumerate(visits) if any(visit.page == each.page for each in visits[:at])]
            for kept in product((True, False), repeat=len(gaps)):
                chosen = merged(visits, {at for at, keep in zip(gaps, kept, strict=True) if keep})
                yield from at_offsets(replace(graph, residents=residents), chosen, room_bytes)


def merged(visits: Sequence[Visit], kept: Collection[int]) -> list[Visit]:
    found: list[Visit] = []
    for at, visit in enumerate(visits):
        before = next((index for index in reversed(range(len(found))) if found[index].page == visit.page), None)
        if at in kept and before is not None:
            found[before] = replace(found[before], last_step=visit.last_step)
        else:
            found.append(visit)
    return found


def at_offsets(graph: Plan, visits: Sequence[Visit], room_bytes: int) -> Iterator[Plan]:
    """The plan that copies as early as there is room, where the visits fit at all."""
    sizes = [graph.pages[visit.page].slot_bytes for visit in visits]
    for usable_bytes in range(room_bytes, 0, -MIB):
        try:
            stays = start_early(visits, sizes, len(graph.steps), usable_bytes, graph.wraps)
        except ValueError:
            return
        packing = pack(stays, sizes, len(graph.steps), wraps=graph.wraps)
        if packing.arena_bytes <= room_bytes:
            k = max(1, most_held(stays, len(graph.steps)))
            yield _at_offsets(replace(graph, k=k), stays, packing)
            return


@settings(max_examples=40)
@given(small_graphs(), st.integers(0, 8))
def test_small_graphs_against_all_choices(graph: Plan, mib: int) -> None:
    capacity_bytes = least_capacity_bytes(graph) + mib * MIB
    if capacity_bytes >= graph.weights_bytes:
        return
    found = choose_fastest(graph, capacity_bytes)
    best_us = min(_careful_us(plan, MACHINE) for plan in all_choices(graph, capacity_bytes))
    assert _careful_us(found, MACHINE) <= best_us * 1.25


@given(graphs())
def test_the_curve_falls(graph: Plan) -> None:
    curve = find_tradeoff(graph)
    for smaller, larger in pairwise(curve):
        assert smaller.peak_bytes < larger.peak_bytes
        assert smaller.iteration_us > larger.iteration_us
    for point in curve:
        assert not verify_plan(point.plan, point.peak_bytes)
        assert point.peak_bytes == point.plan.peak_bytes()


def test_a_curve_is_drawn_without_searching_for_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search takes tenths of a second, and a curve has some hundred plans."""
    searched: list[object] = []

    def search(*problem: object) -> list[object]:
        searched.append(problem)
        return []

    monkeypatch.setattr(packing, "_pack_in_time", search)
    sizes = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]
    pages = tuple(page(f"p{index}", size * MIB) for index, size in enumerate(sizes))
    steps = tuple(Step(f"s{index}", None, (index,), 1.0) for index in range(len(sizes)))
    graph = Plan("cuda:0", 1, 1, True, pages, (), (), steps, (), 1, (), machine=MACHINE)
    assert len(find_tradeoff(graph)) > 10
    assert searched == []
    choose_fastest(graph, 20 * MIB)
    assert searched


@given(graphs(), st.sampled_from((1.0, 1.02, 1.5, 3.0)))
def test_the_leanest_plan_is_fast_enough_and_smallest(graph: Plan, slowdown: float) -> None:
    compute_us = sum(step.compute_us for step in graph.steps)
    plan = choose_leanest(graph, slowdown)
    assert predict_iteration_us(plan, MACHINE) <= compute_us * slowdown * (1 + 1e-6)
    for point in find_tradeoff(graph):
        if point.peak_bytes < plan.peak_bytes():
            assert point.iteration_us > compute_us * slowdown


@given(graphs(), st.integers(1, 12))
def test_reading_in_place_is_only_taken_where_it_helps(graph: Plan, mib: int) -> None:
    copied = gathering(graph, (), 0)
    assert least_capacity_bytes(graph) <= least_capacity_bytes(copied)
    capacity_bytes = max(mib * MIB, least_capacity_bytes(copied))
    with_tables, without = choose_fastest(graph, capacity_bytes), choose_fastest(copied, capacity_bytes)
    assert predict_iteration_us(with_tables, MACHINE) <= predict_iteration_us(without, MACHINE) * 1.5  # a heuristic


def test_a_table_of_which_a_token_reads_one_row_is_mapped() -> None:
    graph = gathering(graph_of(chain(6), [8, 1, 1, 1, 1, 1], [0.1] * 6), {0}, 8192)
    plan = choose_fastest(graph, 3 * MIB)
    assert plan.mapped == (0,)
    assert all(interval.page != 0 for interval in plan.intervals)
    assert choose_fastest(graph, 13 * MIB).mapped == ()
    assert choose_fastest(graph, 3 * MIB, preferred=(1,)).mapped == (0,)
    with pytest.raises(OptionError):
        choose_fastest(gathering(graph, (), 0), 3 * MIB)


def test_a_table_that_another_graph_keeps_is_not_mapped() -> None:
    graph = gathering(graph_of(chain(6), [1] * 6, [0.1] * 6), {0}, 8192)
    assert choose_fastest(graph, 3 * MIB).mapped == (0,)
    kept = choose_fastest(graph, 3 * MIB, preferred=(0,))
    assert (kept.mapped, kept.residents[0]) == ((), 0)


def test_pages_that_another_graph_keeps_stay() -> None:
    """Also where pages are read again, or differ in size: a plan that streamed them would move them off the device."""
    graph = graph_of(there_and_back(6), [1, 2, 1, 2, 1, 2], [0.1] * 12)
    plan = choose_fastest(graph, 6 * MIB, preferred=(0, 4))
    assert {0, 4} <= set(plan.residents)


def test_leftovers_count() -> None:
    graph = replace(graph_of(chain(3), [1, 2, 1], [0.1] * 3), leftovers=(Weight("small", MIB // 2),))
    assert choose_fastest(graph, 4 * MIB).peak_weight_bytes <= 4 * MIB


def test_a_table_that_is_also_the_head_is_read_in_place_and_streamed() -> None:
    graph = gathering(graph_of(((0,), (1,), (2,), (3,), (0,)), [4, 1, 1, 1], [0.1] * 5), {0}, 8192)
    plan = choose_fastest(graph, least_capacity_bytes(graph))
    assert plan.mapped == (0,)
    assert [(plan.load_step(interval), interval.page) for interval in plan.intervals if interval.page == 0] == [(4, 0)]
    assert not verify_plan(plan)


def test_a_slowdown_that_cannot_be_kept() -> None:
    graph = graph_of(chain(6), [1] * 6, [0.1] * 6)
    with pytest.raises(OptionError, match=r"'max_slowdown' = .* cannot be kept .* the fastest plan that fits takes"):
        choose_leanest(graph, 1.5, capacity_bytes=3 * MIB)
    with pytest.raises(OptionError, match="no plan fits"):
        choose_leanest(graph, 1.02, capacity_bytes=1)


def test_where_the_link_is_the_limit_each_resident_counts() -> None:
    plan = choose_fastest(graph_of(chain(8), [1] * 8, [0.3] * 8), 5 * MIB)
    assert (len(plan.residents), plan.k) == (3, 2)


def test_a_single_slot_must_save_more_than_predictions_err() -> None:
    quick, slower = (choose_fastest(graph_of(chain(8), [1] * 8, [us] * 8), 5 * MIB) for us in (0.01, 0.1))
    assert (len(quick.residents), quick.k) == (4, 1)  # 4 copies instead of 5
    assert (len(slower.residents), slower.k) == (3, 2)  # 2.4 us of compute would be more than the copy saved


def kept_gaps(plan: Plan) -> list[int]:
    """Pages that stay on the device while a step runs that does not read them, between two that do."""
    kept = []
    for interval in plan.intervals:
        uses = [
            step for step in range(max(0, interval.start_step), interval.end_step) if interval.page in plan.needs(step)
        ]
        if uses != list(range(uses[0], uses[-1] + 1)):
            kept.append(interval.page)
    return kept


@pytest.mark.parametrize("wraps", [True, False])
def test_forward_and_backward_the_last_layers_stay(wraps: bool) -> None:
    order = there_and_back(8)
    graph = graph_of(order, [1] * 8, [0.1] * len(order), wraps=wraps)
    plan = choose_fastest(graph, 4 * MIB)
    assert not verify_plan(plan, 4 * MIB)
    assert len(plan.intervals) < 2 * (8 - len(plan.residents)) - 1  # not only the last layer, which has no gap
    assert kept_gaps(plan)


def test_a_large_page_is_kept_rather_than_read_twice() -> None:
    """As an embedding that is tied to the head of a short model: everything else moves around it."""
    graph = graph_of(((0,), (1,), (2,), (0,)), [4, 1, 1], [0.1] * 4)
    plan = choose_fastest(graph, 5 * MIB)
    assert sum(interval.page == 0 for interval in plan.intervals) + (0 in plan.residents) == 1


def test_one_slot_is_the_last_resort() -> None:
    plan = choose_fastest(graph_of(chain(8), [1] * 8, [1.0] * 8), MIB)
    assert (plan.residents, plan.k) == ((), 1)
    assert predict_iteration_us(plan, MACHINE) == pytest.approx(16.0)


def test_where_compute_is_the_limit_copies_hide_behind_it() -> None:
    plan = choose_fastest(graph_of(chain(8), [1] * 8, [3.0] * 8), 4 * MIB)
    assert predict_iteration_us(plan, MACHINE) == pytest.approx(24.0)
    leanest = choose_leanest(graph_of(chain(8), [1] * 8, [3.0] * 8), 1.0)
    assert leanest.peak_bytes() <= 3 * MIB


def test_without_a_machine_there_are_two_slots() -> None:
    plan = choose_fastest(graph_of(chain(8), [1] * 8, [0.0] * 8, machine=None), 4 * MIB)
    assert (len(plan.residents), plan.k) == (2, 2)
    with pytest.raises(OptionError, match="needs a machine"):
        plan.tradeoff()


def test_machines_by_name() -> None:
    assert find_machine("rtx4090").name == "rtx4090"
    assert find_machine(MACHINE) is MACHINE
    with pytest.raises(OptionError, match="one of h100, rtx4090 or a Machine, not 'tpu'"):
        find_machine("tpu")


def test_empty_pages_have_places_of_their_own() -> None:
    """Places of no bytes at one address were taken for one slot."""
    graph = graph_of(((0, 1), (0, 2, 3)), [0, 1, 0, 1], [1.0, 1.0])
    plan = choose_fastest(graph, least_capacity_bytes(graph))
    assert not verify_plan(plan, least_capacity_bytes(graph))
    nothing = graph_of(((0,),), [0], [1.0])
    assert choose_fastest(nothing, 0).peak_weight_bytes == 0


def test_the_smallest_plan_is_not_larger_than_everything() -> None:
    """Slots are rounded up, residents are not: for tiny pages streaming takes more."""
    pages = tuple(Page(f"p{index}", (Weight(f"w{index}", 3),)) for index in range(2))
    steps = tuple(Step(f"s{index}", None, (index,), 1.0) for index in range(2))
    graph = Plan("cuda:0", 1, 1, True, pages, (), (), steps, (), 1, (), MACHINE)
    assert least_capacity_bytes(graph) == 6
    assert choose_fastest(graph, 6).residents == (0, 1)
