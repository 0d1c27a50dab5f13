"""Which nodes run together, which weights move together, and when.

Why here: layers are labelled and nothing is cut. The pass reads the graph, decides segments and pages, asks the planner
(torch-free) for placement, slots and intervals, and notes the segment on every node.

    x = embedding(w_0, ids)     # outside      -> segment 0 "embed"      reads page "embed"
    y = mm(x, w_1)              # layers.0     -> segment 1 "layers.0"   reads page "layers.0"
    z = mm(y, w_0)              # outside      -> segment 2 "embed#1"    reads page "embed" (tied)

In training it takes the forward and the backward graph at once: one plan, with the steps of backward behind those of
forward. Unless everything stays on the device, gradients of weights leave for host memory behind the step that makes
them.

**Segments** are the runs of equal labels in program order (``runs.py``), **pages** the weights that move together
(``pages.py``). Neither depends on k and m: plans of one model share compiled segments and host memory. Only where a
budget, or the device, has no room for whole layers, or too little for copies to run ahead of compute, are they cut
finer (``cut_finer.py``), and with a budget small pages that come one behind the other are merged.

The odd case: weights that the graph writes stay out of pages, and are used in place.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import fx

from spcompile.costs import SegmentCost, largest, segment_costs, symbol_values, total_size
from spcompile.errors import OptionError
from spcompile.graph import nbytes_of, tensors_of
from spcompile.ir import Plan, Step
from spcompile.joint import join_graphs
from spcompile.passes.base import SEGMENT, Program, written_weights
from spcompile.passes.pages import gathers_of, make_pages, merge_pages
from spcompile.passes.runs import Run, cut_runs, find_runs, gathered_bytes
from spcompile.planner.choose import least_capacity_bytes
from spcompile.planner.make_plan import place_graph
from spcompile.planner.simulate import Simulation, simulate
from spcompile.text import format_bytes

logger = logging.getLogger(__name__)

MARGIN_FRACTION = 0.05
"""Part of the device's free memory that a plan leaves alone where nothing was asked for: fragmentation, workspaces."""

PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
"""Parts of the largest page that are tried as the limit of a page, where whole layers leave too little room. All of
it is less than a layer where an earlier graph of the model was cut."""

TRIED_CUTS = 4
"""Cuts that are placed, of those with room for the smallest plan: the first of them gain most."""

WORTHWHILE = 0.03
"""A finer cut has to save this part of the time."""

MERGED_COPIES = 4
"""Small pages are merged until their bytes take so many times as long as a copy takes beside its bytes..."""

MERGED_PARTS = 8
"""...but not beyond this part of the memory for weights, which would be too coarse to be divided."""


ROUNDING_BYTES = 2 << 20
"""What torch's CUDA allocator may add: a block is up to 1 MiB larger than was asked for, the arena's and that of the
largest value. (Without it a ViT-H was predicted 1 MiB below what an H100 counted, a Llama with three budgets within
0.1 %.)"""


def make_schedule(program: Program) -> None:
    """Cut the graph into runs, group weights into pages, and plan. Sets ``program.plan`` and ``node.meta[SEGMENT]``."""
    written = frozenset(weight for each in program.graphs for weight in written_weights(each))
    for each in program.graphs:
        each.written = written
    runs: Sequence[Run] = find_runs(program)
    all_stays = graph = _schedule(program, runs, sends=False)
    if program.backward is not None and not _keeps_all(program, graph):
        graph = _schedule(program, runs)
    try:
        runs, plan = _choose_cut(program, runs, _with_merged_pages(program, runs, graph))
    except OptionError:
        # Gradients that leave for host memory may take longer than a slowdown allows: then none does.
        if program.options.max_slowdown is None or graph is all_stays or not _has_room_for_all(program, all_stays):
            raise
        plan = place_graph(all_stays)
    for index, run in enumerate(runs):
        for node in run.nodes:
            node.meta[SEGMENT] = index
    for each in program.graphs:
        each.plan = plan


def _keeps_all(program: Program, graph: Plan) -> bool:
    """Whether all weights stay on the device; then so do their gradients, like those of any model."""
    options = program.options
    if options.k is not None:
        return options.k >= len(graph.pages) + program.elsewhere_pages
    return options.max_slowdown is None and _has_room_for_all(program, graph)


def _has_room_for_all(program: Program, graph: Plan) -> bool:
    """Whether the memory that was asked for, or is free, is enough for all weights at once, those of layers like the
    graph's included."""
    capacity_bytes = _capacity_bytes(program, graph)
    wanted_bytes = graph.weights_bytes + program.alike_bytes + _kept_bytes(program, graph)
    return capacity_bytes is None or capacity_bytes >= wanted_bytes


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


