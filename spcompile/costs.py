"""What the segments of a graph cost before any of it has run: memory while they run, and time.

What: for each segment the most bytes that values other than weights take at once, as polynomials in the graph's own
symbolic sizes, and the time of the kernels that it will run.

How: Inductor fuses what is pointwise, a gather or a reduction, so most values never reach memory. A value is *stored*
if an operator of a library makes it (a matrix product, convolution, attention), or if one reads it, or a later segment,
or the caller, or a kernel that can only start after such an operator. (Not the latter if little is read for it: then
each kernel computes it again, as the residual of a layer.) Everything else lives in registers, and what it was made of
has to stay until the stored values made of it are there. Liveness goes over the stored values alone, in program order,
and is corrected for memory that is used twice: a kernel writes over what it reads for the last time, element by
element; else a result takes memory of its size that fell free before, if keeping it for that does not raise the peak.

Why polynomials of our own: the sum changes at every stored value, and sympy takes milliseconds for what is an addition
of dictionaries. Each size is expanded by sympy once; a maximum keeps only the sums that no other one covers.

The odd cases: a size that is no polynomial (``(s0 + 1) // 2``) counts as a symbol of its own. An operator that is not
known to be fused is taken for one of a library.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from spcompile.graph import memory_roots, nbytes_of, number_of, symbols_of, tensors_of, written_inputs
from spcompile.ir import Machine
from spcompile.planner.machine import kernel_time_us
from spcompile.sizes import Polynomial

aten = torch.ops.aten

GATHERS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default)
"""Operators that read no more of their first input than they return."""

PRODUCTS = frozenset((aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default))
"""Operators of libraries whose result is dense, in the order of its elements."""

CONVOLUTIONS = frozenset((aten.convolution.default, aten._convolution.default))
"""Their input and weight may be copied before: Inductor has the channels last."""

RESHAPES = frozenset((aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default))
"""Views that leave the elements in their order."""

FEW_READS, FEW_OPERATORS = 4, 30
"""A pointwise value that is made of so few others, by so few operators, is computed again by each kernel that reads it
(Inductor's ``realize_reads_threshold`` and ``realize_opcount_threshold``)."""

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
    sent: Sequence[Collection[fx.Node]] = (),
) -> list[SegmentCost]:
    """The costs of all segments of an ATen graph.

    Args:
        graph: before it is split.
        segments: the nodes of each segment, in program order.
        machine: for the times.
        is_fused: whether Inductor compiles the segments. Otherwise every operator stores what it makes.
        sent: by segment, what it makes that leaves for host memory: gone from the device once the next segment that
            sends something has run.
    """
    return _Costs(graph, segments, machine, is_fused, sent).run()


class _Amount:
    """Bytes of the values that are live: as a sum of monomials, and with the sizes at capture."""

    def __init__(self, terms: dict[str, int], nbytes: int) -> None:
        self.terms = terms
        self.nbytes = nbytes

    def copy(self) -> _Amount:
        return _Amount(dict(self.terms), self.nbytes)

    def add(self, node: fx.Node, factor: int) -> None:
        _add(self.terms, _size(node), factor)
        self.nbytes += factor * _nbytes(node)

    def polynomial(self) -> Polynomial:
        return _frozen(self.terms)


class _Kernel(NamedTuple):
    """The stored value that a kernel makes (None: what a segment begins with), and those that are over after it."""

    makes: fx.Node | None
    frees: list[fx.Node]


