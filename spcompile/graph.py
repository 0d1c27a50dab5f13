"""Readers of ATen graphs: what a node aliases, writes, and depends on. They change nothing.

What may alias what is read from the operators' schemas, never from names: a new view op in torch is understood the day
it appears.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch.fx.experimental.symbolic_shapes import ShapeEnv

SCALARS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)

CHECKS = (
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
)
"""Operators that check a number and make nothing."""

CASTS = (torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default)
"""Operators that only change the dtype of a tensor (`_to_copy` is checked for its other arguments)."""

ANY_NUMBER = sys.maxsize - 1
"""torch's upper bound of sizes of which it knows none."""


def value_of(node: fx.Node) -> object:
    """The fake value that tracing recorded, or None."""
    return node.meta.get("val")


def is_scalar(node: fx.Node) -> bool:
    """Whether the node makes or checks a number (a size, say) and no tensor: such nodes stay in the outer graph."""
    return isinstance(value_of(node), SCALARS) or node.target in CHECKS


def tensors_of(node: fx.Node) -> tuple[torch.Tensor, ...]:
    """The fake tensors that a node produces: none for scalars, several for multi-output operators."""
    value = value_of(node)
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, (tuple, list)):
        return tuple(item for item in value if isinstance(item, torch.Tensor))
    return ()


def _schema(node: fx.Node) -> torch._C.FunctionSchema | None:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema
    return None


@functools.cache
def _aliased_arguments(target: torch._ops.OpOverload) -> tuple[tuple[int, str, bool], ...]:
    """Index and name of each argument that may share memory with a result, and whether it is written. Cached: reading
    a schema takes 40 us, and graphs have thousands of nodes of a few operators."""
    return tuple(
        (index, argument.name, argument.alias_info.is_write)
        for index, argument in enumerate(target._schema.arguments)
        if argument.alias_info is not None
    )


def _matched(node: fx.Node, *, written: bool) -> list[fx.Node]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    found: list[fx.Node] = []
    for index, name, is_written in _aliased_arguments(node.target):
        if is_written == written:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(name)
            found.extend(item for item in _flat(value) if isinstance(item, fx.Node))
    return found


def _flat(value: object) -> Iterable[object]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def written_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs that the node writes into (the destination of ``copy_``)."""
    return _matched(node, written=True)


def aliased_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs that the node's output may share memory with."""
    if node.op == "call_function" and node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return aliased_inputs(source) if _schema(source) is not None else [source]
    return _matched(node, written=False) + written_inputs(node)


def is_view(node: fx.Node) -> bool:
    """Whether the node is a view of an input: shares its memory, computes nothing, writes nothing."""
    if node.op != "call_function" or written_inputs(node):
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and is_view(source)
    return bool(aliased_inputs(node))


def is_cast(node: fx.Node) -> bool:
    """Whether the node only changes the dtype of its input."""
    if node.op != "call_function" or node.target not in CASTS:
        return False
    return all(name in ("dtype", "memory_format") for name in node.kwargs)


def is_deterministic_source(node: fx.Node) -> bool:
    """Whether the node makes the same tensor out of nothing each time (``full``): cheap to repeat anywhere."""
    schema = _schema(node)
    if schema is None or node.op != "call_function" or any(True for _ in node.all_input_nodes):
        return False
    return not schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags  # type: ignore[union-attr]


def memory_roots(nodes: Iterable[fx.Node]) -> dict[fx.Node, frozenset[fx.Node]]:
    """For each node, the nodes that own the memory it may share (itself where it owns its memory)."""
    roots: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in nodes:
        sources = [root for source in aliased_inputs(node) for root in roots.get(source, ())]
        roots[node] = frozenset(sources) if sources else frozenset((node,))
    return roots


def nbytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a fake tensor's elements; symbolic sizes count as `number_of` has them."""
    return int(number_of(tensor.numel())) * tensor.element_size()


def number_of(size: Any) -> float:
    """The number that a size stands for: a symbolic one for its value at capture."""
    if not isinstance(size, (torch.SymInt, torch.SymFloat)):
        return float(size)
    if size.node.hint is not None:
        return float(size.node.hint)
    return float(size.node.expr.xreplace(symbols_of(size)))


def symbols_of(size: torch.SymInt | torch.SymFloat) -> dict[sympy.Symbol, int]:
    """The symbols that a size is made of, and their values at capture.

    One that depends on the values of tensors has none. Where torch knows the most that it can be (of ``nonzero``: all
    elements; of what ``torch._check`` limits), it counts as that, otherwise as what Inductor takes it for.
    """
    shapes = size.node.shape_env
    return {symbol: _value_at_capture(shapes, symbol) for symbol in size.node.expr.free_symbols}


def _value_at_capture(shapes: ShapeEnv, symbol: sympy.Symbol) -> int:
    if symbol in shapes.backed_var_to_val:
        return int(shapes.backed_var_to_val[symbol])
    most = shapes.bound_sympy(symbol).upper
    return int(most) if most < ANY_NUMBER else int(inductor_config.unbacked_symint_fallback)
