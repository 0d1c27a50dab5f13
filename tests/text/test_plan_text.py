"""The text of plans: golden cases, widths, and the lines that it promises to verifiers.

The cases are read by people: after ``pytest --update-golden`` look at what has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given

from spcompile.ir import Action, ActionKind, Page, Plan
from spcompile.text import WIDTH, LineKey, format_plan, plan_text
from spcompile.verify.plans import verify_plan
from spcompile.verify.violations import render
from tests.hand_plans import PLANS
from tests.mutants import mutants
from tests.random_plans import full_plans, plans
from tests.text.plan_cases import CASES


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, golden: Callable[[str, str], None]) -> None:
    assert name == "no_pages" or verify_plan(CASES[name]) == []
    golden(name, CASES[name].to_text())


def test_golden_of_a_wrong_plan(golden: Callable[[str, str], None]) -> None:
    """What people see when a plan is rejected."""
    plan = PLANS["chain_in_batches"]
    wrong = replace(plan, k=2, intervals=plan.intervals[:-1], residents=(9,))
    golden("wrong_plan_with_marks", render(plan_text(wrong).lines, verify_plan(wrong)))


@given(plans() | full_plans())
def test_every_plan_has_a_text_that_fits(plan: Plan) -> None:
    """Also plans that are wrong in any way, since a verifier must be able to show them."""
    text = plan_text(plan)
    assert format_plan(plan) == "\n".join(text.lines)
    for line in text.lines:
        assert len(line) <= WIDTH
        assert line.isascii()
        assert line.isprintable()
        assert line == line.rstrip()


@given(plans())
def test_everything_has_a_line(plan: Plan) -> None:
    text = plan_text(plan)
    keys: set[LineKey] = {("header", None)}
    for kind, items in (("page", plan.pages), ("slot", plan.slots), ("step", plan.steps), ("interval", plan.intervals)):
        keys |= {(kind, index) for index in range(len(items))}
    assert set(text.line_of) == keys
    assert all(0 <= line < len(text.lines) for line in text.line_of.values())
    for index, step in enumerate(plan.steps):
        assert text.lines[text.line_of["step", index]].split()[:3] == [">", str(index), "run"], step


@pytest.mark.parametrize("name", CASES)
def test_schedule_is_complete(name: str) -> None:
    """One line for each action, in their order, however long the plan is."""
    plan = CASES[name]
    lines = format_plan(plan).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("Schedule"))
    shown = []
    for line in lines[start + 2 :]:
        words = line.removeprefix(">").split()
        if not words:
            break
        if len(words) > 1 and words[1] in {kind.value for kind in ActionKind}:
            shown.append((int(words[0]), words[1], words[2]))
    assert shown == [(action.step, action.kind.value, _subject(plan, action)) for action in plan.actions()]


def _subject(plan: Plan, action: Action) -> str:
    if action.interval is None:
        return plan.steps[action.step].segment
    return f"#{plan.intervals[action.interval].page}"


def test_lines_of_things() -> None:
    text = plan_text(PLANS["chain_in_batches"])

    def words(*key: object) -> list[str]:
        return text.lines[text.line((str(key[0]), int(str(key[1]))))].split()

    assert text.line(("header", None)) == 0
    assert words("page", 3)[:2] == ["3", "layers.3"]
    assert words("slot", 1)[:2] == ["1", "1,048,576"]
    assert words("step", 2)[:4] == [">", "2", "run", "layers_2"]
    assert words("interval", 4)[:4] == ["2", "prefetch", "#4", "layers.4"]
    assert text.line(("interval", 99)) == 0


def test_long_names_keep_both_ends() -> None:
    plan = PLANS["all_resident"]
    long = replace(plan, pages=(Page("model.language_model.decoder.blocks.17.mlp", ()), *plan.pages[1:]))
    assert "  0  model.la..er.blocks.17.mlp         0 B  resident" in format_plan(long)


@pytest.mark.parametrize("name", PLANS)
def test_plans_that_differ_look_different(name: str) -> None:
    """Except where only the number of phases is wrong: slots that are missing are shown by repeating the others."""
    plan = PLANS[name]
    alike = [mutation for mutation, mutant in mutants(plan) if format_plan(mutant) == format_plan(plan)]
    assert [mutation for mutation in alike if "lacks its last phase" not in mutation] == []
