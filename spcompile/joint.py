"""Forward and backward as one graph: what is live between them, and which output of backward is whose gradient.

The two are compiled apart, at different times, but an iteration of training runs both, and what forward saves for
backward takes memory all the way. `join_graphs` copies both into one graph, for readers that follow values across:

    forward: w_0, x -> loss, mm          joined:  w_0, x, tangent
    backward: mm, w_0, tangent -> g                mm = ...; loss = ...; g = f(mm, w_0, tangent)
                                                   return loss, g
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx


def join_graphs(forward: fx.Graph, backward: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """One graph with copies of all nodes, and the copy of each node. What is saved for backward is no output of it.

    The partitioner names an input of backward after the node of forward that it carries.
    """
    joined = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    saved = {node.name for node in backward.find_nodes(op="placeholder")}
    returned = [node for node in forward.output_node().all_input_nodes if node.name not in saved]
    carried: dict[str, fx.Node] = {}
    for node in forward.nodes:
        if node.op != "output":
            copies[node] = carried[node.name] = joined.node_copy(node, copies.__getitem__)
    for node in backward.nodes:
        if node.op == "placeholder" and node.name in carried:
            copies[node] = carried[node.name]
        elif node.op != "output":
            copies[node] = joined.node_copy(node, copies.__getitem__)
    returned += backward.output_node().all_input_nodes
    joined.output(tuple(copies[node] for node in dict.fromkeys(returned)))
    return joined, copies


def gradients_of(forward: fx.Graph, backward: fx.Graph) -> Iterator[tuple[int, fx.Node]]:
    """Each output of the backward graph that is a gradient, by its index, with the input of forward that it belongs to.

    AOTAutograd returns one gradient for each input of forward, None where there is none; what else it returns stands
    behind them.
    """
    inputs = forward.find_nodes(op="placeholder")
    outputs = backward.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    for index, (source, gradient) in enumerate(zip(inputs, outputs, strict=False)):
        if isinstance(gradient, fx.Node):
            yield index, source
