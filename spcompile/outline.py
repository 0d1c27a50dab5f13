"""Identical layers go through AOTAutograd once: the rest of a graph is traced around them.

What: in Dynamo's graph the nodes of each layer that has an identical twin are replaced by one call (`outlined`);
AOTAutograd traces each distinct layer by itself and then the graph with the calls, in which `Outline.inline` puts the
traced layers back. Why here: AOTAutograd takes about a millisecond a node, twice, which for 32 layers is a third of the
first call; Dynamo has no choice but to follow Python through every layer, and later passes are cheap.

    before                                        after
    linear = linear(x, w0, b0)    # layers.0      outlined = outlined([x, w0, b0], 0, ...)
    relu = relu(linear)           # layers.0      relu = outlined[0]
    linear_1 = linear(relu, w1, b1)   # layers.1  outlined_1 = outlined([relu, w1, b1], 0, ...)
    relu_1 = relu(linear_1)       # layers.1      relu_1 = outlined_1[0]

The graph that comes out is the one that would have come anyway, node for node (the tests compare), or nothing is done:
layers are left in place where anything in them could look different from outside. That is where autograd is at work,
sizes are symbols, a layer writes into its inputs or returns views of them, or tensors reach it laid out otherwise than
Dynamo saw them (`LayoutError`, raised while the graph is traced, which is then done again without).
"""

from __future__ import annotations

import json
import logging
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from spcompile.graph import memory_roots, value_of, written_inputs
from spcompile.regions import Region, describe, find_regions, looks_of, make, region_key

logger = logging.getLogger(__name__)

TraceRegion = Callable[[fx.GraphModule, Sequence[Tensor]], fx.GraphModule]
"""Traces a torch-level graph with example inputs to an ATen graph."""

ORIGIN = "spcompile_origin"
"""Under this key of ``meta["custom"]``, which tracing hands on, a traced node names the place in its layer of the node
that it comes from."""

OF_THE_PLACE = ("nn_module_stack", "stack_trace", "custom")
"""What tracing notes of where in the program a node comes from."""

SOURCE = "_dynamo_source"
"""The attribute of a placeholder by which AOTAutograd knows where Dynamo has it from."""

_LIBRARY = torch.library.Library("spcompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "outlined(Tensor[] inputs, int layer, str takes, str returns) -> Tensor[]"
)


class LayoutError(Exception):
    """A tensor that is not laid out as Dynamo saw it reaches an outlined layer."""


@torch.library.register_fake("spcompile::outlined")  # type: ignore[untyped-decorator]
def _outlined(inputs: Sequence[Tensor], layer: int, takes: str, returns: str) -> list[Tensor]:
    """Stands for a layer while the graph around it is traced; ``takes`` and ``returns`` describe its tensors."""
    looks = describe(inputs)
    if looks != takes:
        raise LayoutError(f"outlined layer {layer} takes {takes}, not {looks}")
    return [make(*looks) for looks in json.loads(returns)]


@dataclass(frozen=True)
class _Traced:
    """A distinct layer as AOTAutograd has traced it."""

    graph: fx.Graph
    takes: str
    returns: str


class Outline:
    """What was outlined in one graph of Dynamo.

    Args:
        gm: that graph.
        regions: the layers to outline.
        layers: for each of them, its traced form.
    """

    def __init__(self, gm: fx.GraphModule, regions: Sequence[Region], layers: Sequence[_Traced]) -> None:
        self._gm = gm
        self._regions = regions
        self._layers = layers

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the graph of Dynamo calls `outlined` in the place of each region."""
        whole = self._gm.graph
        self._gm.graph = self._outlined_graph()
        try:
            yield
        finally:
            self._gm.graph = whole

    def _outlined_graph(self) -> fx.Graph:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        first = {region.nodes[0]: index for index, region in enumerate(self._regions)}
        inside = {node for region in self._regions for node in region.nodes}
        for node in self._gm.graph.nodes:
            if node in first:
                index = first[node]
                region, layer = self._regions[index], self._layers[index]
                inputs = [copies[each] for each in region.inputs]
                call = graph.call_function(
                    torch.ops.spcompile.outlined.default, (inputs, index, layer.takes, layer.returns)
                )
                for place, output in enumerate(region.outputs):
                    copies[output] = graph.call_function(operator.getitem, (call, place))
            elif node not in inside:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                if hasattr(node, SOURCE):
                    setattr(copies[node], SOURCE, getattr(node, SOURCE))
        return graph

    def inline(self, module: fx.GraphModule) -> None:
        """Put the layers back into the ATen graph that came of the outlined one."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        returned: dict[fx.Node, list[fx.Node]] = {}
        for node in module.graph.nodes:
            source = node.args[0] if node.target is operator.getitem else None
            if node.target is torch.ops.spcompile.outlined.default:
                inputs, index = node.args[:2]
                returned[node] = self._inline_layer(graph, index, [copies[each] for each in inputs])
            elif source in returned:
                output = copies[node] = returned[source][node.args[1]]
                output.meta["val"] = node.meta["val"]  # twins must not share the tensors that leave them
            else:
                copies[node] = _copy(graph, node, copies)
        module.graph = graph

    def _inline_layer(self, graph: fx.Graph, index: int, inputs: Sequence[fx.Node]) -> list[fx.Node]:
        """Append a layer to the graph; returns its outputs there."""
        origins, layer = self._regions[index].nodes, self._layers[index].graph
        copies = dict(zip(layer.find_nodes(op="placeholder"), inputs, strict=True))
        for node in (each for each in layer.nodes if each.op == "call_function"):
            copy = copies[node] = _copy(graph, node, copies)
            origin = origins[node.meta["custom"][ORIGIN]]
            for key in OF_THE_PLACE:
                copy.meta.pop(key, None)
                if origin.meta.get(key):
                    copy.meta[key] = origin.meta[key]
        return [copies[each] for each in _returned(layer)]


