"""Compile each distinct segment once.

Identical layers have identical sub-modules (``split_segments`` gives them canonical names), so a model of 32 layers
has three
or four distinct ones; its first call costs what those cost (design.md, decision 4). The key of a segment is its text:
operators, arguments, constants, and shape, stride, dtype and device of every input.

Segments are compiled by `torch._inductor.standalone_compile` (it keeps the strides that tracing recorded for the
outputs, which the next segment was compiled for; takes symbolic shapes; and runs the passes that lower dropout), or
run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from spcompile.graph import tensors_of, value_of

BoxedCallable = Callable[[list[Any]], Any]


INDUCTOR_OPTIONS = {"config_patches": {"size_asserts": False, "alignment_asserts": False}}
"""What a segment's code need not check with each call, because the split has: that inputs have the sizes that they were
compiled for. A call costs 11.6 us with these checks and 2.0 without (design.md, decisions)."""


class CompiledSegment(torch.nn.Module):
    """What a segment call runs: takes the list that ``pack`` made, empties it, returns a tuple."""

    def __init__(self, call: BoxedCallable) -> None:
        super().__init__()
        self.call = call

    def __call__(self, values: list[Any]) -> Any:
        """Without a module's hooks, which nobody can set here and which cost more than some segments."""
        return self.forward(values)

    def forward(self, values: list[Any]) -> Any:
        return self.call(values)


def warm_up_inductor() -> None:
    """Start Inductor's worker processes, which take seconds to come up; they do so while the graph is still traced."""
    from torch._inductor.async_compile import maybe_warm_pool  # slow to import; only needed once compiling

    maybe_warm_pool()


def compile_segments(
    outer: fx.GraphModule, compiler: str, shared: dict[str, torch.nn.Module], own: dict[str, torch.nn.Module]
) -> None:
    """Replace every segment of the outer graph by its compiled form, each distinct one compiled once.

    Args:
        outer: the outer graph module; its segments are replaced in place.
        compiler: one of `spcompile.options.COMPILERS`.
        shared: compiled segments of all graphs of the model, by key.
        own: those of this capture alone. Segments with symbolic sizes go here: what Inductor assumes about a symbol
            becomes a guard of the capture that it was compiled for, and another capture would not check it.
    """
    for name, segment in _segments_of(outer):
        compiled = own if _is_symbolic(segment) else shared
        key = segment_key(segment, compiler)
        if key not in compiled:
            compiled[key] = CompiledSegment(_compile(segment, compiler))
        setattr(outer, name, compiled[key])


def _is_symbolic(segment: fx.GraphModule) -> bool:
    return any(
        isinstance(size, torch.SymInt)
        for node in segment.graph.nodes
        for tensor in tensors_of(node)
        for size in (*tensor.shape, *tensor.stride())
    )


def _segments_of(outer: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """Name and module of each segment that is not compiled yet, in order of the calls."""
    for node in outer.graph.find_nodes(op="call_module"):
        module = getattr(outer, str(node.target))
        if isinstance(module, fx.GraphModule):
            yield str(node.target), module


def segment_key(segment: fx.GraphModule, compiler: str) -> str:
    """Text that is equal exactly for segments that may share one compiled form."""
    lines = [compiler]
    for node in segment.graph.nodes:
        if node.op == "get_attr":  # the body of a higher-order operator
            lines.append(f"{node.name}: {segment_key(getattr(segment, str(node.target)), compiler)}")
            continue
        lines.append(f"{node.name}: {node.op} {node.target} {node.args} {node.kwargs} {_meta_text(value_of(node))}")
    return "\n".join(lines)


def _meta_text(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()} {value.storage_offset()}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_meta_text, value))}]"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return str(value.node.expr)
    return repr(value)


def _compile(segment: fx.GraphModule, compiler: str) -> BoxedCallable:
    if compiler != "inductor":
        return _boxed_interpreter(segment)
    return _compile_with_inductor(segment)


def _boxed_interpreter(segment: fx.GraphModule) -> BoxedCallable:
    def call(values: list[Any]) -> Any:
        with torch.no_grad():
            return segment.forward(values)

    return call


def _compile_with_inductor(segment: fx.GraphModule) -> BoxedCallable:
    segment.graph.set_codegen(fx.graph.CodeGen())  # Inductor calls it with plain arguments
    segment.recompile()
    inputs: list[Any] = [value_of(node) for node in segment.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        artifact = torch._inductor.standalone_compile(
            segment, inputs, dynamic_shapes="from_tracing_context", options=INDUCTOR_OPTIONS
        )

    def call(values: list[Any]) -> Any:
        arguments = tuple(values)
        values.clear()
        return artifact(*arguments)

    return call
