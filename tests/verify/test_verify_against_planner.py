"""Planner and verifier judge each other: plans that are made are clean, and what is clean after a mistake may run.

Neither knows the other. A plan that the planner makes and the verifier rejects is a bug of one of the two; the oracle
of `tests.plan_oracle` is a third opinion.
"""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from spcompile.errors import OptionError
from spcompile.ir import Plan
from spcompile.planner.make_plan import place_graph
from spcompile.verify.plans import verify_plan
from spcompile.verify.violations import render
from tests.mutants import mutants
from tests.plan_oracle import may_run
from tests.random_plans import graphs


@st.composite
def made_plans(draw: st.DrawFn) -> tuple[Plan, int | None]:
    """A plan by k and m, or by capacity; and the budget that it must keep to."""
    graph = draw(graphs())
    widest = max(len(step.reads) for step in graph.steps)
    k = m = capacity_bytes = None
    if draw(st.booleans()):
        k = draw(st.integers(widest, max(widest, len(graph.pages))))
        m = draw(st.integers(1, k))
    else:
        all_bytes = sum(page.slot_bytes for page in graph.pages) + graph.leftovers_bytes
        capacity_bytes = draw(st.integers(all_bytes // 4, all_bytes))
    residents = draw(st.sets(st.sampled_from(range(len(graph.pages))), max_size=2))
    try:
        plan = place_graph(graph, k=k, m=m, capacity_bytes=capacity_bytes, residents=residents)
    except OptionError:
        assume(False)
    return plan, None if capacity_bytes is None else capacity_bytes + plan.beside_bytes()


@given(made_plans())
def test_made_plans_are_clean(made: tuple[Plan, int | None]) -> None:
    plan, budget_bytes = made
    violations = verify_plan(plan, budget_bytes)
    assert not violations, "\n" + render(str(plan).splitlines(), violations)
    assert may_run(plan)
    assert not verify_plan(plan, plan.peak_bytes())
    assert verify_plan(plan, plan.peak_bytes() - 1)


@given(made_plans(), st.data())
def test_mistakes_in_made_plans_are_found(made: tuple[Plan, int | None], data: st.DataObject) -> None:
    plan, _ = made
    for _ in range(data.draw(st.integers(1, 2))):
        _, plan = data.draw(st.sampled_from(list(mutants(plan))))
    assert verify_plan(plan) or may_run(plan)


@given(made_plans())
def test_what_every_plan_needs(made: tuple[Plan, int | None]) -> None:
    """These mistakes have no excuse in any plan."""
    plan, _ = made
    for mutation, mutant in mutants(plan):
        words = mutation.split()
        if words[0] == "interval" and words[2] in {"dropped", "doubled", "nowhere", "lacks"}:
            assert verify_plan(mutant), mutation
        if words[0] in {"resident", "page", "step", "mapped"} or mutation in {"m = 0", "slot nobody takes"}:
            if mutation.endswith("removed") and not any(int(words[1]) in step.reads for step in plan.steps):
                continue
            if words[0] == "mapped" and mutation.endswith("removed") and may_run(mutant):
                continue  # it is streamed for a later step, and there in time for the one that gathered as well
            assert verify_plan(mutant) or not plan.pages, mutation
