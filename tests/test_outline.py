"""Layers that are traced once: the graph is the one that tracing all of them gives, node for node."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn

import spcompile
from spcompile import capture, outline
from spcompile.capture import Capture, Kind, storage_weights
from spcompile.graph import value_of
from spcompile.options import parse_options
from spcompile.outline import Outline
from spcompile.passes.find_layers import module_path
from spcompile.runtime.weights import storage_key
from tests.models import Spec, specs

WIDTH = 8


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A layer with a skip connection, a view, and more than one way out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        left, right = self.fc(x).chunk(2, -1)
        return x + torch.tanh(left) * torch.sigmoid(right) * (1 if scale is None else scale)


class Stack(nn.Module):
    """Four blocks, the last two of another kind if ``mixed``."""

    def __init__(self, *, mixed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.mixed = mixed

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x, torch.full((), 0.5, device=x.device) if self.mixed and index > 1 else None)
        return x


class Features(Stack):
    """Returns what each layer returns."""

    def forward(self, x: Tensor) -> Any:
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return tuple(found)


class Traced:
    """What came of one graph of Dynamo."""

    def __init__(self) -> None:
        self.modules: list[fx.GraphModule] = []
        self.outlines: list[Outline] = []

    @property
    def n_layers(self) -> int:
        """How many layers were outlined."""
        return sum(len(each._regions) for each in self.outlines)

    @property
    def n_distinct(self) -> int:
        return sum(len({id(layer) for layer in each._layers}) for each in self.outlines)


def traced(model: nn.Module, *inputs: Tensor, whole: bool = False, grad: bool = False, **options: Any) -> Traced:
    """Trace a model as the backend does, or (``whole``) with every layer in place."""
    found = Traced()
    weights = storage_weights(model)

    def outlined(*args: Any) -> Outline | None:
        each = None if whole else outline.outline_layers(*args)
        if each is not None:
            found.outlines.append(each)
        return each

    def keep(module: fx.GraphModule, _: Kind) -> Any:
        found.modules.append(module)
        return module.forward

    def backend(gm: fx.GraphModule, examples: list[Any]) -> Any:
        before = str(gm.graph)
        it = Capture(
            gm,
            examples,
            parse_options({"compiler": "eager"}, None),
            lambda tensor, _: weights.get(storage_key(tensor)),
            list(weights.values()),
        )
        with mock.patch.object(capture, "outline_layers", outlined):
            it.trace(keep, lambda forward, _backward: found.modules.append(forward))
        assert str(gm.graph) == before
        return gm.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=backend, dynamic=False, **options)(*inputs)
    return found


def lines(module: fx.GraphModule) -> list[tuple[object, ...]]:
    """A graph without the names of its nodes."""
    places = {node: index for index, node in enumerate(module.graph.nodes)}

    def looks(value: object) -> object:
        if isinstance(value, Tensor):
            return value.dtype, tuple(value.shape), value.stride(), value.storage_offset(), value.device
        return tuple(map(looks, value)) if isinstance(value, (tuple, list)) else repr(value)

    return [
        (
            node.op,
            node.target if node.op == "call_function" else None,
            str(fx.node.map_arg((node.args, node.kwargs), lambda each: f"%{places[each]}")),
            looks(value_of(node)),
            module_path(node),
            node.meta.get("stack_trace"),
            node.meta.get("custom"),
        )
        for node in module.graph.nodes
    ]


def assert_same_graphs(model: nn.Module, *inputs: Tensor) -> Traced:
    """Trace both ways; returns what came with layers outlined."""
    whole, found = traced(model, *inputs, whole=True), traced(model, *inputs)
    assert [lines(module) for module in found.modules] == [lines(module) for module in whole.modules]
    for module in found.modules:
        module.graph.lint()
        assert torch.ops.spcompile.outlined.default not in {node.target for node in module.graph.nodes}
    return found


X = torch.randn(3, WIDTH)


def test_identical_layers_are_traced_once() -> None:
    found = assert_same_graphs(Stack(), X)
    assert (found.n_layers, found.n_distinct) == (4, 1)


def test_names_are_counted_on() -> None:
    whole, found = traced(Stack(), X, whole=True), traced(Stack(), X)
    names = [[node.name for node in each.modules[0].graph.nodes] for each in (found, whole)]
    assert names[0] == names[1]


def test_two_kinds_of_layers() -> None:
    found = assert_same_graphs(Stack(mixed=True), X)
    assert (found.n_layers, found.n_distinct) == (4, 2)


def test_each_twin_has_tensors_of_its_own_for_what_leaves_it() -> None:
    """A segment that reads two layers would else take them for one tensor."""
    found = assert_same_graphs(Features(), X)
    assert found.n_layers == 4
    values = [value_of(node) for node in found.modules[0].graph.output_node().all_input_nodes]
    assert len({id(value) for value in values}) == 4


def test_a_layer_that_differs_stays_in_place() -> None:
    model = Stack()
    model.layers[1].fc = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
    found = assert_same_graphs(model, X)
    assert (found.n_layers, found.n_distinct) == (3, 1)


def test_a_layer_that_runs_twice_stays_in_place() -> None:
    class Twice(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            y: Tensor = self.layers[0](x)
            return y

    assert assert_same_graphs(Twice(), X).n_layers == 3


def test_weights_that_are_views_of_one_storage() -> None:
    """Where in it they lie is part of how they look."""
    model = Stack()
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector.detach(), model.parameters())
    assert assert_same_graphs(model, X).n_layers == 0


def test_outputs_that_start_inside_their_memory() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH + 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.tanh(self.fc(x))[..., 1:]
            return y

    assert assert_same_graphs(nn.Sequential(Inside(), Inside(), Inside(), Inside()), X).n_layers == 3


def test_layers_that_read_nothing() -> None:
    """There is nothing to trace in them, nor a tensor to learn the fake mode from."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self) -> Tensor:
            return torch.arange(WIDTH, dtype=torch.float32)

    class Model(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.ModuleList(Positions() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for each in self.positions:
                x = x + each()
            unused = sum(weight.sum() for weight in self.positions.parameters())
            return super().forward(x) + unused

    assert assert_same_graphs(Model(), X).n_layers == 4


def test_dropout_in_a_layer() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)) for _ in range(3))).train()
    assert assert_same_graphs(model, X).n_layers == 3


