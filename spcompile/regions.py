"""The layers of Dynamo's graph that can be taken out of it, and which of them are the same.

What: `find_regions` gives the layers whose nodes lie together, exchange nothing but plain tensors with the rest, and
are traced alike wherever they stand; `region_key` is equal for those that compute the same. Why apart: `outline.py`
takes them out, and need not know what to look for.

The odd cases: a region of autocast that is open around a layer changes what the layer becomes, and any call without a
result may. A layer that runs twice has two stretches, and stays.
"""

from __future__ import annotations

import itertools
import json
import operator
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from spcompile.module_tree import layer_of
from spcompile.passes.find_layers import module_path

ENTER, EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast

WITHOUT_VALUE = frozenset((ENTER, EXIT, operator.setitem, torch._C._log_api_usage_once, torch._C._set_grad_enabled))
"""Calls that compute nothing and yet may stand in a graph that is outlined: behind an open region of autocast no layer
is, and where gradients are wanted none at all. Behind any other such call none is either."""


@dataclass(frozen=True)
class Region:
    """The nodes of one layer in Dynamo's graph, which lie together.

    Attributes:
        nodes: in their order.
        inputs: what they read from outside, in the order in which they first do.
        outputs: those that are read outside.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


Looks = tuple[Sequence[int], Sequence[int], int, str, str]
"""Shape, strides and storage offset, dtype and device of a tensor."""


def looks_of(tensor: Tensor) -> Looks:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return tensor.shape, tensor.stride(), int(tensor.storage_offset()), dtype, str(tensor.device)


def make(shape: Sequence[int], stride: Sequence[int], offset: int, dtype: str, device: str) -> Tensor:
    """A tensor that looks so; the arguments are those of `Looks`."""
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True) if size)
    memory = torch.empty(last + 1, dtype=getattr(torch, dtype), device=device)
    return memory.as_strided(shape, stride, offset)


def describe(tensors: Sequence[Tensor]) -> str:
    """The looks of some tensors, as text that `json` reads."""
    return json.dumps([looks_of(each) for each in tensors])


def find_regions(graph: fx.Graph, layer_paths: frozenset[str]) -> Iterator[Region]:
    """The layers that can be taken out of a graph of Dynamo, in order. ``layer_paths``: see `module_tree`."""
    stretches: dict[str, list[Region | None]] = defaultdict(list)
    entered: set[fx.Node] = set()

    labels = _labels(graph, layer_paths)
    for label, nodes in itertools.groupby(labels, labels.__getitem__):
        stretch = list(nodes)
        if label is not None:
            stretches[label].append(None if entered else _region(stretch))
        if not _keeps_state(stretch, entered):
            break
    for found in stretches.values():
        if len(found) == 1 and found[0] is not None:
            yield found[0]


def _labels(graph: fx.Graph, layer_paths: frozenset[str]) -> dict[fx.Node, str | None]:
    """The layer of each node that is no placeholder. Calls that Dynamo notes no module of (the begin of a region of
    autocast) belong to what lies on both sides of them."""
    labels: dict[fx.Node, str | None] = {}
    label: str | None = None
    unknown: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        path = module_path(node)
        labels[node] = None if path is None else layer_of(path, layer_paths)
        if node.target is EXIT:
            labels[node] = labels.get(node.all_input_nodes[0])
            continue
        if path is None:
            unknown.append(node)
            continue
        if labels[node] == label:
            labels.update(dict.fromkeys(unknown, label))
        label = labels[node]
        unknown.clear()
    return labels


def _keeps_state(nodes: Sequence[fx.Node], entered: set[fx.Node]) -> bool:
    """Whether layers behind these nodes are traced as they would be without them. ``entered``: regions of autocast that
    are open, kept up to date."""
    for node in nodes:
        if node.target is ENTER:
            entered.add(node)
        elif node.target is EXIT:
            entered.difference_update(node.all_input_nodes)
        elif not _is_known(node):
            return False
    return True


def _is_known(node: fx.Node) -> bool:
    """Whether a node computes a value, or is one of the calls without one that are no hindrance."""
    return "example_value" in node.meta or node.target in WITHOUT_VALUE or node.op == "output"


def _region(nodes: Sequence[fx.Node]) -> Region | None:
    inside = set(nodes)
    inputs = tuple(dict.fromkeys(each for node in nodes for each in node.all_input_nodes if each not in inside))
    outputs = tuple(node for node in nodes if any(user not in inside for user in node.users))
    if any(node.op not in ("call_function", "call_method") or not _is_known(node) for node in nodes):
        return None
    if not all(_is_static(node.meta.get("example_value")) for node in nodes):
        return None
    if not inputs or not outputs or not all(_is_plain(node.meta.get("example_value")) for node in (*inputs, *outputs)):
        return None
    return Region(tuple(nodes), inputs, outputs)


def _is_static(value: object) -> bool:
    """Whether no size in a value is a symbol: twins would share those that a layer makes."""
    if isinstance(value, Tensor):
        return all(isinstance(size, int) for size in (*value.shape, *value.stride()))
    if isinstance(value, (tuple, list)):
        return all(map(_is_static, value))
    return not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _is_plain(value: object) -> bool:
    """Whether a value is a tensor of which `Looks` tell all, in plain numbers."""
    return (
        isinstance(value, FakeTensor)
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_conj() or value.is_neg())
        and _is_static(value)
    )


def region_key(region: Region) -> Hashable:
    """Equal for layers that compute the same: operators, arguments, and the looks of what comes in."""
    places: dict[fx.Node, str] = {node: f"%in{index}" for index, node in enumerate(region.inputs)}
    places |= {node: f"%op{index}" for index, node in enumerate(region.nodes)}
    examples = [node.meta["example_value"] for node in region.inputs]
    calls = tuple(
        (node.op, node.target, str(fx.node.map_arg((node.args, node.kwargs), places.__getitem__)))
        for node in region.nodes
    )
    return describe(examples), calls, tuple(places[node] for node in region.outputs)
