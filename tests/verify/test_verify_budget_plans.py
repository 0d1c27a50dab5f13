"""Plans within a budget, where each stay has an address of its own: slots overlap in address, and are used in turn.

The oracle of `tests.plan_oracle` writes out who holds which bytes during each step; the verifier must find the same
kinds of faults, no more and no less. That also says which mutants are right after all: those do not count.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spcompile.errors import OptionError
from spcompile.ir import Plan, Slot, Step
from spcompile.planner.choose import choose_fastest, find_tradeoff
from spcompile.planner.make_plan import make_plan
from spcompile.planner.streaming import stream_in_room
from spcompile.text import format_plan
from spcompile.verify.plans import verify_plan
from spcompile.verify.violations import render
from tests.hand_plans import page
from tests.mutants import mutants_of_places
from tests.plan_oracle import faults, is_sound, may_run
from tests.random_plans import graphs

WORDS = {
    "shared": "still sits",
    "twice": "is on the device already",
    "crowded": "pages hold slots at step",
    "missing": "but sits in no slot then",
}
"""How the verifier says what the oracle calls a fault."""

UNIT = 1024


def found_faults(plan: Plan) -> frozenset[str]:
    messages = [violation.message for violation in verify_plan(plan)]
    return frozenset(fault for fault, words in WORDS.items() if any(words in message for message in messages))


def assert_clean(plan: Plan, budget_bytes: int | None = None) -> None:
    violations = verify_plan(plan, budget_bytes)
    assert not violations, "\n" + render(str(plan).splitlines(), violations)
    assert may_run(plan)


def in_room(
    reads: list[list[int]], units: list[int], room_units: int, *, keep: bool = False, wraps: bool = True
) -> Plan:
    """Pages of so many units, all streamed through so much room."""
    graph = make_plan(
        device="cpu",
        pages=tuple(page(f"p{index}", UNIT * each) for index, each in enumerate(units)),
        leftovers=(),
        steps=tuple(Step(f"s{index}", None, tuple(pages)) for index, pages in enumerate(reads)),
        wraps=wraps,
    )
    return stream_in_room(graph, (), UNIT * room_units, reserve_bytes=0 if keep else None)


def meet(one: Slot, other: Slot) -> bool:
    return one.offset_bytes < other.offset_bytes + other.nbytes and other.offset_bytes < one.offset_bytes + one.nbytes


def chain(n_pages: int) -> list[list[int]]:
    return [[index] for index in range(n_pages)]


BY_HAND = {
    "small pages where a large one lay": in_room(chain(5), [4, 1, 2, 1, 4], 6),
    "places that change every iteration": in_room(chain(5), [1] * 5, 2),
    "kept over a gap": in_room([[0], [1], [2], [0], [3]], [1, 1, 2, 1], 4, keep=True),
    "there and back, middle kept": in_room(chain(5) + chain(5)[::-1], [1, 3, 1, 2, 1], 5, keep=True, wraps=False),
    "tied ends": in_room([*chain(4), [0]], [1, 1, 2, 1], 3),
    "two pages in a step": in_room([[0, 1], [1, 2], [2, 3], [3, 0]], [1, 2, 1, 3], 6),
}
"""Plans that show what the mutants are about; the tests below say that they do."""


@st.composite
def plans_in_room(draw: st.DrawFn) -> tuple[Plan, int]:
    """A graph streamed through so much room beside some residents; and the budget that it must keep to."""
    graph = draw(graphs())
    residents = draw(st.sets(st.integers(0, len(graph.pages) - 1), max_size=2))
    sizes_bytes = [each.slot_bytes for index, each in enumerate(graph.pages) if index not in residents]
    room_bytes = draw(st.integers(max(sizes_bytes), sum(sizes_bytes)))
    reserve_bytes = draw(st.none() | st.sampled_from([0, max(sizes_bytes)]))
    tables = {index for step in graph.steps for index, _ in step.gathers} - residents
    mapped = tuple(tables) if draw(st.booleans()) else ()
    try:
        plan = stream_in_room(replace(graph, mapped=mapped), residents, room_bytes, reserve_bytes=reserve_bytes)
    except ValueError:
        assume(False)
    return plan, room_bytes + plan.residents_bytes + plan.leftovers_bytes + plan.beside_bytes()


@st.composite
def fastest_plans(draw: st.DrawFn) -> tuple[Plan, int]:
    graph = draw(graphs())
    capacity_bytes = draw(st.integers(graph.weights_bytes // 3, graph.weights_bytes + 256 * len(graph.pages)))
    try:
        plan = choose_fastest(graph, capacity_bytes)
    except OptionError:
        assume(False)
    return plan, capacity_bytes + plan.beside_bytes()


@pytest.mark.parametrize("name", BY_HAND)
def test_plans_by_hand_are_clean(name: str) -> None:
    assert_clean(BY_HAND[name], BY_HAND[name].peak_bytes())


def test_plans_by_hand_show_what_they_are_for() -> None:
    """Slots that overlap, phases, kept gaps: and with each a harmful mutant of every class."""
    harmful: Counter[str] = Counter()
    for name, plan in BY_HAND.items():
        assert any(meet(one, other) for one, other in combinations(plan.slots, 2)) or plan.period > 1, name
        own = Counter(kind for kind, _, mutant in mutants_of_places(plan) if not may_run(mutant))
        assert own["slot moved"] > 0, name
        assert own["stay ends later"] > 0, name
        harmful += own
    assert BY_HAND["places that change every iteration"].period == 2
    assert set(harmful) == {
        "slot moved",
        "slot moved in one phase",
        "slot enlarged",
        "copy starts earlier",
        "stay ends later",
        "gap cut short",
        "left to the next iteration",
    }


@pytest.mark.parametrize("name", BY_HAND)
def test_mutants_of_plans_by_hand(name: str) -> None:
    for kind, mutation, mutant in mutants_of_places(BY_HAND[name]):
        assert_judged_alike(kind, mutation, mutant)


@pytest.mark.parametrize("name", ["kept over a gap", "there and back, middle kept"])
def test_what_was_kept_may_be_loaded_again(name: str) -> None:
    """Mutants that are right: more is copied, but every read finds its page."""
    again = [mutant for kind, _, mutant in mutants_of_places(BY_HAND[name]) if kind == "loaded again"]
    assert again
    for mutant in again:
        assert_clean(mutant)


def assert_judged_alike(kind: str, mutation: str, mutant: Plan) -> None:
    """Verifier and oracle find the same faults; what is no plan at all is rejected."""
    if not is_sound(mutant):
        assert verify_plan(mutant), (kind, mutation)
        return
    assert found_faults(mutant) == faults(mutant), (kind, mutation)


@settings(max_examples=150)
@given(plans_in_room())
def test_plans_in_room_are_clean(made: tuple[Plan, int]) -> None:
    assert_clean(*made)


@settings(max_examples=40)
@given(fastest_plans())
def test_fastest_plans_are_clean(made: tuple[Plan, int]) -> None:
    assert_clean(*made)


@settings(max_examples=10)
@given(graphs())
def test_every_plan_of_the_tradeoff_keeps_to_its_own_peak(graph: Plan) -> None:
    for point in find_tradeoff(graph):
        assert_clean(point.plan, point.peak_bytes)
        assert verify_plan(point.plan, point.peak_bytes - 1)


@settings(max_examples=60)
@given(plans_in_room(), st.data())
def test_mutants_of_plans_in_room(made: tuple[Plan, int], data: st.DataObject) -> None:
    """Some of each class, as there may be thousands; and two at once, which may make up for each other."""
    plan, _ = made
    every = list(mutants_of_places(plan))
    for kind in dict.fromkeys(kind for kind, _, _ in every):
        for each in data.draw(st.lists(st.sampled_from([one for one in every if one[0] == kind]), max_size=4)):
            assert_judged_alike(*each)
    if every:
        kind, name, mutant = data.draw(st.sampled_from(every))
        again = list(mutants_of_places(mutant)) if is_sound(mutant) else []
        if again:
            kind_again, name_again, mutant = data.draw(st.sampled_from(again))
            assert_judged_alike(f"{kind}, {kind_again}", f"{name}, {name_again}", mutant)


@given(plans_in_room(), st.data())
def test_budget_is_checked_at_each_step(made: tuple[Plan, int], data: st.DataObject) -> None:
    """Against sums written out by hand, at any budget: exactly the guilty steps are marked."""
    plan, _ = made
    always = (
        max((slot.offset_bytes + slot.nbytes for slot in plan.slots), default=0)
        + sum(weight.nbytes for index in plan.residents for weight in plan.pages[index].weights)
        + sum(weight.nbytes for weight in plan.leftovers)
        + (7 * 3 + 50 + plan.other_bytes)
    )
    steps_bytes = [always + step.activations_bytes for step in plan.steps]
    assert max(steps_bytes) == plan.peak_bytes()
    budget_bytes = data.draw(st.sampled_from([each + shift for each in (always, *steps_bytes) for shift in (-1, 0, 1)]))
    found = verify_plan(plan, budget_bytes)
    guilty = [f"step {index}" for index, nbytes in enumerate(steps_bytes) if nbytes > budget_bytes]
    blamed = ["any step"] if always > budget_bytes else guilty
    assert [violation.message.split(" takes")[0] for violation in found] == blamed
    if always <= budget_bytes:
        lines = format_plan(plan).splitlines()
        assert [lines[each.line].split()[:3] for each in found] == [[">", step[5:], "run"] for step in guilty]
    for violation, nbytes in zip(found, [each for each in steps_bytes if each > budget_bytes], strict=False):
        taken = always if always > budget_bytes else nbytes
        assert f"takes {taken} bytes, {taken - budget_bytes} more than the budget" in violation.message


@given(plans_in_room())
def test_an_enlarged_arena_breaks_the_budget(made: tuple[Plan, int]) -> None:
    """A larger slot at the end harms nobody, but it takes memory: it is right without a budget and wrong with one."""
    plan, _ = made
    for kind, mutation, mutant in mutants_of_places(plan):
        if kind == "slot enlarged" and mutant.arena_bytes > plan.arena_bytes:
            assert verify_plan(mutant, plan.peak_bytes()), mutation
