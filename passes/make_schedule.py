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
weights. Tables outside the layers of which only rows are read are apart from what is read whole: they may be read in
place. Small weights outside the layers are leftovers: a copy of some KiB costs 15 us of link time whatever its size.
Cuts and pages never depend on k and m: plans of one model share compiled segments and host memory. Only where a budget,
or the device, has no room for whole layers are they cut finer (``cut_finer.py``), and with a budget small pages that
come one behind the other are merged.

The odd case: weights that the graph writes stay out of pages, and are used in place.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import fx

from spcompile.costs import GATHERS, SegmentCost, largest, segment_costs, symbol_hints, total_size
from spcompile.errors import OptionError
from spcompile.graph import is_scalar, nbytes_of, tensors_of
from spcompile.ir import Page, Plan, Step, Weight
from spcompile.module_tree import readable_path
from spcompile.passes.base import IN_PLACE, LAYER, SEGMENT, Program, written_weights
from spcompile.passes.cut_finer import cut_finer
from spcompile.planner.choose import least_capacity_bytes
from spcompile.planner.make_plan import place_graph
from spcompile.text import format_bytes

logger = logging.getLogger(__name__)

MARGIN_FRACTION = 0.05
"""Part of the device's free memory that a plan leaves alone where nothing was asked for: fragmentation, workspaces."""

PARTS = (2, 3, 4, 6, 8, 12, 16, 32)
"""Parts of the largest page that are tried as the limit of a page, where whole layers do not fit."""

MERGED_COPIES = 4
"""Small pages are merged until their bytes take so many times as long as a copy takes beside its bytes..."""

MERGED_PARTS = 8
"""...but not beyond this part of the memory for weights, which would be too coarse to be divided."""

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
    graph = _schedule(program, runs)
    if not _has_room(program, graph):
        graph = _cut_to_fit(program, runs, graph)
    elif merge_bytes := _merge_limit_bytes(program, graph):
        graph = _schedule(program, runs, merge_bytes)
    program.plan = _place(program, graph)


def _has_room(program: Program, graph: Plan) -> bool:
    """Whether the memory that was asked for, or is free, is enough for the smallest plan."""
    capacity_bytes = _capacity_bytes(program, graph)
    return capacity_bytes is None or least_capacity_bytes(graph) <= capacity_bytes


def _capacity_bytes(program: Program, graph: Plan) -> int | None:
    """What weights may take of the device; None where k decides, or there is enough."""
    options = program.options
    if options.k is not None:
        return None
    if options.budget is not None:
        return options.budget - graph.beside_bytes()
    return None if program.free_bytes is None else free_capacity_bytes(program.free_bytes, graph)


