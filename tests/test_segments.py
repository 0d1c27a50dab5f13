"""Identical segments share one compiled form, and segments that differ in anything do not."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import LambdaFuture, PyCodeCache

from spcompile import segments
from spcompile.options import COMPILERS
from spcompile.pipeline import PASSES
from spcompile.segments import CompiledSegment, compile_segments, segment_key
from tests.passes.graph_text import build_program

aten = torch.ops.aten

SIZES = "n: input  # int 5\n"

HEAD = """
x: input  # float32[{rows}, 8]
w_0: weight layers.0.weight  # float32[8, 8]
w_1: weight layers.1.weight  # float32[8, 8]
w_2: weight layers.2.weight  # float32[8, 8]
h: weight head.weight  # float32[8, 5]
"""

LAYER = """
t_{i} = aten.t.default(w_{i})  @ layers.{i}
mm_{i} = aten.mm.default({x}, t_{i})  @ layers.{i}
mul_{i} = aten.mul.Tensor(mm_{i}, 0.5)  @ layers.{i}
"""

TAIL = """
mm_3 = aten.mm.default(mul_2, h)  @ head
return (mm_3,)
"""


def split(rows: str = "2", prefix: str = "") -> fx.GraphModule:
    """Three identical layers and a head, cut into four segments."""
    layers = "".join(LAYER.format(i=i, x="x" if i == 0 else f"mul_{i - 1}") for i in range(3))
    program = build_program(prefix + HEAD.format(rows=rows) + layers + TAIL)
    for each in PASSES[:-1]:
        each.run(program)
    return program.module


def segment(outer: fx.GraphModule, name: str) -> fx.GraphModule:
    module = getattr(outer, name)
    assert isinstance(module, fx.GraphModule)
    return module


def test_identical_layers_have_equal_keys() -> None:
    outer = split()
    keys = [segment_key(segment(outer, name), "eager") for name in ("layers_0", "layers_1", "layers_2", "head")]
    assert keys[0] == keys[1] == keys[2]
    assert keys[0] != keys[3]


def test_another_graph_of_the_same_model_has_equal_keys() -> None:
    assert segment_key(segment(split(), "layers_0"), "eager") == segment_key(segment(split(), "layers_2"), "eager")


def test_compilers_do_not_share() -> None:
    layer = segment(split(), "layers_0")
    assert len({segment_key(layer, compiler) for compiler in COMPILERS}) == len(COMPILERS)


def _node(layer: fx.GraphModule, target: object) -> fx.Node:
    found: fx.Node = next(node for node in layer.graph.nodes if node.target is target)
    return found


def _input(layer: fx.GraphModule, index: int) -> fx.Node:
    nodes: list[fx.Node] = list(layer.graph.find_nodes(op="placeholder"))
    return nodes[index]


def _set_constant(layer: fx.GraphModule, value: object) -> None:
    node = _node(layer, aten.mul.Tensor)
    node.args = (node.args[0], value)  # type: ignore[assignment]


def _set_input(layer: fx.GraphModule, index: int, value: torch.Tensor) -> None:
    _input(layer, index).meta["val"] = value


def _swap_inputs(layer: fx.GraphModule) -> None:
    node = _node(layer, aten.mm.default)
    node.args = node.args[::-1]


def _drop_output(layer: fx.GraphModule) -> None:
    layer.graph.output_node().args = ((),)


DIFFERENCES: dict[str, Callable[[fx.GraphModule], None]] = {
    "constant": lambda layer: _set_constant(layer, 0.25),
    "constant in the last place": lambda layer: _set_constant(layer, 0.5000000000000001),
    "sign of a constant": lambda layer: _set_constant(layer, -0.5),
    "type of a constant": lambda layer: _set_constant(layer, True),
    "operator": lambda layer: setattr(_node(layer, aten.mul.Tensor), "target", aten.add.Tensor),
    "keyword": lambda layer: setattr(_node(layer, aten.mul.Tensor), "kwargs", {"alpha": 2}),
    "order of inputs": _swap_inputs,
    "outputs": _drop_output,
    "shape": lambda layer: _set_input(layer, 0, torch.empty(3, 8)),
    "stride": lambda layer: _set_input(layer, 0, torch.empty(8, 2).t()),
    "dtype": lambda layer: _set_input(layer, 1, torch.empty(8, 8, dtype=torch.float64)),
    "offset": lambda layer: _set_input(layer, 0, torch.empty(3, 8)[1:]),
    "device": lambda layer: _set_input(layer, 0, torch.empty(2, 8, device="meta")),
    "strides of what is computed": lambda layer: _node(layer, aten.mm.default).meta.update(val=torch.empty(8, 2).t()),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_any_difference_gives_another_key(name: str) -> None:
    outer = split()
    layer = segment(outer, "layers_1")
    DIFFERENCES[name](layer)
    assert segment_key(layer, "eager") != segment_key(segment(outer, "layers_0"), "eager")


class Compiler:
    """Stands in for `_compile` and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[fx.GraphModule] = []
        monkeypatch.setattr(segments, "_compile", self)

    def __call__(self, module: fx.GraphModule, _: str) -> Callable[[list[Any]], Any]:
        self.calls.append(module)
        return lambda values: module.forward(values)


