"""The plan becomes nodes: prefetch, load, send and evict between the segment calls.

Why here, and last: the outer graph now has one call per step, so the plan's schedule can be written down line by line.

    before                              after
    pack = pack(x, w_0, w_1)            begin = begin(runtime, [w_0, w_1, ...])
    layers_0 = self.layers_0(pack)      prefetch = prefetch(runtime, 0, 'layers.0')
    y = layers_0[0]                     load = load(runtime, 0, 'layers.0')
                                        pack = pack(x, load)
                                        layers_0 = self.layers_0(pack)
                                        y = layers_0[0]
                                        evict = evict(runtime, 0, 'layers.0')
                                        prefetch_1 = prefetch(runtime, 0, 'layers.0', ahead=1)

How: the actions of `Plan.actions` are inserted in their order, each in front of the call of its step. A streamed page's
weights in a call become the tuple that its load returned. Resident pages and leftovers stay what they were, arguments
of the graph: their memory is on the device. So do pages that a step reads in place: the arguments look at host memory.

A backward graph returns gradients. Those of weights are handed to the send behind the segment that made them, and the
graph returns what that returns: the same values, in host memory by then.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.node import Argument

from spcompile import ops
from spcompile.ir import Action, ActionKind
from spcompile.passes.base import STEP, Program

OPS: dict[ActionKind, Callable[..., Any]] = {
    ActionKind.PREFETCH: ops.prefetch,
    ActionKind.LOAD: ops.load,
    ActionKind.EVICT: ops.evict,
}

RUNTIME = "runtime"
"""Attribute of the outer graph module through which its nodes reach the runtime."""


def insert_transfers(program: Program) -> None:
    """Insert the transfer nodes and make the segment calls read what the loads return."""
    plan, graph = program.planned(), program.graph
    packs: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if ops.is_op(node, ops.pack):
            packs.setdefault(node.meta[STEP], []).append(node)
    paged = {node: program.paged[node.name] for node in program.weight_nodes() if node.name in program.paged}
    program.page_inputs = {
        page: names
        for page in dict.fromkeys(interval.page for interval in plan.intervals)
        if (names := tuple(node.name for node, owner in paged.items() if owner == page))
    }
    if not plan.has_transfers:
        return
    steps = program.steps()
    anchors = {step: packs[step][0] for step in steps} | {steps.stop: graph.output_node()}
    with graph.inserting_before(anchors[steps.start]):
        runtime = graph.create_node("get_attr", RUNTIME)
        streamed = [node for page in program.page_inputs for node, owner in paged.items() if owner == page]
        graph.call_function(ops.begin, (runtime, streamed))
    loads: dict[int, fx.Node] = {}
    for action in plan.actions(steps):
        if action.kind is ActionKind.RUN:
            continue
        is_behind = action.kind in (ActionKind.SEND, ActionKind.EVICT)
        with graph.inserting_before(anchors[action.step + is_behind]):
            if action.interval is None:
                _send(program, runtime, action.step)
                continue
            node = _transfer(program, runtime, action)
        if action.kind is ActionKind.LOAD:
            loads[action.interval] = node
    if program.sends:
        with graph.inserting_before(graph.output_node()):
            graph.call_function(ops.finish, (runtime,))
    _read_loads(program, packs, paged, loads)


def _send(program: Program, runtime: fx.Node, step: int) -> None:
    """Send the gradients that the step has made, and return what comes of it in their place."""
    graph, output = program.graph, program.graph.output_node()
    returned = list(output.args[0])  # type: ignore[arg-type]
    made = [index for index in program.gradients if _step_of(returned[index]) == step]
    program.sends[step] = tuple(program.gradients[index] for index in made)
    segment = program.planned().steps[step].segment
    send = graph.call_function(ops.send, (runtime, step, segment, [returned[index] for index in made]))
    for place, index in enumerate(made):
        value = returned[index]
        returned[index] = graph.call_function(operator.getitem, (send, place))
        returned[index].meta = dict(value.meta)
    output.args = (tuple(returned),)


def _step_of(value: object) -> int | None:
    """The step whose segment returns the value."""
    source = value.args[0] if isinstance(value, fx.Node) and value.target is operator.getitem else None
    return source.meta.get(STEP) if isinstance(source, fx.Node) else None


def _transfer(program: Program, runtime: fx.Node, action: Action) -> fx.Node:
    plan = program.planned()
    assert action.interval is not None
    page = plan.pages[plan.intervals[action.interval].page].name
    kwargs: dict[str, Argument] = {"ahead": action.ahead} if action.ahead else {}
    op = OPS[action.kind]
    return program.graph.call_function(op, (runtime, action.interval, page), kwargs)


def _read_loads(
    program: Program, packs: dict[int, list[fx.Node]], paged: dict[fx.Node, int], loads: dict[int, fx.Node]
) -> None:
    plan = program.planned()
    for step, nodes in packs.items():
        load_of = {
            plan.intervals[index].page: load
            for index, load in loads.items()
            if plan.intervals[index].start_step <= step < plan.intervals[index].end_step
            and plan.intervals[index].page in plan.needs(step)  # else it reads rows of it in place
        }
        for pack in nodes:
            args = (load_of.get(paged[arg], arg) if arg in paged else arg for arg in pack.args)  # type: ignore[index]
            pack.args = tuple(dict.fromkeys(args))
