"""What a user sees when something is wrong: the message itself, as a ValueError where torch.compile reports it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.options import parse_options
from spcompile.runtime.store import find_store
from tests.running import compile_offloaded

WIDTH = 8


class Layer(nn.Module):
    """A layer of its own matrix, and one that all layers share: it reads two pages at once."""

    def __init__(self, shared: nn.Parameter) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x) @ self.shared)


class Sharing(nn.Module):
    """Layers that share a matrix."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.layers = nn.ModuleList(Layer(shared) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def chain() -> nn.Sequential:
    torch._dynamo.reset()
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))


def offloaded() -> nn.Sequential:
    return spcompile.offload(chain(), device="cpu")


def call(model: nn.Module, mode: str | None = None, **options: Any) -> Tensor:
    fast = torch.compile(model, backend="superpipeline", mode=mode, options=options or None)
    with torch.no_grad():
        result: Tensor = fast(torch.ones(2, WIDTH))
    return result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layers": 3},
            "unknown option 'layers'; allowed are k, m, budget, max_slowdown, machine, device, compiler, verify",
        ),
        ({"k": 0}, "option 'k' must be a whole number of pages, 1 or more, not 0"),
        ({"k": "2"}, "option 'k' must be a whole number of pages, 1 or more, not '2'"),
        ({"k": 2, "m": 3}, "option 'm' must be between 1 and k = 2, not 3"),
        ({"m": 1}, "option 'm' needs option 'k'"),
        ({"budget": "8 cups"}, "option 'budget' must be a number of bytes or text such as '8GiB' or '7.5GB'"),
        ({"k": 2, "budget": "8GiB"}, "options 'k' and 'budget' contradict each other: give one of them"),
        ({"max_slowdown": 0.5}, "option 'max_slowdown' must be a number, 1 or more, not 0.5"),
        ({"machine": "abacus"}, "option 'machine' must be one of h100, rtx4090 or a Machine, not 'abacus'"),
        ({"budget": 100}, "option 'budget' = 100 B is too little: the smallest that can be kept is"),
        ({"compiler": "gcc"}, "option 'compiler' must be one of inductor, aot_eager, eager, not 'gcc'"),
        ({"verify": 1}, "option 'verify' must be True or False, not 1"),
        ({"device": "tpu"}, "option 'device' must be 'cuda', 'cuda:<index>' or 'cpu', not 'tpu'"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the text is compared below, by its beginning
        call(offloaded(), **options)
    assert str(caught.value).startswith(message)


def test_modes() -> None:
    with pytest.raises(ValueError, match="mode='reduce-overhead' is not available with the superpipeline backend"):
        call(offloaded(), mode="reduce-overhead")
    with pytest.raises(RuntimeError, match="mode or options"):  # torch's own check
        call(offloaded(), mode="max-autotune", k=2)


@pytest.mark.parametrize("grad", [False, True])
def test_a_window_too_small_names_the_segment(grad: bool) -> None:
    model = Sharing()
    run = compile_offloaded(model, k=1)
    message = r"option 'k' must be at least 2 for this model, not 1: segment 'layers\.0' \(step 0\) reads 2 pages"
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        run.model(torch.ones(2, WIDTH))
    run = compile_offloaded(model, k=2)  # nothing was broken by the attempt
    with torch.no_grad():
        assert torch.equal(run.model(torch.ones(2, WIDTH)), model(torch.ones(2, WIDTH)))


def test_a_window_too_small_for_pages_of_a_part() -> None:
    """A part that is compiled by itself has layers of its own, which are pages from then on."""
    model = spcompile.offload(nn.Sequential(chain(), chain(), nn.Linear(WIDTH, WIDTH)), device="cpu").eval()
    part = model.get_submodule("0")
    assert torch.equal(call(part, compiler="eager", k=2), part(torch.ones(2, WIDTH)))
    message = (
        r"'k' must be at least 4 for this model, not 2: its weights keep the pages of a graph that was compiled before "
        r"\('0', '1'\), and segment '0' reads 4 of them at once"
    )
    with pytest.raises(ValueError, match=message):
        call(model, compiler="eager", k=2)
    spcompile.offload(spcompile.restore(model), device="cpu")  # as the message says
    torch._dynamo.reset()
    for each in (model, part):
        assert torch.equal(call(each, compiler="eager", k=2), each(torch.ones(2, WIDTH)))


def test_a_window_too_small_for_shared_weights_is_no_matter_of_parts() -> None:
    model = Sharing()
    run = compile_offloaded(model, k=2)
    with torch.no_grad():
        run.model(torch.ones(2, WIDTH))
    with pytest.raises(ValueError, match=r"must be at least 2 for this model, not 1: segment 'layers\.0'"):
        call(model, compiler="eager", k=1)


def test_models_that_were_offloaded_apart() -> None:
    one, other = offloaded(), offloaded()

    def both(x: Tensor) -> Tensor:
        y: Tensor = one(x) + other(x)
        return y

    fast = torch.compile(both, backend="superpipeline", options={"compiler": "eager", "k": 2})
    with pytest.raises(ValueError, match="weights of two models that were placed apart"):
        fast(torch.ones(2, WIDTH))


def test_calling_after_restore(caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo goes on with what it compiled: it runs on the ordinary tensors, and says so once."""
    model = chain()
    run = compile_offloaded(model, k=2, m=1)
    x = torch.ones(2, WIDTH)
    fast = run.model
    with torch.no_grad():
        expected = fast(x)
        del run
        spcompile.restore(model)
        for _ in range(2):
            assert torch.equal(fast(x), expected)
        assert [record.message[:69] for record in caplog.records] == [
            "the compiled model is called with weights that are not (or no longer)"
        ]
        spcompile.offload(model, device="cpu")
        assert torch.equal(fast(x), expected)
        store = find_store(model.parameters())
        assert store is not None
        assert [runtime.bytes_moved > 0 for runtime in store.runtimes()] == [True]


def test_calling_after_restore_while_somebody_holds_the_store() -> None:
    """Then the compiled model still knows what to do: every argument is an ordinary tensor and used as it is."""
    model = chain()
    plain = copy.deepcopy(model)
    run = compile_offloaded(model, k=2, m=1)
    x = torch.ones(2, WIDTH)
    store = find_store(model.parameters())
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(run.model(x), plain(x))
        spcompile.restore(model)
        assert store is not None
        assert not store.weights
        for each in (model, plain):
            each[0].weight.mul_(2)  # type: ignore[operator]
        assert torch.equal(run.model(x), plain(x))


def test_a_device_is_what_its_name_says() -> None:
    assert parse_options({"device": torch.device("cpu")}) == parse_options({"device": "cpu"})
