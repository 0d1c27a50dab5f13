"""What the passes share: the program they hand on, and the names of what they note on nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import fx

from spcompile.dump import NOWHERE, Dump
from spcompile.graph import is_cast, is_view, memory_roots, written_inputs
from spcompile.ir import Machine, Page, Plan, Weight
from spcompile.options import Options
from spcompile.planner.machine import PROFILES

LAYER = "spcompile_layer"
"""``node.meta`` key: label of the node's layer, or None outside the layers. Set by ``find_layers``."""

SEGMENT = "spcompile_segment"
"""``node.meta`` key: index of the segment (= step) that the node goes into. Set by ``make_schedule``."""

IN_PLACE = "spcompile_in_place"
"""``node.meta`` key: true for a view of a weight that only the output sees. It stays in the outer graph, on the
placeholder, and costs nothing. Set by ``sink_weight_views``."""

STEP = "spcompile_step"
"""``node.meta`` key of a segment call in the outer graph: its step. Set by ``split_segments``."""

WEIGHT_INPUT = "weight"
"""Beginning of the names of a segment's inputs that are read through a page. Set by ``split_segments``."""


@dataclass(frozen=True)
class WeightInput:
    """What is known of a placeholder that carries a weight.

    Attributes:
        weight: the storage it looks at.
        path: where the module tree holds it, in Dynamo's spelling without brackets (``L['self'].layers.0.fc.weight``),
            or "" where it has no name.
    """

    weight: Weight
    path: str


@dataclass(eq=False)
class Program:
    """One captured graph on its way through the passes.

    Attributes:
        module: the ATen graph; after ``split_segments`` the outer graph that calls segments.
        weights: by name of the placeholder. Several placeholders may share one weight.
        model_order: place of each weight, by name, in the order of the model's parameters.
        options: what the user asked for.
        device: compute device as text.
        wraps: whether the end of an iteration may prefetch for the next one (not in training).
        machine: what the steps are timed on.
        free_bytes: device memory that may be taken for all of the graph where nothing else is asked for; None: enough.
        other_bytes: what the process holds on the device beside the model and the graph's inputs.
        elsewhere_pages: how many pages the parts of the model make, or will make, that this graph does not read.
        alike_bytes: of those, the weights of layers that are like the ones that it reads.
        kept_bytes: the weights of the others that are on the device.
        others_beside_bytes: most memory beside weights that graphs of other parts need.
        known_pages: pages that earlier graphs of the same model made; a weight never changes its page.
        known_leftovers: weights that earlier graphs of the same model left outside the pages.
        known_residents: names of pages that earlier graphs keep on the device.
        forward, backward: in training, the two graphs know each other: they are planned together, and everything about
            the plan is said of the forward one.
        gradients: which outputs of a backward graph are gradients of weights: index of the output, and of Dynamo's
            input that the gradient belongs to.
        written: weights that a graph updates, this one or one that is planned with it: they are read and written in
            place, never through a slot. Filled in by ``make_schedule``.
        plan: filled in by ``make_schedule``.
        paged: per placeholder that is read through a page, the page's index in the plan; filled in by
            ``split_segments``, because afterwards the graph no longer shows which weights its segments write.
        page_inputs: per streamed page, the placeholders that its load stands for, in the order of the tuple that it
            returns; filled in by ``insert_transfers``.
        sends: per step that sends gradients, which of Dynamo's inputs they belong to, in the order of the tuple that
            the send returns; filled in by ``insert_transfers``.
        name: of the model, for people.
        dump: where the graph leaves its texts, if anywhere.
    """

    module: fx.GraphModule
    weights: dict[str, WeightInput]
    options: Options
    device: str
    wraps: bool
    model_order: Mapping[str, int] = field(default_factory=dict)
    machine: Machine = PROFILES["h100"]
    free_bytes: int | None = None
    other_bytes: int = 0
    elsewhere_pages: int = 0
    alike_bytes: int = 0
    kept_bytes: int = 0
    others_beside_bytes: int = 0
    known_pages: tuple[Page, ...] = ()
    known_leftovers: frozenset[Weight] = frozenset()
    known_residents: frozenset[str] = frozenset()
    forward: Program | None = None
    backward: Program | None = None
    gradients: Mapping[int, int] = field(default_factory=dict)
    written: frozenset[Weight] = frozenset()
    plan: Plan | None = None
    paged: dict[str, int] = field(default_factory=dict)
    page_inputs: dict[int, tuple[str, ...]] = field(default_factory=dict)
    sends: dict[int, tuple[int, ...]] = field(default_factory=dict)
    name: str = "graph"
    dump: Dump = NOWHERE

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def weight_nodes(self) -> dict[fx.Node, WeightInput]:
        """The placeholders that carry weights, in order."""
        nodes = self.graph.find_nodes(op="placeholder")
        return {node: self.weights[node.name] for node in nodes if node.name in self.weights}

    @property
    def graphs(self) -> tuple[Program, ...]:
        """The graphs that are planned together, in the order in which they run: one, or forward and backward."""
        first = self.forward or self
        return (first,) if first.backward is None else (first, first.backward)

    @property
    def label(self) -> str:
        """Which graph of which model it is, for people."""
        if self.forward is not None:
            return f"{self.name}-backward"
        return f"{self.name}-{'inference' if self.backward is None else 'forward'}"

    def steps(self) -> range:
        """Which steps of the plan are this graph's."""
        return self.planned().graphs[0 if self.forward is None else 1]

    def planned(self) -> Plan:
        """The plan; only for passes after ``make_schedule``."""
        assert self.plan is not None, "make_schedule has not run"
        return self.plan


@dataclass(frozen=True)
class Pass:
    """One entry of the pipeline: the function that rewrites the program in place, and whether it takes the graphs that
    are planned together at once, as the first of them, or one by one."""

    run: Callable[[Program], None] = dataclasses.field(repr=False)
    together: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__


def written_weights(program: Program) -> Iterator[Weight]:
    """Weights that the graph updates, as it stands before it is split."""
    weights = program.weight_nodes()
    roots = memory_roots(program.graph.nodes)
    for node in program.graph.nodes:
        for root in {root for each in written_inputs(node) for root in roots[each]}:
            if root in weights:
                yield weights[root].weight


def paged_inputs(program: Program) -> dict[fx.Node, int]:
    """The placeholders that are read through a page, each with the page's index in the plan, in order."""
    page_of = {weight.name: index for index, page in enumerate(program.planned().pages) for weight in page.weights}
    return {
        node: page_of[each.weight.name]
        for node, each in program.weight_nodes().items()
        if each.weight.name in page_of and each.weight not in program.written
    }


def weight_views(program: Program) -> dict[fx.Node, None]:
    """The nodes that derive from one weight alone by views and casts, in order."""
    weights = program.weight_nodes()
    derived: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        if len(inputs) == 1 and (inputs[0] in weights or inputs[0] in derived) and (is_view(node) or is_cast(node)):
            derived[node] = None
    return derived