def test_symbolic_sizes_are_traced_as_a_whole() -> None:
    model = Stack()
    x = X.clone()
    torch._dynamo.mark_dynamic(x, 0)
    assert assert_same_graphs(model, x).n_layers == 0


def test_layers_that_want_gradients_are_traced_as_a_whole() -> None:
    assert traced(Stack(), X, grad=True).n_layers == 0
    assert traced(Stack().requires_grad_(False), X, grad=True).n_layers == 4


class Odd(nn.Module):
    """A stack of layers with one trait each."""

    def __init__(self, trait: str) -> None:
        super().__init__()
        self.trait = trait
        self.layers = nn.ModuleList(OddLayer(trait) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        kept = []
        x = x.clone()
        for layer in self.layers:
            x, other = layer(x)
            kept.append(other)
        return x, kept


class OddLayer(nn.Module):
    """Writes into its input, returns a view of it, its input itself, two views of one tensor, or a constant."""

    def __init__(self, trait: str) -> None:
        super().__init__()
        self.trait = trait
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        y = torch.tanh(self.fc(x))
        match self.trait:
            case "writes":
                x.mul_(2)
                return y, y + x
            case "writes an item":
                x[0] = y[0]
                return y, y + x
            case "turns":
                x.t_()
                return y, y + 1
            case "view":
                return y, x[1:]
            case "input":
                return y, x
            case "two views":
                return y, y[1:]
            case "constant":
                return y + torch.tensor([1.0] * WIDTH), y
            case "size":
                return y, y.numel()
            case "nothing else":
                return y, None
            case "own autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return y, y @ y
            case "own grad mode":
                with torch.enable_grad():
                    return torch.relu(y), y
            case "own item":
                y[0] = y[1]
                return y, y + 1
            case "own sizes":
                return y, y[y.sum(1) > 0].sum()
        raise AssertionError


@pytest.mark.parametrize(
    ("trait", "n_layers"),
    [
        ("writes", 0),
        ("writes an item", 0),
        ("turns", 0),
        ("view", 0),
        ("input", 3),  # which the layer does not return in Dynamo's graph
        ("two views", 0),
        ("constant", 0),
        ("size", 3),
        ("nothing else", 3),
        ("own autocast", 3),
        ("own grad mode", 3),
        ("own item", 3),
        ("own sizes", 0),
    ],
)
def test_layers_that_do_more_than_compute(trait: str, n_layers: int) -> None:
    x = torch.randn(WIDTH, WIDTH)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert assert_same_graphs(Odd(trait).requires_grad_(False), x).n_layers == n_layers


def test_layers_that_write_between_layers_that_do_not() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() if index % 2 else OddLayer("writes") for index in range(6))

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            for index, layer in enumerate(self.layers):
                x = layer(x) if index % 2 else layer(x)[1] + x
            return x

    found = assert_same_graphs(Between(), X)
    assert (found.n_layers, found.n_distinct) == (3, 1)