class _Costs:
    def __init__(
        self,
        graph: fx.Graph,
        segments: Sequence[Sequence[fx.Node]],
        machine: Machine,
        is_fused: bool,
        sent: Sequence[Collection[fx.Node]],
    ) -> None:
        self.sent = sent
        self.nodes = list(graph.nodes)
        self.segments = segments
        self.machine = machine
        self.is_fused = is_fused
        self.roots = memory_roots(self.nodes)
        self.segment_of = {node: index for index, nodes in enumerate(segments) for node in nodes}
        self.level = self._levels()
        self.stored: set[fx.Node] = set()
        self.reads: dict[fx.Node, frozenset[fx.Node]] = {}
        self._find_stored()

    def run(self) -> list[SegmentCost]:
        freed_after = self._freed_after()
        live = _Amount({}, 0)
        costs = []
        for nodes in self.segments:
            kernels, moments = [_Kernel(None, [])], [live.copy()]
            for node in nodes:
                if node in self.stored:
                    live.add(node, 1)
                    kernels.append(_Kernel(node, []))
                    moments.append(live.copy())
                    if node.target in CONVOLUTIONS and self.is_fused:
                        for operand in node.all_input_nodes[:2]:
                            moments[-1].add(operand, 1)
                for root in freed_after.get(node, ()):
                    live.add(root, -1)
                    kernels[-1].frees.append(root)
            if self.is_fused:
                self._reuse(kernels, moments)
            compute_us = sum(self._kernel_us(kernel.makes) for kernel in kernels[1:] if kernel.makes is not None)
            peaks = largest(moment.polynomial() for moment in moments)
            uses_libraries = any(map(_is_of_library, nodes))
            costs.append(SegmentCost(peaks, max(each.nbytes for each in moments), compute_us, uses_libraries))
        return costs

    def _reuse(self, kernels: Sequence[_Kernel], moments: Sequence[_Amount]) -> None:
        """Correct what is live at each moment for the memory that Inductor gives to a second value.

        A kernel writes over what it reads last where it can. Otherwise it takes memory of just its size that fell free
        before, which so was kept in between: but only if that does not raise the peak, as Inductor predicts it.
        """
        predicted_bytes = [moment.nbytes for moment in moments]
        most_bytes = max(predicted_bytes)
        pool: dict[tuple[torch.dtype, str], list[int]] = {}
        for index, (makes, frees) in enumerate(kernels):
            overwritten = None
            key = _memory_key(makes) if makes is not None else None
            if makes is not None and key is not None:
                nbytes = _nbytes(makes)
                overwritten = self._overwritten(makes, frees)
                if overwritten is not None:
                    moments[index].add(makes, -1)
                elif pool.get(key) and (
                    pool[key][-1] + 1 == index or max(predicted_bytes[pool[key][-1] + 1 : index]) + nbytes <= most_bytes
                ):
                    for between in range(pool[key].pop() + 1, index):
                        predicted_bytes[between] += nbytes
                        moments[between].add(makes, 1)
            for root in frees:
                freed_key = _memory_key(root)
                if root is not overwritten and freed_key is not None and self._is_of_segment(root, makes):
                    pool.setdefault(freed_key, []).append(index)

    def _is_of_segment(self, root: fx.Node, makes: fx.Node | None) -> bool:
        return makes is not None and self.segment_of.get(root) == self.segment_of[makes]

    def _levels(self) -> dict[fx.Node, int]:
        """How many operators of libraries lie behind each value in its segment, at most: a kernel fuses values of one
        level."""
        levels: dict[fx.Node, int] = {}
        for node in self.nodes:
            here = self.segment_of.get(node)
            inputs = (each for each in node.all_input_nodes if self.segment_of.get(each) == here)
            behind = max((levels[each] for each in inputs), default=0)
            levels[node] = behind + _is_of_library(node)
        return levels

    def _find_stored(self) -> None:
        """Which owners of memory have values that reach it; and for each node, what of memory it is computed from:
        stored values, weights and inputs."""
        readers: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}  # by owner: what is read of it, and by whom
        for node in self.nodes:
            for source in node.all_input_nodes:
                for root in self.roots[source]:
                    readers.setdefault(root, []).append((source, node))
        operators: dict[fx.Node, int] = {}
        for node in self.nodes:
            behind = {root for source in node.all_input_nodes for root in self.roots[source]}
            fused = {root for root in behind if root not in self.stored and root.op != "placeholder"}
            self.reads[node] = frozenset(behind - fused).union(*(self.reads[root] for root in fused))
            operators[node] = 1 + sum(operators[root] for root in fused)
            if node in self.segment_of and node in self.roots[node] and node.op == "call_function":
                repeatable = (
                    _is_pointwise(node) and len(self.reads[node]) <= FEW_READS and operators[node] <= FEW_OPERATORS
                )
                if self._is_stored(node, readers.get(node, ()), repeatable):
                    self.stored.add(node)

    def _is_stored(self, node: fx.Node, readers: Iterable[tuple[fx.Node, fx.Node]], repeatable: bool) -> bool:
        if _is_of_library(node) or not self.is_fused:
            return True
        return any(self._must_reach_memory(source, reader, repeatable) for source, reader in readers)

    def _must_reach_memory(self, source: fx.Node, reader: fx.Node, repeatable: bool) -> bool:
        if reader.op == "output" or _is_of_library(reader) or written_inputs(reader):
            return True
        if self.segment_of.get(source) != self.segment_of.get(reader):
            return True
        # What little a later kernel would have to read again is computed again.
        return self.level[reader] > self.level[source] and not repeatable

    def _freed_after(self) -> dict[fx.Node, list[fx.Node]]:
        """Which stored values are over after each node: when the last stored value made of them is there."""
        last: dict[fx.Node, fx.Node] = {node: node for node in self.stored}
        returned = {root for source in self.nodes[-1].all_input_nodes for root in self.roots[source]}
        for root, gone in self._gone_after():
            if root in self.stored:
                last[root] = gone
                returned.discard(root)
        for node in self.nodes:
            if node in self.stored or written_inputs(node):
                for root in self.reads[node] & self.stored:
                    last[root] = max(last[root], node)
        freed: dict[fx.Node, list[fx.Node]] = {}
        for root, node in last.items():
            if root not in returned:
                freed.setdefault(node, []).append(root)
        return freed

    def _gone_after(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """The owners of what is sent, each with the last node of the next segment that sends something."""
        senders = [index for index, gradients in enumerate(self.sent) if gradients]
        for index, following in pairwise([*senders, len(self.segments) - 1]):
            for root in {root for gradient in self.sent[index] for root in self.roots[gradient]}:
                yield root, self.segments[following][-1]

    def _overwritten(self, node: fx.Node, freed: Sequence[fx.Node]) -> fx.Node | None:
        """The value that is read for the last time by the kernel of ``node``, which writes its result over it.

        Inductor does so where the kernel reads and writes each element at the same place, and nothing else that is not
        done yet reads the value. What it is handed from outside it leaves alone.
        """
        if not self.is_fused or not _is_pointwise(node):
            return None
        for root in freed:
            same = root.op == "call_function" and self.segment_of[root] == self.segment_of[node]
            if same and (root.target in PRODUCTS or not _is_of_library(root)) and self._reads_in_order(node, root):
                return root
        return None

    def _reads_in_order(self, node: fx.Node, root: fx.Node) -> bool:
        """Whether all that reads ``root`` is done before the kernel of ``node``, or leads to it element by element."""
        if _memory_key(root) != _memory_key(node) or not all(map(_is_dense, (root, node))):
            return False
        done = {each for each in self._ancestors(node, root) if self.level[each] < self.level[node]}
        waiting, seen = [root], {root, node}
        while waiting:
            for user in waiting.pop().users:
                if user in seen:
                    continue
                seen.add(user)
                is_fused_in_order = user not in self.stored and _is_elementwise(user, root)
                if is_fused_in_order:
                    waiting.append(user)
                elif user not in done:
                    return False
        return True

    def _ancestors(self, node: fx.Node, since: fx.Node) -> set[fx.Node]:
        """What ``node`` is computed from, as far as it comes after ``since``."""
        found: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            for source in waiting.pop().all_input_nodes:
                if source not in found and source > since:
                    found.add(source)
                    waiting.append(source)
        return found

    def _kernel_us(self, node: fx.Node) -> float:
        gathered = node.all_input_nodes[:1] if node.target in GATHERS else []
        inputs = [each for each in self.reads[node] if each not in gathered]
        traffic_bytes = _nbytes(node) + sum(map(_nbytes, inputs))
        operands = [tensor for each in node.all_input_nodes for tensor in tensors_of(each)]
        dtype = str(operands[0].dtype).removeprefix("torch.") if operands else ""
        return kernel_time_us(self.machine, dtype, _flops(node), traffic_bytes)


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _is_dense(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_contiguous()


def _memory_key(node: fx.Node) -> tuple[torch.dtype, str] | None:
    """What two values must have in common for one to get the memory of the other."""
    value = node.meta.get("val")
    return (value.dtype, str(value.numel())) if isinstance(value, torch.Tensor) else None


def _is_elementwise(node: fx.Node, source: fx.Node) -> bool:
    """Whether each element of a node is made of the element of ``source`` at the same place."""
    same_size = [tensor.numel() for tensor in tensors_of(node)] == [tensor.numel() for tensor in tensors_of(source)]
    return node.target in RESHAPES or (_is_pointwise(node) and same_size)


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
    return number_of(formula(*args, **kwargs, out_val=node.meta.get("val")))


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


def symbol_values(graph: fx.Graph) -> tuple[tuple[str, int], ...]:
    """The graph's symbolic sizes by name, as they were at capture."""
    values: dict[str, int] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        sizes = [size for tensor in tensors_of(node) for size in (*tensor.shape, *tensor.stride())]
        for size in (value, *sizes):
            if isinstance(size, torch.SymInt):
                values.update((str(symbol), number) for symbol, number in symbols_of(size).items())
    return tuple(sorted(values.items()))


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
