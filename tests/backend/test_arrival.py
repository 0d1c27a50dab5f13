"""Models that nobody offloaded: already on the compute device, or on the CPU with CPU inputs.

On a machine without CUDA both run towards the emulated device: ``device="cpu"`` says that the model is there already;
without it the model is a CPU model whose compute is re-homed.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import spcompile
from spcompile import rehome
from spcompile.runtime.store import PageStore, find_store
from tests.running import Run, moved_by_plan

WIDTH = 16
ON_DEVICE: dict[str, Any] = {"device": "cpu"}
REHOMED: dict[str, Any] = {}
WAYS = pytest.mark.parametrize("way", [ON_DEVICE, REHOMED], ids=["on the device", "re-homed"])


class Block(nn.Module):
    """A layer with dropout, a constant, and a buffer that it updates in training."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls.add_(1)
        y: Tensor = x + self.down(torch.relu(self.up(self.norm(x)))) * torch.ones(WIDTH)
        return y


class Stack(nn.Module):
    """An embedding, five layers and a head."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


def tokens(*size: int) -> Tensor:
    return torch.randint(0, 40, size or (2, 7), generator=torch.Generator().manual_seed(0))


def pair(make: Callable[[], nn.Module] = Stack) -> tuple[nn.Module, nn.Module]:
    """A model to compile, and an equal one to compare with."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make()
    return model, copy.deepcopy(model)


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    fast: Callable[..., Any] = torch.compile(
        model, backend="superpipeline", options={"compiler": "eager", "k": 2, **options}
    )
    return fast


def store_of(model: nn.Module) -> PageStore:
    store = find_store(model.parameters())
    assert store is not None
    return store


def weak_storage(tensor: Tensor) -> Callable[[], bool]:
    """Tells whether the storage that the tensor has now is gone."""
    reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return lambda: bool(reference.expired())  # type: ignore[no-untyped-call]


def limit_memory(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """Let a plan without k find this much room for weights."""
    monkeypatch.setattr("spcompile.passes.make_schedule.free_capacity_bytes", lambda *_: nbytes)


@WAYS
def test_inference_is_exact_and_streams(way: dict[str, Any]) -> None:
    model, plain = pair()
    before = list(model.parameters())
    fast = compiled(model, **way)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(fast(tokens()), plain(tokens()))
    store = store_of(model)
    run = Run(fast, store)
    assert store.rehomed == (way is REHOMED)
    assert len(run.plan.intervals) == 7
    assert run.runtime.bytes_moved >= 3 * run.plan.bytes_moved
    assert run.plan.arena_bytes < run.plan.weights_bytes / 2
    after = list(model.parameters())
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert all(type(each) is nn.Parameter and each.device.type == "cpu" for each in after)
    assert store.weights.keys() == dict(model.named_parameters()).keys()


@WAYS
@pytest.mark.parametrize("fused", [False, True])
def test_training_is_exact_with_an_optimizer_made_before(way: dict[str, Any], fused: bool) -> None:
    model, plain = pair()
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01, fused=fused) for each in (model, plain)]
    fast = compiled(model, **way)
    for _ in range(3):
        losses = [call(tokens()).square().mean() for call in (fast, plain)]
        assert torch.equal(*losses)
        torch.autograd.backward(losses)
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert mine.grad is not None
            assert type(mine.grad) is Tensor
            assert other.grad is not None
            assert torch.equal(mine.grad, other.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine, other)
    assert all(moved == 3 * plan.bytes_moved > 0 for plan, moved in moved_by_plan(store_of(model)))


@WAYS
def test_without_k_and_with_room_nothing_is_moved_or_copied(way: dict[str, Any]) -> None:
    model, plain = pair()
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with torch.no_grad():
        assert torch.equal(compiled(model, **way, k=None)(tokens()), plain(tokens()))
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert not any(weight.has_home for weight in store_of(model).weights.values())


