"""Without a GPU a graph comes out as a GPU's where decompositions and passes ask for the device."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from spcompile.cuda_decompositions import as_for_cuda, flatten_single_batches
from spcompile.graph import tensors_of

aten = torch.ops.aten

ROOT = Path(__file__).resolve().parent.parent


def traced(function: Callable[..., Any], *inputs: Tensor, for_cuda: bool = True) -> fx.GraphModule:
    table = select_decomp_table()
    decompositions = as_for_cuda(table) if for_cuda else table
    return make_fx(function, decompositions, "fake", _allow_non_fake_inputs=True)(*inputs)


def count(module: fx.GraphModule, operator: Any) -> int:
    return len(module.graph.find_nodes(op="call_function", target=operator))


def half(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_with_one_row_is_a_product(rows: int, bias: bool) -> None:
    layer = nn.Linear(16, 1, bias=bias).requires_grad_(False)
    product = aten.addmm.default if bias else aten.mm.default
    x = torch.randn(rows, 16)
    assert count(traced(layer, x), product) == 1
    assert count(traced(layer, x, for_cuda=False), product) == (rows > 1)


def test_a_batched_product_with_one_row_is_a_product() -> None:
    factors = torch.randn(3, 1, 16), torch.randn(3, 16, 1)
    assert count(traced(torch.bmm, *factors), aten.bmm.default) == 1
    assert count(traced(torch.bmm, *factors, for_cuda=False), aten.bmm.default) == 0


def layer_norm(x: Tensor) -> tuple[Tensor, ...]:
    weight, bias = torch.ones(8, dtype=x.dtype), torch.ones(8, dtype=x.dtype)
    normed: tuple[Tensor, ...] = aten.native_layer_norm.default(x, [8], weight, bias, 1e-5)
    return normed


def batch_norm(x: Tensor) -> tuple[Tensor, ...]:
    return batch_norm_of(x, training=True)


def batch_norm_of(x: Tensor, *, training: bool) -> tuple[Tensor, ...]:
    weight, bias, mean, variance = (torch.ones(3, dtype=x.dtype) for _ in range(4))
    normed: tuple[Tensor, ...] = aten._native_batch_norm_legit_functional.default(
        x, weight, bias, mean, variance, training, 0.1, 1e-5
    )
    return normed


@pytest.mark.parametrize("norm", [layer_norm, batch_norm])
def test_the_statistics_of_a_norm_stay_precise(norm: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    x = half(2, 3, 8)
    one, other = (traced(norm, x, for_cuda=each)(x) for each in (True, False))
    assert [each.dtype for each in one[:3]] == [torch.bfloat16, torch.float32, torch.float32]
    assert [each.dtype for each in other[:3]] == [torch.bfloat16] * 3
    assert torch.equal(one[0], other[0])
    for mine, narrow in zip(one[1:], other[1:], strict=True):
        assert torch.equal(mine.to(narrow.dtype), narrow)


def test_a_batch_norm_in_evaluation_is_as_ever() -> None:
    def normed(x: Tensor) -> Tensor:
        return batch_norm_of(x, training=False)[0]

    one, other = (traced(normed, half(2, 3, 8), for_cuda=each) for each in (True, False))
    assert one.code == other.code


@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_of_a_bias_is_a_sum(bias: bool) -> None:
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)

    def backward(gradient: Tensor, x: Tensor, weight: Tensor) -> Any:
        sizes = [4] if bias else None
        return aten.convolution_backward.default(
            gradient, x, weight, sizes, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, bias]
        )

    gradient = torch.randn(2, 4, 6, 6)
    module = traced(backward, gradient, x, weight)
    (node,) = module.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    assert node.args[-1] == [True, True, False]
    assert count(module, aten.sum.dim_IntList) == bias
    for mine, plain in zip(module(gradient, x, weight), backward(gradient, x, weight), strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("batches", [1, 2])
def test_a_product_of_one_batch_is_one_of_matrices(batches: int) -> None:
    def product(one: Tensor, other: Tensor) -> Tensor:
        return torch.bmm(one.sin(), other) + 1

    factors = torch.randn(batches, 3, 4), torch.randn(batches, 4, 5)
    module = traced(product, *factors)
    for node in module.graph.find_nodes(op="call_function", target=aten.bmm.default):
        node.meta["nn_module_stack"] = {"layer": ("layer", nn.Linear)}
    flatten_single_batches(module.graph)
    module.recompile()
    module.graph.lint()
    assert count(module, aten.bmm.default) == (batches > 1)
    assert count(module, aten.mm.default) == (batches == 1)
    assert torch.equal(module(*factors), product(*factors))
    for node in module.graph.find_nodes(op="call_function", target=aten.unsqueeze.default):
        assert tensors_of(node)[0].shape == (1, 3, 5)
        assert "layer" in node.meta["nn_module_stack"]


def test_a_batch_with_itself() -> None:
    module = traced(lambda x: torch.bmm(x, x), torch.randn(1, 3, 3))
    flatten_single_batches(module.graph)
    module.recompile()
    x = torch.randn(1, 3, 3)
    assert torch.equal(module(x), torch.bmm(x, x))


FIRST = """
import torch, spcompile
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.MaxPool2d(2, 2), torch.nn.Conv2d(4, 4, 3)).eval()
with torch.no_grad():
    print(len(spcompile.plan(model, (torch.randn(1, 3, 16, 16),), device="cuda", k=2, m=1).pages))
"""


def test_max_pooling_is_planned_in_a_fresh_process() -> None:
    """A decomposition reads a module of Inductor that it does not import."""
    done = subprocess.run([sys.executable, "-c", FIRST], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1
