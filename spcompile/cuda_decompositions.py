"""Decompositions as for CUDA, traced where there is no CUDA.

Some of Inductor's decompositions ask which device a tensor is on, and some of its passes over a training graph act on
a GPU's operators only. Without a GPU a graph is traced with CPU tensors; this is what makes it come out as a GPU's:

- a product with one row is a product, not a sum of products;
- a norm keeps its statistics in the precision in which it computed them (fp32 for bf16);
- the gradient of a convolution's bias is a sum of its own;
- in training, a batched product of one batch is a product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._prims_common import get_computation_dtype
from torch.fx.experimental.symbolic_shapes import statically_known_true

from spcompile.graph import tensors_of, value_of

aten = torch.ops.aten

Table = dict[Any, Callable[..., Any]]

PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1}
"""Products of matrices, and which argument is the left matrix."""

BATCH_NORMS = (
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit_functional.default,
)


def as_for_cuda(table: Table) -> Table:
    """A copy of a table of decompositions that treats CPU tensors as CUDA's."""
    changed = {op: _without_single_rows(table[op], left) for op, left in PRODUCTS.items() if op in table}
    changed |= {op: _batch_norm(table[op]) for op in BATCH_NORMS if op in table}
    changed[aten.native_layer_norm.default] = _with_precise_statistics(table[aten.native_layer_norm.default])
    changed[aten.convolution_backward.default] = _convolution_backward
    return table | changed


def _without_single_rows(decompose: Callable[..., Any], left: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if statically_known_true(args[left].size(-2) == 1):
            return NotImplemented
        return decompose(*args, **kwargs)

    return run


def _with_precise_statistics(decompose: Callable[..., Any]) -> Callable[..., Any]:
    def run(values: Tensor, *args: Any, **kwargs: Any) -> Any:
        result, *statistics = decompose(values.to(get_computation_dtype(values.dtype)), *args, **kwargs)
        return result.to(values.dtype), *statistics

    return run


def _batch_norm(decompose: Callable[..., Any]) -> Callable[..., Any]:
    precise = _with_precise_statistics(decompose)

    def run(values: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *rest: Any) -> Any:
        chosen = precise if training else decompose  # evaluation makes no statistics
        return chosen(values, weight, bias, mean, variance, training, *rest)

    return run


def _convolution_backward(gradient: Tensor, *args: Any) -> Any:
    *others, (wants_input, wants_weight, wants_bias) = args
    if not wants_bias:
        return NotImplemented
    bias = aten.sum(gradient, [0, *range(2, gradient.dim())])
    values, weight, _ = aten.convolution_backward(gradient, *others, [wants_input, wants_weight, False])
    return values, weight, bias


def flatten_single_batches(joint: fx.Graph) -> None:
    """Turn batched products of one batch into products of matrices, as Inductor does in a GPU's training graph."""
    for node in joint.find_nodes(op="call_function", target=aten.bmm.default):
        factors = [each for each in node.args if isinstance(each, fx.Node)]
        if not all(statically_known_true(tensors_of(each)[0].shape[0] == 1) for each in factors):
            continue
        with joint.inserting_before(node):
            left, right = (_call(node, aten.squeeze.dim, each, 0) for each in factors)
            product = _call(node, aten.unsqueeze.default, _call(node, aten.mm.default, left, right), 0)
        node.replace_all_uses_with(product)
        joint.erase_node(node)


def _call(origin: fx.Node, operator: Any, *args: Any) -> fx.Node:
    """A call with what tracing notes of one; module and source line are those of the node that it replaces."""
    node = origin.graph.call_function(operator, args)
    value = operator(*(value_of(each) if isinstance(each, fx.Node) else each for each in args))
    node.meta = origin.meta | {"val": value}
    return node
