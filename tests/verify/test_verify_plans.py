"""The verifier of plans: right plans are clean, every mistake is found, and all mistakes are found at once."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spcompile.errors import VerificationError
from spcompile.ir import Interval, Plan, Slot, Step, Weight
from spcompile.text import format_plan, plan_text
from spcompile.verify.plans import verify_plan
from spcompile.verify.violations import Violation, raise_if_any, render
from tests.hand_plans import MIB, PLANS, equal_slots, layer_pages, layer_steps, page
from tests.mutants import changed, mutants
from tests.plan_oracle import may_run
from tests.random_plans import plans

LATER = "the copy still comes before the first read: time is lost, not data"
EARLIER = "k leaves room for one page more, and its slot is free already"
NOTHING_STREAMED = "no page holds a slot, so k, period and wrap-around have nothing to act on"

EQUIVALENT: dict[str, dict[str, str]] = {
    "chain_in_batches": {
        **{f"interval {index} starts later": LATER for index in (1, 2, 4)},
        **{
            f"slots of intervals 0 and 1 swapped{phase}": "both come and leave together, and their slots are alike"
            for phase in ("", " in phase 0", " in phase 1")
        },
    },
    "chain_one_by_one": {f"interval {index} starts later": LATER for index in range(5)},
    "chain_without_wrap": {f"interval {index} starts later": LATER for index in (1, 2, 3)},
    "all_resident": dict.fromkeys(("k - 1", "period + 1", "no wrap"), NOTHING_STREAMED),
    "tied_ends": {
        "no wrap": "no copy starts before the iteration itself does",
        **{f"interval {index} starts later": LATER for index in (1, 2, 3)},
    },
    "two_pages_in_one_step": {
        **{f"interval {index} starts later": LATER for index in (0, 1, 2)},
        **{f"interval {index} starts earlier": EARLIER for index in (1, 2)},
        "slots of intervals 1 and 2 swapped": "the slots have one size, and nobody else takes them",
    },
}
"""Mutants of the plans by hand that are right as well, and why. All others must be rejected."""

CASES = [(name, mutation) for name, plan in PLANS.items() for mutation, _ in mutants(plan)]


def messages(plan: Plan, budget_bytes: int | None = None) -> list[str]:
    return [violation.message for violation in verify_plan(plan, budget_bytes)]


def with_interval(plan: Plan, index: int, interval: Interval) -> Plan:
    return replace(plan, intervals=changed(plan.intervals, index, interval))


@pytest.mark.parametrize("name", PLANS)
def test_right_plan_is_clean(name: str) -> None:
    assert verify_plan(PLANS[name]) == []
    assert may_run(PLANS[name])


@pytest.mark.parametrize("name", PLANS)
def test_names_of_mutants_are_unique(name: str) -> None:
    names = [mutation for mutation, _ in mutants(PLANS[name])]
    assert len(names) == len(set(names)) >= 20
    assert set(EQUIVALENT[name]) <= set(names)


@pytest.mark.parametrize(("name", "mutation"), CASES)
def test_mutant_is_rejected(name: str, mutation: str) -> None:
    mutant = dict(mutants(PLANS[name]))[mutation]
    found = messages(mutant)
    if mutation in EQUIVALENT[name]:
        assert found == []
        assert may_run(mutant)
    else:
        assert found != []


def test_read_without_interval() -> None:
    plan = PLANS["chain_in_batches"]
    assert messages(replace(plan, intervals=plan.intervals[:-1])) == [
        "layers.4 is read at step 4, but sits in no slot then: it is neither resident nor ever copied"
    ]


def test_read_outside_its_interval() -> None:
    plan = PLANS["tied_ends"]
    assert messages(replace(plan, intervals=plan.intervals[:-1])) == [
        "embed is read at step 3, but sits in no slot then: it is there only in [0, 1)"
    ]


def test_copy_for_the_next_iteration_does_not_serve_this_one() -> None:
    """The tied page is on the device during step 3, but on behalf of the next iteration: nothing has loaded it."""
    plan = PLANS["tied_ends"]
    early = replace(plan, intervals=(Interval(0, -1, 1, (1,)), *plan.intervals[1:-1]))
    found = messages(early)
    assert "embed is read at step 3, but sits in no slot then: it is there only in [-1, 1)" in found


def test_page_in_two_slots_across_the_wrap_around() -> None:
    plan = replace(PLANS["tied_ends"], k=3, slots=(*PLANS["tied_ends"].slots, Slot(4 * MIB, 2 * MIB)))
    early = with_interval(plan, 0, Interval(0, -1, 1, (2,)))
    assert messages(early) == [
        "embed is copied before step 3, but is on the device already: it leaves after step 3",
    ]


def test_stay_longer_than_an_iteration_meets_itself() -> None:
    pages, steps = layer_pages(2), layer_steps(2)
    plan = Plan(
        device="cpu",
        k=3,
        m=1,
        wraps=True,
        pages=pages,
        leftovers=(),
        residents=(),
        steps=steps,
        slots=equal_slots(3),
        period=2,
        intervals=(Interval(1, -1, 2, (0, 1)), Interval(0, 0, 1, (2, 2))),
    )
    assert messages(plan) == [
        "layers.1 is copied before step 1 of phase 0, but is on the device already: it leaves after step 1 of phase 0"
    ]


def test_slot_taken_only_where_phases_meet() -> None:
    """Phases 0 and 1 are right by themselves; the page comes too early where phase 1 follows phase 0."""
    plan = PLANS["chain_one_by_one"]
    first = plan.intervals[0]
    fixed = with_interval(plan, 0, replace(first, slots=(0, 0)))
    found = messages(fixed)
    assert (
        "layers.0 is copied before step 4 of phase 0 into slot 0, where layers.4 still sits: "
        "it leaves after step 4 of phase 0" in found
    )


def test_slot_taken_only_where_the_last_phase_meets_the_first() -> None:
    """Three phases, and only the last one leaves a page in the way of the first one."""
    plan = Plan(
        device="cpu",
        k=2,
        m=1,
        wraps=True,
        pages=layer_pages(2),
        leftovers=(),
        residents=(),
        steps=layer_steps(2),
        slots=equal_slots(3),
        period=3,
        intervals=(Interval(0, -1, 1, (0, 0, 2)), Interval(1, 0, 2, (1, 1, 1))),
    )
    assert verify_plan(plan) == []
    assert messages(with_interval(plan, 1, Interval(1, 0, 2, (1, 1, 0)))) == [
        "layers.0 is copied before step 1 of phase 2 into slot 0, where layers.1 still sits: "
        "it leaves after step 1 of phase 2"
    ]


def test_intervals_outside_the_iteration() -> None:
    plan = PLANS["chain_without_wrap"]
    wrong = {
        (3, 3): "layers.3 in [3, 3) ends before it starts",
        (-4, 4): "layers.3 in [-4, 4) starts more than an iteration ahead: the plan has 4 steps",
        (-1, 4): "layers.3 in [-1, 4) starts in the iteration before, but the plan does not wrap",
        (2, 5): "layers.3 in [2, 5) ends outside the iteration, which has 4 steps",
        (-2, 0): "layers.3 in [-2, 0) ends outside the iteration, which has 4 steps",
        (2, 3): "layers.3 in [2, 3) is copied for nothing: no step in this interval reads it",
    }
    for (start, end), message in wrong.items():
        assert message in messages(with_interval(plan, 3, Interval(3, start, end, (1,))))


def test_slot_needs_room_for_the_alignment_of_each_weight() -> None:
    plan = replace(PLANS["chain_without_wrap"], pages=(*layer_pages(3), page("layers.3", MIB // 2 - 1, MIB // 2)))
    assert verify_plan(plan) == []
    tight = replace(plan, pages=(*layer_pages(3), page("layers.3", 1, MIB - 1)))
    assert messages(tight) == [
        "layers.3 in [2, 4) takes slot 1 in phase 0, which has 1048576 bytes, but it needs 1048832"
    ]


def test_slots_that_overlap_in_bytes_are_one_place() -> None:
    plan = PLANS["chain_without_wrap"]
    found = messages(replace(plan, slots=(Slot(0, MIB), Slot(MIB - 256, MIB))))
    assert (
        "layers.1 is copied before step 0 into slot 1, which overlaps slot 0, where layers.0 still sits: "
        "it leaves after step 0" in found
    )
    assert len(found) == 3  # each of the copies into a slot next to a taken one


def test_slots_may_overlap_where_nobody_meets() -> None:
    """Slots are places, not partitions: a large page may take the bytes of two small ones that have left."""
    plan = Plan(
        device="cpu",
        k=2,
        m=1,
        wraps=False,
        pages=(page("a", 256), page("b", 256), page("c", 512)),
        leftovers=(),
        residents=(),
        steps=(Step("ab", None, (0, 1)), Step("c", None, (2,))),
        slots=(Slot(0, 256), Slot(256, 256), Slot(0, 512)),
        period=1,
        intervals=(Interval(0, 0, 1, (0,)), Interval(1, 0, 1, (1,)), Interval(2, 1, 2, (2,))),
    )
    assert verify_plan(plan) == []


def test_empty_pages_still_need_a_slot_each() -> None:
    plan = Plan(
        device="cpu",
        k=2,
        m=1,
        wraps=False,
        pages=(page("a", 0), page("b", 0)),
        leftovers=(),
        residents=(),
        steps=(Step("ab", None, (0, 1)),),
        slots=(Slot(0, 0), Slot(0, 0)),
        period=1,
        intervals=(Interval(0, 0, 1, (0,)), Interval(1, 0, 1, (1,))),
    )
    assert verify_plan(plan) == []
    assert verify_plan(with_interval(plan, 1, Interval(1, 0, 1, (0,)))) != []


def test_room_for_k_pages() -> None:
    plan = PLANS["chain_in_batches"]
    early = with_interval(plan, 4, replace(plan.intervals[4], start_step=1))
    early = replace(early, intervals=(*early.intervals[:3], early.intervals[4], early.intervals[3]))
    assert "4 pages hold slots at step 1, but k is 3: layers.0, layers.1, layers.2, layers.4" in messages(early)


def test_batches_leave_together() -> None:
    plan = PLANS["chain_in_batches"]
    assert messages(with_interval(plan, 0, replace(plan.intervals[0], end_step=1))) == [
        "layers.0 leaves after step 0, but its batch (layers.0, layers.1) is evicted together after step 1"
    ]
    assert "layers.0 leaves after step 1, but its batch (layers.0) is evicted together after step 0" in messages(
        replace(plan, m=1)
    )


def test_page_may_wait_for_its_batch_outside_chains_too() -> None:
    """m = 2: page 0 waits for page 1, which completes its batch; without m = 2 it would keep its slot for nothing."""
    plan = Plan(
        device="cpu",
        k=3,
        m=2,
        wraps=False,
        pages=layer_pages(3),
        leftovers=(),
        residents=(),
        steps=(Step("a", None, (0, 1)), Step("b", None, (1, 2)), Step("c", None, (2,))),
        slots=equal_slots(3),
        period=1,
        intervals=(Interval(0, 0, 2, (0,)), Interval(1, 0, 2, (1,)), Interval(2, 0, 3, (2,))),
    )
    assert verify_plan(plan) == []
    assert "layers.0 in [0, 2) keeps its slot until after step 1, but is last read at step 0" in messages(
        replace(plan, m=1)
    )


def test_page_waits_no_longer_than_until_room_is_needed() -> None:
    """m = 3: pages 0 and 1 wait for a third one, which finds no room before they leave; nobody waits for nothing."""
    plan = Plan(
        device="cpu",
        k=3,
        m=3,
        wraps=False,
        pages=layer_pages(4),
        leftovers=(),
        residents=(),
        steps=(Step("a", None, (0, 1, 2)), Step("b", None, ()), Step("c", None, ()), Step("d", None, (2, 3))),
        slots=equal_slots(3),
        period=1,
        intervals=(Interval(0, 0, 3, (0,)), Interval(1, 0, 3, (1,)), Interval(2, 0, 4, (2,)), Interval(3, 3, 4, (0,))),
    )
    assert verify_plan(plan) == []
    waits = "layers.1 in [0, 2) keeps its slot until after step 1, but is last read at step 0"
    assert messages(with_interval(plan, 1, Interval(1, 0, 2, (1,)))) == [waits]
    assert len(messages(replace(plan, m=2))) == 2  # both wait, but only one may


def test_short_last_batch_may_wait_until_the_iteration_ends() -> None:
    plan = PLANS["chain_in_batches"]
    plan = replace(plan, steps=(*plan.steps, Step("norm", None, ()), Step("sample", None, ())), wraps=False)
    intervals = tuple(replace(each, start_step=max(each.start_step, 0)) for each in plan.intervals)
    plan = replace(plan, intervals=intervals)
    assert verify_plan(plan) == []
    assert verify_plan(with_interval(plan, 4, replace(intervals[4], end_step=7))) == []
    assert messages(with_interval(plan, 4, replace(intervals[4], end_step=6))) == [
        "layers.4 in [2, 6) keeps its slot until after step 5, but is last read at step 4",
        "layers.4 leaves after step 5, but its batch (layers.4) is evicted together after step 4",
    ]


def test_full_last_batch_does_not_wait() -> None:
    plan = Plan(
        device="cpu",
        k=3,
        m=2,
        wraps=False,
        pages=layer_pages(4),
        leftovers=(),
        residents=(),
        steps=(*layer_steps(4), Step("norm", None, ())),
        slots=equal_slots(3),
        period=1,
        intervals=(Interval(0, 0, 2, (0,)), Interval(1, 0, 2, (1,)), Interval(2, 0, 4, (2,)), Interval(3, 2, 4, (0,))),
    )
    assert verify_plan(plan) == []
    assert messages(with_interval(plan, 2, Interval(2, 0, 5, (2,)))) == [
        "layers.2 leaves after step 4, but its batch (layers.2, layers.3) is evicted together after step 3"
    ]


def test_budget_counts_arena_residents_and_leftovers() -> None:
    plan = replace(PLANS["two_pages_in_one_step"], leftovers=(Weight("scale", 77),))
    assert verify_plan(plan, plan.peak_weight_bytes) == []
    assert messages(plan, plan.peak_weight_bytes - 1) == [
        "any step takes 3146324 bytes, 1 more than the budget of 3146323 bytes (3.00 MiB): "
        "arena 3.00 MiB, leftovers 77 B, residents 7 B"
    ]


def with_values(plan: Plan, *activations_bytes: int) -> Plan:
    """The plan with values at each step, inputs of 7 * 3 bytes, and something for all else that takes memory."""
    steps = tuple(
        replace(step, activations_bytes=nbytes) for step, nbytes in zip(plan.steps, activations_bytes, strict=True)
    )
    return replace(
        plan, steps=steps, sizes=(("s0", 3),), inputs=(("s0", 7),), workspace_bytes=1024, other_bytes=2 * MIB
    )


def test_budget_is_kept_at_each_step() -> None:
    """Only the steps that exceed it are marked, each with what it takes; the largest part comes first."""
    plan = with_values(PLANS["chain_without_wrap"], 10, MIB, 0, 20)
    taken = 2 * MIB + 2 * MIB + 1024 + 21
    assert verify_plan(plan, taken + MIB) == []
    over = verify_plan(plan, taken + 15)
    step_lines = [format_plan(plan).splitlines()[violation.line].split()[:3] for violation in over]
    assert step_lines == [[">", "1", "run"], [">", "3", "run"]]
    assert [violation.message for violation in over] == [
        f"step 1 takes {taken + MIB} bytes, 1048561 more than the budget of {taken + 15} bytes (4.00 MiB): "
        "arena 2.00 MiB, all else 2.00 MiB, its values 1.00 MiB, workspace 1.00 KiB, inputs 21 B",
        f"step 3 takes {taken + 20} bytes, 5 more than the budget of {taken + 15} bytes (4.00 MiB): "
        "arena 2.00 MiB, all else 2.00 MiB, workspace 1.00 KiB, inputs 21 B, its values 20 B",
    ]


def test_no_step_is_to_blame_for_what_is_always_there() -> None:
    plan = with_values(PLANS["chain_without_wrap"], 10, MIB, 0, 20)
    always = 4 * MIB + 1024 + 21
    assert [format_plan(plan).splitlines()[each.line].split()[1] for each in verify_plan(plan, always)] == [
        "0",
        "1",
        "3",
    ]
    assert messages(plan, always - 1) == [
        f"any step takes {always} bytes, 1 more than the budget of {always - 1} bytes (4.00 MiB): "
        "arena 2.00 MiB, all else 2.00 MiB, workspace 1.00 KiB, inputs 21 B"
    ]
    assert verify_plan(plan, always - 1)[0].line == 0


def test_budget_of_a_plan_without_steps() -> None:
    empty = Plan("cpu", 1, 1, False, (), (Weight("scale", 5),), (), (), (), 1, (), inputs=(("1", 3),))
    assert verify_plan(empty, 8) == []
    assert messages(empty, 7) == [
        "any step takes 8 bytes, 1 more than the budget of 7 bytes (7 B): leftovers 5 B, inputs 3 B"
    ]


def test_totals_are_counted_again() -> None:
    """A plan that miscounts: its figures are what the arena is made from, and what people decide by."""

    class Miscounted(Plan):
        bytes_moved = arena_bytes = peak_weight_bytes = 0

    plan = PLANS["tied_ends"]
    assert set(messages(Miscounted(**{each.name: getattr(plan, each.name) for each in fields(plan)}))) == {
        "the slots end at byte 4194304, but the plan says that the arena has 0 bytes",
        "weights take 4194304 bytes at once, but the plan says 0",
        "a warm iteration moves 6291456 bytes, but the plan says 0",
        "slot 0 ends at byte 2097152, but the arena has 0 bytes",
        "slot 1 ends at byte 4194304, but the arena has 0 bytes",
    }


def test_values_are_counted_again() -> None:
    """What a step is said to take, and what `Plan.peak_bytes` goes by, are two texts of one thing."""
    plan = replace(with_values(PLANS["chain_without_wrap"], 10, 30, 0, 20), activations=((("s0", 8),), (("s0", 10),)))
    assert verify_plan(plan) == []
    assert messages(replace(plan, activations=((("s0", 8), ("1", -1)),))) == [
        "the values of one step take 30 bytes at most, but as a formula of sizes 23"
    ]


def test_sizes_without_a_value_are_a_violation() -> None:
    plan = replace(PLANS["chain_without_wrap"], inputs=(("s1", 4),))
    assert messages(plan, 5 * MIB) == [
        "with the sizes at capture there is no value: size 's1' has no value; given are none"
    ]


def test_pages_stand_in_order_of_first_use() -> None:
    plan = PLANS["all_resident"]
    assert messages(replace(plan, steps=plan.steps[::-1])) == [
        "layers.0 stands before layers.1, but is first read after it",
        "layers.1 stands before layers.2, but is first read after it",
    ]


def test_weights_have_one_place_and_a_size() -> None:
    plan = PLANS["all_resident"]
    leftovers = (Weight("layers.0.w0", 4), Weight("bad", -4))
    assert messages(replace(plan, leftovers=leftovers)) == [
        "weight bad has -4 bytes",
        "weight layers.0.w0 is in 2 places: layers.0, the leftovers",
    ]


def test_negative_slots() -> None:
    plan = PLANS["chain_without_wrap"]
    found = messages(replace(plan, slots=(Slot(-256, MIB), Slot(MIB, -1))))
    assert "slot 0 starts 256 bytes before the arena" in found
    assert "slot 1 has -1 bytes" in found


def test_all_violations_are_returned_at_their_lines() -> None:
    """Five independent mistakes, five marks: nothing stops at the first one."""
    plan = PLANS["chain_in_batches"]
    wrong = replace(
        plan,
        m=4,
        slots=(*plan.slots, Slot(3 * MIB + 1, 256)),
        intervals=plan.intervals[:-1],
        residents=(7,),
    )
    found = verify_plan(wrong)
    assert found == sorted(found, key=lambda violation: violation.line)
    lines = format_plan(wrong).splitlines()
    by_message = {violation.message: lines[violation.line] for violation in found}
    header = lines[0]
    assert by_message["m is 4, but must be between 1 and k = 3"] == header
    assert by_message["page 7 is resident, but there are only 5 pages"] == header
    slot_line = lines[plan_text(wrong).line(("slot", 3))]
    assert by_message["slot 3 starts at byte 3145729, which is no multiple of 256"] == slot_line
    assert by_message["slot 3 (256 B) is reserved, but no page ever takes it"] == slot_line
    read = "layers.4 is read at step 4, but sits in no slot then: it is neither resident nor ever copied"
    assert by_message[read].split()[:4] == [">", "4", "run", "layers_4"]


def test_plan_without_steps_or_pages() -> None:
    empty = Plan("cpu", 0, 0, False, (), (), (), (), (), 1, ())
    assert verify_plan(empty) == []
    assert verify_plan(replace(empty, intervals=(Interval(0, 0, 1, (0,)),))) != []


@given(st.data())
def test_what_is_clean_may_run(data: st.DataObject) -> None:
    """Up to three mistakes at once, some of which make up for each other: the oracle agrees where nothing is found."""
    plan = data.draw(st.sampled_from(list(PLANS.values())))
    for _ in range(data.draw(st.integers(1, 3))):
        _, plan = data.draw(st.sampled_from(list(mutants(plan))))
    if not verify_plan(plan):
        assert may_run(plan)


@given(plans())
def test_any_plan_makes_violations_not_exceptions(plan: Plan) -> None:
    lines = format_plan(plan).splitlines()
    assert all(0 <= violation.line < len(lines) for violation in verify_plan(plan, budget_bytes=0))


def test_render_marks_and_wraps() -> None:
    text = render(
        ["one", "  two", "> three", ""],
        [Violation(1, "second"), Violation(1, "again"), Violation(2, "word " * 30), Violation(9, "nowhere")],
    )
    assert text.splitlines() == [
        "one",
        "  two",
        "  ^^^",
        "  second",
        "  again",
        "> three",
        "  ^^^^^",
        "  " + " ".join(["word"] * 19),
        "  " + " ".join(["word"] * 11),
        "",
        "nowhere",
    ]


def test_render_without_violations_is_the_text() -> None:
    assert render(["one", "two"], []) == "one\ntwo"


def test_raise_if_any() -> None:
    plan = PLANS["all_resident"]
    lines = format_plan(plan).splitlines()
    raise_if_any("the plan", lines, verify_plan(plan))
    wrong = replace(plan, residents=(0, 1))
    with pytest.raises(VerificationError, match=r"^the plan has 1 violation:\n") as caught:
        raise_if_any("the plan", format_plan(wrong).splitlines(), verify_plan(wrong))
    message = str(caught.value)
    assert "reads #2\n  " in message
    assert message.splitlines()[-1].startswith("The first of 1 violation: layers.2 is read at step 2")
