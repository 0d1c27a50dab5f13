"""The three ways a model comes to the backend: offloaded, on the compute device, or on the CPU.

An offloaded model (``spcompile.offload``) brings its page store on its tensors. For any other, the store is made here,
as soon as the first of its graphs is compiled, and takes in all parameters of the model as they are. Nothing moves yet:
what a plan streams is moved when it is placed.

Dynamo hands over one graph and not the model, and with graph breaks a graph may hold a single layer. The model is
therefore looked for among the modules that are being called: the outermost whose parameters the graph reads.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from itertools import chain
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from spcompile.capture import module_path
from spcompile.errors import OffloadError, OptionError
from spcompile.module_tree import readable_path
from spcompile.options import Options
from spcompile.runtime.host import compute_device
from spcompile.runtime.optimizers import watch_optimizers
from spcompile.runtime.store import PageStore
from spcompile.runtime.weights import storage_key, tag_of, what_is_special, why_nothing_streams

logger = logging.getLogger(__name__)


def find_or_make_store(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> PageStore:
    """The store of the weights that a graph reads.

    Raises:
        OffloadError: they lie on several devices, or belong to models that have stores of their own.
        OptionError: the option ``device`` names another device than theirs.
    """
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    weights = [parameter for parameter in parameters if what_is_special(parameter) is None]
    stores = list(dict.fromkeys(tag.store for tag in map(tag_of, tensors) if tag is not None))
    if len(stores) > 1:
        raise OffloadError(
            "this graph reads weights of two models that were placed apart: call spcompile.offload, before they are "
            "compiled, on one module that holds both"
        )
    if stores:
        _check_device(options, stores[0].device, "compiled for" if stores[0].rehomed else "offloaded for")
        return stores[0]
    if not weights:
        _tell_if_nothing_streams(tensors)
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        return PageStore(device)
    store = _new_store(weights, options)
    _refuse_special(store, parameters)
    named = _named_parameters(weights) or _named_inputs(gm, example_inputs, weights)
    _take_in(store, named, weights[0].device)
    watch_optimizers()
    return store


def take_in_caller(arguments: Sequence[Tensor], options: Options) -> PageStore | None:
    """A store for the model that is being called, whose graph was compiled for another model; None where the model is
    not found, or its weights cannot be taken in.

    Args:
        arguments: the weights that the graph is called with.
        options: those that the graph was compiled with.
    """
    held = next((tag for tag in map(tag_of, arguments) if tag is not None), None)
    if held is not None:
        return held.store
    weights = [each for each in arguments if isinstance(each, nn.Parameter) and what_is_special(each) is None]
    named = _named_parameters(weights)
    if not named or len({weight.device for weight in weights}) > 1:
        return None
    store = _new_store(weights, options)
    _take_in(store, named, weights[0].device)
    return store


def _tell_if_nothing_streams(inputs: Sequence[Tensor]) -> None:
    """A graph without weights is common between graph breaks; a model without any is worth a word."""
    model = _running_model(frozenset(map(id, inputs)))
    reason = None if model is None else why_nothing_streams(model)
    if reason is not None:
        logger.warning("nothing of this %s can be streamed: %s", type(model).__name__, reason)


def name_of_caller(inputs: Sequence[Any]) -> str:
    """The class of the model that is being called with some of these as its weights; "graph" where it is not found."""
    model = _running_model(frozenset(id(each) for each in inputs if isinstance(each, nn.Parameter)))
    return "graph" if model is None else type(model).__name__


def _new_store(weights: Sequence[nn.Parameter], options: Options) -> PageStore:
    devices = sorted({str(weight.device) for weight in weights})
    if len(devices) > 1:
        raise OffloadError(
            f"the weights of this graph are on {' and '.join(devices)}: move the model to one of them, or call "
            "spcompile.offload(model)"
        )
    device = weights[0].device
    if device.type == "cuda":
        _check_device(options, device, "on")
        return PageStore(device, takes_in=True)
    # On the CPU and asked for "cpu": the model is on the (emulated) compute device already.
    return PageStore(compute_device(options.device), rehomed=options.device != "cpu", takes_in=True)


def _refuse_special(store: PageStore, parameters: Sequence[Tensor]) -> None:
    """A model that stays on the CPU needs every weight copied up and down, whatever it is made of."""
    for parameter in parameters if store.rehomed else ():
        problem = what_is_special(parameter)
        if problem is not None:
            raise OffloadError(
                f"a weight of this CPU model cannot be used on {store.device}: {problem}. Move the model to the GPU "
                "first; such a weight then stays there"
            )


def _check_device(options: Options, device: torch.device, how: str) -> None:
    if options.device is None:
        return
    asked, target = torch.device(options.device), compute_device(options.device)
    if target.type != device.type or (asked.index is not None and target.index != device.index):
        raise OptionError(f"option 'device' is {options.device!r}, but the model is {how} {device}")


def _named_parameters(weights: Sequence[nn.Parameter]) -> list[tuple[str, Tensor]]:
    """All parameters of the running model, and its buffers, by name; empty where no module is running."""
    model = _running_model(frozenset(map(id, weights)))
    if model is None:
        return []
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _running_model(wanted: frozenset[int]) -> nn.Module | None:
    """The outermost module, of those that are being called, that holds one of these tensors (given by id).

    Only frames of ``Module.__call__`` are looked into: they end with the call. Until Python 3.12 a frame that was
    looked into goes on holding what its variables were then, and in a caller's frame that may be a model.
    """
    frame: FrameType | None = sys._getframe(1)
    found: nn.Module | None = None
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code is nn.Module._call_impl.__code__ else None
        if (
            isinstance(owner, nn.Module)
            and owner is not found
            and any(id(each) in wanted for each in chain(owner.parameters(), owner.buffers()))
        ):
            found = owner
        frame = frame.f_back
    return getattr(found, "_orig_mod", found)  # not what torch.compile made of the model, but the model


def _named_inputs(
    gm: fx.GraphModule, example_inputs: Sequence[Any], weights: Sequence[nn.Parameter]
) -> list[tuple[str, Tensor]]:
    """The parameters among the inputs of a graph, named by where Dynamo found them."""
    wanted = frozenset(map(id, weights))
    nodes = gm.graph.find_nodes(op="placeholder")
    return [
        (readable_path(module_path(node)) or node.name, example)
        for node, example in zip(nodes, example_inputs, strict=True)
        if id(example) in wanted
    ]


def _take_in(store: PageStore, named: Sequence[tuple[str, Tensor]], device: torch.device) -> None:
    """Take in the storages of these parameters, and the buffers that look at one of them."""
    groups: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in named:
        if what_is_special(tensor) is not None or tensor.device != device or tag_of(tensor) is not None:
            continue
        if isinstance(tensor, nn.Parameter) or storage_key(tensor) in groups:
            groups.setdefault(storage_key(tensor), []).append((name, tensor))
    for members in groups.values():
        tensors = list({id(tensor): tensor for _, tensor in members}.values())
        store.take(store.free_name(members[0][0]), tensors)
