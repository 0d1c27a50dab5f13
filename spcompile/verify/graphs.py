"""Check a graph against the rules that make it right, by replaying it; no code is shared with the passes.

After every pass the graph must lint, and no node may read an input behind the node that updates it. Once the graph
calls segments and has transfer nodes, it is replayed node by node - cold, then warm for a whole period of phases, and
cold in each phase, as after another graph used the arena - against an account of who owns which bytes of it:

* a segment reads the pages that the plan says, through loads that have happened and whose evicts have not;
* a copy never lands on a page that is in use, nor on one that is still to be used;
* whatever is loaded was prefetched and is evicted, each once; nothing is left in use at the end, and what the plan
  starts for the next iteration is on its way;
* no more than k pages hold slots;
* gradients are sent behind the step that makes them, and the graph returns what was sent, once it has arrived;
* nothing that leaves a segment shares memory with a slot, and no segment writes into one.

All violations are returned, each with the line of the guilty node in `format_graph`'s text.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import fx

from spcompile import ops
from spcompile.graph_text import format_graph
from spcompile.ir import Plan, Slot
from spcompile.verify.violations import Violation, raise_if_any

STEP = "spcompile_step"
"""``node.meta`` key that says which step the argument list of a segment call belongs to. The same as in passes.base,
of which nothing is imported here."""


def verify_graph(
    module: fx.GraphModule,
    plan: Plan | None,
    weights: Mapping[str, str],
    *,
    steps: range | None = None,
    final: bool = False,
) -> list[Violation]:
    """All violations of the graph, in the order of its lines.

    Args:
        module: the graph as a pass left it.
        plan: the plan, once there is one.
        weights: name of the weight behind each placeholder that carries one.
        steps: which steps of the plan are this graph's; None: all.
        final: whether all passes have run: the transfers must be there.
    """
    lines = {node: index for index, node in enumerate(module.graph.nodes)}
    found = _lint(lines) + _reads_behind_writes(module.graph, lines)
    if plan is not None and (final or any(ops.is_op(node, op) for node in lines for op in ops.TRANSFERS)):
        written = _written_arguments(module)  # a weight that the graph updates is used in place, page or not
        weights = {name: weight for name, weight in weights.items() if name not in written}
        own_steps = range(len(plan.steps)) if steps is None else steps
        found += _reads_in_place(module.graph, plan, weights, lines)
        found += _wrong_pages(module.graph, plan, own_steps, lines)
        found += _slot_memory_escapes(module, plan, weights, lines)
        found += _wrong_sends(module.graph, plan, own_steps, lines)
        found += _Replay(module.graph, plan, own_steps, lines).run()
    return sorted(set(found), key=lambda each: (each.line, each.message))


def check_graph(
    module: fx.GraphModule,
    plan: Plan | None,
    weights: Mapping[str, str],
    *,
    steps: range | None = None,
    after: str,
    final: bool,
) -> None:
    """Raise with the printed graph and a mark under each guilty line.

    Raises:
        VerificationError: there are violations.
    """
    violations = verify_graph(module, plan, weights, steps=steps, final=final)
    if violations:  # printing a large graph takes as long as checking it
        raise_if_any(f"the graph after {after}", format_graph(module.graph), violations)


def _lint(lines: Mapping[fx.Node, int]) -> list[Violation]:
    seen: set[fx.Node] = set()
    found = []
    for node, line in lines.items():
        for source in node.all_input_nodes:
            if source not in lines:
                found.append(Violation(line, f"{source.name} is not part of the graph"))
            elif source not in seen:
                found.append(Violation(line, f"{source.name} is read before it is computed"))
        seen.add(node)
    return found


def _reads_behind_writes(graph: fx.Graph, lines: Mapping[fx.Node, int]) -> list[Violation]:
    """AOTAutograd's graphs are functional: whoever reads an input wants its old value, so its update comes last."""
    if not any(_destinations(node) for node in lines):
        return []
    roots = _owners_of_memory(graph.nodes)
    updated: dict[fx.Node, fx.Node] = {}
    found = []
    for node, line in lines.items():
        if node.op == "output":  # AOTAutograd may return an updated input
            continue
        destinations = _destinations(node)
        for source in node.all_input_nodes:
            if source in destinations:  # a second update, not a read
                continue
            found += [
                Violation(line, f"reads {root.name} after {updated[root].name} has updated it")
                for root in roots[source]
                if root in updated and root.op == "placeholder"
            ]
        for destination in destinations:
            updated.update((root, node) for root in roots[destination])
    return found


