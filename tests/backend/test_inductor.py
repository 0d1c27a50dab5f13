"""Compiled segments: bit-equal to all resident, close to eager, and each distinct one compiled once.

Compiling is slow, so each test compiles a model once and runs it as often as it can. The narrow window and "all
resident" are two compiled forms of one model: they share pages and segments, which is tested too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch
from torch import Tensor, fx, nn

from spcompile import segments
from tests.running import Run, compile_offloaded

VOCABULARY, WIDTH = 50, 32

Model = TypeVar("Model", bound=nn.Module)

COMPILERS = ["aot_eager", "inductor"]


class Block(nn.Module):
    """A feed-forward block with a skip connection."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.up(self.norm(x)))
        return x + self.dropout(self.down(hidden))  # type: ignore[no-any-return]


class Language(nn.Module):
    """An embedding, three identical blocks and a head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


class ConvBlock(nn.Module):
    """A convolution, batch norm and a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


class Vision(nn.Module):
    """A strided stem, three identical convolution blocks, and the feature map as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(ConvBlock(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


@dataclass
class Counter:
    """Counts the segments that are compiled."""

    compiled: int = 0

    def since(self) -> int:
        """How many since the last question."""
        count, self.compiled = self.compiled, 0
        return count


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter, compile_segment = Counter(), segments._compile

    def count(segment: fx.GraphModule, compiler: str) -> Callable[[list[object]], object]:
        counter.compiled += 1
        return compile_segment(segment, compiler)

    monkeypatch.setattr(segments, "_compile", count)
    return counter


def made(model: Callable[[], Model]) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model()


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows))


def images(rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)


def again(run: Run, compiler: str, **options: int) -> Callable[[Tensor], Tensor]:
    """One more compiled form of the same model."""
    fast: Callable[[Tensor], Tensor] = torch.compile(
        run.model._orig_mod,  # type: ignore[attr-defined]
        backend="superpipeline",
        options={"compiler": compiler, **options},
    )
    return fast


def streamed_bytes(run: Run) -> int:
    return sum(runtime.bytes_moved for runtime in run.store.runtimes())


@pytest.mark.parametrize("compiler", COMPILERS)
def test_inference_and_a_second_batch_size(compiler: str, counter: Counter) -> None:
    model = made(Language).eval()
    with torch.no_grad():
        eager = {rows: model(tokens(rows)) for rows in (2, 3, 5)}
    run = compile_offloaded(model, k=2, m=1, compiler=compiler)
    with torch.no_grad():
        narrow = [run.model(tokens()) for _ in range(3)]
        assert counter.since() == 3, "the embedding, one block, the head"
        assert run.runtime.bytes_moved >= 3 * run.plan.weights_bytes
        assert torch.equal(again(run, compiler, k=3, m=2)(tokens()), narrow[0])
        whole = again(run, compiler, k=100)
        for result in narrow:
            assert torch.equal(whole(tokens()), result)
        assert counter.since() == 0, "windows share compiled segments"
        torch.testing.assert_close(narrow[0], eager[2])
        wider = {rows: run.model(tokens(rows)) for rows in (3, 5)}
        assert counter.since() == 3, "once more with symbolic sizes, and then no more"
        for rows, result in wider.items():
            torch.testing.assert_close(result, eager[rows])
            assert torch.equal(whole(tokens(rows)), result)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_training_with_dropout(compiler: str) -> None:
    """Masks repeat by seed whatever the window, forward and backward use the same ones, and gradients are bit-equal."""
    model = made(lambda: Language(dropout=0.3)).train()
    run = compile_offloaded(model, k=2, m=1, compiler=compiler)
    narrow = [training_step(run.model, model, seed) for seed in (1, 2)]
    assert streamed_bytes(run) > 0
    whole = again(run, compiler, k=100)
    before = streamed_bytes(run)
    for seed, (loss, gradients) in zip((1, 2), narrow, strict=True):
        expected_loss, expected_gradients = training_step(whole, model, seed)
        assert torch.equal(loss, expected_loss)
        assert all(map(torch.equal, gradients, expected_gradients))
    assert streamed_bytes(run) == before
    assert not torch.equal(narrow[0][0], narrow[1][0])


@pytest.mark.parametrize("compiler", COMPILERS)
def test_gradients_are_close_to_eager(compiler: str) -> None:
    model = made(Language).train()
    expected_loss, expected = training_step(model, model, 0)
    run = compile_offloaded(model, k=2, m=1, compiler=compiler)
    for _ in range(2):
        loss, gradients = training_step(run.model, model, 0)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(gradients, expected)
    assert streamed_bytes(run) > 0


def training_step(call: Callable[[Tensor], Tensor], model: nn.Module, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one step; the model's own gradients are cleared before and after."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = call(tokens()).square().mean()
    torch.autograd.backward(loss)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("compiler", COMPILERS)
def test_channels_last_keeps_its_strides(compiler: str, counter: Counter) -> None:
    model = made(Vision).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        expected = model(images())
    assert expected.is_contiguous(memory_format=torch.channels_last)
    run = compile_offloaded(model, k=2, m=1, compiler=compiler)
    with torch.no_grad():
        for _ in range(2):
            actual = run.model(images())
            torch.testing.assert_close(actual, expected)
            assert actual.stride() == expected.stride()
        assert counter.since() == 2, "the stem, one block"
        assert run.runtime.bytes_moved >= 2 * run.plan.bytes_moved > 0
        assert torch.equal(again(run, compiler, k=100)(images()), actual)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_batch_norm_statistics(compiler: str) -> None:
    """Running statistics are updated in place, once per call, as eager does."""
    model, plain = (made(Vision).train() for _ in range(2))
    run = compile_offloaded(model, k=2, m=1, compiler=compiler)
    addresses = [buffer.data_ptr() for buffer in model.buffers()]
    for rows in (2, 2):
        loss, expected = run.model(images(rows)).square().mean(), plain(images(rows)).square().mean()
        torch.testing.assert_close(loss, expected)
        torch.autograd.backward([loss, expected])
    assert [buffer.data_ptr() for buffer in model.buffers()] == addresses
    for (name, actual), wanted in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(actual, wanted, msg=name)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert streamed_bytes(run) > 0
