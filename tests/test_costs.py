"""What segments are predicted to cost: by hand, against what torch allocates, and in symbols."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

import spcompile
from spcompile.costs import SegmentCost, largest, segment_costs, symbol_values, total_size
from spcompile.planner.machine import PROFILES, kernel_time_us
from spcompile.sizes import value_of

H100 = PROFILES["h100"]


def costs_of(
    function: Callable[..., Any], *inputs: Tensor, cuts: tuple[int, ...] = (), fused: bool = True
) -> list[SegmentCost]:
    """The costs of a traced function, cut in front of the operators with these numbers."""
    graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    borders = (0, *cuts, len(nodes))
    segments = [nodes[one:other] for one, other in pairwise(borders)]
    return segment_costs(graph, segments, H100, fused)


def kib(count: float) -> Tensor:
    """A matrix of so many KiB with 16 rows."""
    return torch.zeros(16, int(count * 16))


def test_what_is_fused_is_not_stored() -> None:
    (cost,) = costs_of(lambda x: ((x + 1).relu() * 2).sum(), kib(4))
    assert cost.activations_bytes == 4
    (plain,) = costs_of(lambda x: ((x + 1).relu() * 2).sum(), kib(4), fused=False)
    assert plain.activations_bytes == 8 * 1024
    assert not cost.uses_libraries


def test_operands_and_results_of_products_are_stored() -> None:
    (cost,) = costs_of(lambda x, w: (((x + 1) @ w).relu() @ w).relu(), torch.zeros(16, 16), torch.zeros(16, 16))
    assert cost.activations_bytes == 2 * 1024  # at any time one product reads a matrix and makes another
    assert cost.uses_libraries


def test_what_a_later_kernel_reads_again_stays() -> None:
    def residual(x: Tensor, w: Tensor) -> Tensor:
        y = x + 1
        return y + y @ w

    (cost,) = costs_of(residual, torch.zeros(16, 16), torch.zeros(16, 16))
    assert cost.activations_bytes == 2 * 1024  # the sum is written over one of its summands
    (plain,) = costs_of(residual, torch.zeros(16, 16), torch.zeros(16, 16), fused=False)
    assert plain.activations_bytes == 3 * 1024


def test_what_is_read_element_by_element_for_the_last_time_is_written_over() -> None:
    x, w = torch.zeros(16, 16), torch.zeros(16, 16)
    (over,) = costs_of(lambda x, w: torch.relu(x @ w) @ w, x, w)
    assert over.activations_bytes == 2 * 1024
    (turned,) = costs_of(lambda x, w: (torch.relu(x @ w).t() + x).t().contiguous() @ w, x, w)
    assert turned.activations_bytes == 2 * 1024

    def read_again(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        return torch.relu(y) @ w @ y

    (kept,) = costs_of(read_again, x, w)
    assert kept.activations_bytes == 3 * 1024


def test_what_the_caller_hands_over_is_not_written_over() -> None:
    costs = costs_of(lambda x, w: torch.relu(x @ w), torch.zeros(16, 16), torch.zeros(16, 16), cuts=(1,))
    assert [cost.activations_bytes for cost in costs] == [1024, 2048]


def test_what_takes_few_reads_is_computed_again() -> None:
    """As the residual of a layer: both summands stay, the sum is never stored."""

    def layer(x: Tensor, w: Tensor) -> Tensor:
        y = x + x @ w
        return y + torch.relu(y.softmax(-1) @ w) @ w

    x, w = torch.zeros(16, 16), torch.zeros(16, 16)
    (cost,) = costs_of(layer, x, w)
    assert cost.activations_bytes == 3 * 1024  # the first product, and one product that reads the other


def test_a_convolution_may_copy_what_it_reads() -> None:
    x, w = torch.zeros(1, 4, 8, 8), torch.zeros(4, 4, 3, 3)
    results = [
        costs_of(lambda x, w: nn.functional.conv2d(x, w, padding=1), x, w, fused=fused) for fused in (True, False)
    ]
    (fused,), (plain,) = results
    assert fused.activations_bytes == 2 * x.nbytes + w.nbytes
    assert plain.activations_bytes == x.nbytes


def test_memory_that_fell_free_is_kept_for_its_size() -> None:
    def function(x: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
        y = x @ w  # read by the first of the products below alone, and then kept for the last one
        return ((y @ w @ up) @ down) @ w

    sizes = (16, 16), (16, 16), (16, 20), (20, 16)
    (cost,) = costs_of(function, *(torch.zeros(size) for size in sizes))
    assert cost.activations_bytes == (16 + 20) * 16 * 4


def test_values_of_other_segments_count() -> None:
    def function(x: Tensor) -> Tensor:
        early = x.exp()  # needed by the last segment
        return x.sin().cos() + early

    costs = costs_of(function, kib(1), cuts=(1, 2, 3))
    assert [cost.activations_bytes for cost in costs] == [1024, 2048, 3072, 3072]


def test_views_take_nothing() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).t().reshape(8, 32) @ w

    (cost,) = costs_of(function, torch.zeros(8, 32), torch.zeros(32, 32), fused=False)
    assert (
        cost.activations_bytes == 2 * 1024
    )  # the product and a copy of its transpose, then that and the second product


def test_symbolic_sizes() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).relu() @ w

    graph = make_fx(function, tracing_mode="symbolic")(torch.zeros(6, 16), torch.zeros(16, 16)).graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    (cost,) = segment_costs(graph, [nodes], H100)
    sizes = dict(symbol_values(graph))
    assert 6 in sizes.values()
    for rows in (1, 6, 1000):
        given = {name: rows if value == 6 else value for name, value in sizes.items()}
        assert max(value_of(each, given) for each in cost.activations) == 2 * rows * 16 * 4
    assert cost.activations_bytes == 2 * 6 * 16 * 4
    (inputs, _) = graph.find_nodes(op="placeholder")
    assert value_of(total_size([inputs]), sizes) == 6 * 16 * 4


def test_a_maximum_keeps_what_nothing_covers() -> None:
    kept = largest([(("1", 5),), (("1", 4), ("s0", 1)), (("s0", 1),), (("1", 5), ("s0**2", 1))])
    assert set(kept) == {(("1", 4), ("s0", 1)), (("1", 5), ("s0**2", 1))}


def test_times_are_those_of_the_roofline() -> None:
    n = 4096
    (product,) = costs_of(torch.mm, torch.zeros(n, n, dtype=torch.bfloat16), torch.zeros(n, n, dtype=torch.bfloat16))
    assert product.compute_us == pytest.approx(2 * n**3 / dict(H100.flops_per_s)["bfloat16"] * 1e6)
    (vector,) = costs_of(torch.mm, torch.zeros(1, n, dtype=torch.bfloat16), torch.zeros(n, n, dtype=torch.bfloat16))
    assert vector.compute_us == pytest.approx((n * n + 2 * n) * 2 / H100.memory_bytes_per_s * 1e6)
    (gather,) = costs_of(torch.embedding, torch.zeros(100_000, 1024), torch.zeros(1, dtype=torch.int64))
    assert gather.compute_us == H100.kernel_us
    assert kernel_time_us(H100, "complex64", 1e12, 0) == kernel_time_us(H100, "float32", 1e12, 0)


class Block(nn.Module):
    """A feed-forward layer with a norm before and a sum behind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.gate = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z: Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return z


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_against_what_torch_allocates(compiler: str, grad: bool) -> None:
    torch._dynamo.reset()
    model = spcompile.offload(nn.Sequential(*(Block(64) for _ in range(3))), device="cpu")
    fast = torch.compile(model, backend="superpipeline", options={"k": 100, "compiler": compiler})
    x, gradient = torch.randn(256, 64), torch.randn(256, 64)

    def iteration() -> object:
        if not grad:
            return fast(x)
        y = fast(x)
        y.backward(gradient)
        return y, [parameter.grad for parameter in model.parameters()]

    with torch.set_grad_enabled(grad):
        for _ in range(2):
            iteration()
            model.zero_grad()
        gc.collect()
        measured_bytes = _peak_of(iteration)
    plan = spcompile.plan(fast)
    # In backward Inductor keeps two values of a layer a little longer than predicted.
    tolerance = 0.05 if grad and compiler == "inductor" else 0.001
    assert measured_bytes == pytest.approx(plan.activations_bytes, rel=tolerance)
    assert plan.peak_bytes() >= plan.weights_bytes + x.nbytes + plan.activations_bytes


