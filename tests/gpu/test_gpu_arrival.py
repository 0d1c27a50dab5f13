"""Models that come on the GPU or on the CPU: results, where tensors are, and the device memory that comes free."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.runtime.store import PageStore, find_store
from tests.device_memory import held_bytes
from tests.slow_device import Slow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH = 1024


class Block(nn.Module):
    """A feed-forward block of 16 MiB in fp32, with a buffer that training updates."""

    calls: Tensor

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls.add_(1)
        y: Tensor = x + self.down(self.drop(torch.relu(self.up(self.norm(x))))) * torch.full((WIDTH,), 0.5).to(x.device)
        return y


class Stack(nn.Module):
    """An embedding, eight blocks and a head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(8))
        self.head = nn.Linear(WIDTH, 1000)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def make(device: str, dropout: float = 0.0) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model where it shall come from, an ordinary one on the GPU, and tokens ``[32]`` beside the first."""
    model = Stack(dropout)
    plain = copy.deepcopy(model).cuda()
    return model.to(device), plain, torch.randint(0, 1000, (32,), device=device)


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    fast: Callable[..., Any] = torch.compile(
        model, backend="superpipeline", options={"compiler": "eager", "k": 2, **options}
    )
    return fast


def store_of(model: nn.Module) -> PageStore:
    store = find_store(model.parameters())
    assert store is not None
    return store


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_inference_is_bit_equal_to_eager_on_the_gpu(device: str) -> None:
    model, plain, tokens = make(device)
    fast = compiled(model.eval())
    plain.eval()
    with torch.no_grad():
        for _ in range(3):
            result = fast(tokens)
            assert result.device.type == device
            assert torch.equal(result.cuda(), plain(tokens.cuda()))
    (runtime,) = store_of(model).runtimes()
    assert runtime.bytes_moved >= 3 * runtime.plan.bytes_moved > 0
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    assert {buffer.device.type for buffer in model.buffers()} == {device}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_training_follows_eager_on_the_gpu(device: str) -> None:
    """Also batch-norm statistics and the step counts of an optimizer that was made before."""
    model, plain, tokens = make(device)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in (model, plain)]
    fast = compiled(model)
    for _ in range(3):
        losses = [fast(tokens).square().mean(), plain(tokens.cuda()).square().mean()]
        torch.testing.assert_close(losses[0].cuda(), losses[1])
        for loss in losses:
            loss.backward()
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert mine.grad is not None
            assert mine.grad.device.type == device
            torch.testing.assert_close(mine.grad.cuda(), other.grad, rtol=1e-2, atol=1e-4)
            other.grad = mine.grad.cuda()  # so that small differences do not grow
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for statistic, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(statistic.cuda(), expected)


def test_weights_on_the_gpu_give_their_memory_back() -> None:
    model, plain, tokens = make("cuda")
    del plain
    before = held_bytes()
    fast = compiled(model.eval())
    with torch.no_grad():
        fast(tokens)
    plan = spcompile.plan(fast)
    streamed = sum(plan.pages[each.page].nbytes for each in plan.intervals)
    fallen = before - held_bytes() + store_of(model).arena.memory.numel()
    assert streamed > 100e6
    assert abs(fallen - streamed) < 0.01 * streamed


def test_residents_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, tokens = make("cuda")
    weights_bytes = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr("spcompile.capture.free_device_bytes", lambda _: weights_bytes * 2 // 3)
    monkeypatch.setattr(PageStore, "device_bytes", lambda _: 0)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    fast = compiled(model.eval(), k=None)
    plain.eval()
    with torch.no_grad():
        expected = plain(tokens)
        before = held_bytes()
        assert torch.equal(fast(tokens), expected)
    plan = spcompile.plan(fast)
    assert plan.intervals
    assert plan.residents
    at_home = dict.fromkeys([*plan.mapped, *(each.page for each in plan.intervals)])
    moved = {weight.name for page in at_home for weight in plan.pages[page].weights}
    for name, parameter in model.named_parameters():
        assert (parameter.data_ptr() != places[name]) == (name in moved), name
    nbytes = sum(plan.pages[page].nbytes for page in at_home)
    fallen = before - held_bytes() + store_of(model).arena.memory.numel()
    assert abs(fallen - nbytes) < 0.01 * nbytes


def test_a_hint_says_who_keeps_device_memory(caplog: pytest.LogCaptureFixture) -> None:
    model, _, tokens = make("cuda")
    kept = [parameter.detach() for parameter in model.parameters()][:4]
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        compiled(model.eval())(tokens)
    assert any("somebody else holds" in record.message for record in caplog.records)
    assert kept


def test_a_cpu_model_takes_little_device_memory() -> None:
    model, plain, tokens = make("cpu")
    del plain
    gc.collect()
    before = held_bytes()
    fast = compiled(model.eval())
    with torch.no_grad():
        fast(tokens)
        torch.cuda.reset_peak_memory_stats()
        fast(tokens)
    plan = spcompile.plan(fast)
    assert plan.peak_weight_bytes < plan.weights_bytes / 3
    values_bytes = plan.workspace_bytes + 16 * 2**20
    assert torch.cuda.max_memory_allocated() - before <= plan.peak_weight_bytes + values_bytes


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_is_rehomed(inside: bool) -> None:
    class Cast(Stack):
        def forward(self, tokens: Tensor) -> Tensor:
            with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
                return super().forward(tokens)

    model = (Cast() if inside else Stack()).eval()
    plain = copy.deepcopy(model).cuda()
    tokens = torch.randint(0, 1000, (32,))
    fast = compiled(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        actual = fast(tokens)
        actual.float().square().mean().backward()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=not inside):
        expected = plain(tokens.cuda())
        expected.float().square().mean().backward()
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(actual.cuda(), expected)
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.cuda(), other.grad, rtol=5e-2, atol=1e-3)


def test_random_numbers_come_from_the_device() -> None:
    model, plain, tokens = make("cpu", dropout=0.5)
    fast = compiled(model)
    results = []
    for seed in (0, 0, 1):
        torch.cuda.manual_seed(seed)
        results.append(fast(tokens))
    torch.cuda.manual_seed(0)
    torch.testing.assert_close(results[0].cuda(), plain(tokens.cuda()))
    torch.testing.assert_close(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_compiler_is_bit_equal_to_all_resident(compiler: str, device: str) -> None:
    """One model, so that both share compiled segments: Inductor times kernels, and may choose others for a second."""
    model, plain, tokens = make(device)
    plain.eval()
    results = []
    for k in (2, 100):
        torch._dynamo.reset()
        model.zero_grad()
        fast = compiled(model.eval(), compiler=compiler, k=k)
        with torch.no_grad():
            result = fast(tokens)
            torch.testing.assert_close(result.cuda(), plain(tokens.cuda()), rtol=1e-3, atol=1e-3)
        fast(tokens).square().mean().backward()
        results.append([result, *(parameter.grad for parameter in model.parameters())])
    for streamed, resident in zip(*results, strict=True):
        assert streamed is not None
        assert resident is not None
        assert torch.equal(streamed, resident)


@pytest.mark.parametrize(("link", "compute"), [(True, False), (False, True)])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_edits_under_slow_link_and_slow_compute(
    monkeypatch: pytest.MonkeyPatch, link: bool, compute: bool, device: str
) -> None:
    """The owner of a CPU model may write its weights as soon as a call has returned."""
    Slow(monkeypatch, link=link, compute=compute)
    model, plain, tokens = make(device)
    fast = compiled(model.eval())
    plain.eval()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(fast(tokens).cuda(), plain(tokens.cuda()))
            for each in (model, plain):
                for parameter in each.parameters():
                    parameter.mul_(1.01)


def test_weights_on_two_devices_are_refused() -> None:
    model, _, tokens = make("cuda")
    model.get_submodule("head").cpu()

    def both(tokens: Tensor) -> tuple[Tensor, Tensor]:
        return model.get_submodule("embed")(tokens), model.get_parameter("head.weight") * 2

    fast = torch.compile(both, backend="superpipeline", options={"compiler": "eager", "k": 2})
    with pytest.raises(ValueError, match="the weights of this graph are on cpu and cuda:0"), torch.no_grad():
        fast(tokens)


def test_another_device_than_the_weights_is_refused() -> None:
    model, _, tokens = make("cuda")
    with pytest.raises(ValueError, match="option 'device' is 'cpu', but the model is on cuda:0"), torch.no_grad():
        compiled(model, device="cpu")(tokens)