def _reads_in_place(
    graph: fx.Graph, plan: Plan, weights: Mapping[str, str], lines: Mapping[fx.Node, int]
) -> list[Violation]:
    """A segment that reads a streamed page's weight through the graph's argument reads it over the link: only the plan
    may want that, where rows are gathered."""
    page_of = {weight.name: page.name for page in plan.pages for weight in page.weights}
    streamed = {plan.pages[interval.page].name for interval in plan.intervals}
    return [
        Violation(
            lines[node],
            f"reads {weights[source.name]} in place, although page {page_of[weights[source.name]]} is streamed",
        )
        for node in graph.nodes
        if ops.is_op(node, ops.pack)
        for source in node.all_input_nodes
        if source.name in weights and page_of.get(weights[source.name]) in streamed - _mapped(plan, node.meta.get(STEP))
    ]


def _mapped(plan: Plan, step: object) -> set[str]:
    """Names of the pages that a step reads in place."""
    if not isinstance(step, int) or not 0 <= step < len(plan.steps):
        return set()
    return {plan.pages[page].name for page, _ in plan.steps[step].gathers if page in plan.mapped}


def _written_arguments(module: fx.GraphModule) -> set[str]:
    """The arguments of the graph that a segment writes into. What it is handed directly comes before the loads."""
    written: set[str] = set()
    for call in module.graph.find_nodes(op="call_module"):
        segment = getattr(module, str(call.target))
        pack = call.args[0]
        if not isinstance(segment, fx.GraphModule) or not isinstance(pack, fx.Node):
            continue
        roots = _owners_of_memory(segment.graph.nodes)
        targets = {root for node in segment.graph.nodes for each in _destinations(node) for root in roots[each]}
        direct = itertools.takewhile(lambda value: not _is_load(value), pack.args)
        handed_over = zip(direct, segment.graph.find_nodes(op="placeholder"), strict=False)
        written |= {str(value) for value, inside in handed_over if inside in targets}
    return written


def _wrong_pages(graph: fx.Graph, plan: Plan, steps: range, lines: Mapping[fx.Node, int]) -> list[Violation]:
    """Each step is handed the loads of the pages that it reads, in their order; several calls may share them."""
    packs: dict[object, list[fx.Node]] = {}
    for node in graph.nodes:
        if ops.is_op(node, ops.pack):
            packs.setdefault(node.meta.get(STEP), []).append(node)
    streamed = {interval.page for interval in plan.intervals}
    found = []
    for index in steps:
        in_place = _mapped(plan, index)
        expected = [
            page for page in plan.steps[index].reads if page in streamed and plan.pages[page].name not in in_place
        ]
        handed = [_pages_loaded(pack, plan) for pack in packs.get(index, ())]
        all_handed = handed[0] if len(handed) == 1 else sorted({page for pages in handed for page in pages})
        if all_handed != (expected if len(handed) == 1 else sorted(expected)):
            line = lines[packs[index][0]] if index in packs else len(lines)
            message = f"step {index} reads {_names(plan, expected)}, not {_names(plan, all_handed)}"
            found.append(Violation(line, message))
    return found


def _wrong_sends(graph: fx.Graph, plan: Plan, steps: range, lines: Mapping[fx.Node, int]) -> list[Violation]:
    """A send takes what the calls of its step have returned, all that the plan says, before the next step begins."""
    made_at: dict[fx.Node, object] = {}  # what each call, and each of its results, was made by
    now: object = None
    sent: dict[object, fx.Node] = {}
    awaited = True
    found = []
    for node, line in lines.items():
        if ops.is_op(node, ops.pack):
            now = node.meta.get(STEP)
        elif node.op == "call_module":
            made_at[node] = now
        elif node.target is operator.getitem and node.all_input_nodes[0] in made_at:
            made_at[node] = made_at[node.all_input_nodes[0]]
        elif ops.is_op(node, ops.finish):
            awaited = True
        elif ops.is_op(node, ops.send):
            awaited = False
            step = node.args[1]
            if step in sent:
                found.append(Violation(line, f"step {step} has sent its gradients already"))
            if step != now:
                found.append(Violation(line, f"sends gradients of step {step} behind step {now}"))
            found += [
                Violation(line, f"sends {source.name}, which step {step} has not made")
                for source in node.all_input_nodes
                if source.op != "get_attr" and made_at.get(source) != step
            ]
            sent[step] = node
    output = graph.output_node()
    wanted = {step for step in steps if plan.steps[step].gradients_bytes}
    end = lines[output]
    found += [Violation(end, f"the gradients of step {step} are never sent") for step in sorted(wanted - set(sent))]
    found += [
        Violation(lines[node], f"the plan sends no gradients of step {step}")
        for step, node in sent.items()
        if step not in wanted
    ]
    if not awaited:
        found.append(Violation(end, "returns gradients that nothing has awaited"))
    gone = {source for node in sent.values() for source in node.all_input_nodes}
    found += [
        Violation(end, f"returns {source.name} from the device, although it was sent")
        for source in output.all_input_nodes
        if source in gone
    ]
    return found


