"""Planner and verifier judge each other: plans that are made are clean, and what is clean after a mistake may run.

Neither knows the other. A plan that the planner makes and the verifier rejects is a bug of one of the two; the oracle
of `tests.plan_oracle` is a third opinion.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from spcompile.errors import OptionError
from spcompile.ir import Page, Plan, Step, Weight
from spcompile.planner.machine import PROFILES
from spcompile.planner.make_plan import place_graph
from spcompile.verify.plans import verify_plan
from spcompile.verify.violations import render
from tests.mutants import mutants
from tests.plan_oracle import may_run

SIZES_BYTES = st.sampled_from([0, 1, 255, 256, 300, 1000, 1024, 4096])


@st.composite
def graphs(draw: st.DrawFn) -> tuple[tuple[Page, ...], tuple[Step, ...]]:
    """Pages in order of first use and the steps that read them: chains, tied pages, several or no pages in one step."""
    n_pages = draw(st.integers(3, 8))
    reads = [[page] for page in range(n_pages)]
    if draw(st.booleans()):
        some_pages = st.lists(st.integers(0, n_pages - 1), max_size=3, unique=True)
        reads = draw(st.permutations(reads + draw(st.lists(some_pages, max_size=5))))
    order = list(dict.fromkeys(page for each in reads for page in each))
    number = {page: index for index, page in enumerate(order)}
    sizes = [draw(st.lists(SIZES_BYTES, min_size=1, max_size=3)) for _ in order]
    pages = tuple(
        Page(f"p{index}", tuple(Weight(f"p{index}.w{part}", nbytes) for part, nbytes in enumerate(each)))
        for index, each in enumerate(sizes)
    )
    tables = draw(st.sets(st.integers(0, n_pages - 1), max_size=1))
    steps = []
    for index, each in enumerate(reads):
        mine = tuple(number[page] for page in each)
        gathers = tuple((page, 8) for page in mine if page in tables)
        tables -= {page for page, _ in gathers}  # whoever reads it later reads all of it
        steps.append(Step(f"s{index}", None, mine, 5.0, 100 * index, gathers))
    return pages, tuple(steps)


@st.composite
def made_plans(draw: st.DrawFn) -> tuple[Plan, int | None]:
    """A plan by k and m, or by capacity; and the budget that it must keep to."""
    pages, steps = draw(graphs())
    leftovers = (Weight("leftover", 77),) if draw(st.booleans()) else ()
    widest = max([1, *(len(step.reads) for step in steps)])
    k = m = capacity_bytes = None
    if draw(st.booleans()):
        k = draw(st.integers(widest, max(widest, len(pages))))
        m = draw(st.integers(1, k))
    else:
        all_bytes = sum(page.slot_bytes for page in pages) + sum(weight.nbytes for weight in leftovers)
        capacity_bytes = draw(st.integers(all_bytes // 4, all_bytes))
    residents = draw(st.sets(st.sampled_from(range(len(pages))), max_size=2)) if pages else ()
    try:
        plan = place_graph(
            unplaced(pages, leftovers, steps, draw(st.booleans())),
            k=k,
            m=m,
            capacity_bytes=capacity_bytes,
            residents=residents,
        )
    except OptionError:
        assume(False)
    return plan, None if capacity_bytes is None else capacity_bytes + plan.beside_bytes()


def unplaced(pages: tuple[Page, ...], leftovers: tuple[Weight, ...], steps: tuple[Step, ...], wraps: bool) -> Plan:
    """A graph with inputs, values and workspaces, on a machine whose link is about as fast as the steps."""
    machine = replace(PROFILES["h100"], h2d_bytes_per_s=1e9, copy_us=0.5)
    most_bytes = max((step.activations_bytes for step in steps), default=0)
    graph = Plan("cpu", 1, 1, wraps, pages, leftovers, (), steps, (), 1, (), machine)
    return replace(
        graph, sizes=(("s0", 3),), inputs=(("s0", 7),), activations=((("1", most_bytes),),), workspace_bytes=50
    )


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
            assert verify_plan(mutant) or not plan.pages, mutation
