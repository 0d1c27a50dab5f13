"""The write-back of an updated input moves beside the value it writes.

Why here: AOTAutograd makes the graph functional and puts every ``copy_`` into an input (a KV cache, batch-norm
statistics) at its very end. There they would all fall into the last segment: each new cache would live until then
beside the old one, and be copied once more. Beside its producer, Inductor writes in place.

    before                                  after
    new = index_put(cache, i, k)            new = index_put(cache, i, k)
    y = attention(q, new)                   copy_ = copy_(cache, new)
    ...                                     y = attention(q, new)
    copy_ = copy_(cache, new)               ...

It may not move above anything that still reads the old value, be it through a view; nor above another write to the same
memory. Inputs that may share memory with each other were merged by AOTAutograd before, so only the graph itself counts.
"""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from spcompile.graph import memory_roots, written_inputs
from spcompile.passes.base import Program


def sink_mutations(program: Program) -> None:
    """Move each write into an input right behind the last node that it depends on or that reads the old value."""
    graph = program.graph
    readers = _readers(graph)
    for node in list(graph.nodes):
        destinations = written_inputs(node)
        if len(destinations) != 1 or node.users or destinations[0].op != "placeholder":
            continue
        above = [other for other in readers[destinations[0]] if other < node]
        last = max([*above, *node.all_input_nodes])
        if last.op != "placeholder":
            last.append(node)


def _readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, what reads its memory, be it through a view."""
    roots = memory_roots(graph.nodes)
    readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        for root in {root for read in node.all_input_nodes for root in roots[read]}:
            readers[root].append(node)
    return readers
