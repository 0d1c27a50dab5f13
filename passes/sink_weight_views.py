"""Views and casts of a weight are computed where they are used.

Why here: a segment must get its weights from the page, and nothing that shares memory with a slot may live longer than
the page's interval. AOTAutograd leaves ``t(w)`` wherever tracing met it first, which may be another layer, and users
far apart may share it. So each reader gets a copy of the chain of its own, right before it; views cost nothing, casts
cost what they cost in eager, and Inductor merges duplicates inside one segment.

    before                          after
    t = t(w)                        x1 = mul(x, 2)
    x1 = mul(x, 2)                  t_1 = t(w)
    y = mm(x1, t)                   y = mm(x1, t_1)

The odd case: what the graph returns. A view of a weight that is an output (autograd saves them where the partitioner
was not told to recompute) stays on the placeholder itself, never on a slot: it then lives in the weight's own memory.
"""

from __future__ import annotations

from torch import fx

from spcompile.graph import is_view
from spcompile.passes.base import IN_PLACE, Program, weight_views


def sink_weight_views(program: Program) -> None:
    """Give every reader of a view or cast of a weight its own copy of it, right before the reader."""
    derived = weight_views(program)
    for node in list(program.graph.nodes):
        if node.op in ("placeholder", "output") or node in derived:
            continue
        for source in dict.fromkeys(each for each in node.all_input_nodes if each in derived):
            with program.graph.inserting_before(node):
                copy = _copy_chain(program.graph, source, derived)
            node.replace_input_with(source, copy)
    for node in reversed(list(derived)):
        if not node.users:
            program.graph.erase_node(node)
    _mark_in_place(program, derived)


def _copy_chain(graph: fx.Graph, node: fx.Node, derived: dict[fx.Node, None]) -> fx.Node:
    if node not in derived:
        return node
    return graph.node_copy(node, lambda source: _copy_chain(graph, source, derived))


def _mark_in_place(program: Program, derived: dict[fx.Node, None]) -> None:
    """Mark what is left of the chains: views that only the output (or a cast for the output) sees."""
    in_place = set(program.weight_nodes())
    for node in program.graph.nodes:
        if node in derived and is_view(node) and node.all_input_nodes[0] in in_place:
            node.meta[IN_PLACE] = True
            in_place.add(node)
