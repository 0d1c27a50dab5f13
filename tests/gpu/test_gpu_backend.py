"""The backend on a real GPU: exactness, memory, and the two waits of [Note: who waits for whom] under slow links and
slow compute.

The link and compute are slowed by kernels that spin on the stream in question, so races show that a fast machine
hides; taking one wait away must then give wrong results, or the test could not fail.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.runtime.store import PageStore, find_store
from spcompile.runtime.streams import CudaStreams
from tests.device_memory import held_bytes
from tests.slow_device import Slow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH = 1024


class Block(nn.Module):
    """A feed-forward block of 8 MiB in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.up(self.norm(x)))
        y: Tensor = x + self.down(hidden)
        return y


class Stack(nn.Module):
    """An embedding, eight blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(8))
        self.head = nn.Linear(WIDTH, 1000)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def make() -> tuple[nn.Module, nn.Module, Tensor]:
    """An offloaded model, an ordinary copy on the GPU, and tokens ``[4, 32]``."""
    model = Stack().to(torch.bfloat16).eval()
    plain = copy.deepcopy(model).cuda()
    tokens = torch.randint(0, 1000, (4, 32), device="cuda")
    return spcompile.offload(model), plain, tokens


def store_of(model: nn.Module) -> PageStore:
    store = find_store(model.parameters())
    assert store is not None
    return store


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="superpipeline", options={"compiler": "eager", **options})


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (5, 2), (9, 1)])
def test_inference_is_bit_equal_to_eager(k: int, m: int) -> None:
    model, plain, tokens = make()
    fast = compiled(model, k=k, m=m)
    with torch.no_grad():
        expected = plain(tokens)
        for _ in range(4):
            assert torch.equal(fast(tokens), expected)
    plan = spcompile.plan(fast)
    (runtime,) = store_of(model).runtimes()
    ahead = sum(plan.pages[each.page].nbytes for each in plan.intervals if each.start_step <= 0)
    assert runtime.bytes_moved == 4 * plan.bytes_moved + ahead


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager", "eager"])
def test_every_compiler_is_bit_equal_to_all_resident(compiler: str) -> None:
    model, plain, tokens = make()
    with torch.no_grad():
        streamed = [compiled(model, k=2, m=1, compiler=compiler)(tokens) for _ in range(2)][-1]
        torch._dynamo.reset()
        resident = compiled(model, k=100, compiler=compiler)(tokens)
        expected = plain(tokens)
    assert torch.equal(streamed, resident)
    torch.testing.assert_close(streamed, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("compiler", ["inductor", "eager"])
def test_gradients_are_bit_equal_to_all_resident(compiler: str) -> None:
    model, plain, tokens = make()
    gradients = []
    for options in ({"k": 2, "m": 1}, {"k": 100}):
        torch._dynamo.reset()
        model.zero_grad()
        compiled(model, compiler=compiler, **options)(tokens).float().square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    plain(tokens).float().square().mean().backward()
    for streamed, resident, eager in zip(*gradients, plain.parameters(), strict=True):
        assert torch.equal(streamed, resident)
        torch.testing.assert_close(streamed, eager.grad, rtol=0.1, atol=0.02)


def test_memory_is_that_of_the_plan() -> None:
    model, plain, tokens = make()
    del plain
    fast = compiled(model, k=2, m=1)
    with torch.no_grad():
        before = held_bytes()
        fast(tokens)
        torch.cuda.reset_peak_memory_stats()
        fast(tokens)
        peak = torch.cuda.max_memory_allocated() - before
    plan = spcompile.plan(fast)
    assert plan.peak_weight_bytes < plan.weights_bytes / 3
    assert plan.peak_weight_bytes <= peak <= plan.peak_weight_bytes + plan.workspace_bytes + 8 * 2**20


def test_another_stream_of_the_caller() -> None:
    model, plain, tokens = make()
    fast = compiled(model, k=2, m=1)
    with torch.no_grad():
        expected = plain(tokens)
        torch.cuda.synchronize()
        for _ in range(3):
            with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                actual = fast(tokens)
            torch.cuda.synchronize()
            assert torch.equal(actual, expected)


def test_edits_between_calls_are_seen() -> None:
    model, plain, tokens = make()
    fast = compiled(model, k=3, m=1)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(fast(tokens), plain(tokens))
            for each in (model, plain):
                for parameter in each.parameters():
                    parameter.mul_(1.01)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, fused=True) for each in (model, plain)]
    for _ in range(2):
        for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
            parameter.grad = torch.ones_like(parameter)
            other.grad = torch.ones_like(other)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            assert torch.equal(fast(tokens), plain(tokens))


@pytest.mark.parametrize(("link", "compute"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("k", "m"), [(2, 1), (3, 2)])
def test_slow_link_and_slow_compute(monkeypatch: pytest.MonkeyPatch, link: bool, compute: bool, k: int, m: int) -> None:
    model, plain, tokens = make()
    Slow(monkeypatch, link=link, compute=compute)
    fast = compiled(model, k=k, m=m)
    with torch.no_grad():
        expected = plain(tokens)
        for _ in range(3):
            assert torch.equal(fast(tokens), expected)


def test_without_waiting_for_the_copy_results_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, tokens = make()
    Slow(monkeypatch, link=True, compute=False)
    monkeypatch.setattr(CudaStreams, "compute_wait", lambda *_: None)
    with torch.no_grad():
        assert not torch.equal(compiled(model, k=2, m=1)(tokens), plain(tokens))


def test_without_waiting_for_the_last_reader_results_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, tokens = make()
    Slow(monkeypatch, link=False, compute=True)
    monkeypatch.setattr(CudaStreams, "side_wait", lambda *_: None)
    with torch.no_grad():
        assert not torch.equal(compiled(model, k=2, m=1)(tokens), plain(tokens))


def test_device_memory_comes_back_without_waiting_for_compiled_code() -> None:
    model, plain, tokens = make()
    del plain
    before = held_bytes()
    fast = compiled(model, k=2, m=1)
    with torch.no_grad():
        fast(tokens)
    assert held_bytes() - before >= store_of(model).arena.memory.numel() > 2**24
    spcompile.restore(model)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert held_bytes() <= before
