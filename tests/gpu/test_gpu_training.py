"""Training on a real GPU: exactness, what is left on the device, and the waits between backward and the host.

The link and compute are slowed by kernels that spin on the stream in question, so races show that a fast machine hides;
taking a wait away must then give wrong gradients, or the test could not fail.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.runtime.store import PageStore, find_store
from spcompile.runtime.streams import CudaStreams
from tests.device_memory import held_bytes
from tests.running import moved_by_plan
from tests.slow_device import SPIN_CYCLES, Slow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH = 1024

N_LAYERS = 8

WAYS = ("offloaded", "on the GPU", "on the CPU")


class Block(nn.Module):
    """A feed-forward block of 16 MiB."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.up(self.norm(x)))
        y: Tensor = x + self.dropout(self.down(hidden))
        return y


class Stack(nn.Module):
    """A small language model that returns its loss."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(N_LAYERS))
        self.head = nn.Linear(WIDTH, 1000)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten().roll(1))


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """The gradient of an embedding is a sum in any order otherwise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def build(dropout: float = 0.0) -> Stack:
    torch.manual_seed(0)
    return Stack(dropout)


def tokens(seed: int, device: str) -> Tensor:
    return torch.randint(0, 1000, (4, 32), generator=torch.Generator().manual_seed(seed)).to(device)


def arrive(model: nn.Module, way: str) -> tuple[nn.Module, str]:
    """The model as it comes, and where its inputs are."""
    if way == "offloaded":
        return spcompile.offload(model), "cuda"
    return (model.cuda(), "cuda") if way == "on the GPU" else (model, "cpu")


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="superpipeline", options={"compiler": "aot_eager", **options})


def store_of(model: nn.Module) -> PageStore:
    store = find_store(model.parameters())
    assert store is not None
    return store


def train(
    way: str,
    iterations: int = 4,
    *,
    dropout: float = 0.0,
    parameters: Callable[[nn.Module], Any] = nn.Module.parameters,
    **options: Any,
) -> tuple[list[Tensor], nn.Module]:
    """Losses, gradients and weights of a plain loop, all on the CPU; and the model."""
    torch._dynamo.reset()
    model, device = arrive(build(dropout), way)
    fast = compiled(model, **options)
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-3)
    torch.manual_seed(1)
    seen: list[Tensor] = []
    for seed in range(iterations):
        loss = fast(tokens(seed, device))
        loss.backward()
        seen += [
            loss.detach().cpu(),
            *(each.grad.cpu().clone() for each in model.parameters() if each.grad is not None),
        ]
        optimizer.step()
        optimizer.zero_grad()
        seen += [each.detach().cpu().clone() for each in model.parameters()]
    return seen, model


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 1), (3, 2)])
def test_training_is_exact(way: str, k: int, m: int) -> None:
    expected, _ = train(way, k=1000)
    seen, model = train(way, k=k, m=m)
    assert same(seen, expected)
    assert all(moved == 4 * plan.bytes_moved > 0 for plan, moved in moved_by_plan(store_of(model)))


def test_compiled_segments_and_dropout() -> None:
    options = {"compiler": "inductor", "dropout": 0.2}
    expected, _ = train("on the GPU", k=1000, **options)  # type: ignore[arg-type]
    seen, _ = train("offloaded", k=2, m=1, **options)  # type: ignore[arg-type]
    assert same(seen, expected)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_budget_is_kept(part: float) -> None:
    expected, _ = train("on the GPU", k=1000)
    model = build()
    torch._dynamo.reset()
    spcompile.offload(model)
    curve = spcompile.plan(model, (tokens(0, "cuda"),), k=2, compiler="aot_eager").tradeoff()
    budget = int(curve[0].peak_bytes + part * (curve[-1].peak_bytes - curve[0].peak_bytes))
    del model
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    seen, _ = train("offloaded", parameters=spcompile.host_parameters, budget=budget)
    assert torch.cuda.max_memory_allocated() <= budget
    losses = [each for each in seen if each.dim() == 0]
    assert same(losses[:1], [each for each in expected if each.dim() == 0][:1])
    torch.testing.assert_close(losses, [each for each in expected if each.dim() == 0], rtol=1e-3, atol=1e-3)


