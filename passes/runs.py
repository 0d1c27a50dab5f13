"""Runs: segments in the making.

A run is a stretch of nodes with one label in program order, or, outside the layers, with none. One outside that reads
no weight joins the run before it: a sum between two layers costs no segment of its own.

    x = embedding(w_0, ids)     # outside      -> run "embed"      reads w_0
    y = mm(x, w_1)              # layers.0     -> run "layers.0"   reads w_1
    z = y + x                   # outside      -> joins "layers.0"

In training the runs of the backward graph follow those of the forward graph. Runs of layers that read too many weights
at once can be cut into pieces (``cut_finer.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from spcompile.costs import GATHERS
from spcompile.graph import is_scalar, nbytes_of, tensors_of
from spcompile.ir import Weight
from spcompile.module_tree import readable_path
from spcompile.passes.base import IN_PLACE, LAYER, Program
from spcompile.passes.cut_finer import cut_finer


@dataclass
class Run:
    """A segment in the making. ``label`` is the layer's, or a name of its own outside the layers; ``reads`` has the
    weights in order of first read, each with the path at which the segment finds it."""

    program: Program
    label: str
    layer: str | None
    nodes: list[fx.Node]
    reads: dict[Weight, str]

    @property
    def is_backward(self) -> bool:
        return self.program.forward is not None


def find_runs(program: Program) -> list[Run]:
    """The runs of labelled graphs that are planned together, in program order; each node that computes a tensor is in
    one of them."""
    runs: list[Run] = []
    for each in program.graphs:
        runs += _name_outside(_join_weightless(_find_runs(each)), runs)
    return runs


def _find_runs(program: Program) -> list[Run]:
    weights = program.weight_nodes()
    runs: list[Run] = []
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or is_scalar(node) or node.meta.get(IN_PLACE):
            continue
        layer = node.meta[LAYER]
        if not runs or runs[-1].layer != layer:
            runs.append(Run(program, layer or "", layer, [], {}))
        runs[-1].nodes.append(node)
        for source in node.all_input_nodes:
            if source in weights:
                runs[-1].reads.setdefault(weights[source].weight, weights[source].path or weights[source].weight.name)
    return runs


def cut_runs(runs: Sequence[Run], limit_bytes: int) -> list[Run]:
    """The runs, those of layers that read more weights than the limit in pieces."""
    cut: list[Run] = []
    for program, group in itertools.groupby(runs, lambda run: run.program):
        weights = program.weight_nodes().items()
        weight_of = {node: each.weight for node, each in weights if each.weight not in program.written}
        cut += _cut_runs(group, weight_of, limit_bytes)
    return cut


def _cut_runs(runs: Iterable[Run], weight_of: Mapping[fx.Node, Weight], limit_bytes: int) -> Iterator[Run]:
    for run in runs:
        too_large = run.layer is not None and sum(weight.nbytes for weight in run.reads) > limit_bytes
        pieces = cut_finer(run.nodes, weight_of, limit_bytes) if too_large else [run.nodes]
        for number, nodes in enumerate(pieces):
            label = f"{run.label}:{number}" if len(pieces) > 1 else run.label
            read = (weight_of[source] for node in nodes for source in node.all_input_nodes if source in weight_of)
            reads = {weight: run.reads[weight] for weight in dict.fromkeys(read)}
            yield Run(run.program, label, run.layer, nodes, reads)


def _join_weightless(runs: list[Run]) -> list[Run]:
    joined: list[Run] = []
    for run in runs:
        previous = joined[-1] if joined else None
        if previous is not None and (previous.layer == run.layer or (run.layer is None and not run.reads)):
            previous.nodes.extend(run.nodes)
            for weight, path in run.reads.items():
                previous.reads.setdefault(weight, path)
        else:
            joined.append(run)
    return joined


def _name_outside(runs: list[Run], before: Sequence[Run]) -> list[Run]:
    """Name the runs outside the layers after the first weight that they read, module path only.

    Args:
        runs: of one graph.
        before: of the forward graph: what reads a weight in backward is called like what reads it there.
    """
    known = {weight: run.label for run in before if run.layer is None for weight in run.reads}
    taken = {run.label for run in (*before, *runs)}
    for index, run in enumerate(runs):
        run.label = readable_path(run.label)
        if run.layer is not None:
            run.layer = run.label
            continue
        label = next((known[weight] for weight in run.reads if weight in known), None)
        if label is None:
            first = readable_path(next(iter(run.reads.values()), f"between.{index}.?"))
            name = first.rpartition(".")[0] or first
            label = name if name not in taken else f"{name}.{index}"
        run.label = label
        taken.add(run.label)
    return runs


def gathered_bytes(run: Run) -> dict[Weight, int]:
    """The weights of which a run only gathers rows, each with the bytes of those rows."""
    weights = run.program.weight_nodes()
    rows_bytes: dict[Weight, int] = {}
    others: set[Weight] = set()
    for node in run.nodes:
        for source in node.all_input_nodes:
            if source not in weights:
                continue
            weight = weights[source].weight
            if node.target in GATHERS and node.args[0] is source:
                rows_bytes[weight] = rows_bytes.get(weight, 0) + sum(map(nbytes_of, tensors_of(node)))
            else:
                others.add(weight)
    return {weight: nbytes for weight, nbytes in rows_bytes.items() if weight not in others}
