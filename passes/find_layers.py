"""Every node gets the label of its layer, or None outside the layers.

Why here: the graph is final (views and write-backs are where they belong), and nothing has been cut yet.

Three sources, in this order:

1. **The module tree**, from the names of the weights. Children of one module that are numbered (``layers.0``,
   ``block1``) and hold alike weights are layers; the search goes from the root down and stops at the first such
   group, so experts inside a layer do not split it, while stages of differing width (ConvNeXt, Swin) and towers
   of many layers are entered and their blocks found. A node belongs to the layer in whose path its
   ``nn_module_stack`` lies. Should most weights lie in one stretch outside the layers, that is cut as in 3.
2. **Narrow cuts**, where the weights have no such names: nodes that every path from input to output passes through (the
   dominators of the data flow, networkx) end a part; parts that repeat in a cycle are joined into one layer.
3. **Width**, where one part still holds most of the weights (skip connections over the whole depth): it is cut
   between consecutive readers of weights, wherever fewest tensors cross.

    add_6 = add(embedding, mm_3)        # layers.0
    pow_2 = pow(add_6, 2)               # layers.0
    t_9 = t(w_9)                        # layers.1

Nodes without a stack belong where the weights lie that they read; those that read none (sums that autograd made,
moved write-backs) take the label of the node before them. Cheap constants (``full``, ``arange``) are copied to each
layer that reads them, so that they tie no layers together and identical layers stay identical.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import networkx
from torch import fx

from spcompile.graph import is_deterministic_source, is_scalar, tensors_of
from spcompile.passes.base import LAYER, Program, weight_views

SIMILAR = 0.5
"""Numbered siblings are layers when two of them share at least this part of their weights (relative name and bytes).
The first T5 block has one weight more than the others, the first block of a ResNet stage a projection: 0.5 keeps
both."""

SMALL_FRACTION = 64
"""Numbered siblings with names (``norm1``, ``norm2``) that together hold less than this part of the weights beside them
are no layers. Items of a list always may be."""

DOMINANT = 0.5
"""A part that holds more than this of all weight bytes, while there are others to be had, is cut by width."""

SPLITTING = 0.8
"""A stretch outside the layers is not cut when one piece would still hold more than this of it: an embedding table with
small weights around it stays one page."""

Signature = frozenset[tuple[str, int]]


def find_layers(program: Program) -> None:
    """Write ``node.meta[LAYER]`` on every node that is not a placeholder or the output."""
    _tuck_getitems(program)
    named = [each for each in program.weights.values() if each.path]
    layer_paths = find_layer_paths((_dotted(each.path), each.weight.nbytes) for each in named)
    if layer_paths:
        _label_by_module(program, layer_paths)
    else:
        _label_by_structure(program)
    _label_weight_views(program)
    _copy_constants_to_readers(program)


def _tuck_getitems(program: Program) -> None:
    """Put every getitem right behind its producer: only tensors may cross a cut, never a list of them."""
    for node in list(program.graph.nodes):
        items = [user for user in node.users if user.target is operator.getitem and user.op == "call_function"]
        for item in sorted(items, reverse=True):
            node.append(item)


def find_layer_paths(weights: Iterable[tuple[str, int]]) -> frozenset[str]:
    """Paths of the layers in a module tree that is given as (path of a weight, its bytes)."""
    return frozenset(_search(sorted(set(weights)), ""))


def _search(weights: Sequence[tuple[str, int]], prefix: str) -> set[str]:
    """``weights`` are those below ``prefix``, with paths relative to it."""
    children: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for path, nbytes in weights:
        child, dot, rest = path.partition(".")
        if dot:
            children[child].append((rest, nbytes))
    groups: dict[str, list[str]] = defaultdict(list)
    for child in children:
        match = re.fullmatch(r"(.*?)(\d+)", child)
        if match:
            groups[match[1]].append(child)
    layers: set[str] = set()
    for stem, members in groups.items():
        if _are_layers(stem, [children[member] for member in members], sum(nbytes for _, nbytes in weights)):
            layers.update(members)
    found: set[str] = set()
    for child, below in children.items():
        path = f"{prefix}{child}"
        found |= {path} if child in layers else _search(below, f"{path}.")
    return found


def _are_layers(stem: str, members: Sequence[Sequence[tuple[str, int]]], siblings_bytes: int) -> bool:
    """Whether these numbered siblings are layers. ``stem`` is what their names begin with, "" for items of a list."""
    signatures = [frozenset(member) for member in members]
    if len(signatures) == 1:  # a list of one block (ALBERT, or a model shrunk to one layer); a lone leaf is no layer
        return stem == "" and any("." in name for name, _ in signatures[0])
    if not _alike(signatures):
        return False
    if stem == "":
        return True
    if any(len(_search(member, "")) > len(members) for member in members):  # towers: few, of many layers each
        return False
    return sum(nbytes for member in members for _, nbytes in member) * SMALL_FRACTION >= siblings_bytes


def _alike(signatures: Sequence[Signature]) -> bool:
    distinct = list(dict.fromkeys(signatures))
    if len(distinct) < len(signatures):
        return True
    return any(_similar(one, other) for index, one in enumerate(distinct) for other in distinct[index + 1 :])


def _similar(one: Signature, other: Signature) -> bool:
    """Two layers of one kind share most of all weights; two of different kinds (one with experts, say), most of what
    the smaller one has outside of lists."""
    if len(one & other) >= SIMILAR * len(one | other):
        return True
    own_one, own_other = _outside_lists(one), _outside_lists(other)
    return len(own_one & own_other) >= SIMILAR * max(1, min(len(own_one), len(own_other)))


def _outside_lists(signature: Signature) -> Signature:
    return frozenset((name, nbytes) for name, nbytes in signature if not re.search(r"(^|\.)\d+\.", name))


def module_path(node: fx.Node) -> str | None:
    """Path of the innermost module that the node was traced in, or None where tracing recorded none."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return None
    path: str = list(stack.values())[-1][0]
    return _dotted(re.sub(r"@\d+", "", path))  # Dynamo numbers the calls of a module that runs several times


