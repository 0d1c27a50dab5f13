"""Gradients on their way to host memory: the buffers, the waits, and what is left on the device."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.runtime.gradients import GradientMemory
from spcompile.runtime.streams import EmulatedStreams
from spcompile.runtime.transfers import Transfers
from spcompile.runtime.weights import WeightView
from tests.running import Run, compile_offloaded

SEEDS = range(6)
"""Of the emulated device: which copies are early, and which late."""


class Chain(nn.Module):
    """Four layers that differ in their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def make() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Chain(), torch.randn(3, 8)


def gradients(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    call(x).square().mean().backward()  # type: ignore[no-untyped-call]
    found = [parameter.grad for parameter in model.parameters()]
    return [each.clone() for each in found if each is not None]


def trained(seed: int) -> tuple[Run, nn.Module, Tensor, list[Tensor]]:
    model, x = make()
    expected = gradients(plain := copy.deepcopy(model), plain, x)
    return compile_offloaded(model, k=2, m=1, seed=seed), model, x, expected


def is_right(iterations: int = 3) -> bool:
    """Whether all gradients are, under every seed, on a device that stays warm."""
    for seed in SEEDS:
        run, model, x, expected = trained(seed)
        for _ in range(iterations):
            try:
                found = gradients(run.model, model, x)
            except RuntimeError:  # a gradient is copied before it is there
                return False
            if not all(torch.equal(*pair) for pair in zip(found, expected, strict=True)):
                return False
    return True


def test_as_it_is() -> None:
    assert is_right()


@pytest.mark.parametrize("wait", ["down_wait", "compute_wait", "side_wait"])
def test_without_a_wait_gradients_are_wrong(monkeypatch: pytest.MonkeyPatch, wait: str) -> None:
    """The copy waits for the gradient; compute for the copy: [Note: who waits for whom]."""
    monkeypatch.setattr(EmulatedStreams, wait, lambda *_: None)
    assert not is_right()


def test_gradients_that_nobody_awaits_at_the_end_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transfers, "finish", lambda _: None)
    assert not is_right()


