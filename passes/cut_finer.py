"""Cut a run of nodes that reads more weights than are to be held at once. Used by ``make_schedule``.

A layer is one segment as long as its weights fit. Where they do not, it is cut into as few pieces as the limit allows,
and among those cuts where the fewest bytes cross:

    q = mm(x, t(w_q)); k = mm(x, t(w_k)); ...; h = add(x, o)    # piece 0: w_q, w_k, w_v, w_o
    --------------------------------------------------------    # h alone crosses
    up = mm(h, t(w_up)); ...                                    # piece 1: w_up, ...

How: some values must not cross: views of weights (outside the segment they would be aliases of a slot), casts of them,
and results that are lists. What lies between the places that they leave is a *part*, cut no further. A piece without
weights could join the one beside it, so there is at most one cut between a part that reads weights and the next such
part, and only the cheapest place counts, the earliest of equals. What is left to choose is between which of the few
readers to cut: a dynamic program over them.

What crosses: memory that is made before a cut, in the run or outside it, and that the run reads behind it, once for
each cut. Only the run's own reads count: what is read after the run (saved for backward, say) is stored wherever the
cut is, and alike layers are cut alike though only the last of them is the last reader of a mask. Graph inputs count
too: a cache is then read and updated in one piece.

The odd cases: a part that needs more than the limit is a piece that holds what this part reads and nothing else.
Scalars are never among the nodes and cost nothing, nor does the tensor that one is computed from: ``split_segments``
cuts there in any case.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from torch import fx

from spcompile.graph import aliased_inputs, is_cast, is_view, nbytes_of, tensors_of, value_of
from spcompile.ir import Weight

Gap = tuple[int, int]
"""A place to cut: bytes that cross there, and the index of the node behind it. The smaller one is the better one."""


def cut_finer(nodes: Sequence[fx.Node], weight_of: Mapping[fx.Node, Weight], limit_bytes: int) -> list[list[fx.Node]]:
    """Cut a run into pieces that each read at most so many bytes of weights, as far as that is possible.

    Fewest pieces come first, then the fewest bytes that cross the cuts, then the earliest cuts. Order, operators,
    shapes and bytes decide, never names: alike runs are cut at the same places.

    Args:
        nodes: what computes tensors in one stretch of an ATen graph, in program order, with ``meta["val"]``. Each view
            or cast of a weight stands before its readers of the same run (``sink_weight_views``).
        weight_of: the weight behind each placeholder that carries one; without those that the graph writes, if they
            are to be held elsewhere. A weight counts once for each piece that reads it.
        limit_bytes: the most bytes of weights that a piece should read.

    Returns:
        The pieces, in order; together they are ``nodes``. A piece that reads more than the limit reads just what one
        operator (or one part that cannot be cut) needs.
    """
    readers: list[AbstractSet[Weight]] = []
    starts: list[list[int]] = [[]]  # of the parts, by how many readers there are before
    for start, weights in _parts(nodes, weight_of):
        starts[-1].append(start)
        if weights:
            readers.append(weights)
            starts.append([])
    if len(readers) < 2 or _nbytes(frozenset().union(*readers)) <= limit_bytes:
        return [list(nodes)]
    crossing_bytes = _crossing_bytes(nodes, weight_of)
    gaps = [min((crossing_bytes[start], start) for start in behind) for behind in starts[1 : len(readers)]]
    borders = (0, *_best_cuts(readers, gaps, limit_bytes), len(nodes))
    return [list(nodes[start:end]) for start, end in itertools.pairwise(borders)]


def _nbytes(weights: AbstractSet[Weight]) -> int:
    return sum(weight.nbytes for weight in weights)


def _parts(nodes: Sequence[fx.Node], weight_of: Mapping[fx.Node, Weight]) -> Iterator[tuple[int, AbstractSet[Weight]]]:
    """Where each part begins that cannot be cut, and the weights that it reads."""
    index_of = {node: index for index, node in enumerate(nodes)}
    derived: set[fx.Node] = set()
    start, end = 0, 0  # of the open part
    weights: set[Weight] = set()
    for index, node in enumerate(nodes):
        if index > end:
            yield start, weights
            start, end, weights = index, index, set()
        read = [source for source in node.all_input_nodes if source in weight_of or source in derived]
        weights.update(weight_of[source] for source in read if source in weight_of)
        if read and (is_view(node) or is_cast(node)):
            derived.add(node)
        if node in derived or isinstance(value_of(node), (tuple, list)):
            end = max(end, *(index_of.get(user, index) for user in node.users), index)
    if nodes:
        yield start, weights


def _crossing_bytes(nodes: Sequence[fx.Node], weight_of: Mapping[fx.Node, Weight]) -> list[int]:
    """Bytes of the memory that would cross a cut in front of each node. Weights come with the page and do not count."""
    made = {node: index for index, node in enumerate(nodes)}
    owners: dict[fx.Node, tuple[fx.Node, ...]] = {}
    last_read: dict[fx.Node, int] = {}
    for index, node in enumerate(nodes):
        for source in node.all_input_nodes:
            last_read.update(dict.fromkeys(_owners(source, owners), index))
    changes_bytes = [0] * (len(nodes) + 1)
    for owner, last in last_read.items():
        if owner not in weight_of:
            nbytes = sum(map(nbytes_of, tensors_of(owner)))
            changes_bytes[made.get(owner, -1) + 1] += nbytes
            changes_bytes[last + 1] -= nbytes
    return list(itertools.accumulate(changes_bytes))


def _owners(node: fx.Node, known: dict[fx.Node, tuple[fx.Node, ...]]) -> tuple[fx.Node, ...]:
    """The nodes that own the memory which a value looks at; ``known`` is filled on the way."""
    if node not in known:
        sources = aliased_inputs(node)
        if sources and node.target is operator.getitem and not is_view(node):
            sources = []  # each result of an operator has memory of its own
        known[node] = tuple(owner for source in sources for owner in _owners(source, known)) or (node,)
    return known[node]


def _best_cuts(readers: Sequence[AbstractSet[Weight]], gaps: Sequence[Gap], limit_bytes: int) -> tuple[int, ...]:
    """Where to cut; ``gaps`` has the best place behind each reader but the last."""
    needs_bytes = [_nbytes(weights) for weights in readers]
    most_bytes = max(limit_bytes, *needs_bytes)
    end = (0, -1)
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}  # by readers before: pieces, bytes, cuts
    for first in range(len(readers)):
        pieces, crossing_bytes, cuts = best[first]
        held: set[Weight] = set()
        held_bytes, allowed_bytes = 0, limit_bytes
        for count, (weights, needs) in enumerate(zip(readers[first:], needs_bytes[first:], strict=True), first + 1):
            held_bytes += _nbytes(weights - held)
            held |= weights
            allowed_bytes = max(allowed_bytes, needs)
            if held_bytes > most_bytes:
                break
            if held_bytes <= allowed_bytes:  # else a later reader may still need all of it
                gap_bytes, gap = gaps[count - 1] if count < len(readers) else end
                candidate = pieces + 1, crossing_bytes + gap_bytes, (*cuts, gap)
                best[count] = min(best.get(count, candidate), candidate)
    return best[len(readers)][2][:-1]
