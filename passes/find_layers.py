"""Every node gets the label of its layer, or None outside the layers.

Why here: the graph is final (views and write-backs are where they belong), and nothing has been cut yet.

Two sources:

1. **The module tree** (``module_tree.py``), from the names of the weights. A node belongs to the layer in whose path
   its ``nn_module_stack`` lies. Should most weights lie in one stretch outside the layers, that is cut as in 2.
2. **Structure** (``structure.py``), where the weights have no telling names: narrow cuts, and cycles.

    add_6 = add(embedding, mm_3)        # layers.0
    pow_2 = pow(add_6, 2)               # layers.0
    t_9 = t(w_9)                        # layers.1

Nodes without a stack belong where the weights lie that they read; those that read none (sums that autograd made,
moved write-backs) take the label of the node before them. Cheap constants (``full``, ``arange``) are copied to each
layer that reads them, so that they tie no layers together and identical layers stay identical.

In a backward graph each node belongs where the node of the forward graph does that it differentiates: autograd has
given both the same number. What is computed again in backward belongs to its first reader.
"""

from __future__ import annotations

import itertools
import math
import operator
import re

from torch import fx

from spcompile.graph import is_deterministic_source, written_inputs
from spcompile.module_tree import canonical_path, find_layer_paths, layer_of
from spcompile.passes.base import LAYER, Program, weight_views
from spcompile.passes.structure import cut_by_width, parts_by_structure, weight_bytes_read

SPLITTING = 0.8
"""A stretch outside the layers is not cut when one piece would still hold more than this of it: an embedding table with
small weights around it stays one page."""


def find_layers(program: Program) -> None:
    """Write ``node.meta[LAYER]`` on every node that is not a placeholder or the output."""
    _tuck_getitems(program)
    if program.forward is not None:
        _label_backward(program, program.forward)
    else:
        if program.backward is not None:
            _tuck_saved(program, program.backward)
        _label_forward(program)
    for node in program.graph.find_nodes(op="call_function", target=operator.getitem):
        node.meta[LAYER] = node.all_input_nodes[0].meta.get(LAYER)  # only tensors may cross a cut
    _label_weight_views(program)
    _copy_constants_to_readers(program)


def _label_forward(program: Program) -> None:
    named = [each for each in program.weights.values() if each.path]
    layer_paths = find_layer_paths((each.path, each.weight.nbytes) for each in named)
    if layer_paths:
        _label_by_module(program, layer_paths)
    else:
        _label_by_structure(program)


def _tuck_getitems(program: Program) -> None:
    """Put every getitem right behind its producer."""
    for node in list(program.graph.nodes):
        items = [user for user in node.users if user.target is operator.getitem and user.op == "call_function"]
        for item in sorted(items, reverse=True):
            node.append(item)


def _tuck_saved(program: Program, backward: Program) -> None:
    """Put what forward computes for backward alone right behind what it is computed from. The partitioner leaves it at
    the end of the graph: it would be a segment of its own, and keep its inputs on the device until then."""
    saved = {node.name for node in backward.graph.find_nodes(op="placeholder")}
    only_saved: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        is_read = any(user not in only_saved and (user.op != "output" or node.name not in saved) for user in node.users)
        if node.op == "call_function" and node.users and not is_read and not written_inputs(node):
            only_saved.add(node)
    for node in [node for node in program.graph.nodes if node in only_saved]:
        last = max(node.all_input_nodes, default=None)
        if last is not None and last.op != "placeholder" and last.next is not node:
            last.append(node)


