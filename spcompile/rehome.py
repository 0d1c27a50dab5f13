"""A CPU model, run on the compute device: its graph and inputs are moved there, its results come back.

Before AOTAutograd, because decompositions depend on the device (attention has an operator for CPUs only):
`rehome_graph` rewrites Dynamo's graph, `rehome_examples` its example inputs.

    before                                          after
    arange = torch.arange(7)                        arange = torch.arange(7, device=cuda:0)
    to = x.to('cpu')                                to = x.to(cuda:0)
    enter = _enter_autocast('cpu', None, True, ..)  enter = _enter_autocast('cuda', torch.bfloat16, True, ..)

At run time a `RehomedCall` stands around the compiled graph. Weights are read through the page store; they are moved
into pinned memory at most, and stay CPU tensors. Other inputs go up with each call, except buffers, which stay there
until they change. What the graph updates in place is written back; outputs, and gradients in backward, come down as CPU
tensors. An output that is a view of an input becomes a view of the CPU input.

On the emulated device "up" and "down" are copies within host memory, so the same code runs everywhere.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._device import _device_constructors
from torch.utils.weak import WeakTensorKeyDictionary

from spcompile.runtime.compiled_graph import CompiledGraph, FindStore
from spcompile.runtime.store import PageStore
from spcompile.runtime.weights import WeightView, real_tensors, storage_key, tag_of

HOST = torch.device("cpu")

# The graph.


def rehome_graph(gm: fx.GraphModule, device: torch.device) -> None:
    """Rewrite a torch-level graph that was captured on the CPU, and the bodies of its higher-order operators, in place.

    Args:
        gm: Dynamo's graph.
        device: the compute device.
    """
    constructors = _device_constructors()
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            _rehome_node(node, device, constructors)
        module.recompile()


def _rehome_node(node: fx.Node, device: torch.device, constructors: Collection[object]) -> None:
    if node.op not in ("call_function", "call_method"):
        return
    if node.target is torch.amp.autocast_mode._enter_autocast:
        if node.args[0] == "cpu":
            # The dtype that was meant is the CPU's default, which is not CUDA's.
            dtype = node.args[1] or torch.get_autocast_dtype("cpu")
            node.args = (device.type, dtype, *node.args[2:])
        return
    if node.op == "call_method" and node.target == "cpu":
        node.target, node.args = "to", (node.args[0], device)

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) and value.type == "cpu" else value

    node.args = fx.node.map_aggregate(node.args, moved)
    node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
    if node.target == "to" and len(node.args) > 1 and node.args[1] == "cpu":
        node.update_arg(1, device)
    if node.kwargs.get("device") == "cpu" or (node.target in constructors and node.kwargs.get("device") is None):
        node.update_kwarg("device", device)


def rehome_examples(gm: fx.GraphModule, example_inputs: Sequence[Any], device: torch.device) -> list[Any]:
    """Example inputs for AOTAutograd: fake tensors on the compute device, with Dynamo's own symbolic sizes.

    Inputs that share a storage go on sharing one.
    """
    shared: dict[int, list[int]] = {}
    fakes: list[Any] = list(example_inputs)
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = node.meta.get("example_value", example_inputs[index])
        if isinstance(value, FakeTensor):
            fakes[index] = value
            shared.setdefault(storage_key(value), []).append(index)
    for indices in shared.values():
        first: FakeTensor = fakes[indices[0]]
        with first.fake_mode, torch.no_grad():
            memory = None
            if len(indices) > 1:
                memory = torch.empty(first.untyped_storage().nbytes(), dtype=torch.uint8, device=device)
            for index in indices:
                fakes[index] = _fake_view(fakes[index], memory, device)
    return fakes


def _fake_view(value: FakeTensor, memory: Tensor | None, device: torch.device) -> Tensor:
    if memory is None:
        moved = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
    else:
        moved = memory.view(value.dtype).as_strided(value.size(), value.stride(), value.storage_offset())
    return moved.requires_grad_(value.requires_grad)


def ambient_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The caller's ``torch.autocast("cpu")``, if there is one, as it is to be traced for the compute device."""
    if device.type == "cpu" or not torch.is_autocast_enabled("cpu"):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.get_autocast_dtype("cpu"))


# The call.


