"""Cutting changes nothing that a graph computes: every golden case is run before and after the passes, on real tensors.

What the cut graphs look like is in ``cases/split_segments.txt``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from spcompile import ops
from spcompile.graph import value_of
from spcompile.passes.base import STEP, Program
from spcompile.passes.split_segments import split_segments
from spcompile.pipeline import PASSES
from spcompile.segments import compile_segments, segment_key
from tests.passes.graph_text import Case, build_program, read_cases

ALL_CASES = [case for path in sorted((Path(__file__).parent / "cases").glob("*.txt")) for case in read_cases(path)]

SPLIT = 1 + [each.run for each in PASSES].index(split_segments)

LAYER = "mm_{i} = aten.mm.default({x}, w_{i})  @ {path}\n"


def cut(text: str) -> Program:
    program = build_program(text)
    for each in PASSES[:SPLIT]:
        each.run(program)
    return program


def chain(*paths: str) -> Program:
    """A product per path, each with its own weight."""
    lines = ["x: input  # float32[2, 8]\n"]
    lines += [f"w_{i}: weight {path}.weight  # float32[8, 8]\n" for i, path in enumerate(paths)]
    lines += [LAYER.format(i=i, x=f"mm_{i - 1}" if i else "x", path=path) for i, path in enumerate(paths)]
    return cut("".join(lines) + f"return (mm_{len(paths) - 1},)\n")


def real_inputs(graph: fx.Graph) -> list[Any]:
    """Random tensors of the shapes that the text says; placeholders of one name get equal values in every call."""
    torch.manual_seed(0)
    inputs: list[Any] = []
    for node in graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if not isinstance(value, Tensor):
            inputs.append(int(value))  # type: ignore[call-overload]
            continue
        shape = [int(size) for size in value.shape]
        is_integer = not value.dtype.is_floating_point
        inputs.append(torch.randint(0, 5, shape) if is_integer else torch.randn(shape).to(value.dtype))
    return inputs


def run(module: fx.GraphModule, inputs: list[Any]) -> list[Any]:
    """The outputs, and what became of the inputs."""
    torch.manual_seed(1)
    outputs = fx.Interpreter(module).run(*inputs)
    return [*outputs, *inputs]


@pytest.mark.parametrize("case", ALL_CASES, ids=[case.name for case in ALL_CASES])
def test_results_stay_the_same(case: Case) -> None:
    original = build_program(case.graph)
    expected = run(original.module, real_inputs(original.graph))
    program = cut(case.graph)
    program.graph.lint()
    results = run(program.module, real_inputs(program.graph))
    torch.testing.assert_close(results, expected, rtol=0, atol=0)
    compile_segments(program.module, "eager", {}, {})
    torch.testing.assert_close(run(program.module, real_inputs(program.graph)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", ALL_CASES, ids=[case.name for case in ALL_CASES])
def test_every_node_is_somewhere_once(case: Case) -> None:
    """No node of the graph is lost or doubled by the cut."""
    before = build_program(case.graph)
    for each in PASSES[: SPLIT - 1]:
        each.run(before)
    wanted = sorted(str(node.target) for node in before.graph.nodes if _is_computed(node))
    program = cut(case.graph)
    modules = [program.module, *_segments(program.module).values()]
    found = sorted(str(node.target) for module in modules for node in module.graph.nodes if _is_computed(node))
    assert found == wanted


def _is_computed(node: fx.Node) -> bool:
    calls = node.op == "call_function" and not ops.is_op(node, ops.pack)
    return calls and not (node.args and isinstance(node.args[0], fx.Node) and node.args[0].op == "call_module")


def _segments(module: fx.GraphModule) -> dict[str, fx.GraphModule]:
    names = [str(node.target) for node in module.graph.find_nodes(op="call_module")]
    return {name: getattr(module, name) for name in names}


@pytest.mark.parametrize("case", ALL_CASES, ids=[case.name for case in ALL_CASES])
def test_only_tensors_and_sizes_cross_a_cut(case: Case) -> None:
    for segment in _segments(cut(case.graph).module).values():
        for node in (*segment.graph.find_nodes(op="placeholder"), *segment.graph.output_node().all_input_nodes):
            assert isinstance(value_of(node), (Tensor, torch.SymInt)), node


def test_a_segment_empties_its_list() -> None:
    program = chain("layers.0", "layers.1")
    values = [torch.randn(2, 8), torch.randn(8, 8)]
    result = _segments(program.module)["layers_0"](values)
    assert values == []
    assert isinstance(result, tuple)


def test_identical_layers_do_not_depend_on_their_names() -> None:
    program = chain("layers.0", "layers.1", "layers.2")
    keys = {segment_key(segment, "eager") for segment in _segments(program.module).values()}
    assert len(keys) == 1


def test_names_are_identifiers_and_distinct() -> None:
    """Layers of a bare nn.Sequential are called 0, 1, ...; two paths may become one identifier."""
    program = chain("0.fc", "1.fc", "x.0", "x.1", "x_0", "x_1", "0.fc")
    names = list(_segments(program.module))
    assert len(set(names)) == len(names) == 7
    assert [name for name in names if not re.fullmatch(r"[A-Za-z_]\w*", name)] == []


def test_calls_know_their_steps() -> None:
    program = chain("layers.0", "layers.1", "head")
    calls = program.graph.find_nodes(op="call_module")
    assert [call.meta[STEP] for call in calls] == [0, 1, 2]
    assert [call.args[0].meta[STEP] for call in calls] == [0, 1, 2]
    assert [step.segment for step in program.planned().steps] == ["layers.0", "layers.1", "head"]


def test_a_graph_without_weights_is_one_segment() -> None:
    program = cut("x: input  # float32[2]\nrelu = aten.relu.default(x)\nneg = aten.neg.default(relu)\nreturn (neg,)")
    assert len(_segments(program.module)) == 1


def test_a_graph_that_computes_nothing() -> None:
    program = cut("x: input  # float32[2]\nw: weight w  # float32[2]\nreturn (x, w)")
    assert _segments(program.module) == {}
    x, w = torch.randn(2), torch.randn(2)
    assert program.module(x, w) == (x, w)
