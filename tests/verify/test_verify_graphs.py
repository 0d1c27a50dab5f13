"""The verifier of graphs rejects every wrong graph, with the mark where somebody would look.

The graphs are those that the passes make of a model written as text, under plans written by hand; each mutant does
one thing wrong to one of them.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import fx

from spcompile import ops
from spcompile.errors import VerificationError
from spcompile.graph_text import format_graph
from spcompile.ir import Plan
from spcompile.passes import base
from spcompile.passes.insert_transfers import RUNTIME
from spcompile.pipeline import PASSES
from spcompile.verify import graphs
from spcompile.verify.graphs import check_graph, verify_graph
from spcompile.verify.violations import Violation, render
from tests.passes.graph_text import build_program, with_plan

aten = torch.ops.aten

CHAIN = """
x: input  # float32[8, 8]
cache: input  # float32[8, 8]
"""
CHAIN += "\n".join(
    f"w_{i}: weight layers.{i}.weight  # float32[8, 8]\nb_{i}: weight layers.{i}.bias  # float32[8]" for i in range(5)
)
CHAIN += """
addmm_0 = aten.addmm.default(b_0, x, w_0)  @ layers.0
addmm_1 = aten.addmm.default(b_1, addmm_0, w_1)  @ layers.1
addmm_2 = aten.addmm.default(b_2, addmm_1, w_2)  @ layers.2
add = aten.add.Tensor(cache, addmm_2)  @ layers.2
mul = aten.mul.Tensor(cache, add)  @ layers.2
addmm_3 = aten.addmm.default(b_3, mul, w_3)  @ layers.3
addmm_4 = aten.addmm.default(b_4, addmm_3, w_4)  @ layers.4
copy_ = aten.copy_.default(cache, add)
return (addmm_4,)
"""

ONE_BY_ONE = """[plan k=2 m=1]
layers.0: -1..1 in slots 0 1
layers.1: 0..2 in slots 1 0
layers.2: 1..3 in slots 0 1
layers.3: 2..4 in slots 1 0
layers.4: 3..5 in slots 0 1
"""

IN_BATCHES = """[plan k=3 m=2]
layers.0: -1..2 in slots 0 0
layers.1: -1..2 in slots 1 2
layers.2: 0..4 in slots 2 1
layers.3: 2..4 in slots 0 0
layers.4: 2..5 in slots 1 2
"""

SHARED = """
x: input  # float32[8, 8]
w_0: weight layers.0.weight  # float32[8, 8]
w_1: weight layers.1.weight  # float32[8, 8]
s: weight layers.0.shared  # float32[8, 8]
mm = aten.mm.default(x, w_0)  @ layers.0
mm_1 = aten.mm.default(mm, s)  @ layers.0
mm_2 = aten.mm.default(mm_1, w_1)  @ layers.1
mm_3 = aten.mm.default(mm_2, s)  @ layers.1
return (mm_3,)
"""

SHARED_PLAN = """[plan k=3 m=1]
layers.0: 0..1 in slots 0
layers.0.shared: 0..2 in slots 1
layers.1: 0..2 in slots 2
"""

WITHOUT_WRAP = """[plan k=2 m=1 wraps=no]
layers.0: 0..1 in slots 0
layers.1: 0..2 in slots 1
layers.2: 1..3 in slots 0
layers.3: 2..4 in slots 1
layers.4: 3..5 in slots 0
"""

PLANS = {
    "k=2 m=1": (CHAIN, ONE_BY_ONE),
    "k=3 m=2": (CHAIN, IN_BATCHES),
    "without wrap": (CHAIN, WITHOUT_WRAP),
    "a shared page": (SHARED, SHARED_PLAN),
}


@dataclass
class Rewritten:
    """A graph that the passes made, ready to be spoilt."""

    module: fx.GraphModule
    plan: Plan
    weights: dict[str, str]

    def verify(self) -> list[Violation]:
        return verify_graph(self.module, self.plan, self.weights, final=True)

    def all(self, op: Callable[..., Any]) -> list[fx.Node]:
        return [node for node in self.module.graph.nodes if ops.is_op(node, op)]

    def node(self, name: str) -> fx.Node:
        found: fx.Node = next(node for node in self.module.graph.nodes if node.name == name)
        return found

    def lines_found(self) -> list[str]:
        """The guilty lines, as they are printed."""
        lines = format_graph(self.module.graph)
        return [lines[each.line].partition(" = ")[0].partition(" ")[0] for each in self.verify()]


@functools.cache
def _original(graph: str, plan: str) -> Rewritten:
    each = rewrite(graph, plan)
    setattr(each.module, RUNTIME, "a runtime")  # without it the module cannot be copied
    return each


def rewrite(graph: str, plan: str, passes: tuple[base.Pass, ...] = PASSES) -> Rewritten:
    program = build_program(graph)
    for each in passes:
        each.run(program)
        if each.name == "make_schedule":
            program.plan = with_plan(program.planned(), plan)
    weights = {placeholder: each.weight.name for placeholder, each in program.weights.items()}
    return Rewritten(program.module, program.planned(), weights)


def rewritten(name: str) -> Rewritten:
    """A copy to spoil."""
    original = _original(*PLANS[name])
    return replace(original, module=copy.deepcopy(original.module))


@pytest.mark.parametrize("name", PLANS)
def test_right_graphs(name: str) -> None:
    each = rewritten(name)
    assert each.verify() == []
    check_graph(each.module, each.plan, each.weights, after="insert_transfers", final=True)


def test_step_key_is_that_of_the_passes() -> None:
    assert graphs.STEP == base.STEP


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("op", ops.TRANSFERS, ids=lambda op: op.__name__)
def test_a_dropped_node(name: str, op: Callable[..., Any]) -> None:
    for index in range(len(rewritten(name).all(op))):
        each = rewritten(name)
        node = each.all(op)[index]
        page = node.args[2] if op is not ops.begin else ""
        for pack in list(node.users):  # a load: its readers read the graph's own arguments instead
            own = [each.node(name) for name, weight in each.weights.items() if str(weight).startswith(f"{page}.")]
            pack.args = tuple(value for arg in pack.args for value in (own if arg is node else [arg]))
        each.module.graph.erase_node(node)
        assert each.verify(), f"{node.name} dropped"
        if op is ops.prefetch and not node.kwargs:
            (load,) = [other for other in each.all(ops.load) if other.args[1] == node.args[1]]
            assert load.name in each.lines_found()
        if op is ops.prefetch and node.kwargs:
            assert each.lines_found() == ["return"]
        if op is ops.begin:
            assert each.lines_found()[0] == each.all(ops.prefetch)[0].name


@pytest.mark.parametrize("name", PLANS)
def test_a_node_twice(name: str) -> None:
    for op in (ops.begin, ops.load, ops.evict):
        for index in range(len(rewritten(name).all(op))):
            each = rewritten(name)
            node = each.all(op)[index]
            with each.module.graph.inserting_after(node):
                each.module.graph.node_copy(node)
            assert each.verify(), f"{node.name} twice"
            told = [violation.message.partition(":")[0] for violation in each.verify()]
            assert op is not ops.begin or "the iteration has begun already" in told


def must_keep_order(first: fx.Node, second: fx.Node, plan: Plan) -> bool:
    """Whether these neighbours, in this order, must not change places. Everything else about them may be a choice."""
    if first in second.all_input_nodes:
        return True
    transfers = first.target in ops.TRANSFERS and second.target in ops.TRANSFERS
    if first.target is ops.begin or (transfers and first.args[1] == second.args[1]):
        return True
    if first.target is ops.evict and second.target is ops.prefetch:
        ahead = second.kwargs.get("ahead", 0)
        assert isinstance(ahead, int)
        one, other = (plan.intervals[int(str(node.args[1]))] for node in (first, second))
        return any(one.slots[phase] == other.slots[(phase + ahead) % plan.period] for phase in range(plan.period))
    if second.target is ops.evict:  # a call that reads the page
        return any(
            ops.is_op(load, ops.load) and load.args[1] == second.args[1]
            for pack in (first, *first.all_input_nodes)
            if ops.is_op(pack, ops.pack)
            for load in pack.all_input_nodes
        )
    return False


@pytest.mark.parametrize("name", PLANS)
def test_neighbours_swapped(name: str) -> None:
    n_nodes, n_caught = len(rewritten(name).module.graph.nodes), 0
    for index in range(n_nodes - 2):
        each = rewritten(name)
        first, second = list(each.module.graph.nodes)[index : index + 2]
        if first.op == "placeholder" and second.op == "placeholder":
            continue
        must = must_keep_order(first, second, each.plan)
        second.append(first)
        if must:
            assert {first.name, second.name} & {*each.lines_found()}, f"{first.name} behind {second.name}"
            n_caught += 1
    assert n_caught > 7


@pytest.mark.parametrize("name", PLANS)
def test_a_load_behind_its_reader(name: str) -> None:
    for index in range(len(rewritten(name).all(ops.load))):
        each = rewritten(name)
        load = each.all(ops.load)[index]
        reader = next(iter(load.users))
        reader.append(load)
        assert reader.name in each.lines_found()


@pytest.mark.parametrize("name", PLANS)
def test_an_evict_before_its_reader(name: str) -> None:
    """Before the argument list is made, and between that and the call, which reads on."""
    for index in range(len(rewritten(name).all(ops.evict))):
        for depth in (0, 1):
            each = rewritten(name)
            evict = each.all(ops.evict)[index]
            (load,) = [node for node in each.all(ops.load) if node.args[1] == evict.args[1]]
            reader = list(load.users)[-1]
            reader = next(iter(reader.users)) if depth else reader
            reader.prepend(evict)
            assert reader.name in each.lines_found()


@pytest.mark.parametrize("name", PLANS)
def test_a_prefetch_before_its_slot_is_free(name: str) -> None:
    """Above the last evict before it that frees its slot in some phase."""
    n_mutants = 0
    for index in range(len(rewritten(name).all(ops.prefetch))):
        each = rewritten(name)
        prefetch = each.all(ops.prefetch)[index]
        nodes = list(each.module.graph.nodes)
        evicts = [node for node in nodes[: nodes.index(prefetch)] if must_keep_order(node, prefetch, each.plan)]
        evicts = [node for node in evicts if node.target is ops.evict]
        if not evicts:
            continue
        evicts[-1].prepend(prefetch)
        assert prefetch.name in each.lines_found()
        n_mutants += 1
    assert n_mutants > 1


@pytest.mark.parametrize("name", PLANS)
def test_a_load_replaced_in_a_pack(name: str) -> None:
    """By the graph's own arguments: what runs is right, but reads the page over the link."""
    for index in range(len(rewritten(name).all(ops.load))):
        each = rewritten(name)
        load = each.all(ops.load)[index]
        own = [each.node(name) for name, weight in each.weights.items() if weight.startswith(f"{load.args[2]}.")]
        own = own or [each.node("s")]
        for pack in list(load.users):
            pack.args = tuple(value for arg in pack.args for value in (own if arg is load else [arg]))
            assert pack.name in each.lines_found()
            assert any("in place" in violation.message for violation in each.verify())


