"""Graphs as text, for tests that no torch upgrade can move: nothing here is traced.

A case file holds named cases in the notation of `spcompile.graph_text.format_graph`, with what a test has to add:

    [case a view that another layer reads]
    x: input  # float32[2, 8]
    n: input  # int 5                                          a size (SymInt), to be used as float32[n, 8]
    w_0: weight layers.0.fc.weight  # float32[8, 8]             the name of the weight is also its path,
    w_1: weight embed.weight @ head.weight  # float32[8, 8]     unless the path is given (here: a tied weight)
    t = aten.t.default(w_0)  @ layers.0.fc                      the module that a node was traced in
    mm = aten.mm.default(x, t)  @ layers.0.fc
    return (mm,)
    [plan k=2 m=1]                                              only where the schedule matters; else all is resident
    layers.0: -1..1 in slots 0 1                                an interval: page, steps, slot in each phase
    [out]
    ...

Lines that begin with ``#`` are prose. Values of nodes are computed by running the operators on fake tensors.
``pytest --update-golden`` rewrites what follows ``[out]`` and nothing else.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from spcompile.graph import SCALARS, value_of
from spcompile.graph_text import format_graph
from spcompile.ir import Interval, Plan, Slot, Weight
from spcompile.options import Options
from spcompile.passes.base import IN_PLACE, LAYER, SEGMENT, Program, WeightInput

DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One case of a file: the text of the input graph, of the plan ("" for none) and of what is expected."""

    name: str
    graph: str
    plan: str
    expected: str


def read_cases(path: Path) -> list[Case]:
    """All cases of a file, in order."""
    return [_read_case(chunk) for chunk in _chunks(path)[1:]]


def update_case(path: Path, name: str, text: str) -> None:
    """Replace what is expected of one case."""
    chunks = _chunks(path)
    for index, chunk in enumerate(chunks):
        if chunk.startswith(f"[case {name}]\n"):
            chunks[index] = f"{chunk.partition('[out]')[0].rstrip()}\n[out]\n{text}\n\n"
    path.write_text("".join(chunks).rstrip() + "\n", encoding="utf-8")