def _kept_bytes(program: Program, graph: Plan) -> int:
    """What is no room for this graph's residents: what others keep, and what they alone need beside weights."""
    return program.kept_bytes + max(0, program.others_beside_bytes - graph.beside_bytes())


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


def _with_merged_pages(program: Program, runs: Sequence[Run], graph: Plan) -> Plan:
    """The graph with small pages merged, where there is still room for it then."""
    if not _has_room(program, graph):
        return graph
    merge_bytes = _merge_limit_bytes(program, graph)
    if merge_pages(program, runs, graph.pages, merge_bytes) == graph.pages:
        return graph
    merged = _schedule(program, runs, merge_bytes)
    return merged if _has_room(program, merged) else graph


def _choose_cut(program: Program, runs: Sequence[Run], whole: Plan) -> tuple[Sequence[Run], Plan]:
    """How finely layers are cut, and the plan that this leads to.

    They stay whole where there is room for copies to run ahead. Otherwise they are cut finer: two slots for thirds of
    layers take a third of the memory. That costs compilation, and fusion across the cuts, so it has to be worthwhile.
    Where a slowdown is given they are only cut to fit at all, and in training, where the few percent that it saves take
    ten seconds to find.
    """
    if program.options.k is not None:
        return runs, _place(program, whole)
    is_only_to_fit = program.options.max_slowdown is not None or program.backward is not None
    best: tuple[Sequence[Run], Plan, Simulation] | None = None
    smallest, tries_left = whole, TRIED_CUTS
    for cut, graph in _cuts(program, runs, whole):
        if not _has_room(program, graph):
            smallest = min(smallest, graph, key=_least_bytes)
            continue
        plan = _place(program, graph)
        if is_only_to_fit:
            return cut, plan
        predicted = simulate(plan, program.machine)
        if best is None or predicted.iteration_us < (1 - WORTHWHILE) * best[2].iteration_us:
            best = cut, plan, predicted
        tries_left -= 1
        # Where compute or the link is busy all the time, copies that start earlier do not help.
        if not tries_left or best[2].iteration_us <= (1 + WORTHWHILE) * best[2].bound_us:
            break
    if best is not None:
        return best[:2]
    if program.options.budget is not None:
        raise OptionError(_infeasible(smallest, program.options.budget))
    return runs, _place(program, whole)


def _cuts(program: Program, runs: Sequence[Run], whole: Plan) -> Iterator[tuple[Sequence[Run], Plan]]:
    """The graph in whole layers, and cut finer and finer."""
    yield runs, whole
    largest_bytes = max((page.nbytes for page in whole.pages), default=0)
    n_runs = len(runs)
    for parts in PARTS:
        cut = cut_runs(runs, largest_bytes // parts)
        if len(cut) > n_runs:
            n_runs = len(cut)
            yield cut, _schedule(program, cut)


def _least_bytes(graph: Plan) -> int:
    return graph.beside_bytes() + least_capacity_bytes(graph)


def _schedule(program: Program, runs: Sequence[Run], merge_bytes: int = 0, *, sends: bool = True) -> Plan:
    """The graph with pages, steps and what is known of their costs, not placed.

    Args:
        merge_bytes: layers' pages that come one behind the other are merged up to this.
        sends: whether gradients of weights leave for host memory as they are made.
    """
    gathered = [gathered_bytes(run) for run in runs]
    pages, leftovers = make_pages(program, runs, gathered)
    pages = merge_pages(program, runs, pages, merge_bytes)
    page_of = {
        weight: index for index, page in enumerate(pages) for weight in page.weights if weight not in program.written
    }
    sent = [_gradients_made(run) if sends else () for run in runs]
    steps = []
    seen: dict[str, int] = {}
    costs = _costs(program, runs, sent)
    for run, cost, rows_bytes, made in zip(runs, costs, gathered, sent, strict=True):
        label = f"{run.label}.backward" if run.is_backward else run.label
        count = seen[label] = seen.get(label, -1) + 1
        reads = dict.fromkeys(page_of[weight] for weight in run.reads if weight in page_of)
        name = f"{label}#{count}" if count else label
        gathers = tuple(gathers_of(pages, tuple(reads), run.reads, rows_bytes))
        sent_bytes = sum(nbytes_of(tensor) for node in made for tensor in tensors_of(node))
        times_and_bytes = cost.compute_us, cost.activations_bytes, gathers, sent_bytes
        steps.append(Step(name, run.layer, tuple(reads), *times_and_bytes))
    unplaced = Plan(program.device, 1, 1, program.wraps, pages, leftovers, (), tuple(steps), (), 1, ())
    return replace(unplaced, **_totals(program, costs), backward_step=_backward_step(runs))


def _backward_step(runs: Sequence[Run]) -> int | None:
    n_forward = sum(not run.is_backward for run in runs)
    return None if runs and runs[0].program.backward is None else n_forward


def _gradients_made(run: Run) -> tuple[fx.Node, ...]:
    """The gradients of weights that a run of a backward graph makes; twice where two weights share one."""
    outputs = run.program.graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    inside = set(run.nodes)
    made = (outputs[index] for index in run.program.gradients)
    return tuple(node for node in made if isinstance(node, fx.Node) and node in inside)


def _costs(program: Program, runs: Sequence[Run], sent: Sequence[Sequence[fx.Node]]) -> list[SegmentCost]:
    graph, nodes = program.graph, [run.nodes for run in runs]
    if program.backward is not None:
        graph, copies = join_graphs(program.graph, program.backward.graph)
        nodes, sent = ([[copies[node] for node in group] for group in groups] for groups in (nodes, sent))
    return segment_costs(graph, nodes, program.machine, program.options.compiler == "inductor", sent)


def _totals(program: Program, costs: Sequence[SegmentCost]) -> dict[str, Any]:
    """What the plan says of memory beside that of its weights."""
    weights = program.weight_nodes()
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node not in weights]
    if program.backward is not None:  # what comes from outside: the gradients of what forward returned
        saved = {node.name for node in program.graph.nodes}
        inputs += [node for node in program.backward.graph.find_nodes(op="placeholder") if node.name not in saved]
    # A library has a workspace for each thread that calls it, and backward runs in a thread of its own.
    n_workspaces = len(program.graphs) if program.device != "cpu" and any(cost.uses_libraries for cost in costs) else 0
    rounding_bytes = ROUNDING_BYTES if program.device != "cpu" else 0
    return {
        "machine": program.machine,
        "sizes": symbol_values(program.graph),
        "inputs": total_size(inputs),
        "activations": largest(candidate for cost in costs for candidate in cost.activations),
        "workspace_bytes": program.machine.workspace_bytes * n_workspaces + rounding_bytes,
        "other_bytes": program.other_bytes,
        "budget_bytes": program.options.budget,
    }