@pytest.mark.parametrize("name", PLANS)
def test_a_load_of_another_page_in_a_pack(name: str) -> None:
    """Same shapes, and perhaps on the device at that moment: the results would be wrong, and nothing would crash."""
    n_loads = len(rewritten(name).all(ops.load))
    for index in range(n_loads):
        for other in range(n_loads):
            each = rewritten(name)
            loads = each.all(ops.load)
            pack = next(iter(loads[index].users))
            nodes = list(each.module.graph.nodes)
            if other == index or nodes.index(loads[other]) > nodes.index(pack) or loads[other] in pack.args:
                continue
            pack.replace_input_with(loads[index], loads[other])
            assert pack.name in each.lines_found()


def test_loads_swapped_in_a_pack() -> None:
    each = rewritten("a shared page")
    pack = each.all(ops.pack)[0]
    x, one, other = pack.args
    pack.args = (x, other, one)
    assert each.lines_found() == ["pack"]
    assert each.verify()[0].message == "step 0 reads layers.0, layers.0.shared, not layers.0.shared, layers.0"


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("op", [ops.prefetch, ops.load, ops.evict], ids=lambda op: op.__name__)
def test_another_number_of_an_interval(name: str, op: Callable[..., Any]) -> None:
    each = rewritten(name)
    n_intervals = len(each.plan.intervals)
    for index in range(len(each.all(op))):
        for number in (*range(-1, n_intervals + 1), None, "0"):
            each = rewritten(name)
            node = each.all(op)[index]
            if node.args[1] == number:
                continue
            node.args = (node.args[0], number, node.args[2])
            assert node.name in each.lines_found()
            if isinstance(number, int) and 0 <= number < n_intervals:  # with the name of the page changed to match
                page = each.plan.pages[each.plan.intervals[number].page].name
                node.args = (node.args[0], number, page)
                assert each.verify()