def test_gradients_take_no_device_memory() -> None:
    gc.collect()
    others_bytes = held_bytes()
    model, device = arrive(build(), "offloaded")
    fast = compiled(model, k=2, m=1)
    for seed in range(3):
        fast(tokens(seed, device)).backward()
        before = torch.cuda.memory_allocated()
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        assert len(gradients) == len(list(model.parameters()))
        assert {each.device.type for each in gradients} == {"cuda"}
        assert all(store_of(model).gradients.find(each) is not None for each in gradients)
        del gradients
        model.zero_grad()
        assert torch.cuda.memory_allocated() == before
    plan = spcompile.plan(fast)
    most_bytes = plan.arena_bytes + plan.leftovers_bytes + plan.workspace_bytes
    assert before - others_bytes < most_bytes + (4 << 20)


def test_the_optimizer_on_the_host() -> None:
    """AdamW on the CPU over the memory that the GPU reads; with residents, too. (Its sums round as the CPU's do.)"""
    expected, _ = train("on the CPU", k=1000)
    for options in ({"k": 2, "m": 1}, {"k": 1000}):
        seen, model = train("offloaded", parameters=spcompile.host_parameters, **options)
        assert same(seen, expected)
        assert {each.device.type for each in spcompile.host_parameters(model)} == {"cpu"}


class SlowDown:
    """Slows the copies of gradients to the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        copy_now = CudaStreams.down_copy

        def down_copy(streams: CudaStreams, target: Tensor, source: Tensor) -> None:
            with torch.cuda.stream(streams.down):
                torch.cuda._sleep(SPIN_CYCLES)  # type: ignore[no-untyped-call]
            copy_now(streams, target, source)

        monkeypatch.setattr(CudaStreams, "down_copy", down_copy)


@pytest.mark.parametrize(
    ("link", "compute", "down"), [(True, False, False), (False, True, False), (False, False, True)]
)
def test_with_a_slow_machine(monkeypatch: pytest.MonkeyPatch, link: bool, compute: bool, down: bool) -> None:
    expected = {way: train(way, 2, k=1000)[0] for way in WAYS}
    Slow(monkeypatch, link=link, compute=compute)
    if down:
        SlowDown(monkeypatch)
    for way in WAYS:
        assert same(train(way, 2, k=2, m=1)[0], expected[way])


def test_without_waiting_for_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = train("on the GPU", 2, k=1000)
    Slow(monkeypatch, link=False, compute=True)
    monkeypatch.setattr(CudaStreams, "down_wait", lambda *_: None)
    assert not same(train("offloaded", 2, k=2, m=1)[0], expected)


def test_without_waiting_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits at the end of backward: the host reads what has not arrived."""
    expected, _ = train("on the GPU", 2, k=1000)
    SlowDown(monkeypatch)
    monkeypatch.setattr("spcompile.runtime.transfers.Transfers.finish", lambda _: None)
    assert not same(train("offloaded", 2, k=2, m=1)[0], expected)


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_and_accumulation(way: str) -> None:
    def run(**options: Any) -> list[Tensor]:
        torch._dynamo.reset()
        model, device = arrive(build(), way)
        fast = compiled(model, **options)
        seen = []
        for seed in range(2):
            for part in range(3):
                loss = fast(tokens(10 * seed + part, device))
                with torch.no_grad():
                    seen.append(fast(tokens(99, device)).cpu())
                loss.backward()
            seen += [each.grad.cpu().clone() for each in model.parameters() if each.grad is not None]
            model.zero_grad()
        return seen

    assert same(run(k=2, m=1), run(k=1000))


def test_a_copied_model_trains_alike() -> None:
    """What training leaves behind is an ordinary model."""
    _, model = train("offloaded", 2, k=2, m=1)
    plain = copy.deepcopy(model)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), plain.parameters(), strict=True))
    spcompile.restore(model, device="cuda")
    loss = model(tokens(5, "cuda"))
    assert torch.equal(loss, plain(tokens(5, "cuda")))