def _is_read(plan: Plan, interval: int, steps: range) -> bool:
    """Whether a step reads the interval's page during its stay."""
    each = plan.intervals[interval]
    stay = range(max(each.start_step, steps.start), min(each.end_step, steps.stop))
    return any(
        each.page in plan.steps[step].reads and plan.pages[each.page].name not in _mapped(plan, step) for step in stay
    )


def _pages_loaded(pack: fx.Node, plan: Plan) -> list[int]:
    intervals = [value.args[1] for value in pack.args if isinstance(value, fx.Node) and _is_load(value)]
    return [plan.intervals[each].page for each in intervals if _is_interval(each, plan)]


def _is_interval(value: object, plan: Plan) -> TypeGuard[int]:
    return isinstance(value, int) and 0 <= value < len(plan.intervals)


def _names(plan: Plan, pages: Iterable[int]) -> str:
    return ", ".join(plan.pages[page].name for page in pages) or "no streamed page"


def _slot_memory_escapes(
    module: fx.GraphModule, plan: Plan, weights: Mapping[str, str], lines: Mapping[fx.Node, int]
) -> list[Violation]:
    """Look into the segments that are not compiled yet: what may alias a slot, and what writes into one."""
    found = []
    widths = _widths_of_loads(module.graph, plan, weights)
    for call in module.graph.find_nodes(op="call_module"):
        segment = getattr(module, str(call.target))
        pack = call.args[0]
        if not isinstance(segment, fx.GraphModule) or not isinstance(pack, fx.Node):
            continue
        taken = segment.graph.find_nodes(op="placeholder")
        in_slot = [each for value in pack.args for each in _handed_over(value, widths)]
        if len(in_slot) != len(taken):
            found.append(Violation(lines[call], f"gets {len(in_slot)} values, but takes {len(taken)}"))
        inside = {node for node, slot in zip(taken, in_slot, strict=False) if slot}
        roots = _owners_of_memory(segment.graph.nodes)
        found += [
            Violation(lines[call], f"{output.name} leaves the segment and shares memory with a slot")
            for output in segment.graph.output_node().all_input_nodes
            if roots[output] & inside
        ]
        found += [
            Violation(lines[call], f"{node.name} inside the segment writes into a slot")
            for node in segment.graph.nodes
            if any(roots[destination] & inside for destination in _destinations(node))
        ]
        found += _reads_behind_writes(segment.graph, dict.fromkeys(segment.graph.nodes, lines[call]))
    return found


def _widths_of_loads(graph: fx.Graph, plan: Plan, weights: Mapping[str, str]) -> dict[fx.Node, int]:
    """How many tensors each load returns: one for each argument of the graph that looks at its page."""
    page_of = {weight.name: index for index, page in enumerate(plan.pages) for weight in page.weights}
    counts: dict[int | None, int] = {}
    for begin in graph.find_nodes(op="call_function", target=ops.begin):
        for source in begin.all_input_nodes:
            page = page_of.get(weights.get(source.name, ""))
            counts[page] = counts.get(page, 0) + 1
    return {
        load: counts.get(plan.intervals[load.args[1]].page, 0)
        for load in graph.find_nodes(op="call_function", target=ops.load)
        if _is_interval(load.args[1], plan)
    }


