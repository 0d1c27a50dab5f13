"""The text of a plan reads back to an equal plan, and a text that was changed is refused or is what it says."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spcompile.errors import PlanFormatError
from spcompile.ir import FORMAT_VERSION, Plan, Weight
from spcompile.plan_details import TITLE
from spcompile.text import format_plan
from tests.hand_plans import PLANS
from tests.mutants import mutants
from tests.random_plans import full_plans, graphs, plans
from tests.text.plan_cases import CASES

TEXTS = {name: plan.to_text() for name, plan in CASES.items()}


@given(plans() | full_plans() | graphs())
def test_round_trip(plan: Plan) -> None:
    """Any plan, also one that breaks every rule or has names that break lines."""
    text = plan.to_text()
    assert text.isascii()
    again = Plan.from_text(text)
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.to_text() == text


@pytest.mark.parametrize("name", CASES)
def test_round_trip_of_cases(name: str) -> None:
    assert Plan.from_text(TEXTS[name]) == CASES[name]
    assert Plan.from_json(CASES[name].to_json()).to_text() == TEXTS[name]


@pytest.mark.parametrize(
    "name", ["true", "null", "NaN", "Infinity", "-1", "1e5", "a b", "", '"', "é", "x\n  step 0", "[]"]
)
def test_names_that_look_like_something_else(name: str) -> None:
    plan = replace(PLANS["tied_ends"], device=name, leftovers=(Weight(name, 3), Weight(name + ".x", 4)))
    assert Plan.from_text(plan.to_text()) == plan


def test_text_begins_with_what_people_read() -> None:
    plan = PLANS["chain_in_batches"]
    assert plan.to_text().startswith(format_plan(plan) + "\n\n" + TITLE + "\n")


def test_line_ends_and_blank_lines_around_do_not_matter() -> None:
    text = TEXTS["tied_ends"]
    assert Plan.from_text("\n\n" + text.replace("\n", "  \r\n") + "\n\n") == CASES["tied_ends"]


@pytest.mark.parametrize("name", PLANS)
def test_plans_that_differ_have_texts_that_differ(name: str) -> None:
    plan = PLANS[name]
    made = {plan.to_text(): plan}
    for _, mutant in mutants(plan):
        assert made.setdefault(mutant.to_text(), mutant) == mutant
        assert Plan.from_text(mutant.to_text()) == mutant


# Texts that were changed.


@pytest.mark.parametrize("name", ["tied_ends", "training", "symbolic_sizes", "mapped_table"])
def test_lines_left_out_or_doubled_are_refused_or_say_what_they_make(name: str) -> None:
    lines = TEXTS[name].splitlines()
    start = lines.index(TITLE)
    for index in range(len(lines)):
        for changed in (lines[:index] + lines[index + 1 :], lines[: index + 1] + lines[index:]):
            text = "\n".join(changed)
            if index <= start:
                with pytest.raises(PlanFormatError):
                    Plan.from_text(text)
            else:
                with suppress(PlanFormatError):
                    assert Plan.from_text(text).to_text() == text


@given(st.sampled_from(["tied_ends", "training", "symbolic_sizes", "mapped_table"]), st.randoms(use_true_random=False))
def test_changed_characters_are_refused_or_say_what_they_make(name: str, rng: random.Random) -> None:
    text = TEXTS[name]
    at = rng.randrange(len(text))
    changed = text[:at] + rng.choice('0123456789abcz=[]" .,-\n') + text[at + rng.randrange(2) :]
    with suppress(PlanFormatError):  # and no other error
        plan = Plan.from_text(changed)
        assert plan.to_text() == "\n".join(line.rstrip() for line in changed.strip("\n").splitlines())


def test_a_change_in_the_details_alone_is_read() -> None:
    """What only the details say may be edited there: no other line says it."""
    plan = CASES["training"]
    text = TEXTS["training"].replace("compute_us=30.5", "compute_us=31.5")
    assert text != TEXTS["training"]
    steps = tuple(replace(each, compute_us=31.5 if each.compute_us == 30.5 else each.compute_us) for each in plan.steps)
    assert Plan.from_text(text) == replace(plan, steps=steps)


def test_a_change_in_one_place_shows_the_other() -> None:
    text = TEXTS["tied_ends"].replace("k = 2, m = 1", "k = 3, m = 1")
    with pytest.raises(PlanFormatError) as caught:
        Plan.from_text(text)
    assert str(caught.value).splitlines() == [
        "line 2 of the plan's text:",
        "",
        "Plan for cuda:0: 3 pages, 2 layers, 4 steps",
        "k = 3, m = 1, period 1; the end of an iteration prefetches for the next",
        "^" * 71,
        "a plan with these details has here 'k = 2, m = 1, period 1; the end of an iteration prefetches for the next': "
        "change both, or plan.to_json() instead",
        "",
        "                                     bytes",
    ]


@pytest.mark.parametrize(
    ("before", "after", "line", "message"),
    [
        ("plan device=cuda:0 k=2", "plan device=cuda:0 k=two", "  plan device=cuda:0 k=two", "k must be of type int"),
        ("k=2 m=1", "k=2 m=1.0", "m=1.0", "m must be of type int"),
        ("wraps=true", "wraps=1", "wraps=1", "wraps must be of type bool"),
        ("k=2 m=1", "k=2 m=9" + 400 * "9", "m=999", "m must be of type int"),
        ("k=2 m=1", "k=2 m=", "m= wraps", "expected a value behind m="),
        ("k=2 m=1", "k=2 k=1", "k=2 k=1", "expected a new field and its value, name=value, at 'k=1"),
        ("k=2 m=1", "k=2, m=1", "k=2, m=1", "expected a space at ', m=1"),
        ("wraps=true", "wraps=true colour=red", "colour=red", "unknown field 'colour'; this line may have device, k"),
        (" m=1 wraps", " wraps", "plan device=cuda:0 k=2 wraps", "something is missing: "),
        ("step 1 segment", "step 2 segment", "step 2 segment", "expected step 1"),
        ("  step 1 segment", "  stop 1 segment", "stop 1 segment", "nothing more was expected here"),
        ("reads=[1]", "reads=[1.5]", "reads=[1.5]", "reads must be of type tuple[int, ...]"),
        ("reads=[1]", "reads=1", "reads=1", "reads must be of type tuple[int, ...]"),
        ("  residents pages", "  residence pages", "residence", "a line 'residents' was expected here"),
        ("  plan device", "  plan 0 device", "plan 0 device", "expected plan without a number"),
    ],
)
def test_lines_that_are_wrong(before: str, after: str, line: str, message: str) -> None:
    """The guilty line is shown, with a mark and what is wrong with it below."""
    head, details = TEXTS["tied_ends"].split(TITLE)
    assert before in details
    with pytest.raises(PlanFormatError) as caught:
        Plan.from_text(head + TITLE + details.replace(before, after, 1))
    lines = str(caught.value).splitlines()
    mark = next(index for index, each in enumerate(lines) if set(each.strip()) == {"^"})
    assert line in lines[mark - 1]
    assert lines[mark + 1].strip().startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this text has no section 'Details'"),
        (str(PLANS["tied_ends"]), "this text has no section 'Details'.*shortened one"),
        (format_plan(PLANS["tied_ends"]), "this text has no section 'Details'"),
        (TEXTS["tied_ends"].replace(TITLE, "Details, format 99"), f"'Details, format 99'.*reads '{TITLE}'"),
        (TITLE, "a line 'plan' was expected here"),
    ],
)
def test_texts_that_are_no_plan(text: str, message: str) -> None:
    with pytest.raises(PlanFormatError, match=message):
        Plan.from_text(text)


def test_what_is_no_text() -> None:
    nothing: Any = None
    with pytest.raises(PlanFormatError, match="the text of a plan must be a str, not NoneType"):
        Plan.from_text(nothing)


def test_title_has_the_format() -> None:
    assert TITLE.endswith(f"format {FORMAT_VERSION}")
