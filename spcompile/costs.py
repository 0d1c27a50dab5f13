"""What the segments of a graph cost before any of it has run: memory while they run, and time.

What: for each segment the most bytes that values other than weights take at once, as polynomials in the graph's own
symbolic sizes, and the time of the kernels that it will run.

How: Inductor fuses what is pointwise, a gather or a reduction, so most values never reach memory. A value is *stored*
if an operator of a library makes it (a matrix product, convolution, attention), or if one reads it, or a later segment,
or the caller, or a kernel that can only start after such an operator. Everything else lives in registers, and what it
was made of has to stay until the stored values made of it are there. Liveness then goes over the stored values alone,
in program order. A kernel's results are counted beside its inputs: Inductor rarely writes over them.

Why polynomials of our own: the sum changes at every stored value, and sympy takes milliseconds for what is an addition
of dictionaries. Each size is expanded by sympy once; a maximum keeps only the sums that no other one covers.

The odd cases: a size that is no polynomial (``(s0 + 1) // 2``) counts as a symbol of its own. An operator that is not
known to be fused is taken for one of a library.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from spcompile.graph import memory_roots, nbytes_of, tensors_of, written_inputs
from spcompile.ir import Machine
from spcompile.planner.machine import kernel_time_us
from spcompile.sizes import Polynomial

aten = torch.ops.aten

GATHERS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default)
"""Operators that read no more of their first input than they return."""

FUSED = frozenset((
    *GATHERS,
    *(aten.full.default, aten.scalar_tensor.default, aten.arange.default, aten.arange.start_step, aten.rand.default),
    *(aten.cat.default, aten.constant_pad_nd.default, aten.flip.default, aten.repeat.default),
    *(aten.native_dropout.default, aten.slice_scatter.default, aten.select_scatter.default),
    torch.ops.prims.iota.default,
    *(aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default, aten.amax.default, aten.amin.default),
    *(aten.var_mean.correction, aten.var.correction, aten.any.dim, aten.any.default, aten.argmax.default),
))  # fmt: skip
"""Operators that Inductor fuses, beside those tagged as pointwise or reductions."""


@dataclass(frozen=True)
class SegmentCost:
    """What one segment costs.

    Attributes:
        activations: the candidates for the most bytes that stored values take at once, those of other segments
            included.
        activations_bytes: the most of them with the sizes at capture.
        compute_us: time of its kernels, one after the other.
        uses_libraries: whether a library runs some of them.
    """

    activations: tuple[Polynomial, ...]
    activations_bytes: int
    compute_us: float
    uses_libraries: bool


def segment_costs(
    graph: fx.Graph,
    segments: Sequence[Sequence[fx.Node]],
    machine: Machine,
    is_fused: bool = True,
) -> list[SegmentCost]:
    """The costs of all segments of an ATen graph.

    Args:
        graph: before it is split.
        segments: the nodes of each segment, in program order.
        machine: for the times.
        is_fused: whether Inductor compiles the segments. Otherwise every operator stores what it makes.
    """
    return _Costs(graph, segments, machine, is_fused).run()


class _Costs:
    def __init__(
        self,
        graph: fx.Graph,
        segments: Sequence[Sequence[fx.Node]],
        machine: Machine,
        is_fused: bool,
    ) -> None:
        self.nodes = list(graph.nodes)
        self.segments = segments
        self.machine = machine
        self.is_fused = is_fused
        self.roots = memory_roots(self.nodes)
        self.segment_of = {node: index for index, nodes in enumerate(segments) for node in nodes}
        self.level = self._levels()
        self.stored = self._stored()
        self.reads = self._reads()

    def run(self) -> list[SegmentCost]:
        freed_after = self._freed_after()
        live: dict[str, int] = {}
        live_bytes = 0
        costs = []
        for nodes in self.segments:
            peaks: dict[Polynomial, int] = {_frozen(live): live_bytes}
            compute_us = 0.0
            for node in nodes:
                if node in self.stored:
                    compute_us += self._kernel_us(node)
                    _add(live, _size(node), 1)
                    live_bytes += _nbytes(node)
                    peaks[_frozen(live)] = live_bytes
                for root in freed_after.get(node, ()):
                    _add(live, _size(root), -1)
                    live_bytes -= _nbytes(root)
            uses_libraries = any(map(_is_of_library, nodes))
            costs.append(SegmentCost(largest(peaks), max(peaks.values()), compute_us, uses_libraries))
        return costs

    def _levels(self) -> dict[fx.Node, int]:
        """How many operators of libraries lie behind each value, at most: a kernel fuses values of one level."""
        levels: dict[fx.Node, int] = {}
        for node in self.nodes:
            inputs = node.all_input_nodes
            behind = max((levels[each] for each in inputs), default=0)
            levels[node] = behind + _is_of_library(node)
        return levels

    def _stored(self) -> frozenset[fx.Node]:
        """The owners of memory whose values reach it."""
        stored: set[fx.Node] = set()
        for node in self.nodes:
            if node not in self.segment_of:
                continue
            if _is_of_library(node) or not self.is_fused:
                stored.update(self.roots[node])
            for source in node.all_input_nodes:
                if self._must_reach_memory(source, node):
                    stored.update(self.roots[source])
        for source in self.nodes[-1].all_input_nodes:
            stored.update(self.roots[source])
        return frozenset(node for node in stored if node.op == "call_function" and node in self.segment_of)

    def _must_reach_memory(self, source: fx.Node, reader: fx.Node) -> bool:
        if _is_of_library(reader) or written_inputs(reader):
            return True
        if self.segment_of.get(source) != self.segment_of[reader]:
            return True
        return self.level[reader] > self.level[source]

    def _reads(self) -> dict[fx.Node, frozenset[fx.Node]]:
        """For each node, what of memory it is computed from: stored values, weights and inputs."""
        reads: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self.nodes:
            found: set[fx.Node] = set()
            for source in node.all_input_nodes:
                for root in self.roots[source]:
                    found |= {root} if root in self.stored or root.op == "placeholder" else reads[root]
            reads[node] = frozenset(found)
        return reads

    def _freed_after(self) -> dict[fx.Node, list[fx.Node]]:
        """Which stored values are over after each node: when the last stored value made of them is there."""
        last: dict[fx.Node, fx.Node] = {node: node for node in self.stored}
        returned = {root for source in self.nodes[-1].all_input_nodes for root in self.roots[source]}
        for node in self.nodes:
            if node in self.stored or written_inputs(node):
                for root in self.reads[node] & self.stored:
                    last[root] = node
        freed: dict[fx.Node, list[fx.Node]] = {}
        for root, node in last.items():
            if root not in returned:
                freed.setdefault(node, []).append(root)
        return freed

    def _kernel_us(self, node: fx.Node) -> float:
        gathered = node.all_input_nodes[:1] if node.target in GATHERS else []
        inputs = [each for each in self.reads[node] if each not in gathered]
        traffic_bytes = _nbytes(node) + sum(map(_nbytes, inputs))
        operands = [tensor for each in node.all_input_nodes for tensor in tensors_of(each)]
        dtype = str(operands[0].dtype).removeprefix("torch.") if operands else ""
        return kernel_time_us(self.machine, dtype, _flops(node), traffic_bytes)


def _is_of_library(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return _is_library_operator(node.target) and bool(tensors_of(node))


@functools.cache
def _is_library_operator(target: torch._ops.OpOverload) -> bool:
    if target in FUSED or {"pointwise", "reduction"} & {tag.name for tag in target.tags}:
        return False
    # What aliases is a view, or writes where it reads.
    return all(argument.alias_info is None for argument in target._schema.arguments)


def _flops(node: fx.Node) -> float:
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0.0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: each.meta.get("val"))
    return float(_hint(formula(*args, **kwargs, out_val=node.meta.get("val"))))


def _hint(number: Any) -> float:
    return float(number.node.hint or 0) if isinstance(number, (torch.SymInt, torch.SymFloat)) else float(number)


def _nbytes(node: fx.Node) -> int:
    return sum(map(nbytes_of, tensors_of(node)))


def _size(node: fx.Node) -> Mapping[str, int]:
    size: dict[str, int] = {}
    for tensor in tensors_of(node):
        numel: Any = tensor.numel()
        expression = numel.node.expr if isinstance(numel, torch.SymInt) else sympy.Integer(numel)
        _add(size, _monomials(expression), tensor.element_size())
    return size


@functools.lru_cache(maxsize=4096)
def _monomials(expression: sympy.Expr) -> Mapping[str, int]:
    terms = sympy.expand(expression).as_coefficients_dict()
    return {str(monomial): int(coefficient) for monomial, coefficient in terms.items()}


def _add(total: dict[str, int], size: Mapping[str, int], factor: int) -> None:
    for monomial, count in size.items():
        total[monomial] = total.get(monomial, 0) + factor * count
        if not total[monomial]:
            del total[monomial]


def _frozen(total: Mapping[str, int]) -> Polynomial:
    return tuple(sorted(total.items()))


def total_size(nodes: Iterable[fx.Node]) -> Polynomial:
    """Bytes of all tensors that these nodes produce."""
    total: dict[str, int] = {}
    for node in nodes:
        _add(total, _size(node), 1)
    return _frozen(total)


def symbol_hints(graph: fx.Graph) -> tuple[tuple[str, int], ...]:
    """The graph's symbolic sizes by name, as they were at capture."""
    hints: dict[str, int] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        sizes = [size for tensor in tensors_of(node) for size in (*tensor.shape, *tensor.stride())]
        for size in (value, *sizes):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                hints[str(size.node.expr)] = int(size.node.hint or 0)
    return tuple(sorted(hints.items()))


def largest(candidates: Iterable[Polynomial]) -> tuple[Polynomial, ...]:
    """Those that no other one covers: sizes are never negative, so a sum with larger coefficients is larger."""
    kept: list[Polynomial] = []
    for candidate in sorted(set(candidates), key=lambda each: -sum(count for _, count in each)):
        if not any(_covers(other, candidate) for other in kept):
            kept.append(candidate)
    return tuple(kept)


def _covers(one: Polynomial, other: Polynomial) -> bool:
    counts = dict(one)
    return all(counts.get(monomial, 0) >= count for monomial, count in other)
