"""Run an outer graph on the emulated device: queue everything first, then let the seeded scheduler execute it.

A GPU's host runs ahead: when it issues a copy, the compute that it enqueued before has mostly not happened yet. So the
whole iteration is queued node by node - transfers speak to the runtime at once, as they do on a GPU; everything else
becomes a piece of compute - and only then drained. See ``streams.py``.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from spcompile import ops
from spcompile.runtime.streams import Deferred, EmulatedStreams
from spcompile.runtime.transfers import Transfers


def run_emulated(
    module: fx.GraphModule,
    runtime: Transfers,
    streams: EmulatedStreams,
    args: list[Any],
    segments: Mapping[str, int],
) -> Any:
    """One iteration of the outer graph; ``args`` is emptied, as a compiled function empties its boxed arguments.

    ``segments``: see `spcompile.runtime.transfers.Layout`.
    """
    values: dict[fx.Node, Any] = {}
    arguments = iter(list(args))
    args.clear()
    last_use = _last_uses(module.graph)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(arguments)
        elif node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(module)
        elif ops.is_op(node, ops.send):
            values[node] = _send(node, values, runtime, streams, last_use.get(node, ()))
        elif node.op == "call_function" and node.target in ops.TRANSFERS:
            values[node] = _call(module, node, values)
        elif node.op != "output":
            if node.op == "call_module":
                runtime.note("run", str(node.target))
            streams.run(_Compute(module, node, values, last_use.get(node, ())))
            if node.op == "call_module" and runtime.store.recorder is not None:
                runtime.store.recorder.ran(segments[str(node.target)])
    streams.drain()
    output = module.graph.output_node()
    return fx.map_arg(output.args[0], values.__getitem__)


def _send(
    node: fx.Node,
    values: dict[fx.Node, Any],
    runtime: Transfers,
    streams: EmulatedStreams,
    dying: Sequence[fx.Node],
) -> tuple[Tensor, ...]:
    """What compute has yet to make is sent as a promise, which compute keeps when it gets here."""
    gradients = node.args[3]
    assert isinstance(gradients, (list, tuple))
    promised = [Deferred() for _ in gradients]

    def keep() -> None:
        for promise, gradient in zip(promised, gradients, strict=True):
            promise.tensor = values[gradient]
        for each in dying:
            del values[each]

    streams.run(keep)
    return runtime.send(node.args[1], promised)  # type: ignore[arg-type]


class _Compute:
    """One node, run when its turn comes."""

    def __init__(
        self, module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], dying: Sequence[fx.Node]
    ) -> None:
        self.module, self.node, self.values, self.dying = module, node, values, dying

    def __call__(self) -> None:
        self.values[self.node] = _call(self.module, self.node, self.values)
        for node in self.dying:
            del self.values[node]


def _call(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args = fx.map_arg(node.args, values.__getitem__)
    kwargs = fx.map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        return module.get_submodule(str(node.target))(*args, **kwargs)
    assert callable(node.target)
    with torch.no_grad():
        return node.target(*args, **kwargs)


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Which values each node reads last."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        if node.op != "output" and source.op != "get_attr":
            dying.setdefault(node, []).append(source)
    return dying