@WAYS
def test_only_what_is_evicted_moves(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair()
    storages = {name: weak_storage(each) for name, each in model.named_parameters()}
    limit_memory(monkeypatch, sum(parameter.nbytes for parameter in model.parameters()) * 2 // 3)
    fast = compiled(model, **way, k=None)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(fast(tokens()), plain(tokens()))
    plan = Run(fast, store_of(model)).plan
    assert plan.residents
    assert plan.intervals
    evicted = {*plan.mapped, *(each.page for each in plan.intervals)}
    at_home = {weight.name for page in evicted for weight in plan.pages[page].weights}
    for name, storage in storages.items():
        assert storage() == (name in at_home), name  # gone, or still the very same


def test_a_hint_says_who_keeps_device_memory(caplog: pytest.LogCaptureFixture) -> None:
    model, plain = pair()
    kept = model.get_submodule("layers.1").state_dict()
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        assert torch.equal(compiled(model, **ON_DEVICE)(tokens()), plain(tokens()))
    held_bytes = sum(tensor.nbytes for name, tensor in kept.items() if name != "calls")
    (message,) = [record.message for record in caplog.records if "somebody else holds" in record.message]
    assert message.startswith(f"{held_bytes:,} bytes of device memory do not come free")
    assert "'layers.1." in message


def test_no_hint_where_memory_comes_free(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        compiled(model, **ON_DEVICE)(tokens())
    assert optimizer.param_groups
    assert "somebody else" not in caplog.text


@WAYS
def test_parameters_shared_with_another_model_follow(way: dict[str, Any]) -> None:
    model, plain = pair()
    other = Stack()
    other.layers = model.get_submodule("layers")  # type: ignore[assignment]
    fast = compiled(model, **way)
    with torch.no_grad():
        fast(tokens())
        for each in (model, plain):
            each.get_parameter("layers.2.up.weight").mul_(2)
        assert torch.equal(fast(tokens()), plain(tokens()))
        assert torch.equal(other.get_parameter("layers.2.up.weight"), plain.get_parameter("layers.2.up.weight"))
        fast_other = compiled(other, **way)
        assert torch.equal(fast_other(tokens()), other(tokens()))
    assert store_of(other) is store_of(model)


@WAYS
def test_to_another_dtype_afterwards(way: dict[str, Any]) -> None:
    """``.to`` makes ordinary tensors of the weights; the next call compiles again and streams those."""
    model, plain = pair()
    fast = compiled(model, **way)
    with torch.no_grad():
        assert torch.equal(fast(tokens()), plain(tokens()))
        model.double()
        assert find_store(model.parameters()) is None
        plain.double()
        assert torch.equal(fast(tokens()), plain(tokens()))
    run = Run(fast, store_of(model))
    assert run.runtime.bytes_moved >= run.plan.bytes_moved > 0


@WAYS
def test_offload_and_restore_afterwards(way: dict[str, Any]) -> None:
    model, plain = pair()
    fast = compiled(model, **way)
    with torch.no_grad():
        assert torch.equal(fast(tokens()), plain(tokens()))
        spcompile.offload(model, device="cpu")
        assert all(weight.has_home for weight in store_of(model).weights.values())
        assert not store_of(model).rehomed
        assert torch.equal(model(tokens()), plain(tokens()))
        torch._dynamo.reset()
        assert torch.equal(compiled(model)(tokens()), plain(tokens()))
        spcompile.restore(model)
        assert find_store(model.parameters()) is None
        assert torch.equal(model(tokens()), plain(tokens()))


@WAYS
def test_edits_between_calls(way: dict[str, Any]) -> None:
    model, plain = pair()
    for k in (2, 100):
        torch._dynamo.reset()
        fast = compiled(model, **way, k=k)
        with torch.no_grad():
            for factor in (1, 3):
                for each in (model, plain):
                    for parameter in each.parameters():
                        parameter.mul_(factor)
                assert torch.equal(fast(tokens()), plain(tokens())), (k, factor)
            for each in (model, plain):
                each.get_parameter("head.weight").data.fill_(0.5)
            spcompile.refresh(model)
            assert torch.equal(fast(tokens()), plain(tokens())), k
            for each in (model, plain):
                each.get_parameter("head.weight").data = torch.ones(40, WIDTH)
            assert torch.equal(fast(tokens()), plain(tokens())), k


@WAYS
def test_the_model_dies_with_its_last_tensor(way: dict[str, Any]) -> None:
    model, _ = pair()
    fast = compiled(model, **way)
    with torch.no_grad():
        fast(tokens())
    storages = [weak_storage(parameter) for parameter in model.parameters()]
    del model, fast
    torch._dynamo.reset()
    gc.collect()
    assert all(storage() for storage in storages)


def assert_streamed_twice(model: nn.Module) -> None:
    """By its one graph, in two calls at least."""
    (runtime,) = store_of(model).runtimes()
    assert runtime.bytes_moved >= 2 * runtime.plan.bytes_moved > 0


@WAYS
def test_a_second_model_of_the_same_class_is_streamed_by_the_same_graph(way: dict[str, Any]) -> None:
    """Dynamo caches by the code of a model: it brings the second one to the graph of the first."""
    first, plain = pair()
    second = Stack()
    plain_second = copy.deepcopy(second)
    with torch.no_grad():
        assert torch.equal(compiled(first, **way)(tokens()), plain(tokens()))
        fast = compiled(second, **way)
        for _ in range(2):
            assert torch.equal(fast(tokens()), plain_second(tokens()))
        assert store_of(second) is not store_of(first)
        assert_streamed_twice(second)
        del first
        gc.collect()
        assert torch.equal(fast(tokens()), plain_second(tokens()))


@WAYS
def test_a_model_is_streamed_by_the_graph_of_one_that_is_gone(way: dict[str, Any]) -> None:
    with torch.no_grad():
        for index in range(3):
            model, plain = pair() if index == 0 else (Stack(), None)  # `pair` resets what is compiled
            expected = (plain or copy.deepcopy(model))(tokens())
            fast = compiled(model, **way)
            for _ in range(2):
                assert torch.equal(fast(tokens()), expected)
            assert_streamed_twice(model)
            storages = [weak_storage(parameter) for parameter in model.parameters()]
            del model, plain, fast
            gc.collect()
            assert all(storage() for storage in storages), "compiled code keeps no model"


@WAYS
def test_to_another_dtype_and_back_is_streamed_by_the_first_graph(way: dict[str, Any]) -> None:
    """The parameters then have the tags of the second dtype's store, and look elsewhere."""
    model, plain = pair()
    fast = compiled(model, **way)
    with torch.no_grad():
        fast(tokens())
        model.double()
        fast(tokens())
        model.float()
        for _ in range(2):
            assert torch.equal(fast(tokens()), plain(tokens()))
    assert_streamed_twice(model)


def test_another_device_than_the_weights() -> None:
    model, _ = pair()
    spcompile.offload(model, device="cpu")
    with torch.no_grad():
        compiled(model, device="cuda")(tokens())  # there is none: the CPU stands in for it
    assert store_of(model).device.type == "cpu" or torch.cuda.is_available()


# Re-homed alone: what goes up and down.


class Counting:
    """Counts the tensors that go up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[tuple[int, ...]] = []
        upload = rehome._upload

        def counted(value: Tensor, device: torch.device) -> Tensor:
            self.sizes.append(tuple(value.shape))
            return upload(value, device)

        monkeypatch.setattr(rehome, "_upload", counted)

    def since(self) -> list[tuple[int, ...]]:
        sizes, self.sizes = self.sizes, []
        return sizes


class Buffered(nn.Module):
    """Buffers that are read, updated, and never touched."""

    scale: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.register_buffer("scale", torch.full((WIDTH,), 0.5))
        self.register_buffer("count", torch.zeros(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) * self.scale
        self.count[1].add_(1)
        return x * self.count[1, 0]


def test_buffers_go_up_once_and_come_back_when_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair(Buffered)
    fast, counting = compiled(model), Counting(monkeypatch)
    x = torch.randn(2, WIDTH)
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))
        assert sorted(counting.since()) == [(2, WIDTH), (3, 2), (WIDTH,)]
        assert torch.equal(fast(x), plain(x))
        assert counting.since() == [(2, WIDTH)], "buffers stay up, the one that was written, too"
        assert torch.equal(model.get_buffer("count"), plain.get_buffer("count"))
        for each in (model, plain):
            each.get_buffer("scale").mul_(2)
            each.get_buffer("count").zero_()
        assert torch.equal(fast(x), plain(x))
        assert sorted(counting.since()) == [(2, WIDTH), (3, 2), (WIDTH,)]
        for each in (model, plain):
            each.get_buffer("scale").data.fill_(7)  # leaves no trace
        spcompile.refresh(model)
        assert torch.equal(fast(x), plain(x))


class Views(nn.Module):
    """Returns its input, views of it and of a weight; updates an argument in place; reads an expanded argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, cache: Tensor) -> tuple[Any, ...]:
        y = x
        for layer in self.layers:
            y = torch.relu(layer(y))
        cache[:, 1:3].add_(y[:, :1, None].expand(-1, 2, 3).reshape(cache[:, 1:3].shape))
        return y, x, x[1:], self.layers[0].weight.t(), cache, {"size": x.shape[0], "last": cache[:, -1]}  # type: ignore[operator]


@pytest.mark.parametrize("offset", [0, 1])
def test_outputs_that_are_inputs(offset: int) -> None:
    model, plain = pair(Views)
    results = []
    for call in (compiled(model), plain):
        torch.manual_seed(0)
        memory, cache = torch.randn(4 + offset, 2 * WIDTH), torch.zeros(3, 8, 3)[:, 2:]
        x = memory[offset : offset + 3, ::2]
        with torch.no_grad():
            for _ in range(2):
                y, same, view, weight, returned, more = call(x, cache)
        assert same.data_ptr() == x.data_ptr()
        assert view.data_ptr() == x[1:].data_ptr()
        assert returned.data_ptr() == cache.data_ptr()
        assert more["last"].data_ptr() == cache[:, -1].data_ptr()
        results.append([y, same, view, weight, returned, more["last"], cache, torch.tensor(more["size"])])
    assert weight.data_ptr() == plain.get_parameter("layers.0.weight").data_ptr()
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
        assert mine.stride() == other.stride()
    assert results[0][3].data_ptr() == model.get_parameter("layers.0.weight").data_ptr()


def test_strange_strides_go_up_as_they_are() -> None:
    model, plain = pair(lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3))))
    fast = compiled(model)
    x = torch.randn(WIDTH, 5)
    for value in (x.t(), x[:, :1].t().expand(4, WIDTH), torch.empty(0, WIDTH), x.t()[1::2]):
        with torch.no_grad():
            assert torch.equal(fast(value), plain(value))


