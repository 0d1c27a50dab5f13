"""From Dynamo's graph to the programs that the passes work on.

AOTAutograd turns Dynamo's torch-level graph into ATen graphs: one for inference, or one forward and (at the first
``.backward()``) one backward. A `Capture` runs it with the right decompositions and makes a `Program` of each graph,
which needs to know which placeholders are weights. AOTAutograd notes on each placeholder the index of Dynamo's input;
that input's example is the model's own parameter, and its storage is the weight.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor.virtualized import V
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from spcompile.cuda_decompositions import Table, as_for_cuda
from spcompile.errors import OffloadError
from spcompile.graph import memory_roots, tensors_of, written_inputs
from spcompile.ir import Machine, Page, Weight
from spcompile.joint import gradients_of
from spcompile.module_tree import canonical_path, find_layer_paths, layer_of
from spcompile.options import Options
from spcompile.outline import LayoutError, Outline, outline_layers
from spcompile.partition import partition
from spcompile.passes.base import Program, WeightInput
from spcompile.passes.pages import LEFTOVER_FRACTION
from spcompile.planner.machine import PROFILES, find_machine
from spcompile.runtime.host import free_device_bytes
from spcompile.runtime.measure import this_machine
from spcompile.runtime.store import PageStore
from spcompile.runtime.weights import storage_key

logger = logging.getLogger(__name__)

DEFAULT_MACHINE = "h100"
"""The profile that iterations are timed on where none is asked for and nothing can be measured."""


class Kind(enum.Enum):
    """What an ATen graph is for."""

    INFERENCE = "inference"
    FORWARD = "forward"
    BACKWARD = "backward"


GraphCompiler = Callable[[fx.GraphModule, Kind], Callable[..., Any]]
"""Compiles an ATen graph."""

TrainingPlanner = Callable[[fx.GraphModule, fx.GraphModule], None]
"""Takes a forward graph and its backward graph as soon as there are two, before either is compiled."""


class Capture:
    """One graph of Dynamo on its way through AOTAutograd.

    Args:
        gm: Dynamo's torch-level graph.
        example_inputs: its inputs as they are at capture; parameters are the model's own.
        options: what the user asked for.
        weight_of: the weight that an example input looks at, given its path; None where it is no weight.
        model_weights: all weights of the model, in the order of its parameters.
        traced_inputs: what AOTAutograd traces with instead of ``example_inputs`` (a re-homed model's stand-ins).
        for_cuda: whether CPU tensors stand for those of a GPU that is not here.
        name: of the model, for people.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        options: Options,
        weight_of: Callable[[Tensor, str], Weight | None],
        model_weights: Sequence[Weight],
        traced_inputs: Sequence[Any] | None = None,
        for_cuda: bool = False,
        name: str = "graph",
    ) -> None:
        self.gm = gm
        self.name = name
        self.for_cuda = for_cuda
        self.traced_inputs = example_inputs if traced_inputs is None else traced_inputs
        self.example_inputs = example_inputs
        self.options = options
        self.model_weights = model_weights
        self.weights: dict[int, WeightInput] = {}
        self.written: set[int] = set()  # indices of the inputs that a graph updates in place
        for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            example, path = example_inputs[index], module_path(node)
            weight = weight_of(example, path) if isinstance(example, Tensor) else None
            if weight is not None:
                self.weights[index] = WeightInput(weight, path)

    def trace(self, compile_graph: GraphCompiler, plan_training: TrainingPlanner) -> Callable[..., Any]:
        """Run AOTAutograd, which hands over each ATen graph as soon as it has it.

        In training it first makes both graphs, for ``plan_training``; the backward graph comes to ``compile_graph`` at
        the first ``.backward()``.
        """
        table = self._decompositions()
        fake_mode = detect_fake_mode(self.traced_inputs)
        tracing_context = TracingContext.try_get() or TracingContext(fake_mode)
        # Donated buffers are those that backward may write over; `retain_graph` is refused where there are any.
        no_donation = torch._functorch.config.patch(donated_buffer=False)
        with V.set_fake_mode(fake_mode), tracing(tracing_context), no_donation:
            outline = self._outline(table)
            if outline is not None:
                try:
                    return self._trace_outlined(outline, compile_graph, table)
                except LayoutError as error:
                    logger.debug("every layer is traced: %s", error)
            partition_fn = partition(self.options.compiler, self.is_weight, plan_training, self.for_cuda)
            return _aot(compile_graph, table, partition_fn=partition_fn)(self.gm, self.traced_inputs)

    def forget_inputs(self) -> None:
        """Hold the model's tensors and its inputs no longer: everything has been traced."""
        self.example_inputs = self.traced_inputs = ()

    def _outline(self, table: Table) -> Outline | None:
        """What of the graph need not be traced more than once: layers of which no gradient is wanted."""
        setting = self.gm.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
        is_grad_enabled = torch.is_grad_enabled() or any(node.args[0] for node in setting)
        if is_grad_enabled and any(isinstance(each, Tensor) and each.requires_grad for each in self.example_inputs):
            return None
        named = ((each.path, each.weight.nbytes) for each in self.weights.values() if each.path)
        is_moved = self.traced_inputs is not self.example_inputs
        device = next((each.device for each in self.traced_inputs if isinstance(each, Tensor)), None)

        def trace(layer: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
            traced: list[fx.GraphModule] = []

            def keep(module: fx.GraphModule, _: Kind) -> Callable[..., Any]:
                traced.append(module)
                return module.forward

            with tracing(TracingContext(detect_fake_mode(inputs))):
                _aot(keep, table)(layer, inputs)
            return traced[0]

        return outline_layers(self.gm, find_layer_paths(named), device if is_moved else None, trace)

    def _trace_outlined(self, outline: Outline, compile_graph: GraphCompiler, table: Table) -> Callable[..., Any]:
        def compile_inlined(module: fx.GraphModule, kind: Kind) -> Callable[..., Any]:
            outline.inline(module)
            return compile_graph(module, kind)

        with outline.in_place():
            return _aot(compile_inlined, table)(self.gm, self.traced_inputs)

    def _decompositions(self) -> Table:
        if self.options.compiler == "eager":
            return {}
        # Slow to import; only needed once compiling. One decomposition (of max pooling) reads the second as an
        # attribute of its package and does not import it.
        from torch._inductor import decomposition, lowering  # noqa: F401

        table: Table = decomposition.select_decomp_table()
        return as_for_cuda(table) if self.for_cuda else table

    def is_weight(self, placeholder: fx.Node) -> bool:
        """Whether a placeholder of an ATen graph carries a weight."""
        return input_index(placeholder) in self.weights

    def owned_by_model(self) -> frozenset[int]:
        """Indices of the inputs that are no weights but belong to the model itself: its buffers."""
        nodes = self.gm.graph.find_nodes(op="placeholder")
        paths = {index: module_path(node) for index, node in enumerate(nodes) if index not in self.weights}
        return frozenset(index for index, path in paths.items() if path.startswith(("L['self'].", "G[")))

    def program(
        self,
        module: fx.GraphModule,
        *,
        device: torch.device,
        store: PageStore | None,
        backward: fx.GraphModule | None = None,
        free_bytes: int | None = None,
    ) -> Program:
        """What the passes need to know of one ATen graph, or of a forward graph and its ``backward``.

        ``store`` is None for a model that is not offloaded, ``free_bytes`` where the device is here and can be asked.
        """
        weights = self._weights_of(module.graph)
        wraps = backward is None
        self.written.update(_written_indices(module.graph))
        model_order = {weight.name: index for index, weight in enumerate(self.model_weights)}
        program = Program(module, weights, self.options, str(device), wraps, model_order, name=self.name)
        free_bytes = free_device_bytes(device) if free_bytes is None else free_bytes
        if store is not None:
            program.known_pages = tuple(store.pages)
            program.known_leftovers = frozenset(weight for each in store.runtimes() for weight in each.plan.leftovers)
            program.known_residents = frozenset(store.resident_pages())
            free_bytes += store.device_bytes()  # what is placed already can be placed again
        read = {each.weight for each in weights.values()}
        layer_paths = find_layer_paths((weight.name, weight.nbytes) for weight in self.model_weights)
        program.elsewhere_pages = _elsewhere_pages(program.known_pages, self.model_weights, read, layer_paths)
        alike = _alike(self.model_weights, read, layer_paths)
        program.alike_bytes = sum(weight.nbytes for weight in alike)
        if store is not None:
            others = (weight for weight in self.model_weights if weight not in read and weight not in alike)
            program.kept_bytes = sum(weight.nbytes for weight in others if store.is_resident(weight))
            program.others_beside_bytes = store.beside_bytes_of_others(read)
        program.free_bytes = free_bytes
        program.machine = find_machine_for(device, self.options)
        program.other_bytes = self._other_bytes(device, store)
        if backward is not None:
            self._add_backward(program, backward)
        return program

    def _add_backward(self, program: Program, backward: fx.GraphModule) -> None:
        """Tie the program of a backward graph to that of its forward graph."""
        self.written.update(_written_indices(backward.graph))
        outputs: Any = backward.graph.output_node().args[0]
        gradients = {
            output: index
            for output, source in gradients_of(program.graph, backward.graph)
            if (index := input_index(source)) in self.weights and index is not None and _is_dense(outputs[output])
        }
        program.backward = replace(
            program,
            module=backward,
            weights=self._weights_of(backward.graph),
            forward=program,
            gradients=gradients,
            paged={},
            page_inputs={},
            sends={},
        )

    def _weights_of(self, graph: fx.Graph) -> dict[str, WeightInput]:
        """The placeholders that carry weights, by name."""
        indices = {node.name: input_index(node) for node in graph.find_nodes(op="placeholder")}
        return {name: self.weights[index] for name, index in indices.items() if index in self.weights}

    def _other_bytes(self, device: torch.device, store: PageStore | None) -> int:
        """What the process holds on the device that neither belongs to the model nor is an input."""
        if device.type != "cuda" or not torch.cuda.is_available():
            return 0
        tensors = [value for value in self.example_inputs if isinstance(value, Tensor) and value.device == device]
        if store is not None:  # it knows what its weights take: offloaded ones only look as if they were on the device
            tensors = [tensor for tensor in tensors if store.weight_of(tensor, "") is None]
        held = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
        # What cuBLAS got for earlier calls would count here, and once more as what this graph will need.
        torch._C._cuda_clearCublasWorkspaces()
        model_bytes = sum(held.values()) + (store.device_bytes() if store is not None else 0)
        return max(0, torch.cuda.memory_allocated(device) - model_bytes)


def _aot(compile_graph: GraphCompiler, table: Table, **training: Any) -> Callable[..., Callable[..., Any]]:
    """AOTAutograd with these decompositions; ``training``: what only matters where gradients are wanted."""
    aot: Callable[..., Callable[..., Any]] = aot_autograd(
        fw_compiler=lambda module, _inputs: compile_graph(module, Kind.FORWARD),
        bw_compiler=lambda module, _inputs: compile_graph(module, Kind.BACKWARD),
        inference_compiler=lambda module, _inputs: compile_graph(module, Kind.INFERENCE),
        decompositions=table,
        keep_inference_input_mutations=True,
        **training,
    )
    return aot


def find_machine_for(device: torch.device, options: Options) -> Machine:
    """The one that was asked for, or the one that is here; a shipped profile where the GPU is not here, or full."""
    if options.machine is not None:
        return find_machine(options.machine)
    if device.type == "cuda" and torch.cuda.is_available():
        try:
            return this_machine(device)
        except (OffloadError, torch.OutOfMemoryError) as error:
            logger.warning("%s cannot be measured (%s): planning as for %s", device, error, DEFAULT_MACHINE)
    return PROFILES[DEFAULT_MACHINE]


def _written_indices(graph: fx.Graph) -> Iterator[int]:
    roots = memory_roots(graph.nodes)
    for node in graph.nodes:
        for root in {root for each in written_inputs(node) for root in roots[each]}:
            index = input_index(root)
            if index is not None:
                yield index


def _elsewhere_pages(
    known_pages: Sequence[Page], model_weights: Sequence[Weight], read: Set[Weight], layer_paths: frozenset[str]
) -> int:
    """How many pages the weights make that a graph does not read: those of other graphs, and an estimate of those that
    no graph has read so far (one for each layer, and one for what lies outside unless it is small)."""
    page_of = {weight: page for page in known_pages for weight in page.weights}
    others = set(page_of.values()) - {page_of[weight] for weight in read if weight in page_of}
    unread = {
        weight: layer_of(weight.name, layer_paths)
        for weight in model_weights
        if weight not in page_of and weight not in read
    }
    outside_bytes = sum(weight.nbytes for weight, layer in unread.items() if layer is None)
    has_outside = outside_bytes * LEFTOVER_FRACTION > max((weight.nbytes for weight in model_weights), default=0)
    return len(others) + len(set(unread.values()) - {None}) + has_outside


def _is_dense(gradient: fx.Node) -> bool:
    """Whether it is an ordinary tensor. A sparse one, of an embedding, stays where it is."""
    return all(tensor.layout is torch.strided for tensor in tensors_of(gradient))


def _alike(model_weights: Sequence[Weight], read: Set[Weight], layer_paths: frozenset[str]) -> frozenset[Weight]:
    """The weights that a graph does not read and that have in their layers the place that one has which it reads:
    another graph will read these, or this one will be called for those layers, too."""
    places = {weight: _place_in_layer(weight, layer_paths) for weight in model_weights}
    mine = {places[weight] for weight in read if weight in places} - {None}
    return frozenset(weight for weight in model_weights if weight not in read and places[weight] in mine)


def _place_in_layer(weight: Weight, layer_paths: frozenset[str]) -> tuple[str, str, int] | None:
    layer = layer_of(weight.name, layer_paths)
    if layer is None:
        return None
    return layer.rpartition(".")[0], weight.name.removeprefix(layer), weight.nbytes


def input_index(placeholder: fx.Node) -> int | None:
    """Index of Dynamo's input behind a placeholder of an ATen graph, or None (activations, gradients)."""
    index = getattr(placeholder.meta.get("desc"), "idx", None)
    return index if type(placeholder.meta.get("desc")).__name__ == "PlainAOTInput" else None


def module_path(placeholder: fx.Node) -> str:
    """Where the module tree holds the input of a Dynamo graph: ``L['self'].layers.0.fc.weight``; "" if unknown."""
    argument = placeholder.meta.get("grapharg")
    source = getattr(argument, "source", None) or getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")
    text: str = name() if callable(name) else name  # a method in torch 2.11, a property later
    return canonical_path(text)


def storage_weights(model: torch.nn.Module) -> dict[int, Weight]:
    """Weights of a model that is not offloaded, tied ones and views of one storage once, in the order of its
    parameters.

    By identity of their storage; a tensor subclass, which may have none, by its own, with the bytes that its shape and
    dtype name. A lazy parameter has no bytes yet, and is left out.
    """
    weights: dict[int, Weight] = {}
    named: Iterator[tuple[str, Any]] = model.named_parameters(remove_duplicate=False)
    for name, parameter in named:
        if is_lazy(parameter):
            continue
        has_storage = not is_traceable_wrapper_subclass(parameter)
        key = storage_key(parameter) if has_storage else id(parameter)
        nbytes = parameter.untyped_storage().nbytes() if has_storage else parameter.numel() * parameter.element_size()
        weights.setdefault(key, Weight(name, nbytes))
    return weights
