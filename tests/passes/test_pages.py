"""Which weights become pages and which leftovers, where a model has several graphs. One graph: the golden cases."""

from __future__ import annotations

from spcompile.passes.base import Program
from spcompile.pipeline import PLANNING, run_passes
from tests.passes.graph_text import build_program

LAYERS = """
x: input  # float32[2, 32]
w_0: weight layers.0.fc.weight  # float32[32, 32]
w_1: weight layers.1.fc.weight  # float32[32, 32]
g: weight norm.weight  # float32[1]
mm = aten.mm.default(x, w_0)  @ layers.0.fc
mm_1 = aten.mm.default(mm, w_1)  @ layers.1.fc
mul = aten.mul.Tensor(mm_1, g)  @ norm
return (mul,)
"""

TAIL = """
x: input  # float32[2, 1]
g: weight norm.weight  # float32[1]
mul = aten.mul.Tensor(x, g)  @ norm
return (mul,)
"""

UPDATE = """
x: input  # float32[32, 32]
w_1: weight layers.1.fc.weight  # float32[32, 32]
copy_ = aten.copy_.default(w_1, x)  @ layers.1.fc
return (copy_,)
"""


def planned(text: str, *earlier: Program, earlier_live: bool = True) -> Program:
    """A graph of the model that these earlier graphs were of, planned. Pages stay known when graphs are gone."""
    program = build_program(text)
    plans = [each.planned() for each in earlier]
    program.known_pages = tuple(dict.fromkeys(page for plan in plans for page in plan.pages))
    program.known_leftovers = frozenset(weight for plan in plans for weight in plan.leftovers if earlier_live)
    run_passes(program, PLANNING)
    return program


def pages_and_leftovers(program: Program) -> tuple[list[str], list[str]]:
    plan = program.planned()
    return [page.name for page in plan.pages], [weight.name for weight in plan.leftovers]


def test_a_second_graph_of_the_same_layers_has_the_same_leftovers() -> None:
    first = planned(LAYERS)
    assert pages_and_leftovers(first) == (["layers.0", "layers.1"], ["norm.weight"])
    for earlier_live in (True, False):
        second = planned(LAYERS, first, earlier_live=earlier_live)
        assert pages_and_leftovers(second) == pages_and_leftovers(first)


def test_a_leftover_stays_one_in_a_graph_that_reads_no_page() -> None:
    assert pages_and_leftovers(planned(TAIL)) == (["norm"], [])
    assert pages_and_leftovers(planned(TAIL, planned(LAYERS))) == ([], ["norm.weight"])


def test_a_weight_that_an_earlier_graph_updated_can_still_become_a_page() -> None:
    update = planned(UPDATE)
    assert pages_and_leftovers(update) == ([], ["layers.1.fc.weight"])
    head = planned(LAYERS.replace("w_1", "w_9").replace("layers.1", "layers.9"))  # so that some page is known
    third = planned(LAYERS, update, head)
    assert "layers.1" in pages_and_leftovers(third)[0]