def _copy(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Append a copy of a node, under the next name of its kind where it computes."""
    if node.op != "call_function":
        return graph.node_copy(node, copies.__getitem__)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
    copy = graph.create_node(node.op, node.target, args, kwargs, name=re.sub(r"_\d+$", "", node.name))
    copy.meta = node.meta.copy()
    return copy


def outline_layers(
    gm: fx.GraphModule, layer_paths: frozenset[str], device: torch.device | None, trace: TraceRegion
) -> Outline | None:
    """Find layers that are identical, and trace each distinct one.

    Args:
        gm: Dynamo's graph, of which no gradient is wanted.
        layer_paths: where the module tree holds layers.
        device: of all tensors, where it is another than Dynamo saw (a re-homed model).
        trace: makes an ATen graph of a layer.

    Returns:
        None where there are none.
    """
    twins: dict[Hashable, list[Region]] = defaultdict(list)
    for region in find_regions(gm.graph, layer_paths):
        twins[region_key(region)].append(region)
    traced: dict[Region, _Traced] = {}
    for regions in twins.values():
        layer = _trace(gm, regions[0], device, trace) if len(regions) > 1 else None
        if layer is not None:
            traced.update(dict.fromkeys(regions, layer))
    if not traced:
        return None
    logger.debug("%d layers are traced as %d", len(traced), len({id(layer) for layer in traced.values()}))
    return Outline(gm, list(traced), list(traced.values()))


def _trace(gm: fx.GraphModule, region: Region, device: torch.device | None, trace: TraceRegion) -> _Traced | None:
    examples: list[FakeTensor] = [node.meta["example_value"] for node in region.inputs]
    looks = [looks_of(each) for each in examples]
    with examples[0].fake_mode:
        inputs = [make(*each[:-1], each[-1] if device is None else str(device)) for each in looks]
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # a layer may end in setting it
            graph = trace(fx.GraphModule(gm, _extract(region)), inputs).graph
    except Exception as error:  # noqa: BLE001  # whatever it is, it comes again where the whole graph is traced
        logger.debug("a layer cannot be traced by itself: %s", error)
        return None
    if not _only_computes(graph, len(region.outputs)):
        return None
    values = [value_of(node) for node in _returned(graph)]
    return _Traced(graph, describe(inputs), describe(values))  # type: ignore[arg-type]  # checked above


def _extract(region: Region) -> fx.Graph:
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"input_{index}") for index, node in enumerate(region.inputs)}
    for index, node in enumerate(region.nodes):
        copy = copies[node] = graph.node_copy(node, copies.__getitem__)
        copy.meta["custom"] = {**node.meta.get("custom", {}), ORIGIN: index}
    graph.output(tuple(copies[node] for node in region.outputs))
    return graph


def _only_computes(graph: fx.Graph, n_outputs: int) -> bool:
    """Whether a traced layer does nothing but compute fresh tensors: it neither writes into its inputs (AOTAutograd
    returns some of what is written, besides) nor returns views of them or of each other, and it keeps no constants."""
    if any(node.op not in ("placeholder", "call_function", "output") for node in graph.nodes):
        return False
    if any(ORIGIN not in node.meta.get("custom", {}) for node in graph.nodes if node.op == "call_function"):
        return False
    roots = memory_roots(graph.nodes)
    inputs = set(graph.find_nodes(op="placeholder"))
    written = {root for node in graph.nodes for each in written_inputs(node) for root in roots[each]}
    returned = _returned(graph)
    owners = [root for node in returned for root in roots[node]]
    return (
        len(returned) == n_outputs
        and all(isinstance(value_of(node), Tensor) for node in returned)
        and inputs.isdisjoint(written)
        and inputs.isdisjoint(owners)
        and len(set(owners)) == len(owners)
    )


def _returned(graph: fx.Graph) -> list[fx.Node]:
    returned: Any = graph.output_node().args[0]
    return [each for each in returned if isinstance(each, fx.Node)]