def _dotted(path: str) -> str:
    """Items of a plain list of modules (``G['blocks'][0]``) are numbered children like others."""
    return re.sub(r"\[(\d+)\]", r".\1", path)


def _label_by_module(program: Program, layer_paths: frozenset[str]) -> None:
    views = weight_views(program)
    read = _first_path_read(program, views)
    label: str | None = None
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output") or node in views:
            continue
        path = module_path(node) or read.get(node)
        if path is not None and node.target is not operator.getitem:  # that one lies behind its producer
            label = _layer_of(path, layer_paths)
        node.meta[LAYER] = label
    _cut_outside(program, views)


def _first_path_read(program: Program, views: dict[fx.Node, None]) -> dict[fx.Node, str]:
    """Path of the first weight that each node reads, directly or through views; only of nodes that read a named one."""
    behind = {node: _dotted(each.path) for node, each in program.weight_nodes().items() if each.path}
    for node in views:
        if node.all_input_nodes[0] in behind:
            behind[node] = behind[node.all_input_nodes[0]]
    read = {}
    for node in program.graph.nodes:
        paths = [behind[source] for source in node.all_input_nodes if source in behind]
        if paths:
            read[node] = paths[0]
    return read


def _cut_outside(program: Program, views: dict[fx.Node, None]) -> None:
    """Where most weights lie outside the layers in one stretch, cut it: a page must not be half of the model."""
    reads = _weight_bytes_read(program, views)
    nodes = [node for node in program.graph.nodes if LAYER in node.meta]
    total_bytes = sum(reads[node] for node in nodes)
    by_label = itertools.groupby(nodes, lambda node: node.meta[LAYER])
    stretches = [list(group) for label, group in by_label if label is None]
    for index, stretch in enumerate(stretches):
        pieces = _cut_by_width(stretch, reads, total_bytes, fewest_readers=2)
        largest = max(sum(reads[node] for node in piece) for piece in pieces)
        if len(pieces) == 1 or largest > SPLITTING * sum(reads[node] for node in stretch):
            continue
        for number, piece in enumerate(pieces):
            for node in piece:
                node.meta[LAYER] = f"outside.{index}.{number}"


def _layer_of(path: str, layer_paths: frozenset[str]) -> str | None:
    parts = path.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return next((prefix for prefix in prefixes if prefix in layer_paths), None)


def _label_weight_views(program: Program) -> None:
    """A view or cast of a weight belongs to its reader, wherever the weight comes from."""
    for node in reversed(weight_views(program)):
        readers = [user for user in node.users if user.op != "output"]
        node.meta[LAYER] = readers[0].meta[LAYER] if readers else None


def _label_by_structure(program: Program) -> None:
    views = weight_views(program)
    nodes = [node for node in program.graph.nodes if node.op == "call_function" and node not in views]
    reads = _weight_bytes_read(program, views)
    ends = _narrow_cuts(program)
    parts = _drop_weightless(_split_after(nodes, ends), reads)
    total_bytes = sum(reads[node] for node in nodes)
    parts = [piece for part in parts for piece in _cut_by_width(part, reads, total_bytes)]
    parts = _join_cycles(parts)
    for index, part in enumerate(parts):
        for node in part:
            source = node.args[0] if node.target is operator.getitem else None
            if isinstance(source, fx.Node) and LAYER in source.meta:
                node.meta[LAYER] = source.meta[LAYER]
            else:
                node.meta[LAYER] = f"part.{index}" if len(parts) > 1 else None


def _weight_bytes_read(program: Program, views: dict[fx.Node, None]) -> dict[fx.Node, int]:
    """Bytes of the weights that each node reads, directly or through views."""
    behind = {node: each.weight.nbytes for node, each in program.weight_nodes().items()}
    for node in views:
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


def _cut_by_width(
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
        for start in range(period):
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