@pytest.mark.parametrize("name", PLANS)
def test_a_prefetch_for_the_wrong_iteration(name: str) -> None:
    for index in range(len(rewritten(name).all(ops.prefetch))):
        each = rewritten(name)
        node = each.all(ops.prefetch)[index]
        node.kwargs = {} if node.kwargs else {"ahead": 1}
        assert each.verify(), f"{node.name} of the wrong iteration"


@pytest.mark.parametrize("name", PLANS)
def test_a_prefetch_that_nobody_awaits(name: str) -> None:
    """A page that is copied again behind its evict, where the plan has a copy for the next iteration, or has none."""
    for index in range(len(rewritten(name).all(ops.evict))):
        each = rewritten(name)
        evict = each.all(ops.evict)[index]
        with each.module.graph.inserting_after(evict):
            each.module.graph.call_function(ops.prefetch, evict.args)
        messages = [violation.message for violation in each.verify()]
        assert [message for message in messages if message.endswith(("is never awaited", "is still to be used"))]


@pytest.mark.parametrize("name", PLANS)
def test_an_argument_missing_in_begin(name: str) -> None:
    """Changes of that weight would go unseen, and the load would return one tensor less."""
    for index in range(len(rewritten(name).weights)):
        each = rewritten(name)
        (begin,) = each.all(ops.begin)
        weights = begin.args[1]
        assert isinstance(weights, list)
        begin.args = (begin.args[0], [*weights[:index], *weights[index + 1 :]])
        assert each.verify(), f"{weights[index]} missing"