class Surrounded(Stack):
    """Layers behind something that changes how they are traced, or not."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        match self.what:
            case "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return super().forward(x)
            case "autocast before":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    x = x @ x.t() @ x
                return super().forward(x.float())
            case "grad":
                with torch.enable_grad():
                    return super().forward(x)
            case "vmap":
                y: Tensor = torch.vmap(super().forward)(x)
                return y
        raise AssertionError


@pytest.mark.parametrize(("what", "n_layers"), [("autocast", 0), ("autocast before", 4), ("grad", 4), ("vmap", 0)])
def test_what_surrounds_the_layers(what: str, n_layers: int) -> None:
    model = Surrounded(what).requires_grad_(False)
    assert assert_same_graphs(model, X).n_layers == n_layers


def test_gradients_that_are_wanted_inside_alone() -> None:
    assert assert_same_graphs(Surrounded("grad"), X).n_layers == 0


def test_an_ambient_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = assert_same_graphs(Stack(), X)
    assert found.n_layers == 4
    assert torch.bfloat16 in {value.dtype for node in found.modules[0].graph.nodes for value in outputs_of(node)}


def test_inference_mode() -> None:
    with torch.inference_mode():
        whole, found = traced(Stack(), X, whole=True), traced(Stack(), X)
    assert found.n_layers == 4
    assert [lines(module) for module in found.modules] == [lines(module) for module in whole.modules]


def outputs_of(node: fx.Node) -> list[Tensor]:
    value = value_of(node)
    return [value] if isinstance(value, Tensor) else []


def test_a_tensor_that_is_laid_out_otherwise_than_dynamo_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then all is traced as a whole."""
    trace = outline._trace

    def traced_otherwise(*args: Any) -> Any:
        layer = trace(*args)
        assert layer is not None
        return replace(layer, takes="something else")

    monkeypatch.setattr(outline, "_trace", traced_otherwise)
    inlined: list[fx.GraphModule] = []
    monkeypatch.setattr(Outline, "inline", lambda _, module: inlined.append(module))
    assert assert_same_graphs(Stack(), X).n_layers == 4
    assert not inlined


def test_a_layer_that_writes_is_told_by_its_graph() -> None:
    """Also where tracing says of the write what it says of what computes."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.tanh.default, (x,))
    write = graph.call_function(torch.ops.aten.copy_.default, (x, y))
    graph.output((y,))
    for node in (x, y, write):
        node.meta["val"] = X
        node.meta["custom"] = {outline.ORIGIN: 0}
    assert not outline._only_computes(graph, n_outputs=1)
    graph.erase_node(write)
    assert outline._only_computes(graph, n_outputs=1)


def test_a_layer_that_cannot_be_traced_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise KeyError("no layer")

    monkeypatch.setattr(outline, "_extract", fail)
    assert assert_same_graphs(Stack(), X).n_layers == 0


def test_errors_of_passes_are_not_taken_for_ours() -> None:
    """What fails behind the tracing is not tried again."""
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        raise KeyError("a pass failed")

    model = spcompile.offload(Stack())
    with (
        mock.patch("spcompile.backend.run_passes", fail),
        torch.no_grad(),
        pytest.raises(Exception, match="a pass failed"),
    ):
        torch.compile(model, backend="superpipeline", options={"device": "cpu"})(X)
    assert len(calls) == 1


@given(spec=specs())
@settings(max_examples=30)
def test_random_models(spec: Spec) -> None:
    gc.collect()
    assert_same_graphs(spec.build().eval(), spec.inputs())
