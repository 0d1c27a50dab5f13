"""Cuts by structure, for graphs whose weights have no telling names. Used by ``find_layers``.

First narrow cuts: nodes that every path from input to output passes through (the dominators of the data flow, networkx)
end a part. A part that still holds most of the weights (skip connections over the whole depth) is cut between
consecutive readers of weights, wherever fewest tensors cross. Parts that repeat in a cycle are joined into one layer
per cycle.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import networkx
from torch import fx

from spcompile.graph import is_deterministic_source, is_scalar, tensors_of
from spcompile.passes.base import Program, weight_views

DOMINANT = 0.5
"""A part that holds more than this of all weight bytes, while there are others to be had, is cut by width."""


def parts_by_structure(program: Program) -> list[list[fx.Node]]:
    """The graph's computing nodes in program order, cut into layers. Views of weights are left out."""
    views = weight_views(program)
    nodes = [node for node in program.graph.nodes if node.op == "call_function" and node not in views]
    reads = weight_bytes_read(program)
    parts = _drop_weightless(_split_after(nodes, _narrow_cuts(program)), reads)
    total_bytes = sum(reads[node] for node in nodes)
    return _join_cycles([piece for part in parts for piece in cut_by_width(part, reads, total_bytes)])


def weight_bytes_read(program: Program) -> dict[fx.Node, int]:
    """Bytes of the weights that each node reads, directly or through views."""
    behind = {node: each.weight.nbytes for node, each in program.weight_nodes().items()}
    for node in weight_views(program):
        behind[node] = behind[node.all_input_nodes[0]]
    return {node: sum(behind.get(source, 0) for source in node.all_input_nodes) for node in program.graph.nodes}


def _narrow_cuts(program: Program) -> frozenset[fx.Node]:
    """Nodes that every path of activations from the inputs to the outputs passes through."""
    output = program.graph.output_node()
    flow = networkx.DiGraph()
    flow.add_edges_from(
        (node, user)
        for node in program.graph.nodes
        if node.name not in program.weights and not is_scalar(node) and not is_deterministic_source(node)
        for user in node.users
        if not (user is output and node.op == "placeholder")
    )
    from_activations = _reachable_from_activations(program)
    flow.remove_nodes_from([node for node in flow if node not in from_activations and node is not output])
    source = "inputs"
    flow.add_edges_from((source, node) for node in list(flow) if flow.in_degree(node) == 0)
    if output not in flow or source not in flow:
        return frozenset()
    dominators = networkx.immediate_dominators(flow, source)
    cuts, node = set(), dominators.get(output)
    while node is not None and node != source and dominators.get(node) != node:
        cuts.add(node)
        node = dominators.get(node)
    calls = [cut for cut in cuts if isinstance(cut, fx.Node) and cut.op == "call_function"]
    return frozenset(cut for cut in calls if len(tensors_of(cut)) == 1)


def _reachable_from_activations(program: Program) -> frozenset[fx.Node]:
    """Nodes that depend on an input of the graph that is no weight."""
    reached: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name not in program.weights and not is_scalar(node):
                reached.add(node)
        elif any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return frozenset(reached)


def _split_after(nodes: Sequence[fx.Node], ends: frozenset[fx.Node]) -> list[list[fx.Node]]:
    parts: list[list[fx.Node]] = [[]]
    for node in nodes:
        parts[-1].append(node)
        if node in ends:
            parts.append([])
    return [part for part in parts if part]


def _drop_weightless(parts: list[list[fx.Node]], reads: dict[fx.Node, int]) -> list[list[fx.Node]]:
    """Join each part that reads no weight to the one before it (the first ones to the one behind)."""
    joined: list[list[fx.Node]] = []
    pending: list[fx.Node] = []
    for part in parts:
        if any(reads[node] for node in part):
            joined.append(pending + part)
            pending = []
        elif joined:
            joined[-1].extend(part)
        else:
            pending = pending + part
    if pending:
        joined.append(pending)
    return joined


def cut_by_width(
    part: list[fx.Node], reads: dict[fx.Node, int], total_bytes: int, fewest_readers: int = 4
) -> list[list[fx.Node]]:
    """Cut a part that holds most of the weights between consecutive readers of weights, where fewest tensors cross."""
    readers = [index for index, node in enumerate(part) if reads[node]]
    if len(readers) < fewest_readers or sum(reads[node] for node in part) <= DOMINANT * total_bytes:
        return [part]
    position = {node: index for index, node in enumerate(part)}
    crossing = [0] * len(part)
    for node in part:
        last = max((position.get(user, len(part) - 1) for user in node.users), default=position[node])
        for index in range(position[node], last):
            crossing[index] += 1
    ends = {
        part[min(range(first, second), key=lambda index: (crossing[index], -index))]
        for first, second in itertools.pairwise(readers)
    }
    return _split_after(part, frozenset(ends))


def _join_cycles(parts: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Join parts that repeat in a cycle (attention, feed-forward, attention, ...) into one layer per cycle.

    The shortest period that repeats at least twice, starting anywhere, and covers more than half of the parts wins.
    """
    shapes = [_shape_text(part) for part in parts]
    count = len(parts)
    for period in range(1, count // 2 + 1):
        for start in range(count - 2 * period + 1):
            repeats = 1
            while shapes[start : start + period] == shapes[start + repeats * period : start + (repeats + 1) * period]:
                repeats += 1
            covered = repeats * period
            if repeats < 2 or 2 * covered <= count:
                continue
            if period == 1:
                return parts
            cycle = [list(itertools.chain(*parts[at : at + period])) for at in range(start, start + covered, period)]
            return parts[:start] + cycle + parts[start + covered :]
    return parts


def _shape_text(part: list[fx.Node]) -> str:
    return ";".join(f"{node.target}{[tuple(map(str, each.shape)) for each in tensors_of(node)]}" for node in part)
