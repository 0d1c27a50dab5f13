"""Embedding tables whose rows are read in place: never copied, never on the device, and the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.ir import Plan
from spcompile.runtime.store import PageStore, find_store

WIDTH, ROWS = 64, 20_000
TABLE_BYTES = ROWS * WIDTH * 4


class Language(nn.Module):
    """A table with positions beside it, layers, and a head that may be tied to the table."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.positions = nn.Embedding(16, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens) + self.positions(torch.arange(tokens.shape[-1], device=tokens.device)))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        y: Tensor = self.head(x)
        return y


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(*, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Language(tied=tied).eval()


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(ROWS, (3, 5), generator=torch.Generator().manual_seed(seed))


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="superpipeline", options={"compiler": "eager", "device": "cpu", **options})


def tight_budget(model: nn.Module, *, tied: bool = False, compiler: str = "eager") -> int:
    """Bytes for the head, which is as large as the table, and little else."""
    with torch.no_grad():
        curve = spcompile.plan(model, (tokens(),), compiler=compiler, device="cpu", k=2).tradeoff()
    return curve[0].peak_bytes + (0 if tied else TABLE_BYTES // 8)


def plan_of(fast: Any) -> Plan:
    plan = spcompile.plan(fast)
    assert isinstance(plan, Plan)
    return plan


def store_of(model: nn.Module) -> PageStore:
    store = find_store(model.parameters())
    assert store is not None
    return store


def names(plan: Plan, pages: tuple[int, ...]) -> list[str]:
    return [plan.pages[page].name for page in pages]


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_read_in_place(tied: bool, compiler: str) -> None:
    plain, model = make(tied=tied), spcompile.offload(make(tied=tied), device="cpu")
    budget = tight_budget(model, tied=tied, compiler=compiler)
    fast = compiled(model, budget=budget, compiler=compiler)
    tolerance = 0 if compiler == "eager" else 1e-4
    with torch.no_grad():
        for seed in range(4):
            torch.testing.assert_close(fast(tokens(seed)), plain(tokens(seed)), rtol=tolerance, atol=tolerance)
    plan = plan_of(fast)
    assert "embed" in names(plan, plan.mapped)[0]
    table = plan.mapped[0]
    assert [interval.page for interval in plan.intervals].count(table) == int(tied)  # for the head, if that is the same
    assert plan.peak_bytes() <= budget
    assert plan.gathered_bytes(0) >= tokens().numel() * WIDTH * 4
    assert not store_of(model).any_resident(plan.pages[table])


def test_rows_follow_the_weights() -> None:
    plain, model = make(), spcompile.offload(make(), device="cpu")
    fast = compiled(model, budget=tight_budget(model))
    ids = tokens()
    with torch.no_grad():
        fast(ids)
        for each in (plain, model):
            each.get_parameter("embed.weight")[ids[0, 0]] += 1.0
        assert torch.equal(fast(ids), plain(ids))
        state = {name: value * 2 for name, value in plain.state_dict().items()}
        for each in (plain, model):
            each.load_state_dict(state)
        assert torch.equal(fast(ids), plain(ids))
    assert plan_of(fast).mapped


def test_a_model_that_nobody_offloaded() -> None:
    plain, model = make(), make()
    fast = compiled(model, budget=tight_budget(make()))
    with torch.no_grad():
        for seed in range(3):
            assert torch.equal(fast(tokens(seed)), plain(tokens(seed)))
    plan = plan_of(fast)
    assert plan.mapped
    store = store_of(model)
    for page in plan.mapped:
        assert all(store.weights[weight.name].has_home for weight in plan.pages[page].weights)
        assert not store.any_resident(plan.pages[page])


def test_where_there_is_room_for_all_everything_is_resident() -> None:
    model = spcompile.offload(make(), device="cpu")
    fast = compiled(model, budget="1GB")
    with torch.no_grad():
        assert torch.equal(fast(tokens()), make()(tokens()))
    plan = plan_of(fast)
    assert plan.mapped == ()
    assert len(plan.residents) == len(plan.pages)


def test_explicit_k_moves_every_page() -> None:
    model = spcompile.offload(make(), device="cpu")
    fast = compiled(model, k=2, m=1)
    with torch.no_grad():
        assert torch.equal(fast(tokens()), make()(tokens()))
    plan = plan_of(fast)
    assert plan.mapped == ()
    assert len(plan.intervals) == len(plan.pages)


def test_many_rows_are_not_read_in_place() -> None:
    """A prompt that reads more rows than the table has is better served by a copy."""
    model = spcompile.offload(make(), device="cpu")
    ids = torch.zeros(2, ROWS // 2, dtype=torch.int64)
    model.positions = nn.Embedding(ROWS, WIDTH)
    with torch.no_grad():
        point = spcompile.plan(model, (ids,), compiler="eager", device="cpu", k=2).tradeoff()[0]
    assert point.plan.mapped == ()