def module_path(node: fx.Node) -> str | None:
    """Path of the innermost module that the node was traced in, or None where tracing recorded none."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return None
    path: str = list(stack.values())[-1][0]
    return canonical_path(re.sub(r"@\d+", "", path))  # Dynamo numbers the calls of a module that runs several times


def _label_by_module(program: Program, layer_paths: frozenset[str]) -> None:
    views = weight_views(program)
    read = _first_path_read(program, views)
    label: str | None = None
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output") or node in views:
            continue
        path = module_path(node) or read.get(node)
        if path is not None and node.target is not operator.getitem:  # that one lies behind its producer
            label = layer_of(path, layer_paths)
        node.meta[LAYER] = label
    _cut_outside(program)


def _first_path_read(program: Program, views: dict[fx.Node, None]) -> dict[fx.Node, str]:
    """Path of the first weight that each node reads, directly or through views; only of nodes that read a named one."""
    behind = {node: each.path for node, each in program.weight_nodes().items() if each.path}
    for node in views:
        if node.all_input_nodes[0] in behind:
            behind[node] = behind[node.all_input_nodes[0]]
    read = {}
    for node in program.graph.nodes:
        paths = [behind[source] for source in node.all_input_nodes if source in behind]
        if paths:
            read[node] = paths[0]
    return read


def _label_backward(program: Program, forward: Program) -> None:
    """By the number that autograd gave to a forward node and its derivative; the last node with a number is the one
    that was differentiated.

    Autograd goes back from high numbers to low ones. A higher one in between belongs to a sum that autograd made, which
    follows the node before it.
    """
    label_of = {node.meta.get("seq_nr"): node.meta[LAYER] for node in forward.graph.nodes if LAYER in node.meta}
    views = weight_views(program)
    recomputed: list[fx.Node] = []
    label: str | None = None
    lowest = math.inf
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output") or node in views:
            continue
        number = node.meta.get("seq_nr")
        if node.meta.get("partitioner_tag") == "is_forward":
            recomputed.append(node)
        elif number is not None and number <= lowest and number in label_of:
            label, lowest = label_of[number], number
        node.meta[LAYER] = label
    for node in reversed(recomputed):
        readers = [user for user in sorted(node.users) if LAYER in user.meta]
        node.meta[LAYER] = readers[0].meta[LAYER] if readers else node.meta[LAYER]


def _cut_outside(program: Program) -> None:
    """Where most weights lie outside the layers in one stretch, cut it: a page must not be half of the model."""
    reads = weight_bytes_read(program)
    nodes = [node for node in program.graph.nodes if LAYER in node.meta]
    total_bytes = sum(reads[node] for node in nodes)
    by_label = itertools.groupby(nodes, lambda node: node.meta[LAYER])
    stretches = [list(group) for label, group in by_label if label is None]
    for index, stretch in enumerate(stretches):
        pieces = cut_by_width(stretch, reads, total_bytes, fewest_readers=2)
        largest = max(sum(reads[node] for node in piece) for piece in pieces)
        if len(pieces) == 1 or largest > SPLITTING * sum(reads[node] for node in stretch):
            continue
        for number, piece in enumerate(pieces):
            for node in piece:
                node.meta[LAYER] = f"outside.{index}.{number}"


def _label_weight_views(program: Program) -> None:
    """A view or cast of a weight belongs to its reader, wherever the weight comes from."""
    for node in reversed(weight_views(program)):
        readers = [user for user in node.users if user.op != "output"]
        node.meta[LAYER] = readers[0].meta[LAYER] if readers else None


def _label_by_structure(program: Program) -> None:
    parts = parts_by_structure(program)
    for index, part in enumerate(parts):
        for node in part:
            source = node.args[0] if node.target is operator.getitem else None
            if isinstance(source, fx.Node) and LAYER in source.meta:
                node.meta[LAYER] = source.meta[LAYER]
            else:
                node.meta[LAYER] = f"part.{index}" if len(parts) > 1 else None


def _copy_constants_to_readers(program: Program) -> None:
    """Give each reading layer its own copy of a tensor that is made of nothing."""
    for node in list(program.graph.nodes):
        if not is_deterministic_source(node):
            continue
        copies: dict[object, fx.Node] = {node.meta[LAYER]: node}
        for user in sorted(node.users):
            label = user.meta.get(LAYER, node.meta[LAYER])
            if label not in copies:
                with program.graph.inserting_before(user):
                    copies[label] = program.graph.node_copy(node)
                copies[label].meta[LAYER] = label
            user.replace_input_with(node, copies[label])
        if not node.users:
            program.graph.erase_node(node)