def test_each_distinct_segment_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(monkeypatch)
    outer = split()
    shared: dict[str, nn.Module] = {}
    own: dict[str, nn.Module] = {}
    compile_segments(outer, "eager", shared, own)
    assert len(compiler.calls) == 2
    assert (len(shared), len(own)) == (2, 0)
    assert outer.layers_0 is outer.layers_1
    assert outer.layers_0 is outer.layers_2
    compile_segments(split(), "eager", shared, own)  # a recompilation
    assert len(compiler.calls) == 2
    compile_segments(split(rows="3"), "eager", shared, own)  # another batch size
    assert len(compiler.calls) == 4


def test_segments_with_symbolic_sizes_are_shared_inside_one_capture_only(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(monkeypatch)
    shared: dict[str, nn.Module] = {}
    own: dict[str, nn.Module] = {}
    compile_segments(split(rows="n", prefix=SIZES), "eager", shared, own)
    assert len(compiler.calls) == 2
    assert (len(shared), len(own)) == (0, 2)
    compile_segments(split(rows="n", prefix=SIZES), "eager", shared, {})
    assert len(compiler.calls) == 4


def test_kernels_are_awaited_when_all_segments_are_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, each would wait for its own kernels."""
    events: list[str] = []
    wait, load = AsyncCompile.wait, PyCodeCache.load_by_key_path.__func__  # type: ignore[attr-defined]

    def waiting(self: AsyncCompile, scope: dict[str, Any]) -> None:
        events.append("wait")
        wait(self, scope)

    def loading(cls: type[PyCodeCache], *args: Any, **kwargs: Any) -> Any:
        events.append("load")
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(AsyncCompile, "wait", waiting)
    monkeypatch.setattr(PyCodeCache, "load_by_key_path", classmethod(loading))
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)), nn.Linear(8, 5)).eval()
    x = torch.randn(2, 8)
    fast = torch.compile(copy.deepcopy(model), backend="superpipeline", options={"k": 2, "m": 1, "device": "cpu"})
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
        torch.testing.assert_close(fast(x), model(x))
    assert events == ["load", "load", "wait", "wait"]
    assert AsyncCompile.wait is waiting


def test_the_alignment_of_weights_is_not_checked_with_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[int]] = []
    original = compile_fx.compile_fx_inner

    def compile_inner(module: fx.GraphModule, examples: Any, **kwargs: Any) -> Any:
        told.append(kwargs["static_input_idxs"])
        return original(module, examples, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compile_inner)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))).eval()
    fast = torch.compile(model, backend="superpipeline", options={"k": 2, "m": 1, "device": "cpu"})
    with torch.no_grad():
        fast(torch.randn(2, 8))
    assert told == [[1, 2]]  # behind the activation


def test_another_thread_waits_for_its_own_kernels() -> None:
    scope: dict[str, Any] = {"kernel": LambdaFuture(lambda: "compiled")}
    with segments._kernels_awaited_together():
        thread = threading.Thread(target=AsyncCompile().wait, args=(scope,))
        thread.start()
        thread.join()
        assert scope["kernel"] == "compiled"


def test_segments_whose_kernels_fail_are_not_kept() -> None:
    def fail() -> None:
        raise ValueError("no such instruction")

    known: dict[str, nn.Module] = {}
    wait = AsyncCompile.wait

    def compile_badly(module: fx.GraphModule, _: str) -> Callable[[list[Any]], Any]:
        AsyncCompile().wait({"kernel": LambdaFuture(fail)})
        return lambda values: module.forward(values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "_compile", compile_badly)
        with pytest.raises(ValueError, match="no such instruction"):
            compile_segments(split(), "inductor", known, {})
    assert known == {}
    assert AsyncCompile.wait is wait


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_segment_empties_its_list_and_returns_a_tuple(compiler: str) -> None:
    outer = split()
    compile_segments(outer, compiler, {}, {})
    x, w = torch.randn(2, 8), torch.randn(8, 8, requires_grad=True)
    values = [x, w]
    compiled = outer.layers_0
    assert isinstance(compiled, CompiledSegment)
    result = compiled(values)
    assert values == []
    assert isinstance(result, tuple)
    assert torch.equal(result[0], x @ w.t() * 0.5)
    assert not result[0].requires_grad


def test_the_outer_graph_computes_what_it_did() -> None:
    outer = split()
    inputs = [torch.randn(2, 8), *(torch.randn(8, 8) for _ in range(3)), torch.randn(8, 5)]
    expected = copy.copy(inputs[0])
    for weight in inputs[1:4]:
        expected = expected @ weight.t() * 0.5
    compile_segments(outer, "eager", {}, {})
    (result,) = outer(*inputs)
    assert torch.equal(result, expected @ inputs[4])
