"""Which nodes run together, which weights move together, and when.

Why here: layers are labelled and nothing is cut. The pass reads the graph, decides segments and pages, asks the planner
(torch-free) for placement, slots and intervals, and notes the segment on every node.

    x = embedding(w_0, ids)     # outside      -> segment 0 "embed"      reads page "embed"
    y = mm(x, w_1)              # layers.0     -> segment 1 "layers.0"   reads page "layers.0"
    z = mm(y, w_0)              # outside      -> segment 2 "embed#1"    reads page "embed" (tied)

**Segments** are the runs of equal labels in program order. A run outside the layers that reads no weight joins the
segment before it (a sum between two layers costs no segment of its own).

**Pages** group weights by the set of labels of the segments that read them: a layer's own weights are one page, however
often the layer runs; a weight tied between two places is a page of its own, so that neither place drags in the other's
weights. Small weights outside the layers are leftovers: a copy of some KiB costs 15 us of link time whatever its size.
Cuts and pages never depend on k and m: plans of one model share compiled segments and host memory.

The odd case: weights that the graph writes stay out of pages, and are used in place.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from spcompile.errors import OptionError
from spcompile.graph import is_scalar
from spcompile.ir import Page, Plan, Step, Weight
from spcompile.module_tree import readable_path
from spcompile.passes.base import IN_PLACE, LAYER, SEGMENT, Program, written_weights
from spcompile.planner.make_plan import make_plan

logger = logging.getLogger(__name__)

LEFTOVER_FRACTION = 64
"""Weights outside the layers that together are smaller than this part of the largest page stay on the device."""


@dataclass
class _Run:
    """A segment in the making. ``label`` is the layer's, or a name of its own outside the layers; ``reads`` has the
    weights in order of first read, each with the path at which the segment finds it."""

    label: str
    layer: str | None
    nodes: list[fx.Node]
    reads: dict[Weight, str]


def make_schedule(program: Program) -> None:
    """Cut the graph into runs, group weights into pages, and plan. Sets ``program.plan`` and ``node.meta[SEGMENT]``."""
    runs = _runs(program)
    pages, leftovers = _pages(program, runs)
    written = written_weights(program)
    page_of = {weight: index for index, page in enumerate(pages) for weight in page.weights if weight not in written}
    steps = []
    seen: dict[str, int] = {}
    for index, run in enumerate(runs):
        for node in run.nodes:
            node.meta[SEGMENT] = index
        count = seen[run.label] = seen.get(run.label, -1) + 1
        reads = dict.fromkeys(page_of[weight] for weight in run.reads if weight in page_of)
        steps.append(Step(f"{run.label}#{count}" if count else run.label, run.layer, tuple(reads)))
    program.plan = _plan(program, pages, leftovers, tuple(steps))


def _plan(program: Program, pages: tuple[Page, ...], leftovers: tuple[Weight, ...], steps: tuple[Step, ...]) -> Plan:
    """Plan as asked for. Without k: by free memory, and where that seems not to do, with the smallest window of two.

    What seems not to do may well fit: activations are bounded before fusion, and that bound is pessimistic.
    """

    def plan(k: int | None, m: int | None) -> Plan:
        return make_plan(
            device=program.device,
            pages=pages,
            leftovers=leftovers,
            steps=steps,
            wraps=program.wraps,
            k=k,
            m=m,
            capacity_bytes=program.capacity_bytes,
            residents=tuple(index for index, page in enumerate(pages) if page.name in program.known_residents),
            elsewhere_pages=program.elsewhere_pages,
            activations_bytes=program.activations_bytes,
        )

    try:
        return plan(program.options.k, program.options.m)
    except OptionError as error:
        if program.options.k is not None:
            raise
        logger.warning("%s; streaming everything", error)
        widest = max(len(step.reads) for step in steps)
        return plan(max(widest, min(2, len(pages) - 1)), 1)


def _runs(program: Program) -> list[_Run]:
    weights = program.weight_nodes()
    runs: list[_Run] = []
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or is_scalar(node) or node.meta.get(IN_PLACE):
            continue
        layer = node.meta[LAYER]
        if not runs or runs[-1].layer != layer:
            runs.append(_Run(layer or "", layer, [], {}))
        runs[-1].nodes.append(node)
        for source in node.all_input_nodes:
            if source in weights:
                runs[-1].reads.setdefault(weights[source].weight, weights[source].path or weights[source].weight.name)
    return _name_outside(_join_weightless(runs))


def _join_weightless(runs: list[_Run]) -> list[_Run]:
    joined: list[_Run] = []
    for run in runs:
        previous = joined[-1] if joined else None
        if previous is not None and (previous.layer == run.layer or (run.layer is None and not run.reads)):
            previous.nodes.extend(run.nodes)
            previous.reads = run.reads | previous.reads
        else:
            joined.append(run)
    return joined


def _name_outside(runs: list[_Run]) -> list[_Run]:
    """Name the runs outside the layers after the first weight that they read, module path only."""
    taken = {run.label for run in runs}
    for index, run in enumerate(runs):
        run.label = readable_path(run.label)
        if run.layer is not None:
            run.layer = run.label
            continue
        first = readable_path(next(iter(run.reads.values()), f"between.{index}.?"))
        name = first.rpartition(".")[0] or first
        run.label = name if name not in taken else f"{name}.{index}"
        taken.add(run.label)
    return runs


def _pages(program: Program, runs: Sequence[_Run]) -> tuple[tuple[Page, ...], tuple[Weight, ...]]:
    readers: dict[Weight, dict[str, None]] = {}
    for run in runs:
        for weight in run.reads:
            readers.setdefault(weight, {})[run.label] = None
    written = written_weights(program)
    known = {weight.name: page for page in program.known_pages for weight in page.weights}
    layer_labels = {run.label for run in runs if run.layer is not None}
    used: dict[Page, None] = {}
    groups: dict[tuple[str, ...], list[Weight]] = {}
    for weight, labels in readers.items():
        if weight in written:
            continue
        if weight.name in known:
            used[known[weight.name]] = None
        else:
            groups.setdefault(tuple(labels), []).append(weight)
    taken = {page.name for page in program.known_pages}
    fresh = []
    for group, members in groups.items():
        in_layer = any(label in layer_labels for label in group)
        fresh.append((Page(_page_name(group, members, taken), tuple(_in_model_order(program, members))), in_layer))
    largest = max((page.nbytes for page, _ in fresh), default=0)
    for page, in_layer in fresh:
        if in_layer or page.nbytes * LEFTOVER_FRACTION >= largest:
            used[page] = None
    paged = {weight for page in used for weight in page.weights}
    order = {weight: index for index, weight in enumerate(readers)}
    pages = sorted(used, key=lambda page: min(order.get(weight, len(order)) for weight in page.weights))
    return tuple(pages), tuple(weight for weight in readers if weight not in paged)


def _page_name(labels: tuple[str, ...], members: Sequence[Weight], taken: set[str]) -> str:
    """The label, or the weight's own name where several places share it; made unique among all pages of the model."""
    name = labels[0] if len(labels) == 1 else readable_path(members[0].name)
    unique, suffix = name, 1
    while unique in taken:
        suffix += 1
        unique = f"{name}~{suffix}"
    taken.add(unique)
    return unique


def _in_model_order(program: Program, members: Sequence[Weight]) -> list[Weight]:
    """Host memory holds weights in the order of the model's parameters: neighbours there are neighbours in the page, so
    that one copy moves them all. (The graph's own order is that of use: 4 to 5 copies for each Llama layer.)"""
    return sorted(members, key=lambda weight: program.model_order.get(weight.name, len(program.model_order)))