def _place(program: Program, graph: Plan) -> Plan:
    """Place as asked for: by k and m, by a budget, by a slowdown, or by the memory that is free."""
    options = program.options
    residents = tuple(index for index, page in enumerate(graph.pages) if page.name in program.known_residents)
    place = partial(
        place_graph,
        graph,
        residents=residents,
        elsewhere_pages=program.elsewhere_pages,
        alike_bytes=program.alike_bytes,
        kept_bytes=_kept_bytes(program, graph),
    )
    if options.k is not None:
        _check_pages_of_parts(program, graph, options.k)
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


def _check_pages_of_parts(program: Program, graph: Plan, k: int) -> None:
    """Refuse a k that is too little only because an earlier graph made smaller pages: of a part that was compiled by
    itself, with layers of its own, or of layers that a budget had cut. Pages that the same layers read are such."""
    readers: dict[int, set[str]] = {}
    for step in graph.steps:
        for page in step.reads:
            readers.setdefault(page, set()).add(step.layer or step.segment)
    for step in graph.steps:
        known = [page for page in step.reads if graph.pages[page] in program.known_pages]
        alone = {frozenset(readers[page]) for page in step.reads}
        if len(alone) <= k < len(step.reads) and len(known) > 1:
            one, other = (graph.pages[page].name for page in known[:2])
            raise OptionError(
                f"option 'k' must be at least {len(step.reads)} for this model, not {k}: its weights keep the pages of "
                f"a graph that was compiled before ({one!r}, {other!r}), and segment {step.segment!r} reads "
                f"{len(step.reads)} of them at once. To have other pages made, call spcompile.restore, "
                "spcompile.offload and torch._dynamo.reset, and compile the whole model first"
            )


def place_uncut(program: Program, graph: Plan) -> Plan:
    """Place a graph of which only pages and steps are known, so that it cannot be cut finer, as the options ask.

    Raises:
        OptionError: the plan that was asked for is impossible.
    """
    if program.options.budget is not None and not _has_room(program, graph):
        raise OptionError(_infeasible(graph, program.options.budget))
    return _place(program, graph)


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
        message += f", {format_bytes(step.activations_bytes)} for the values of segment {step.segment!r}"
    if graph.workspace_bytes:
        message += f", {format_bytes(graph.workspace_bytes)} for the workspaces of libraries"
    if graph.other_bytes:
        message += f", {format_bytes(graph.other_bytes)} are held by other tensors of the process"
    return message