@pytest.mark.parametrize("name", PLANS)
def test_another_plan(name: str) -> None:
    each = rewritten(name)
    plan = each.plan
    each.plan = replace(plan, k=plan.k - 1)
    assert each.all(ops.prefetch)[plan.k - 1].name in each.lines_found()
    shrunk = replace(plan.slots[0], nbytes=plan.slots[0].nbytes * 2)
    each.plan = replace(plan, slots=(shrunk, *plan.slots[1:]))
    assert any("copies over" in violation.message for violation in each.verify())
    each.plan = replace(plan, intervals=plan.intervals[:-1])
    assert any("which the plan does not have" in violation.message for violation in each.verify())


def segment_of(each: Rewritten, name: str) -> fx.GraphModule:
    segment = getattr(each.module, name)
    assert isinstance(segment, fx.GraphModule)
    return segment


def weight_nodes(segment: fx.GraphModule) -> Iterator[fx.Node]:
    """The placeholders of the page in a layer of the chain: behind the activations."""
    nodes = segment.graph.find_nodes(op="placeholder")
    return iter(nodes[-2:])


@pytest.mark.parametrize("layer", range(5))
@pytest.mark.parametrize("through_view", [False, True])
def test_a_segment_that_returns_a_weight(layer: int, through_view: bool) -> None:
    for index in range(2):
        each = rewritten("k=2 m=1")
        segment = segment_of(each, f"layers_{layer}")
        leaving = list(weight_nodes(segment))[index]
        output = segment.graph.output_node()
        if through_view:
            with segment.graph.inserting_before(output):
                split = segment.graph.call_function(aten.split.Tensor, (leaving, 4))
                leaving = segment.graph.call_function(operator.getitem, (split, 1))
        output.args = ((*output.args[0], leaving),)  # type: ignore[misc]
        assert each.lines_found() == [f"layers_{layer}"]
        assert each.verify()[0].message.endswith("leaves the segment and shares memory with a slot")