def _merge_limit_bytes(program: Program, graph: Plan) -> int:
    """How large pages may become that are merged because a copy of them takes little more than any copy; 0 where pages
    are to stay as they are: with k they are what is counted, and where all fit nothing is copied."""
    capacity_bytes = _capacity_bytes(program, graph)
    if program.options.max_slowdown is not None:
        capacity_bytes = min(graph.weights_bytes, capacity_bytes or graph.weights_bytes)
    elif capacity_bytes is None or capacity_bytes >= graph.weights_bytes:
        return 0
    machine = program.machine
    worthwhile_bytes = int(MERGED_COPIES * machine.copy_us / 1e6 * machine.h2d_bytes_per_s)
    return min(worthwhile_bytes, capacity_bytes // MERGED_PARTS)


def _cut_to_fit(program: Program, runs: Sequence[_Run], whole: Plan) -> Plan:
    """The graph cut finer and finer, until the smallest plan fits; the graph in whole layers where it never does."""
    largest_bytes = max((page.nbytes for page in whole.pages), default=0)
    smallest, n_runs = whole, len(runs)
    for parts in PARTS:
        cut = _cut(program, runs, largest_bytes // parts)
        if len(cut) == n_runs:
            continue
        n_runs = len(cut)
        graph = _schedule(program, cut)
        if _has_room(program, graph):
            return graph
        smallest = min(smallest, graph, key=_least_bytes)
    if program.options.budget is not None:
        raise OptionError(_infeasible(smallest, program.options.budget))
    return _schedule(program, runs)


def _least_bytes(graph: Plan) -> int:
    return graph.beside_bytes() + least_capacity_bytes(graph)


def _cut(program: Program, runs: Sequence[_Run], limit_bytes: int) -> list[_Run]:
    """The runs, those of layers that read more weights than the limit in pieces."""
    written = written_weights(program)
    weight_of = {node: each.weight for node, each in program.weight_nodes().items() if each.weight not in written}
    cut: list[_Run] = []
    for run in runs:
        too_large = run.layer is not None and sum(weight.nbytes for weight in run.reads) > limit_bytes
        pieces = cut_finer(run.nodes, weight_of, limit_bytes) if too_large else [run.nodes]
        for number, nodes in enumerate(pieces):
            label = f"{run.label}:{number}" if len(pieces) > 1 else run.label
            read = {weight_of[source] for node in nodes for source in node.all_input_nodes if source in weight_of}
            reads = {weight: path for weight, path in run.reads.items() if weight in read}
            cut.append(_Run(label, run.layer, nodes, reads))
    return cut


def _schedule(program: Program, runs: Sequence[_Run], merge_bytes: int = 0) -> Plan:
    """The graph with pages, steps and what is known of their costs, not placed. Sets ``node.meta[SEGMENT]``.

    Layers' pages that come one behind the other are merged up to ``merge_bytes``.
    """
    gathered = [_gathered_bytes(program, run) for run in runs]
    pages, leftovers = _pages(program, runs, gathered)
    pages = _merged(program, runs, pages, merge_bytes)
    written = written_weights(program)
    page_of = {weight: index for index, page in enumerate(pages) for weight in page.weights if weight not in written}
    is_fused = program.options.compiler == "inductor"
    costs = segment_costs(program.graph, [run.nodes for run in runs], program.machine, is_fused)
    steps = []
    seen: dict[str, int] = {}
    for index, (run, cost, rows_bytes) in enumerate(zip(runs, costs, gathered, strict=True)):
        for node in run.nodes:
            node.meta[SEGMENT] = index
        count = seen[run.label] = seen.get(run.label, -1) + 1
        reads = dict.fromkeys(page_of[weight] for weight in run.reads if weight in page_of)
        name = f"{run.label}#{count}" if count else run.label
        gathers = tuple(_gathers(pages, tuple(reads), run.reads, rows_bytes))
        steps.append(Step(name, run.layer, tuple(reads), cost.compute_us, cost.activations_bytes, gathers))
    unplaced = Plan(program.device, 1, 1, program.wraps, pages, leftovers, (), tuple(steps), (), 1, ())
    return replace(unplaced, **_totals(program, costs))


def _totals(program: Program, costs: Sequence[SegmentCost]) -> dict[str, Any]:
    """What the plan says of memory beside that of its weights."""
    weights = program.weight_nodes()
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node not in weights]
    has_libraries = program.device != "cpu" and any(cost.uses_libraries for cost in costs)
    return {
        "machine": program.machine,
        "sizes": symbol_hints(program.graph),
        "inputs": total_size(inputs),
        "activations": largest(candidate for cost in costs for candidate in cost.activations),
        "workspace_bytes": program.machine.workspace_bytes if has_libraries else 0,
        "other_bytes": program.other_bytes,
    }


def _place(program: Program, graph: Plan) -> Plan:
    """Place as asked for: by k and m, by a budget, by a slowdown, or by the memory that is free."""
    options = program.options
    residents = tuple(index for index, page in enumerate(graph.pages) if page.name in program.known_residents)
    place = partial(place_graph, graph, residents=residents, elsewhere_pages=program.elsewhere_pages)
    if options.k is not None:
        return place(k=options.k, m=options.m)
    capacity_bytes = _capacity_bytes(program, graph)
    try:
        return place(capacity_bytes=capacity_bytes, max_slowdown=options.max_slowdown)
    except OptionError as error:
        if options.budget is not None or options.max_slowdown is not None:
            raise
        # It may well fit: what is predicted is rather too much than too little.
        logger.warning("%s; streaming everything", error)
        widest = max(len(step.reads) for step in graph.steps)
        return place(k=max(widest, min(2, len(graph.pages) - 1)), m=1)


def free_capacity_bytes(free_bytes: int, graph: Plan) -> int:
    """What weights may take of memory that is free. Inputs and whatever else there is are there already."""
    usable_bytes = int(free_bytes * (1 - MARGIN_FRACTION))
    return max(0, usable_bytes - graph.activations_bytes - graph.workspace_bytes)


def _infeasible(graph: Plan, budget_bytes: int) -> str:
    """Why a budget cannot be kept, which could be, and what it is spent on."""
    weights_bytes = least_capacity_bytes(graph)
    least_bytes = graph.beside_bytes() + weights_bytes
    message = (
        f"option 'budget' = {format_bytes(budget_bytes)} is too little: the smallest that can be kept is "
        f"{least_bytes:,} bytes ({format_bytes(least_bytes)}), of which {format_bytes(weights_bytes)} are for weights"
    )
    page = max(graph.pages, key=lambda page: page.nbytes, default=None)
    if page is not None:
        message += f" (the largest page is {page.name!r} with {format_bytes(page.nbytes)})"
    step = max(graph.steps, key=lambda step: step.activations_bytes, default=None)
    if step is not None and step.activations_bytes:
        message += f", and {format_bytes(step.activations_bytes)} for the values of segment {step.segment!r}"
    if graph.other_bytes:
        message += f", and {format_bytes(graph.other_bytes)} are held by other tensors of the process"
    return message


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


def _gathered_bytes(program: Program, run: _Run) -> dict[Weight, int]:
    """The weights of which a run only gathers rows, each with the bytes of those rows."""
    weights = program.weight_nodes()
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


def _gathers(
    pages: Sequence[Page], indices: Iterable[int], read: Container[Weight], rows_bytes: Mapping[Weight, int]
) -> Iterator[tuple[int, int]]:
    """Those of the pages of which a run reads nothing but rows, each with the bytes of those rows."""
    for index in indices:
        mine = [weight for weight in pages[index].weights if weight in read]
        if all(weight in rows_bytes for weight in mine):
            yield index, sum(rows_bytes[weight] for weight in mine)


def _pages(
    program: Program, runs: Sequence[_Run], gathered: Sequence[Mapping[Weight, int]]
) -> tuple[tuple[Page, ...], tuple[Weight, ...]]:
    readers: dict[Weight, dict[str, None]] = {}
    for run in runs:
        for weight in run.reads:
            readers.setdefault(weight, {})[run.label] = None
    written = written_weights(program)
    known = {weight.name: page for page in program.known_pages for weight in page.weights}
    layer_labels = {run.label for run in runs if run.layer is not None}
    # Tables outside the layers, of which only rows are read, are pages of their own: they may be read in place.
    tables = {weight for run, rows in zip(runs, gathered, strict=True) if run.layer is None for weight in rows}
    used: dict[Page, None] = {}
    groups: dict[tuple[tuple[str, ...], bool], list[Weight]] = {}
    for weight, labels in readers.items():
        if weight in written:
            continue
        if weight.name in known:
            used[known[weight.name]] = None
        else:
            groups.setdefault((tuple(labels), weight in tables), []).append(weight)
    taken = {page.name for page in program.known_pages}
    fresh = []
    for (group, _), members in groups.items():
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


def _merged(program: Program, runs: Sequence[_Run], pages: Sequence[Page], merge_bytes: int) -> tuple[Page, ...]:
    """The pages, small ones that are read one behind the other in one place, and by nobody else, in one."""
    places: dict[Weight, list[int]] = {}
    for place, run in enumerate(runs):
        for weight in run.reads if run.layer is not None else ():
            places.setdefault(weight, []).append(place)
    merged: list[list[Page]] = []
    before: int | None = None  # where the last page of the open group is read
    for page in pages:
        read_at = {place for weight in page.weights for place in places.get(weight, (-1, -2))}
        here = read_at.pop() if len(read_at) == 1 and page not in program.known_pages else None
        taken_bytes = sum(each.nbytes for each in merged[-1]) if merged else 0
        if here is not None and before == here - 1 and taken_bytes + page.nbytes <= merge_bytes:
            merged[-1].append(page)
        else:
            merged.append([page])
        before = here
    return tuple(_one_page(program, group) for group in merged)


def _one_page(program: Program, group: Sequence[Page]) -> Page:
    if len(group) == 1:
        return group[0]
    weights = [weight for page in group for weight in page.weights]
    return Page(f"{group[0].name}..{group[-1].name}", tuple(_in_model_order(program, weights)))


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
