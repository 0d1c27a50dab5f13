"""Sizes that depend on the values of tensors, captured into one graph: `nonzero` of a router, `item` of a length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.ir import Plan

WIDTH, N_EXPERTS, N_LAYERS = 16, 2, 2


@pytest.fixture(autouse=True)
def captured() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        yield


class Experts(nn.Module):
    """Each row goes through the expert that a router chooses for it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, N_EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(N_EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).max(-1)
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(1)
            total = total.index_add(0, rows, torch.relu(expert(x[rows])) * weights[rows].unsqueeze(1))
        return x + total


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(N_LAYERS))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


class Padded(nn.Module):
    """Between two layers as many rows are added as a number says: at most 8, which torch may be told, or not."""

    def __init__(self, is_limited: bool) -> None:
        super().__init__()
        self.is_limited = is_limited
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        number = int(count.item())
        torch._check(number >= 1)  # type: ignore[no-untyped-call]
        if self.is_limited:
            torch._check(number <= 8)  # type: ignore[no-untyped-call]
        for layer in self.layers[:2]:
            x = torch.relu(layer(x))
        x = torch.cat([x, x.new_zeros(number, WIDTH)])  # a size that is a sum: no input has it as it is
        for layer in self.layers[2:]:
            x = torch.relu(layer(x))
        return x


def plan_of(fast: Callable[..., Any]) -> Plan:
    plan = spcompile.plan(fast)
    assert isinstance(plan, Plan), "one graph"
    return plan


@pytest.mark.parametrize(("compiler", "grad"), [("eager", True), ("inductor", False), ("inductor", True)])
def test_rows_that_a_router_chooses(compiler: str, grad: bool) -> None:
    torch.manual_seed(0)
    model = Routed()
    options: Any = {"device": "cpu", "compiler": compiler, "k": 2}
    fast = torch.compile(model, backend="superpipeline", options=options, fullgraph=True, dynamic=False)
    for _ in range(3):
        x = torch.randn(8, WIDTH)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(fast(x), model(x))
        if grad:
            gradients = {}
            for each in (fast, model):
                model.zero_grad()
                each(x).square().sum().backward()
                gradients[each] = [parameter.grad for parameter in model.parameters()]
            torch.testing.assert_close(gradients[fast], gradients[model])
    plan = plan_of(fast)
    assert plan.intervals
    assert {number for name, number in plan.sizes if name.startswith("u")} == {8}, "at most all rows go to an expert"


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("is_limited", [False, True])
def test_rows_that_a_number_counts(compiler: str, is_limited: bool) -> None:
    torch.manual_seed(0)
    model = Padded(is_limited)
    options: Any = {"device": "cpu", "compiler": compiler, "k": 2}
    fast = torch.compile(model, backend="superpipeline", options=options, fullgraph=True, dynamic=False)
    for number in (3, 7, 1):
        x, count = torch.randn(8, WIDTH), torch.tensor(number)
        with torch.no_grad():
            torch.testing.assert_close(fast(x, count), model(x, count))
    plan = plan_of(fast)
    assert plan.intervals
    ((name, assumed),) = plan.sizes
    assert assumed == (8 if is_limited else torch._inductor.config.unbacked_symint_fallback)
    row_bytes = WIDTH * 4
    grown_bytes = plan.peak_bytes(**{name: assumed + 10}) - plan.peak_bytes()
    assert grown_bytes in (10 * row_bytes, 20 * row_bytes)  # a layer's output, and its input unless it is written over
