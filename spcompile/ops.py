"""The nodes that the compiler writes into the outer graph.

Each is a plain function whose first argument is the graph's ``runtime`` attribute (a `Runtime`), so that the printed
code of the graph reads as what happens, line by line:

    runtime = self.runtime
    begin = begin(runtime, [w0, w1])
    prefetch = prefetch(runtime, 0, 'layers.0')           # start the copy on the side stream
    load = load(runtime, 0, 'layers.0')                   # compute waits for it; the weights as a tuple
    pack = pack(x, load)
    layers_0 = self.layers_0(pack)
    evict = evict(runtime, 0, 'layers.0')                 # the slot is free once compute gets here

and, in backward,

    send = send(runtime, 5, 'layers.0.backward', [g0, g1])   # start the copies of the gradients to host memory
    finish = finish(runtime)                                 # they are there; the graph returns them

The page's name is there for the reader of the graph. The nodes have side effects, so dead code elimination must not
touch them, and none of them may enter a segment: Inductor reorders side effects (design.md, decision 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx.node import has_side_effect


class Runtime(Protocol):
    """What the nodes ask of the runtime. ``interval`` indexes ``Plan.intervals``."""

    def begin(self, weights: Sequence[Tensor]) -> None: ...

    def prefetch(self, interval: int, ahead: int) -> None: ...

    def load(self, interval: int) -> tuple[Tensor, ...]: ...

    def evict(self, interval: int) -> None: ...

    def send(self, step: int, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]: ...

    def finish(self) -> None: ...


def begin(runtime: Runtime, weights: Sequence[Tensor]) -> None:
    """An iteration starts: pick its phase, look whether weights changed. ``weights`` are the graph's own arguments."""
    runtime.begin(weights)


def prefetch(runtime: Runtime, interval: int, _page: str, ahead: int = 0) -> None:
    """Start the copy of the page into its slot, for this iteration or (``ahead=1``) for the next one. A hint."""
    runtime.prefetch(interval, ahead)


def load(runtime: Runtime, interval: int, _page: str) -> tuple[Tensor, ...]:
    """Make compute wait for the copy (starting it now where no prefetch did), and return the page's weights."""
    return runtime.load(interval)


def evict(runtime: Runtime, interval: int, _page: str) -> None:
    """Give the slot back: whoever takes it next waits until compute has got here."""
    runtime.evict(interval)


def send(runtime: Runtime, step: int, _segment: str, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Start the copies of weights' gradients to host memory; returns the gradients there, which ``finish`` awaits."""
    return runtime.send(step, gradients)


def finish(runtime: Runtime) -> None:
    """Make compute wait for all gradients that were sent."""
    runtime.finish()


def pack(*values: Any) -> list[Any]:
    """The argument list of a segment, with the tuples that loads returned spread out.

    A segment empties the list it is given, so an activation dies inside the segment that reads it last instead of
    being held by the outer graph during the call.
    """
    if tuple not in map(type, values):  # nothing streamed: every microsecond counts where the host is the limit
        return list(values)
    flat: list[Any] = []
    for value in values:
        if isinstance(value, tuple):
            flat.extend(value)
        else:
            flat.append(value)
    return flat


TRANSFERS: tuple[Callable[..., Any], ...] = (begin, prefetch, load, evict, send, finish)
"""The nodes that speak to the runtime."""

for _op in TRANSFERS:
    has_side_effect(_op)


def is_op(node: torch.fx.Node, op: Callable[..., Any]) -> bool:
    """Whether the node calls this op."""
    return node.op == "call_function" and node.target is op
