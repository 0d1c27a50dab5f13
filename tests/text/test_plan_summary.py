"""What ``print(plan)`` shows: golden cases in the width of a terminal, and the times that a simulation predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given

from spcompile.ir import Plan, Plans
from spcompile.planner.simulate import simulate
from spcompile.text import WIDTH, format_plan
from spcompile.verify.plans import verify_plan
from spcompile.wording import format_us
from tests.hand_plans import PLANS
from tests.random_plans import full_plans, graphs
from tests.text.plan_cases import CASES, TIMED


@pytest.mark.parametrize("name", TIMED)
def test_golden(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"print_{name}", str(TIMED[name]))


def test_golden_of_several_graphs(golden: Callable[[str, str], None]) -> None:
    golden("print_several_graphs", str(Plans([TIMED["inference"], PLANS["all_resident"]])))


@given(full_plans() | graphs())
def test_every_plan_prints_in_a_terminal(plan: Plan) -> None:
    """Also a wrong one, of which nothing can be predicted."""
    for line in str(plan).splitlines():
        assert len(line) <= WIDTH
        assert line.isascii()
        assert line == line.rstrip()


@pytest.mark.parametrize("name", PLANS)
def test_a_short_plan_without_machine_prints_its_whole_text(name: str) -> None:
    assert str(PLANS[name]) == format_plan(PLANS[name])


@pytest.mark.parametrize("name", TIMED)
def test_times_are_those_of_the_simulation(name: str) -> None:
    plan = TIMED[name]
    assert plan.machine is not None
    simulation = simulate(plan, plan.machine)
    rows = _predicted(str(plan))
    assert rows["iteration"].startswith(format_us(simulation.iteration_us))
    assert rows["compute"].startswith(format_us(simulation.compute_us))
    assert rows["copies"].startswith(format_us(simulation.link_us))
    assert rows["stalls"].startswith(format_us(sum(stall.us for stall in simulation.stalls)))
    bounds = {"compute": simulation.compute_us, "copies": simulation.link_us, "gradients": simulation.down_us}
    assert [row for row, text in rows.items() if text.endswith("the bound")] == [
        max(bounds, key=lambda row: bounds[row])
    ]
    longest = max(simulation.stalls, key=lambda stall: stall.us, default=None)
    assert ("longest stall" in rows) == (longest is not None)
    if longest is not None:
        assert rows["longest stall"].startswith(format_us(longest.us))
        assert f"step {longest.step}:" in rows["longest stall"] or "at the end" in rows["longest stall"]


def _predicted(text: str) -> dict[str, str]:
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("Predicted on "))
    rows = {}
    for line in lines[start + 1 : lines.index("", start)]:
        if line[2] != " ":
            rows[line[2:19].rstrip()] = line[21:].strip()
    return rows


def test_of_a_wrong_plan_nothing_is_predicted() -> None:
    """A simulation of it might fail, or say something of a plan that cannot run."""
    plan = TIMED["inference"]
    wrong = replace(plan, k=1)
    n_violations = len(verify_plan(wrong))
    assert n_violations > 1
    assert f"No times are predicted: this plan breaks {n_violations} rules of the verifier" in str(wrong).splitlines()
    assert "Predicted on" not in str(wrong)


def test_every_page_and_slot_of_a_long_plan_is_there() -> None:
    """A long plan is condensed and not cut off: its schedule alone is elsewhere, and it says where."""
    plan = CASES["language_model_80_layers_long_period"]
    n_actions = sum(1 for _ in plan.actions())
    text = str(plan)
    assert text.splitlines()[-1] == f"Schedule: {n_actions} lines, shown by print(plan.to_text())"
    assert "1..80  model.layers.0 .. 79" in text
    assert all(f"\n  slot {index:<4}" in text for index in range(len(plan.slots)))
    assert len(text.splitlines()) < 80