def _llama() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4, vocab_size=500
    )
    tokens = torch.ones(4, 64, dtype=torch.int64)
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens, "use_cache": False}


def _vit() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ViTConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8
    )
    return transformers.ViTModel(config), {"pixel_values": torch.randn(4, 3, 64, 64)}


def _t5() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.T5Config(d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4, vocab_size=300)
    tokens = torch.ones(4, 32, dtype=torch.int64)
    return transformers.T5Model(config), {"input_ids": tokens, "decoder_input_ids": tokens, "use_cache": False}


def _convnext() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[2, 2, 2, 2])
    return transformers.ConvNextModel(config), {"pixel_values": torch.randn(4, 3, 64, 64)}


@pytest.mark.parametrize("make", [_llama, _vit, _t5, _convnext])
def test_architectures_against_what_torch_allocates(make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> None:
    torch._dynamo.reset()
    model, inputs = make()
    spcompile.offload(model.eval(), device="cpu")
    fast = torch.compile(model, backend="superpipeline", options={"k": 100})
    with torch.no_grad():
        for _ in range(2):
            fast(**inputs)
        gc.collect()
        measured_bytes = _peak_of(lambda: fast(**inputs))
    assert measured_bytes == pytest.approx(spcompile.plan(fast).activations_bytes, rel=0.01)


def _peak_of(call: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator had given out during a call, beside those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    live = peak = 0
    for event in sorted((each for each in events if each.get("name") == "[memory]"), key=lambda each: each["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def test_the_memory_of_a_node_without_tensors() -> None:
    graph = fx.Graph()
    assert total_size([graph.placeholder("n")]) == ()
