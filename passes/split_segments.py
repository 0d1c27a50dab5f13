"""Carry the cuts out: the graph becomes an outer graph that calls one sub-module per segment.

Why here: every node knows its segment, and from now on only whole segments are spoken of.

    before (segment noted on each node)         after
    t = t(w_0)            # 1                   pack_1 = pack(x, w_0)
    y = mm(x, t)          # 1                   layers_0 = self.layers_0(pack_1)
    z = add(y, 1)         # 2                   y = layers_0[0]
                                                pack_2 = pack(y)
                                                tail = self.tail(pack_2)

How: a segment is an interval of program order, so values only ever flow forward. A segment's inputs come in a canonical
order - activations and scalars in order of first use, then its weights page by page in page order - and its nodes get
canonical names, so that identical layers give identical sub-modules, wherever their pages are placed. Scalars (sizes)
are computed in the outer graph and handed in; a symbol that only shows in a shape is handed in too, because Inductor
needs it bound. A segment takes one list, empties it (see ``ops.pack``), and returns a tuple.

The odd case: a scalar that is computed from a tensor of the open segment. The segment is cut there, and its step makes
two calls.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Container, Sequence

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.fx.graph import _BoxedCodeGen

from spcompile import ops
from spcompile.graph import is_scalar, tensors_of, value_of
from spcompile.passes.base import SEGMENT, STEP, WEIGHT_INPUT, Program, paged_inputs


def split_segments(program: Program) -> None:
    """Replace each segment's nodes by one call; ``program.module`` becomes the outer graph."""
    program.module = _Splitter(program).split()


class _Splitter:
    """Builds the outer graph node by node; ``outer`` maps each value of the old graph to its value in the new one."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.plan = program.planned()
        self.new = fx.Graph()
        self.outer: dict[fx.Node, fx.Node] = {}
        self.root = torch.nn.Module()
        self.paged = paged_inputs(program)
        program.paged = {node.name: page for node, page in self.paged.items()}
        self.bound_by = _symbol_binders(program.graph)

    def split(self) -> fx.GraphModule:
        members: list[fx.Node] = []
        for node in self.program.graph.nodes:
            if SEGMENT not in node.meta:
                if node.op == "output" or any(source in members for source in node.all_input_nodes):
                    members = self._emit_segment(members)
                self._emit_outer(node)
                continue
            if members and members[0].meta[SEGMENT] != node.meta[SEGMENT]:
                members = self._emit_segment(members)
            members.append(node)
        return fx.GraphModule(self.root, self.new, "Superpipeline")

    def _emit_outer(self, node: fx.Node) -> None:
        """Copy a placeholder, constant, scalar, in-place view or the output."""
        if node.op == "get_attr":
            setattr(self.root, str(node.target), getattr(self.program.module, str(node.target)))
            if _is_subgraph(node):
                return  # each segment that calls it holds it itself
        self.outer[node] = self.new.node_copy(node, self.outer.__getitem__)

    def _emit_segment(self, members: Sequence[fx.Node]) -> list[fx.Node]:
        """Emit the call of the open segment; returns the new, empty one."""
        if not members:
            return []
        inside = set(members)
        step = members[0].meta[SEGMENT]
        inputs = self._inputs(members, inside)
        outputs = [node for node in members if any(user not in inside for user in node.users)]
        name = self._free_name(self.plan.steps[step].segment)
        self.root.add_module(name, _extract(self.program.module, members, inputs, outputs, self.paged))
        pack = self.new.call_function(ops.pack, tuple(self.outer[node] for node in inputs))
        call = self.new.call_module(name, (pack,))
        call.meta[STEP] = pack.meta[STEP] = step
        for index, node in enumerate(outputs):
            item = self.new.create_node("call_function", operator.getitem, (call, index), name=node.name)
            item.meta = {"val": value_of(node)}
            self.outer[node] = item
        return []

    def _inputs(self, members: Sequence[fx.Node], inside: set[fx.Node]) -> list[fx.Node]:
        """Unbound symbols, activations and scalars in order of first use, then all weights of the pages read."""
        sources = dict.fromkeys(source for node in members for source in node.all_input_nodes if source not in inside)
        activations = [node for node in sources if node not in self.paged and not _is_subgraph(node)]
        pages = dict.fromkeys(self.paged[node] for node in sources if node in self.paged)
        weights = [node for page in pages for node, owner in self.paged.items() if owner == page]
        symbols = {symbol for node in (*members, *activations) for symbol in _symbols_of(node)}
        binders = [self.bound_by[symbol] for symbol in sorted(symbols) if symbol in self.bound_by]
        return [*(node for node in binders if node in self.outer and node not in sources), *activations, *weights]

    def _free_name(self, segment: str) -> str:
        base = re.sub(r"\W+", "_", segment).strip("_")
        base = base if base and not base[0].isdigit() else f"s_{base}"
        name, suffix = base, 1
        while hasattr(self.root, name):
            suffix += 1
            name = f"{base}_{suffix}"
        return name


def _extract(
    module: fx.GraphModule,
    members: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    weights: Container[fx.Node],
) -> fx.GraphModule:
    """The segment as a module of its own, with canonical names, that takes one list and returns a tuple."""
    graph = fx.Graph()
    root = torch.nn.Module()
    inner: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(inputs):
        inner[node] = graph.placeholder(f"{WEIGHT_INPUT if node in weights else 'in'}_{index}")
        inner[node].meta = {"val": value_of(node)}
    for node in members:
        for source in node.all_input_nodes:
            if source not in inner and _is_subgraph(source):
                setattr(root, str(source.target), getattr(module, str(source.target)))
                inner[source] = graph.get_attr(str(source.target))
        args = fx.map_arg(node.args, inner.__getitem__)
        kwargs = fx.map_arg(node.kwargs, inner.__getitem__)
        inner[node] = graph.create_node(node.op, node.target, args, kwargs)
        inner[node].meta = {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
    graph.output(tuple(inner[node] for node in outputs))
    graph.set_codegen(_BoxedCodeGen())
    return _make_graph_module(root, graph, "Segment")  # in Dynamo's hands its Python code is made when it is needed


def _is_subgraph(node: fx.Node) -> bool:
    """Whether the node fetches the body of a higher-order operator."""
    if node.op != "get_attr":
        return False
    return isinstance(getattr(node.graph.owning_module, str(node.target), None), torch.nn.Module)


def _symbols_of(node: fx.Node) -> set[str]:
    values = [value_of(node)] if is_scalar(node) else tensors_of(node)
    return {str(symbol) for value in values for symbol in free_symbols(value)}


def _symbol_binders(graph: fx.Graph) -> dict[str, fx.Node]:
    """For each size symbol, the input that carries it, or the number read from a tensor that it stands for."""
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        value = value_of(node)
        if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            found.setdefault(str(value.node.expr), node)
    return found