def _chunks(path: Path) -> list[str]:
    """The prose before the first case, then one text per case."""
    return re.split(r"^(?=\[case )", path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def _read_case(chunk: str) -> Case:
    title, _, body = chunk.partition("\n")
    inputs, _, expected = body.partition("[out]\n")
    graph, bracket, plan = inputs.partition("[plan")
    return Case(title.removeprefix("[case ").removesuffix("]"), graph, bracket + plan, expected.strip("\n"))


def build_program(text: str, options: Options | None = None) -> Program:
    """A program from the text of a graph; plans are made by ``make_schedule`` or `with_plan`."""
    return _Builder(options or Options(compiler="eager")).build(text)


class _Builder:
    """Reads a graph line by line."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.weights: dict[str, WeightInput] = {}
        self.storages: dict[str, Weight] = {}
        self.shape_env = ShapeEnv()
        self.fake_mode = FakeTensorMode(shape_env=self.shape_env)

    def build(self, text: str) -> Program:
        for line in text.splitlines():
            if line.strip() and not line.startswith("#"):
                self._line(line.strip())
        self.graph.lint()
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        order = {name: index for index, name in enumerate(self.storages)}
        return Program(module, self.weights, self.options, str(DEVICE), wraps=True, model_order=order)

    def _line(self, line: str) -> None:
        code, _, comment = (part.strip() for part in line.partition("  #"))
        code, _, path = (part.strip() for part in code.partition(" @ "))
        if code.startswith("return "):
            self.graph.output(self._value(ast.parse(code.removeprefix("return "), mode="eval").body))
        elif re.match(r"\w+: ", code):
            name, _, kind = code.partition(": ")
            self._placeholder(name, kind, path, comment)
        else:
            self._call(code, path)

    def _placeholder(self, name: str, kind: str, path: str, comment: str) -> None:
        node = self._named(self.graph.placeholder(name), name)
        node.meta["val"] = value = self._fake_input(name, comment)
        if not kind.startswith("weight "):
            return
        weight_name = kind.removeprefix("weight ")
        weight = self.storages.setdefault(weight_name, Weight(weight_name, value.numel() * value.element_size()))
        self.weights[name] = WeightInput(weight, path or weight_name)

    def _fake_input(self, name: str, comment: str) -> Any:
        if comment.startswith("int "):
            hint, source = int(comment.removeprefix("int ")), ConstantSource(name)
            symbol = self.shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
            return self.shape_env.create_symintnode(symbol, hint=hint, source=source)
        match = re.fullmatch(r"(\w+)\[(.*)\]", comment)
        assert match, f"input {name} needs a comment like 'float32[2, 8]', not {comment!r}"
        sizes = [size.strip() for size in match[2].split(",") if size.strip()]
        shape: list[Any] = [int(size) if size.isdigit() else value_of(self.nodes[size]) for size in sizes]
        with self.fake_mode:
            return torch.empty(shape, dtype=getattr(torch, match[1]), device=DEVICE)

    def _call(self, code: str, path: str) -> None:
        match = re.fullmatch(r"(\w+) = ([\w.]+)\((.*)\)", code)
        assert match, f"not a line of a graph: {code!r}"
        call = ast.parse(f"call({match[3]})", mode="eval").body
        assert isinstance(call, ast.Call)
        args = tuple(map(self._value, call.args))
        kwargs = {str(keyword.arg): self._value(keyword.value) for keyword in call.keywords}
        target = _target(match[2])
        node = self._named(self.graph.create_node("call_function", target, args, kwargs, name=match[1]), match[1])
        with self.fake_mode:
            node.meta["val"] = target(*_values(args), **_values(kwargs))
        if path:
            node.meta["nn_module_stack"] = {"": (path, torch.nn.Module)}

    def _named(self, node: fx.Node, name: str) -> fx.Node:
        assert node.name == name, f"the name {name!r} is taken, or is none that torch.fx allows"
        self.nodes[name] = node
        return node

    def _value(self, tree: ast.expr) -> Any:
        if isinstance(tree, ast.Name):
            return DEVICE if tree.id == str(DEVICE) else self.nodes[tree.id]
        if isinstance(tree, ast.Attribute):  # torch.float32
            return getattr(torch, tree.attr)
        if isinstance(tree, ast.List):
            return [self._value(item) for item in tree.elts]
        if isinstance(tree, ast.Tuple):
            return tuple(self._value(item) for item in tree.elts)
        return ast.literal_eval(tree)


def _values(arguments: Any) -> Any:
    def value(node: fx.Node) -> Any:
        return value_of(node)

    return fx.map_arg(arguments, value)


def _target(name: str) -> Any:
    if "." not in name:
        return getattr(operator, name)
    target: Any = torch.ops
    for part in name.split("."):
        target = getattr(target, part)
    return target


def with_plan(plan: Plan, text: str) -> Plan:
    """The plan with its placement and schedule replaced by those of a ``[plan]`` text; pages without a line stay."""
    title, *lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    numbers = dict(word.split("=") for word in title.strip("[]").split()[1:])
    page_of = {page.name: index for index, page in enumerate(plan.pages)}
    intervals = []
    for line in lines:
        match = re.fullmatch(r"(.+): (-?\d+)\.\.(\d+) in slots ([\d ]+)", line)
        assert match, f"not an interval: {line!r}"
        slots = tuple(map(int, match[4].split()))
        intervals.append(Interval(page_of[match[1]], int(match[2]), int(match[3]), slots))
    streamed = {interval.page for interval in intervals}
    nbytes = max(plan.pages[page].slot_bytes for page in streamed)
    n_slots = 1 + max(slot for interval in intervals for slot in interval.slots)
    return replace(
        plan,
        k=int(numbers["k"]),
        m=int(numbers["m"]),
        wraps=numbers.get("wraps", "yes") == "yes",
        residents=tuple(page for page in range(len(plan.pages)) if page not in streamed),
        slots=tuple(Slot(index * nbytes, nbytes) for index in range(n_slots)),
        period=len(intervals[0].slots),
        intervals=tuple(intervals),
    )


def show_graph(program: Program) -> str:
    """`format_graph`, with a mark on views of weights that stay in place and sizes named after their inputs."""
    nodes = list(program.graph.nodes)
    lines = format_graph(program.graph)
    shown = [line + "  <- in place" * bool(node.meta.get(IN_PLACE)) for node, line in zip(nodes, lines, strict=True)]
    return _name_sizes("\n".join(shown), program.graph)


def show_layers(program: Program) -> str:
    """The graph with a heading wherever the label of the layer changes."""
    return _grouped(program.graph, {node: _layer_heading(node) for node in program.graph.nodes})


def show_schedule(program: Program) -> str:
    """The graph with a heading at each segment, then the pages and leftovers."""
    plan = program.planned()
    headings = {}
    for node in program.graph.nodes:
        if SEGMENT not in node.meta:
            headings[node] = "" if node.op in ("placeholder", "output") else "outer graph:"
            continue
        step = plan.steps[node.meta[SEGMENT]]
        place = "" if step.layer is None else f", layer {step.layer}"
        reads = ", ".join(plan.pages[page].name for page in step.reads) or "nothing"
        headings[node] = f"segment {step.segment}{place}, reads {reads}:"
    pages = [f"page {page.name}: {', '.join(weight.name for weight in page.weights)}" for page in plan.pages]
    leftovers = [f"leftover {weight.name}" for weight in plan.leftovers]
    return "\n".join([_grouped(program.graph, headings), *pages, *leftovers])


def show_segments(program: Program) -> str:
    """The outer graph, then each segment's own graph."""
    texts = [show_graph(program)]
    texts += [f"{name}:\n{_indented(format_graph(segment.graph))}" for name, segment in _segments(program)]
    return _name_sizes("\n".join(texts), program.graph)


def _segments(program: Program) -> Iterator[tuple[str, fx.GraphModule]]:
    for node in program.graph.find_nodes(op="call_module"):
        segment = getattr(program.module, str(node.target))
        assert isinstance(segment, fx.GraphModule)
        yield str(node.target), segment


def _layer_heading(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return ""
    return f"{node.meta[LAYER] or 'outside the layers'}:"


def _grouped(graph: fx.Graph, headings: Mapping[fx.Node, str]) -> str:
    shown: list[str] = []
    heading = ""
    for node, line in zip(graph.nodes, format_graph(graph), strict=True):
        if headings[node] and headings[node] != heading:
            shown.append(headings[node])
        heading = headings[node]
        shown.append(f"    {line}" if heading else line)
    return _name_sizes("\n".join(shown), graph)


def _indented(lines: list[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def _name_sizes(text: str, graph: fx.Graph) -> str:
    """Symbols of sizes are named by torch (``s77``): show the name of the input instead."""
    for node in graph.find_nodes(op="placeholder"):
        if isinstance(value_of(node), SCALARS):
            text = re.sub(rf"\b{value_of(node)}\b", node.name, text)
    return text
