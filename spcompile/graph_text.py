"""Print a graph, one line per node: for messages of the verifier, logs, and golden tests.

FX has printers of its own; this one keeps to one line per node, so that a line number names a node, and shows what this
project's readers look for: shapes, and the transfer nodes as calls.
"""

from __future__ import annotations

import torch
from torch import fx

from spcompile.graph import tensors_of


def format_graph(graph: fx.Graph) -> list[str]:
    """One line per node, in order: ``mm = aten.mm.default(view, t)  # f32[8, 16]``. Stable, for tests and messages."""
    return [_format_node(node) for node in graph.nodes]


def _format_node(node: fx.Node) -> str:
    note = ", ".join(_format_value(value) for value in tensors_of(node))
    comment = f"  # {note}" if note else ""
    if node.op == "placeholder":
        return f"{node.name}: input{comment}"
    if node.op == "get_attr":
        return f"{node.name} = self.{node.target}"
    if node.op == "output":
        return f"return {node.args[0]}"
    args = [*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items())]
    target = f"self.{node.target}" if node.op == "call_module" else _format_target(node.target)
    return f"{node.name} = {target}({', '.join(args)}){comment}"


def _format_target(target: object) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def _format_value(tensor: torch.Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind}[{', '.join(map(str, tensor.shape))}]"