def test_gradients_of_two_sends_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent is let go of when the next send begins."""
    held: list[int] = []
    most: list[int] = []
    send, wait = Transfers.send, Transfers._await_sent

    def counted_send(runtime: Transfers, step: int, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        result = send(runtime, step, tensors)
        held.append(len(tensors))
        most.append(sum(held))
        return result

    def counted_wait(runtime: Transfers) -> None:
        wait(runtime)
        held.clear()

    monkeypatch.setattr(Transfers, "send", counted_send)
    monkeypatch.setattr(Transfers, "_await_sent", counted_wait)
    run, model, x, _ = trained(0)
    gradients(run.model, model, x)
    assert most == [2, 2, 2, 2]
    assert held == []


def test_autograd_takes_gradients_over_as_they_are() -> None:
    """A copy would be on the device."""
    run, model, x, _ = trained(0)
    for _ in range(2):
        gradients(run.model, model, x)
        buffers = [run.store.gradients.find(each.grad) for each in model.parameters() if each.grad is not None]
        assert None not in buffers
        assert len(buffers) == 8
    assert run.store.gradients.nbytes() == sum(each.nbytes for each in model.parameters()), "used again"


def test_a_second_micro_batch_has_buffers_of_its_own() -> None:
    run, model, x, expected = trained(0)
    for _ in range(2):
        model.zero_grad()
        for _ in range(3):
            run.model(x).square().mean().backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, 3 * gradient)
    assert run.store.gradients.nbytes() == 2 * sum(each.nbytes for each in model.parameters())


def test_gradients_stay_where_all_weights_do() -> None:
    model, x = make()
    run = compile_offloaded(model, k=1000)
    gradients(run.model, model, x)
    assert run.store.gradients.nbytes() == 0
    assert run.plan.gradients_bytes == 0
    assert not run.plan.has_transfers


def test_gradients_leave_although_all_weights_stay() -> None:
    """A budget may have room for the weights, but not for all gradients, too."""
    model, x = make()
    expected = gradients(plain := copy.deepcopy(model), plain, x)
    every = spcompile.plan(make()[0], (x,), k=1000, device="cpu", compiler="eager")
    torch._dynamo.reset()
    run = compile_offloaded(model, budget=every.peak_bytes() - 1)
    found = gradients(run.model, model, x)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert run.plan.intervals == ()
    assert run.plan.gradients_bytes == sum(each.nbytes for each in model.parameters())
    assert run.plan.peak_bytes() < every.peak_bytes()


# The buffers.


def view(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype = torch.float32) -> WeightView:
    return WeightView("w", dtype, size, stride, 0)


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        ((3, 4), (4, 1), (4, 1)),
        ((3, 4), (1, 3), (1, 3)),
        ((2, 3, 4, 5), (60, 1, 15, 3), (60, 1, 15, 3)),
        ((3, 4), (8, 1), (4, 1)),
        ((3, 1), (1, 7), (1, 7)),
        ((3, 4), (0, 1), (4, 1)),
        ((), (), ()),
        ((0, 4), (4, 1), (4, 1)),
    ],
)
def test_a_gradient_is_laid_out_as_autograd_wants_it(
    size: tuple[int, ...], stride: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """As its parameter; contiguous where that leaves holes, or shares memory with itself."""
    (buffer,) = GradientMemory(torch.device("cpu")).take([view(size, stride)])
    for tensor in (buffer.on_host(), buffer.on_device()):
        assert (tuple(tensor.shape), tensor.stride()) == (size, expected)
        tensor.fill_(1)
    assert buffer.memory.numel() == 4 * tensor.numel()


def test_a_buffer_is_free_when_nobody_looks_at_it() -> None:
    memory = GradientMemory(torch.device("cpu"))
    views = [view((3,), (1,)), view((2, 2), (2, 1))]
    first = memory.take(views)
    assert memory.take(views) == first
    held = first[0].on_device()
    assert memory.find(held) is first[0]
    second = memory.take(views)
    assert (second[0] is first[0], second[1] is first[1]) == (False, True)
    part = first[1].on_host()[1]
    assert memory.take(views)[1] not in first
    del held, part
    gc.collect()
    assert memory.take(views) == first


def test_one_look_wanted_twice_at_once_gets_two_buffers() -> None:
    """Two parameters over one storage, which look at it alike."""
    one, other = GradientMemory(torch.device("cpu")).take([view((3,), (1,))] * 2)
    assert one is not other


# What is said of the optimizer.


def test_the_user_is_told_once_where_the_state_is(caplog: pytest.LogCaptureFixture) -> None:
    run, model, x, _ = trained(0)
    optimizer = torch.optim.AdamW(model.parameters())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            gradients(run.model, model, x)
            optimizer.step()
    (message,) = [each.getMessage() for each in caplog.records if "state of this" in each.getMessage()]
    assert message.startswith("the state of this AdamW, 2,3")
    assert "spcompile.host_parameters(model)" in message


def test_nothing_is_said_of_a_state_in_host_memory(caplog: pytest.LogCaptureFixture) -> None:
    run, model, x, _ = trained(0)
    optimizer = torch.optim.AdamW(spcompile.host_parameters(model))
    with caplog.at_level(logging.WARNING):
        gradients(run.model, model, x)
        optimizer.step()
    assert not [each for each in caplog.records if "state of this" in each.getMessage()]


def test_nothing_is_said_of_a_cpu_model_as_it_came(caplog: pytest.LogCaptureFixture) -> None:
    """`spcompile.host_parameters` would give its own parameters."""
    torch._dynamo.reset()
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    fast = torch.compile(model, backend="superpipeline", options={"compiler": "eager", "k": 2, "device": "cpu"})
    optimizer = torch.optim.AdamW(model.parameters())
    with caplog.at_level(logging.WARNING):
        fast(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    assert spcompile.plan(fast).intervals
    own = zip(spcompile.host_parameters(model), model.parameters(), strict=True)
    assert all(one is other for one, other in own)
    assert not [each for each in caplog.records if "state of this" in each.getMessage()]