def test_gradients_of_inputs_come_down() -> None:
    model, plain = pair(lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3))))
    fast = compiled(model)
    results = []
    for call in (fast, plain):
        torch.manual_seed(0)
        leaf = torch.randn(3, WIDTH, requires_grad=True)
        call(leaf * 2).square().sum().backward()
        results.append(leaf.grad)
    assert torch.equal(*results)  # type: ignore[arg-type]


def test_frozen_and_trainable_in_one_model() -> None:
    model, plain = pair()
    for each in (model, plain):
        each.get_submodule("layers").requires_grad_(False)
    fast = compiled(model)
    for call in (fast, plain):
        call(tokens()).square().mean().backward()
    for (name, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == name.startswith("layers.")
        assert mine.grad is None or torch.equal(mine.grad, other.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    class Cast(Stack):
        def forward(self, tokens: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                return super().forward(tokens)

    model, plain = pair(Cast if inside else Stack)
    fast = compiled(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        losses = [call(tokens()).float().square().mean() for call in (fast, plain)]
    torch.testing.assert_close(*losses)
    torch.autograd.backward(losses)
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=2e-2, atol=1e-3)


def test_dropout_repeats_by_seed() -> None:
    model, _ = pair(lambda: nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)) for _ in range(3))))
    fast = compiled(model)
    x = torch.randn(8, WIDTH)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(fast(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_another_size_and_inference_mode() -> None:
    model, plain = pair()
    fast = compiled(model)
    with torch.inference_mode():
        for rows in (2, 3, 5, 2):
            assert torch.equal(fast(tokens(rows, 7)), plain(tokens(rows, 7)))
    with torch.no_grad():
        assert torch.equal(fast(tokens(4, 7)), plain(tokens(4, 7)))


def test_checkpointing_inside_the_model() -> None:
    class Checkpointed(Stack):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            y: Tensor = self.head(x)
            return y

    model, plain = pair(Checkpointed)
    model.eval()
    plain.eval()
    for call in (compiled(model), plain):
        call(tokens()).square().mean().backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_a_model_that_enables_gradients_itself() -> None:
    """Forces are gradients of an energy, wanted under ``no_grad``: so the graph is one of training, its call is not."""

    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def energy(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x.sum()

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(self.energy(x), x)[0]

    model, plain = pair(Forces)
    fast = compiled(model)
    with torch.no_grad():
        for rows in (4, 4, 3):
            x = torch.randn(rows, WIDTH)
            torch.testing.assert_close(fast(x), plain(x))


def test_parameters_that_only_no_grad_uses_have_no_gradient() -> None:
    """They had one of zeros, which weight decay and momentum take for a gradient."""

    class Detached(Stack):
        def forward(self, tokens: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.layers[0](self.embed(tokens))
            for layer in self.layers[1:]:
                x = layer(x)
            y: Tensor = self.head(x)
            return y

    model, plain = pair(Detached)
    model.eval()
    plain.eval()
    for call in (compiled(model), plain):
        call(tokens()).square().mean().backward()
    seen = [each.grad is None for each in model.parameters()]
    assert seen == [each.grad is None for each in plain.parameters()]
    assert any(seen)


def test_another_plan_between_forward_and_backward() -> None:
    """It sends some weights away, and those that stay were copied again, over what autograd had saved."""
    model, plain = pair()
    model.eval()
    plain.eval()
    weights_bytes = sum(each.nbytes for each in model.parameters())
    large, small = compiled(model, k=None), compiled(model, k=None, budget=int(0.7 * weights_bytes))
    with torch.no_grad():
        small(tokens())
    for _ in range(3):
        loss = large(tokens()).square().mean()
        with torch.no_grad():
            assert torch.equal(small(tokens()), plain(tokens()))
        assert 0 < store_of(model).device_bytes() < weights_bytes
        loss.backward()
        plain(tokens()).square().mean().backward()
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)
            mine.grad = other.grad = None


def test_a_tensor_subclass_on_the_cpu_is_refused_by_name() -> None:
    class Marked(Tensor):
        pass

    model, _ = pair()
    model.get_submodule("head").weight = nn.Parameter(torch.randn(40, WIDTH).as_subclass(Marked))
    with torch.no_grad(), pytest.raises(ValueError, match="it is a Marked, a tensor subclass"):
        compiled(model)(tokens())
