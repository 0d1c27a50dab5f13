"""Golden text cases of the six passes, on graphs written by hand (see `tests.passes.graph_text` for the notation).

``pytest --update-golden`` rewrites what the cases expect. Read the diff: the cases are the passes' specification.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spcompile.passes.base import Pass, Program
from spcompile.pipeline import PASSES
from spcompile.verify.graphs import verify_graph
from tests.passes.graph_text import (
    Case,
    build_program,
    read_cases,
    show_graph,
    show_layers,
    show_schedule,
    show_segments,
    update_case,
    with_plan,
)

CASES = Path(__file__).parent / "cases"

SHOW: dict[str, Callable[[Program], str]] = {
    "sink_weight_views": show_graph,
    "sink_mutations": show_graph,
    "find_layers": show_layers,
    "make_schedule": show_schedule,
    "split_segments": show_segments,
    "insert_transfers": show_graph,
}

ALL_CASES = [(name, case) for name in SHOW for case in read_cases(CASES / f"{name}.txt")]


def run_until(last: str, case: Case) -> Program:
    """Run the passes up to ``last``, with the plan of the case instead of the planner's."""
    program = build_program(case.graph)
    for each in PASSES[: 1 + _names().index(last)]:
        each.run(program)
        if each.name == "make_schedule" and case.plan:
            program.plan = with_plan(program.planned(), case.plan)
    return program


def _names() -> list[str]:
    return [each.name for each in PASSES]


def test_every_pass_has_cases() -> None:
    assert list(SHOW) == _names()
    assert {name for name, _ in ALL_CASES} == set(SHOW)
    assert all(isinstance(each, Pass) for each in PASSES)


@pytest.mark.parametrize(("name", "case"), ALL_CASES, ids=[f"{name}: {case.name}" for name, case in ALL_CASES])
def test_golden(name: str, case: Case, request: pytest.FixtureRequest) -> None:
    program = run_until(name, case)
    shown = SHOW[name](program)
    if request.config.getoption("--update-golden"):
        update_case(CASES / f"{name}.txt", case.name, shown)
        return
    assert shown == case.expected


@pytest.mark.parametrize(("name", "case"), ALL_CASES, ids=[f"{name}: {case.name}" for name, case in ALL_CASES])
def test_results_are_right(name: str, case: Case) -> None:
    """The verifier finds nothing in what the cases expect."""
    program = run_until(name, case)
    weights = {placeholder: each.weight.name for placeholder, each in program.weights.items()}
    assert verify_graph(program.module, program.plan, weights, final=name == "insert_transfers") == []
