"""Compile each distinct segment once.

Identical layers have identical sub-modules (``split_segments`` gives them canonical names), so a model of 32 layers
has three or four distinct ones; its first call costs what those cost (design.md, decision 15). The key of a segment is
its text: operators, arguments, constants, and shape, stride, dtype and device of every input.

Segments are compiled by Inductor's `compile_fx` (it keeps the strides that tracing recorded for the outputs, which the
next segment was compiled for; takes symbolic shapes; and runs the passes that lower dropout), or run as they are. What
`compile_fx` returns checks and wraps its arguments for autograd, aliasing and mutation. The split has settled all of
that, so a segment calls the generated code inside directly - except where an output is a view of an input, which those
wrappers take care of.
"""

from __future__ import annotations

import threading
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing

from spcompile.graph import memory_roots, tensors_of, value_of
from spcompile.passes.base import WEIGHT_INPUT
from spcompile.progress import progress

BoxedCallable = Callable[[list[Any]], Any]


INDUCTOR_CONFIG = {"size_asserts": False, "alignment_asserts": False}
"""What a segment's code need not check with each call, because the split has: that inputs have the sizes that they were
compiled for. A call costs 11.6 us with these checks and 2.0 without (docs/design.md, decision 14)."""


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
    """Start Inductor's worker processes, unless they run; they take seconds to come up."""
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
    known = ChainMap({}, shared), ChainMap({}, own)
    keyed = [(name, each, segment_key(each, compiler), known[_is_symbolic(each)]) for name, each in _segments_of(outer)]
    n_distinct = len({(key, id(compiled)) for _, _, key, compiled in keyed if key not in compiled})
    with (
        _kernels_awaited_together() if compiler == "inductor" else nullcontext(),
        progress(f"compiling segments, {n_distinct} distinct of {len(keyed)}", n_distinct, "segment") as advance,
    ):
        for name, segment, key, compiled in keyed:
            if key not in compiled:
                compiled[key] = CompiledSegment(_compile(segment, compiler))
                advance(1)
            setattr(outer, name, compiled[key])
    shared.update(known[0].maps[0])
    own.update(known[1].maps[0])


_LOCK = threading.RLock()
"""Held while Inductor's way of waiting is another one."""


@contextmanager
def _kernels_awaited_together() -> Iterator[None]:
    """Let Inductor go on to the next segment while its workers compile the kernels of those before; wait at the end.

    The code that Inductor generates ends in ``AsyncCompile.wait(globals())``, which puts the finished kernels in the
    place of their futures. A kernel takes about a second, most segments have few, and nothing runs before all are
    compiled. Other threads that compile wait as ever.
    """
    from torch._inductor.async_compile import AsyncCompile  # slow to import; only needed once compiling

    pending: list[tuple[AsyncCompile, dict[str, Any]]] = []
    thread = threading.get_ident()
    with _LOCK:
        wait = AsyncCompile.wait

        def put_off(self: AsyncCompile, scope: dict[str, Any]) -> None:
            if threading.get_ident() == thread:
                pending.append((self, scope))
            else:
                wait(self, scope)

        AsyncCompile.wait = put_off  # type: ignore[method-assign]
        try:
            yield
        finally:
            AsyncCompile.wait = wait  # type: ignore[method-assign]
        with progress("compiling kernels", len(pending), "segment") as advance:
            for compiling, scope in pending:
                wait(compiling, scope)
                advance(1)


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
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # slow to import; only needed once compiling

    segment.graph.set_codegen(fx.graph.CodeGen())  # Inductor calls it with plain arguments
    segment.recompile()
    placeholders = segment.graph.find_nodes(op="placeholder")
    inputs: list[Any] = [value_of(node) for node in placeholders]
    weights = [index for index, node in enumerate(placeholders) if node.name.startswith(WEIGHT_INPUT)]
    is_plain = not _returns_views_of_inputs(segment.graph)
    generated: list[BoxedCallable] = []

    def compile_inner(module: fx.GraphModule, examples: Sequence[Any], **kwargs: Any) -> Any:
        if len(examples) != len(inputs):
            return compile_fx_inner(module, examples, **kwargs)
        # A weight starts where a page's piece may start, so no call need look whether its address is a good one.
        code = compile_fx_inner(module, examples, **kwargs | {"static_input_idxs": weights})
        generated.append(code)
        return code

    # Without AOTAutograd's cache, which would return its wrappers and never ask for the code inside. Inductor's own
    # cache, of generated code, stays.
    with (
        torch.no_grad(),
        tracing(TracingContext(TracingContext.get().fake_mode)),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        wrapped: Any = compile_fx(segment, inputs, inner_compile=compile_inner, config_patches=INDUCTOR_CONFIG)
    if is_plain and len(generated) == 1:
        return generated[0]

    def call(values: list[Any]) -> Any:
        arguments = tuple(values)
        values.clear()
        return wrapped(*arguments)

    return call


def _returns_views_of_inputs(graph: fx.Graph) -> bool:
    roots = memory_roots(graph.nodes)
    outputs = graph.output_node().all_input_nodes
    return any(root.op == "placeholder" for node in outputs for root in roots[node])