@pytest.mark.parametrize("layer", range(5))
def test_a_segment_that_writes_into_a_weight(layer: int) -> None:
    each = rewritten("k=3 m=2")
    segment = segment_of(each, f"layers_{layer}")
    weight = next(weight_nodes(segment))
    with segment.graph.inserting_before(segment.graph.output_node()):
        view = segment.graph.call_function(aten.t.default, (weight,))
        segment.graph.call_function(aten.copy_.default, (view, weight))
    assert each.lines_found() == [f"layers_{layer}"]
    assert "writes into a slot" in each.verify()[0].message


def test_a_resident_page_between_the_loads() -> None:
    """What lies in a slot is told argument by argument: here a streamed page comes before a resident one."""
    result = rewrite(SHARED, "[plan k=1 m=1]\nlayers.0: 0..1 in slots 0\nlayers.1: 1..2 in slots 0")
    assert [str(arg) for arg in result.all(ops.pack)[0].args] == ["x", "load", "s"]
    assert result.verify() == []
    segment = segment_of(result, "layers_0")
    _, streamed, resident = segment.graph.find_nodes(op="placeholder")
    output = segment.graph.output_node()
    before = output.args[0]
    output.args = ((*before, resident),)  # type: ignore[misc]
    assert result.verify() == []
    output.args = ((*before, streamed),)  # type: ignore[misc]
    assert result.lines_found() == ["layers_0"]


@pytest.mark.parametrize("where", ["before the passes", "in its segment"])
def test_an_update_above_a_reader_of_the_old_value(where: str) -> None:
    each = rewritten("k=2 m=1")
    module = build_program(CHAIN).module if where == "before the passes" else segment_of(each, "layers_2")
    nodes = list(module.graph.nodes)
    update = next(node for node in nodes if node.target is aten.copy_.default)
    reader = next(node for node in nodes if node.target is aten.mul.Tensor)
    reader.prepend(update)
    found = verify_graph(module, None, {}) if where == "before the passes" else each.verify()
    assert [violation.message.partition(" after")[0] for violation in found] == [f"reads {reader.args[0]}"]
    assert where == "before the passes" or each.lines_found() == ["layers_2"]


def test_transfers_that_are_missing_altogether() -> None:
    each = rewrite(CHAIN, ONE_BY_ONE, PASSES[:-1])
    assert verify_graph(each.module, each.plan, each.weights) == []
    assert each.verify()


def test_names_that_are_not_computed_yet() -> None:
    module = build_program(CHAIN).module
    nodes = {node.name: node for node in module.graph.nodes}
    nodes["addmm_1"].append(nodes["addmm_0"])
    assert verify_graph(module, None, {}) == [Violation(12, "addmm_0 is read before it is computed")]


GOLDEN = """\
pack_1 = pack(addmm_0, load_1)
layers_1 = self.layers_1(pack_1)
addmm_1 = getitem(layers_1, 0)  # float32[8, 8]
prefetch_3 = prefetch(runtime, 3, layers.3)
^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
copies over layers.1, which is in use
evict_1 = evict(runtime, 1, layers.1)
^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
layers.1 is evicted, but is not loaded
load_2 = load(runtime, 2, layers.2)
"""


def test_golden_rendering() -> None:
    """What is printed when a prefetch comes before the evict that frees its slot."""
    each = rewritten("k=2 m=1")
    each.node("evict_1").prepend(each.node("prefetch_3"))
    text = render(format_graph(each.module.graph), each.verify())
    assert GOLDEN in text
    with pytest.raises(VerificationError) as raised:
        check_graph(each.module, each.plan, each.weights, after="insert_transfers", final=True)
    assert str(raised.value).startswith("the graph after insert_transfers has ")
    assert text in str(raised.value)