def _handed_over(value: object, widths: Mapping[fx.Node, int]) -> list[bool]:
    """For each value that an argument of ``pack`` becomes, whether it lies in a slot."""
    if isinstance(value, fx.Node) and _is_load(value):
        return [True] * widths.get(value, 0)
    return [False]


def _is_load(value: object) -> bool:
    return isinstance(value, fx.Node) and ops.is_op(value, ops.load)


@dataclass
class _Owner:
    """Who owns a place of the arena in the replay: an interval of one iteration."""

    iteration: int
    interval: int
    slot: Slot
    in_use: bool = False


@dataclass
class _Replay:
    """Runs the transfer nodes over several iterations and keeps the account.

    A forward graph leaves pages on the device for its backward graph, which is also replayed as if it had not.
    """

    graph: fx.Graph
    plan: Plan
    steps: range
    lines: Mapping[fx.Node, int]
    owners: list[_Owner] = field(default_factory=list)
    loaded: set[int] = field(default_factory=set)
    found: list[Violation] = field(default_factory=list)

    def run(self) -> list[Violation]:
        for phase in range(self.plan.period):  # cold, in every phase
            self.owners = []
            self._iteration(0, phase)
        self.owners = []
        for iteration in range(self.plan.period + 1):  # warm
            phase = iteration % self.plan.period
            if self.steps.start:
                self.owners += self._left_by_forward(iteration, phase)
            self._iteration(iteration, phase)
        return self.found

    def _left_by_forward(self, iteration: int, phase: int) -> list[_Owner]:
        before, own = range(self.steps.start), self.steps
        return [
            _Owner(iteration, index, self.plan.slots[each.slots[phase % len(each.slots)]], self._reads(index, before))
            for index, each in enumerate(self.plan.intervals)
            if each.start_step < own.start < each.end_step and self._reads(index, own)
        ]

    def _reads(self, interval: int, steps: range) -> bool:
        return _is_read(self.plan, interval, steps)

    def _stays(self, interval: int) -> bool:
        """Whether the page is left on the device for the graph behind this one."""
        return self._reads(interval, range(self.steps.stop, len(self.plan.steps)))

    def _iteration(self, iteration: int, phase: int) -> None:
        self.loaded = set()
        begun = False
        for node in self.graph.nodes:
            if ops.is_op(node, ops.begin):
                if begun:
                    self._report(node, "the iteration has begun already: its phase would advance twice")
                begun = True
            if node.op == "output":
                self._end(node, iteration)
            elif ops.is_op(node, ops.pack):
                self._read(node, node, iteration)
            elif node.op == "call_module":
                for pack in node.all_input_nodes:
                    self._read(node, pack, iteration)
            elif any(_is_load(source) for source in node.all_input_nodes):
                self._report(node, "reads a loaded page outside a segment: nothing would keep its slot")
            if node.op != "call_function" or node.target not in ops.TRANSFERS or node.target is ops.begin:
                continue
            if not begun:
                self._report(node, "comes before the iteration begins")
            if node.target in (ops.prefetch, ops.load, ops.evict):
                self._transfer(node, iteration, phase)

    def _transfer(self, node: fx.Node, iteration: int, phase: int) -> None:
        interval = node.args[1]
        if not _is_interval(interval, self.plan):
            self._report(node, f"names interval {interval}, which the plan does not have")
            return
        if node.args[2] != self._name(interval):
            self._report(node, f"interval {interval} is of {self._name(interval)}, not of {node.args[2]}")
        if node.target is ops.prefetch:
            ahead = node.kwargs.get("ahead", 0)
            self._prefetch(node, iteration + int(ahead == 1), interval, phase + int(ahead == 1))
        elif node.target is ops.load:
            self._load(node, iteration, interval)
        else:
            self._evict(node, iteration, interval)

    def _prefetch(self, node: fx.Node, iteration: int, interval: int, phase: int) -> None:
        slots = self.plan.intervals[interval].slots
        slot = self.plan.slots[slots[phase % len(slots)]]
        for owner in list(self.owners):
            if (owner.iteration, owner.interval) == (iteration, interval):
                if owner.slot != slot or interval in self.loaded:
                    self._report(node, f"{self._name(interval)} has another slot already, or is in use")
                return
            if _overlap(owner.slot, slot):
                state = "in use" if owner.in_use else "still to be used"
                self._report(node, f"copies over {self._name(owner.interval)}, which is {state}")
                self.owners.remove(owner)
        self.owners.append(_Owner(iteration, interval, slot))
        if len(self.owners) > self.plan.k:
            names = ", ".join(self._name(owner.interval) for owner in self.owners)
            self._report(node, f"{len(self.owners)} pages hold slots, more than k = {self.plan.k}: {names}")

    def _load(self, node: fx.Node, iteration: int, interval: int) -> None:
        owner = self._owner(iteration, interval)
        if interval in self.loaded:
            self._report(node, f"{self._name(interval)} is loaded twice")
        elif owner is None:
            self._report(node, f"no prefetch of {self._name(interval)} before its load")
        else:
            owner.in_use = True
        self.loaded.add(interval)

    def _evict(self, node: fx.Node, iteration: int, interval: int) -> None:
        owner = self._owner(iteration, interval)
        if owner is None or not owner.in_use:
            self._report(node, f"{self._name(interval)} is evicted, but is not loaded")
        if owner is not None:
            self.owners.remove(owner)

    def _read(self, reader: fx.Node, pack: fx.Node, iteration: int) -> None:
        """The call reads what ``pack`` took from the loads: both must happen during the stay."""
        for value in pack.args:
            if not isinstance(value, fx.Node) or not ops.is_op(value, ops.load):
                continue
            interval = value.args[1]
            owner = self._owner(iteration, interval) if isinstance(interval, int) else None
            if owner is None or not owner.in_use:
                self._report(reader, f"reads {value.name} outside its stay on the device")

    def _end(self, output: fx.Node, iteration: int) -> None:
        for interval, each in enumerate(self.plan.intervals):
            is_whole = len(self.steps) == len(self.plan.steps)
            if interval not in self.loaded and (is_whole or self._reads(interval, self.steps)):
                self._report(output, f"{self._name(interval)} is never loaded")
            stays = each.start_step < self.steps.stop and self._stays(interval)
            if stays and self._owner(iteration, interval) is None:
                self._report(output, f"{self._name(interval)} is not left on the device for backward")
        for owner in self.owners:
            if self._stays(owner.interval):
                continue
            if owner.in_use:
                self._report(output, f"{self._name(owner.interval)} is never evicted")
            elif owner.iteration == iteration:
                self._report(output, f"the copy of {self._name(owner.interval)} is never awaited")
        for interval, each in enumerate(self.plan.intervals):
            if self.plan.wraps and each.start_step <= 0 and self._owner(iteration + 1, interval) is None:
                self._report(output, f"the copy of {self._name(interval)} for the next iteration is not on its way")
        self.owners = [owner for owner in self.owners if owner.iteration > iteration and not owner.in_use]

    def _owner(self, iteration: int, interval: int) -> _Owner | None:
        matching = (each for each in self.owners if (each.iteration, each.interval) == (iteration, interval))
        return next(matching, None)

    def _name(self, interval: int) -> str:
        return self.plan.pages[self.plan.intervals[interval].page].name

    def _report(self, node: fx.Node, message: str) -> None:
        self.found.append(Violation(self.lines[node], message))


def _overlap(one: Slot, other: Slot) -> bool:
    return one.offset_bytes < other.offset_bytes + other.nbytes and other.offset_bytes < one.offset_bytes + one.nbytes


def _owners_of_memory(nodes: Iterable[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """For each node, the nodes whose memory its value may lie in, told by the annotations of the operators' schemas."""
    owners: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        shared = _annotated(node, lambda _: True)
        if node.target is operator.getitem:  # an item of a list of views, or of the results of a segment
            shared = [source for source in node.all_input_nodes if _annotated(source, lambda _: True)]
        owners[node] = set().union(*(owners.get(source, {source}) for source in shared)) or {node}
    return owners


def _destinations(node: fx.Node) -> list[fx.Node]:
    """The inputs that the node writes into."""
    return _annotated(node, lambda info: info.is_write)


def _annotated(node: fx.Node, wanted: Callable[[Any], bool]) -> list[fx.Node]:
    """Inputs whose schema argument carries an alias annotation of the wanted kind."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    bound = dict(zip((each.name for each in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    found: list[fx.Node] = []
    for argument in node.target._schema.arguments:
        if argument.alias_info is not None and wanted(argument.alias_info):
            fx.map_arg(bound.get(argument.name), found.append)
    return found
