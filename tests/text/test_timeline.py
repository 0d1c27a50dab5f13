"""The ASCII timeline: whole where it can be seen at a glance, else its ends and the turn, and the rest in words."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from spcompile.ir import Interval, Plan, Step
from spcompile.timeline import TIMELINE_SLOTS, TIMELINE_STEPS, timeline
from tests.hand_plans import PLANS, equal_slots, layer_pages, layer_steps
from tests.text.plan_cases import language_model, training


def lines_of(plan: Plan) -> list[str]:
    return [line for line, _ in timeline(plan)]


def steps_of(lines: list[str]) -> list[list[int]]:
    """The steps drawn in each band."""
    return [list(map(int, line.split()[1:])) for line in lines if line.startswith("  step  ")]


def chain(n_layers: int, k: int = 2) -> Plan:
    """Layers that are streamed one by one, the first copies without overlap."""
    return Plan(
        device="cpu",
        k=k,
        m=1,
        wraps=False,
        pages=layer_pages(n_layers),
        leftovers=(),
        residents=(),
        steps=layer_steps(n_layers),
        slots=equal_slots(k),
        period=1,
        intervals=tuple(Interval(index, max(index - k + 1, 0), index + 1, (index % k,)) for index in range(n_layers)),
    )


def test_nothing_streamed_has_no_timeline() -> None:
    assert lines_of(PLANS["all_resident"]) == []
    assert lines_of(replace(PLANS["tied_ends"], steps=())) == []


def test_marks() -> None:
    """Copied, read, kept, without overlap, for the next iteration: in the slots of that one."""
    rows = [line.split() for line in lines_of(PLANS["chain_in_batches"])[4:]]
    assert rows == [
        ["step", "0", "1", "2", "3", "4"],
        ["slot", "0", "#0", "-0", "~3", "#3", "~0'"],
        ["slot", "1", "~1", "#1", "~4", "~4", "#4"],
        ["slot", "2", "~2", "~2", "#2", "-2", "~1'"],
        ["held", "3", "3", "3", "3", "3"],
    ]


@pytest.mark.parametrize("n_steps", [17, 18, TIMELINE_STEPS])
def test_short_plans_show_every_step(n_steps: int) -> None:
    lines = lines_of(chain(n_steps))
    assert [step for band in steps_of(lines) for step in band] == list(range(n_steps))
    assert not any(line.startswith("  ...") for line in lines)


@pytest.mark.parametrize("plan", [chain(41), language_model(80, 11), training(30), training(40), training(150)])
def test_long_plans_show_their_ends_and_the_turn_and_say_the_rest(plan: Plan) -> None:
    """Every step is drawn once or lies in one stretch of words."""
    lines = lines_of(plan)
    n_steps = len(plan.steps)
    drawn = [step for band in steps_of(lines) for step in band]
    told = [
        step
        for line in lines
        if (match := re.match(r"  \.\.\. steps (\d+) to (\d+): ", line))
        for step in range(int(match[1]), int(match[2]) + 1)
    ]
    assert sorted([*drawn, *told]) == list(range(n_steps))
    assert told
    assert {0, 1, n_steps - 2, n_steps - 1} <= set(drawn)
    if plan.backward_step is not None:
        assert {plan.backward_step - 1, plan.backward_step} <= set(drawn)
    assert len(steps_of(lines)) <= 4


def test_what_is_said_of_steps_that_are_not_drawn() -> None:
    (words,) = [line for line in lines_of(chain(41)) if line.startswith("  ...")]
    assert words == "  ... steps 17 to 23: 2 pages hold slots; 7 copies started: #18, #19, #20, #21,"
    lines = lines_of(chain(41))
    assert lines[lines.index(words) + 1] == "  #22, #23, #24"
    lone = replace(chain(50, k=1), intervals=chain(50, k=1).intervals[:20])
    text = " ".join(lines_of(lone))
    assert "... steps 17 to 32: 0 to 1 pages hold slots; 3 copies started: #17, #18, #19" in text


def test_many_slots_are_counted() -> None:
    n_slots = TIMELINE_SLOTS + 3
    step = Step("all", None, tuple(range(n_slots)))
    plan = replace(
        chain(n_slots, k=n_slots),
        steps=(step,),
        intervals=tuple(Interval(index, 0, 1, (index,)) for index in range(n_slots)),
    )
    lines = lines_of(plan)
    assert sum(line.startswith("  slot ") for line in lines) == TIMELINE_SLOTS
    assert "  ... and 3 slots more" in lines
    assert lines[-1].split() == ["held", str(n_slots)]


def test_slots_without_anything_in_a_band_are_left_out() -> None:
    plan = replace(chain(30), slots=(*equal_slots(2), *equal_slots(1)))
    assert not any(line.startswith("  slot 2") for line in lines_of(plan))