class RehomedCall:
    """What Dynamo calls instead of the compiled graph.

    Args:
        compiled: the graph, compiled for the compute device.
        store: where the weights live.
        weights: per input that is a weight, how it looks at it.
        static: inputs that belong to the model (buffers) and stay on the device while they do not change.
        written: inputs that a compiled graph updates in place; may grow as graphs are compiled.
        graphs: what ``compiled`` runs; may grow likewise.
        find_store: makes a page store for weights of another model, which has none.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        store: PageStore,
        weights: Mapping[int, WeightView],
        static: frozenset[int],
        written: set[int],
        graphs: Sequence[CompiledGraph],
        find_store: FindStore,
    ) -> None:
        self.compiled = compiled
        self.device = store.device
        self.graphs = graphs
        self.find_store = find_store
        self.lock = threading.RLock()
        self._store = weakref.ref(store)
        self.weights = weights
        self.static = static
        self.written = written
        self.buffers: Any = WeakTensorKeyDictionary()

    def __call__(self, *args: Any) -> Any:
        with self.lock:
            store = self._store_of(args)
            with store.lock:
                return self._call(store, args)

    def _store_of(self, args: Sequence[Any]) -> PageStore:
        """The store of the weights that the call was given: Dynamo brings other models of the same class here, too."""
        current = self._store()
        if current is not None and not self.weights:
            return current
        tag = next((tag for index in self.weights if (tag := tag_of(args[index])) is not None), None)
        if tag is not None and tag.store is current:
            return current
        found = tag.store if tag is not None else self.find_store([args[index] for index in self.weights])
        store = found or current or PageStore(self.device, rehomed=True)
        self._store = weakref.ref(store)
        for graph in self.graphs:
            graph.select(store)
        return store

    def _call(self, store: PageStore, args: Sequence[Any]) -> Any:
        self.graphs[0].runtime.place_again(self.weights, args)
        uploads = {
            index: self._up(store, index, value) for index, value in enumerate(args) if isinstance(value, Tensor)
        }
        inputs = [uploads.get(index, value) for index, value in enumerate(args)]
        versions = {index: tensor._version for index, tensor in uploads.items()}
        # A graph may enable gradients itself, and is then compiled for training where its caller wants none.
        is_training = torch.is_grad_enabled() or any(graph.plan.backward_step is not None for graph in self.graphs)
        with torch.set_grad_enabled(is_training):
            if is_training:
                _attach_gradients(store, args, inputs, uploads)
            outputs = self.compiled(*inputs)
        self._write_back(store, args, inputs, uploads, versions)
        origins = {storage_key(tensor): (args[index], tensor) for index, tensor in uploads.items()}
        with torch.set_grad_enabled(is_training):
            results = [_down(output, origins) if isinstance(output, Tensor) else output for output in outputs]
        self.settle()
        return results

    def settle(self) -> None:
        """Wait until nothing reads the model's memory any more: from here on its owner may write it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _up(self, store: PageStore, index: int, value: Tensor) -> Tensor:
        weight = self._weight(store, index, value)
        return self._copy(store, index, value) if weight is None else weight

    def _weight(self, store: PageStore, index: int, value: Tensor) -> Tensor | None:
        """The weight as the device sees it; None where the input is no weight, or has been given other memory."""
        if index not in self.weights:
            return None
        return store.as_device_sees(self, index, self.weights[index], value)

    def _copy(self, store: PageStore, index: int, value: Tensor) -> Tensor:
        """An input on the device: a fresh copy, or that of a buffer that has not changed."""
        with real_tensors():
            if index not in self.static or value.is_inference():
                return _upload(value, store.device)
            known: tuple[Hashable, Tensor | None] = self.buffers.get(value, (None, None))
            version, copy = known
            if copy is None or version != _version(value, store):
                copy = _upload(value, store.device)
                self.buffers[value] = _version(value, store), copy
            return copy

    def _write_back(
        self,
        store: PageStore,
        args: Sequence[Any],
        inputs: Sequence[Any],
        uploads: Mapping[int, Tensor],
        versions: Mapping[int, int],
    ) -> None:
        for index, tensor in uploads.items():
            if index not in self.written and tensor._version == versions[index]:
                continue
            tag = tag_of(args[index])
            if tag is not None and tag.store is store and index in self.weights:
                store.write_back(tag.name)
                continue
            with torch.set_grad_enabled(torch.is_grad_enabled() and inputs[index].requires_grad):
                args[index].copy_(inputs[index])
            if args[index] in self.buffers:
                self.buffers[args[index]] = _version(args[index], store), tensor


def _version(buffer: Tensor, store: PageStore) -> Hashable:
    return buffer._version, buffer.data_ptr(), store.generation


def _upload(value: Tensor, device: torch.device) -> Tensor:
    """A copy on the device with the same strides, of exactly the stretch of memory that the tensor covers."""
    if not value.numel():
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(value.size(), value.stride(), strict=True))
    stretch = value.detach().as_strided((reach,), (1,)).to(device, copy=True)
    return stretch.as_strided(value.size(), value.stride(), 0)


def _down(output: Tensor, origins: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
    """An output as a CPU tensor. ``origins``: by storage, the CPU input behind an input on the device."""
    original, uploaded = origins.get(storage_key(output), (None, output))
    if original is None or original.dtype != output.dtype:
        return output.to(HOST)
    offset = output.storage_offset() - uploaded.storage_offset() + original.storage_offset()
    return original.as_strided(output.size(), output.stride(), offset)


def _attach_gradients(store: PageStore, args: Sequence[Any], inputs: list[Any], uploads: Mapping[int, Tensor]) -> None:
    """Tie the inputs on the device to those on the CPU, so that gradients flow back to these."""
    tied = [index for index in uploads if args[index].requires_grad]
    if not tied:
        return
    ties = _Up.apply(store, *(args[i] for i in tied), *(uploads[i] for i in tied))  # type: ignore[no-untyped-call]
    for index, tensor in zip(tied, ties, strict=True):
        inputs[index] = tensor


class _Up(torch.autograd.Function):
    """Up in forward (the copies are made already), down in backward."""

    @staticmethod
    def forward(ctx: Any, store: PageStore, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.store = store
        ctx.set_materialize_grads(False)  # what nobody used has no gradient
        return tuple(tensor.detach() for tensor in tensors[len(tensors) // 2 :])

    @staticmethod
    @_disable_dynamo  # which looks at all that runs where backward is called in a compiled function
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        store: PageStore = ctx.store
        down = [gradient if gradient is None else _gradient_down(store, gradient) for gradient in gradients]
        if store.device.type == "cuda":
            torch.cuda.current_stream(store.device).synchronize()  # from here on the host may read them
        return None, *down, *(None for _ in gradients)


def _gradient_down(store: PageStore, gradient: Tensor) -> Tensor:
    """A gradient as a CPU tensor; one that was sent is there already."""
    buffer = store.gradients.find(gradient)
    return gradient.to(HOST) if buffer is None else buffer.on_host()
