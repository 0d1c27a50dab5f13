"""Whole plans: options, residents, slots in bytes, and the verifier's opinion of every plan that is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spcompile.errors import OptionError
from spcompile.ir import Action, ActionKind, Page, Plan, Step, Weight
from spcompile.planner.make_plan import make_plan
from spcompile.planner.residents import smallest_capacity_bytes, spread_residents
from spcompile.planner.slots import slot_period
from spcompile.planner.streaming import MAX_PERIOD
from spcompile.planner.window import plan_window
from spcompile.verify.plans import verify_plan
from spcompile.verify.violations import render
from tests.hand_plans import MIB, PLANS
from tests.planner.planner_cases import READS, Reads, chain, in_order_of_use, there_and_back
from tests.random_plans import plans

KIB = 1024
SIZES_BYTES = st.sampled_from([0, 1, 255, 256, 1000, KIB, 4 * KIB, 64 * KIB])


def page_of(index: int, *sizes_bytes: int) -> Page:
    return Page(f"p{index}", tuple(Weight(f"p{index}.w{part}", nbytes) for part, nbytes in enumerate(sizes_bytes)))


def steps_of(reads: Sequence[Sequence[int]]) -> tuple[Step, ...]:
    return tuple(Step(f"s{index}", None, tuple(each)) for index, each in enumerate(reads))


def plan_of(
    reads: Sequence[Sequence[int]],
    sizes_bytes: Sequence[int],
    *,
    k: int | None = None,
    m: int | None = None,
    wraps: bool = True,
    capacity_bytes: int | None = None,
    leftover_bytes: int = 0,
    residents: Sequence[int] = (),
) -> Plan:
    """A plan for pages of one weight each, which the verifier has found right."""
    plan = make_plan(
        device="cpu",
        pages=tuple(page_of(index, nbytes) for index, nbytes in enumerate(sizes_bytes)),
        leftovers=(Weight("leftover", leftover_bytes),) if leftover_bytes else (),
        steps=steps_of(reads),
        wraps=wraps,
        k=k,
        m=m,
        capacity_bytes=capacity_bytes,
        residents=residents,
    )
    assert_right(plan, capacity_bytes)
    return plan


def assert_right(plan: Plan, capacity_bytes: int | None = None) -> None:
    violations = verify_plan(plan, capacity_bytes)
    assert violations == [], "\n" + render(str(plan).splitlines(), violations)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[tuple[Page, ...], tuple[Step, ...]]:
    """Pages of several weights, some of which no step may read, and the steps."""
    reads = draw(READS)
    n_read = len({page for pages in reads for page in pages})
    n_pages = n_read + draw(st.sampled_from([0, 0, 1, 2]))
    sizes = st.lists(SIZES_BYTES, min_size=1, max_size=2)
    return tuple(page_of(index, *draw(sizes)) for index in range(n_pages)), steps_of(reads)


@settings(max_examples=1000)
@given(graphs(), st.booleans(), st.data())
def test_plans_by_k_and_m_are_right(
    graph: tuple[tuple[Page, ...], tuple[Step, ...]], wraps: bool, data: st.DataObject
) -> None:
    pages, steps = graph
    k = data.draw(st.integers(max((1, *(len(step.reads) for step in steps))), len(pages) + 2))
    m = data.draw(st.none() | st.integers(1, k))
    plan = make_plan(device="cpu", pages=pages, leftovers=(), steps=steps, wraps=wraps, k=k, m=m)
    assert_right(plan)
    assert plan.wraps == wraps
    if k >= len(pages):
        assert (plan.k, plan.m) == (len(pages), max(1, min(m or 1, len(pages))))
        assert plan.residents == tuple(range(len(pages)))
        assert (plan.intervals, plan.slots, plan.period) == ((), (), 1)
        return
    assert (plan.k, plan.m, plan.residents) == (k, m or 1, ())
    assert {interval.page for interval in plan.intervals} == {page for step in steps for page in step.reads}
    sizes_bytes = {pages[each.page].slot_bytes for each in plan.intervals}
    assert plan.arena_bytes <= k * max(sizes_bytes, default=0)
    if len(sizes_bytes) == 1:
        assert len(plan.slots) <= k
        assert plan.arena_bytes == len(plan.slots) * sizes_bytes.pop()


@settings(max_examples=1000)
@given(graphs(), st.booleans(), st.integers(0, 400 * KIB), st.lists(st.integers(0, 15), max_size=3))
def test_plans_by_capacity_are_right(
    graph: tuple[tuple[Page, ...], tuple[Step, ...]], wraps: bool, capacity_bytes: int, known: list[int]
) -> None:
    pages, steps = graph
    leftovers = (Weight("leftover", 77),)
    arguments = {"device": "cpu", "pages": pages, "leftovers": leftovers, "steps": steps, "wraps": wraps}
    known = [page for page in known if page < len(pages)]
    try:
        plan = make_plan(**arguments, capacity_bytes=capacity_bytes, residents=known)  # type: ignore[arg-type]
    except OptionError as error:
        least_bytes = int(str(error).split()[-2].replace(",", ""))
        assert least_bytes > capacity_bytes
        assert_right(make_plan(**arguments, capacity_bytes=least_bytes), least_bytes)  # type: ignore[arg-type]
        return
    assert_right(plan, capacity_bytes)
    assert plan.m == 1
    if not plan.intervals:
        return
    resident_bytes = sum(pages[page].slot_bytes for page in plan.residents)
    assert capacity_bytes >= 77 + resident_bytes + plan.arena_bytes
    equal_slots_bytes = len(plan.slots) * max(
        (slot.nbytes for slot in plan.slots), default=0
    )  # what the choice assumes
    left_bytes = capacity_bytes - 77 - resident_bytes - equal_slots_bytes
    if plan.intervals and plan.k == len(plan.slots) == 2:  # a step of several pages may leave room of a slot unused
        assert all(pages[interval.page].slot_bytes > left_bytes for interval in plan.intervals)


@settings(max_examples=300)
@given(st.integers(1, 9), st.integers(0, 11 * KIB), st.booleans())
def test_equal_pages_as_many_as_fit_and_evenly(n: int, capacity_bytes: int, wraps: bool) -> None:
    fitting = [count for count in range(n) if (count + min(2, n - count)) * KIB <= capacity_bytes]
    if not fitting:
        return
    plan = plan_of(chain(n), [KIB] * n, capacity_bytes=capacity_bytes, wraps=wraps)
    assert len(plan.residents) == (n if n * KIB <= capacity_bytes else max(fitting))
    if not plan.intervals:
        return
    resident = [page in plan.residents for page in range(n)] * 2
    for length in range(1, n):  # even: no stretch of the cycle has two residents more than another of its length
        counts = [sum(resident[start : start + length]) for start in range(n)]
        assert max(counts) - min(counts) <= 1


@settings(max_examples=300)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=7), st.integers(0, 30))
def test_residents_against_all_choices(page_bytes: list[int], capacity_bytes: int) -> None:
    """The least capacity is the least of all choices, and what moves is within one page of the fewest bytes."""
    n = len(page_bytes)
    needs = {}
    for chosen in (each for count in range(n + 1) for each in combinations(range(n), count)):
        streamed = [page_bytes[page] for page in range(n) if page not in chosen]
        slots_bytes = min(2, len(streamed)) * max(streamed, default=0)
        needs[chosen] = slots_bytes + sum(page_bytes[page] for page in chosen)
    assert smallest_capacity_bytes(page_bytes, chain(n)) == min(needs.values())
    if capacity_bytes < min(needs.values()):
        with pytest.raises(ValueError, match="bytes are less than the"):
            spread_residents(page_bytes, chain(n), capacity_bytes)
        return
    found = spread_residents(page_bytes, chain(n), capacity_bytes)
    assert needs[found] <= capacity_bytes
    most_bytes = max(sum(page_bytes[page] for page in each) for each, need in needs.items() if need <= capacity_bytes)
    assert sum(page_bytes[page] for page in found) >= most_bytes - max(page_bytes)


def test_residents_start_with_the_first_page() -> None:
    """Without a wrap nothing could hide the copy of the first page."""
    assert spread_residents([KIB] * 6, chain(6), 4 * KIB) == (0, 3)
    assert spread_residents([KIB] * 6, chain(6), 5 * KIB + 1023) == (0, 2, 4)


def test_large_page_is_resident_rather_than_twice_a_slot() -> None:
    plan = plan_of(chain(6), [4 * KIB, *[KIB] * 4, 8 * KIB], capacity_bytes=15 * KIB)
    assert plan.residents == (0, 1, 5)
    assert plan.arena_bytes == 2 * KIB


def test_page_that_would_be_copied_twice_is_resident_first() -> None:
    """The two ends of a tied weight: one resident page saves two copies."""
    reads = ((1,), (2,), (0,), (3,), (4,), (0,))
    assert spread_residents([KIB] * 5, reads, 3 * KIB) == (0,)


def test_turning_point_is_copied_once_and_streamed_first() -> None:
    assert 4 not in spread_residents([KIB] * 5, there_and_back(5), 5 * KIB - 1)


def test_residents_of_another_graph_stay() -> None:
    assert plan_of(chain(6), [KIB] * 6, capacity_bytes=4 * KIB, residents=(1, 4)).residents == (1, 4)
    assert plan_of(chain(6), [KIB] * 6, capacity_bytes=4 * KIB, residents=(5,)).residents == (0, 5)
    assert len(plan_of(chain(6), [KIB] * 6, capacity_bytes=4 * KIB, residents=(1, 2, 3)).residents) == 2
    assert plan_of(chain(6), [KIB] * 6, k=2, residents=(1, 4)).residents == ()


def test_no_options_keeps_all_resident() -> None:
    for plan in (plan_of(chain(3), [KIB] * 3), plan_of(chain(3), [KIB] * 3, capacity_bytes=3 * KIB)):
        assert plan.residents == (0, 1, 2)
        assert (plan.k, plan.m, plan.period, plan.bytes_moved) == (3, 1, 1, 0)


def test_leftovers_are_taken_off_the_capacity() -> None:
    assert plan_of(chain(6), [KIB] * 6, capacity_bytes=4 * KIB, leftover_bytes=1).residents == (0,)


def test_capacity_too_small_names_the_least() -> None:
    with pytest.raises(
        OptionError, match=r"^1,123 bytes .* too few: the smallest plan for this model needs 1,124 bytes$"
    ):
        plan_of(chain(6), [KIB] * 6, capacity_bytes=KIB + 99, leftover_bytes=100)
    for capacity_bytes, k in ((KIB + 100, 1), (2 * KIB + 99, 1), (2 * KIB + 100, 2)):
        plan = plan_of(chain(6), [KIB] * 6, capacity_bytes=capacity_bytes, leftover_bytes=100)
        assert (plan.residents, plan.k) == ((), k)


def test_window_by_capacity_widens_for_a_step_of_three_pages() -> None:
    plan = plan_of(((0, 1, 2), (3,), (4,)), [KIB] * 5, capacity_bytes=3 * KIB)
    assert (plan.k, plan.m, plan.residents) == (3, 1, ())


@pytest.mark.parametrize(
    ("k", "m", "message"),
    [
        (0, None, "option 'k' must be a number of pages, 1 or more, not 0"),
        (-2, 1, "option 'k' must be a number of pages, 1 or more, not -2"),
        (2, 0, "option 'm' must be between 1 and k = 2, not 0"),
        (2, 3, "option 'm' must be between 1 and k = 2, not 3"),
        (9, 10, "option 'm' must be between 1 and k = 9, not 10"),
        (None, 1, "option 'm' needs option 'k', and must be between 1 and k; m = 1 was given alone"),
    ],
)
def test_options_out_of_range(k: int | None, m: int | None, message: str) -> None:
    with pytest.raises(OptionError) as raised:
        plan_of(chain(4), [KIB] * 4, k=k, m=m)
    assert str(raised.value) == message


def test_k_below_the_pages_of_one_segment_names_it() -> None:
    with pytest.raises(OptionError) as raised:
        plan_of(((0,), (1, 2), (3,)), [KIB] * 4, k=1)
    assert str(raised.value) == (
        "option 'k' must be at least 2 for this model, not 1: segment 's1' (step 1) reads 2 pages at once"
    )


def test_explicit_k_moves_every_page_once() -> None:
    plan = plan_of(chain(5), [100, 200, 300, 400, 500], k=2, m=1)
    assert plan.bytes_moved == 1500
    assert plan.arena_bytes == 2 * 512
    assert [slot.offset_bytes for slot in plan.slots] == [0, 512]
    assert plan.period == 2


def test_plans_by_hand() -> None:
    """Plans written on paper are what the planner makes."""
    for name in ("chain_in_batches", "chain_one_by_one", "chain_without_wrap", "all_resident", "tied_ends"):
        hand = PLANS[name]
        made = make_plan(
            device=hand.device,
            pages=hand.pages,
            leftovers=hand.leftovers,
            steps=hand.steps,
            wraps=hand.wraps,
            k=hand.k,
            m=hand.m,
        )
        spans = [(each.page, each.start_step, each.end_step) for each in hand.intervals]
        assert [(each.page, each.start_step, each.end_step) for each in made.intervals] == spans, name
        assert (made.k, made.m, made.residents) == (hand.k, hand.m, hand.residents), name
        if name == "tied_ends":  # by hand it has equal slots
            assert (made.arena_bytes, hand.arena_bytes) == (3 * MIB, 4 * MIB)
        else:
            assert made.slots == hand.slots, name


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize(("k", "capacity_bytes"), [(1, None), (3, None), (None, None), (None, 0), (None, 10)])
def test_nothing_to_place(k: int | None, capacity_bytes: int | None, wraps: bool) -> None:
    for reads in ((), ((), ())):
        plan = plan_of(reads, [], k=k, capacity_bytes=capacity_bytes, wraps=wraps)
        assert (plan.k, plan.m, plan.period, plan.slots, plan.intervals) == (0, 1, 1, (), ())


def test_unread_page_stays_on_the_host() -> None:
    assert plan_of(chain(2), [KIB] * 3, k=2).residents == ()
    assert plan_of(chain(2), [KIB] * 3, capacity_bytes=2 * KIB).residents == (0, 1)
    assert plan_of((), [KIB] * 3, capacity_bytes=KIB).residents == ()
    assert plan_of(chain(2), [KIB] * 3, capacity_bytes=3 * KIB).residents == (0, 1, 2)


def test_empty_page_is_streamed_like_any_other() -> None:
    plan = plan_of(chain(3), [0, 0, 0], k=2)
    assert len(plan.intervals) == 3
    assert plan.arena_bytes == 0
    assert plan_of(chain(4), [0, KIB, KIB, KIB], capacity_bytes=2 * KIB).residents == (0,)


def irregular(n: int) -> Reads:
    """A chain beside which every third step reads one page that all share, so that slots are freed out of order."""
    return in_order_of_use([(page, n) if page % 3 == 0 else (page,) for page in range(n)])


def test_long_periods_are_held_fast() -> None:
    """A plan lists the slots of all phases, so one that would need thousands waits for its slots instead."""
    reads, k = next(
        (irregular(n), k)
        for n in range(20, 100)
        for k in range(10, n // 2)
        if slot_period(plan_window(irregular(n), k, 2, wraps=True), n) > MAX_PERIOD
    )
    plan = plan_of(reads, [KIB] * (len(reads) + 1), k=k, m=2)
    assert plan.period == 1
    assert plan.bytes_moved == plan_of(reads, [KIB] * (len(reads) + 1), k=k, m=2, wraps=False).bytes_moved
    assert any(interval.start_step < 0 for interval in plan.intervals), "some copies still start ahead"


def test_long_chain_keeps_its_period() -> None:
    assert plan_of(chain(301), [KIB] * 301, k=290).period == 290


@given(plans())
def test_actions_in_order(plan: Plan) -> None:
    """The schedule by its definition: for every position, all intervals in turn. Wrong plans have one too."""
    assert list(plan.actions()) == list(actions_by_definition(plan))


def actions_by_definition(plan: Plan) -> Iterator[Action]:
    n_steps = len(plan.steps)
    for step in range(n_steps + 1):
        for index, interval in enumerate(plan.intervals):
            if interval.end_step == step:
                yield Action(ActionKind.EVICT, step - 1, index)
        for index, interval in enumerate(plan.intervals):
            if max(interval.start_step, 0) == step and step < n_steps:
                yield Action(ActionKind.PREFETCH, step, index)
        for index, interval in enumerate(plan.intervals):
            if plan.wraps and interval.start_step <= 0 and n_steps + interval.start_step == step:
                yield Action(ActionKind.PREFETCH, step, index, ahead=1)
        if step == n_steps:
            return
        for index, interval in enumerate(plan.intervals):
            if plan.load_step(interval) == step:
                yield Action(ActionKind.LOAD, step, index)
        yield Action(ActionKind.RUN, step)
