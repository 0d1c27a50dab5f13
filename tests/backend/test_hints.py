"""A prefetch is a hint: whatever happens between two calls, results are right, and nothing moves twice for nothing.

Everything runs on the emulated device; `Side` keeps a compiled model beside a plain copy that lives through the same
edits.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.runtime.store import PageStore
from spcompile.runtime.transfers import Transfers
from spcompile.segments import CompiledSegment
from tests.running import Event, compile_offloaded

WIDTH = 16


class Stack(nn.Module):
    """Identical layers, one behind the other."""

    def __init__(self, n_layers: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(n_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

    def linear(self, index: int) -> nn.Linear:
        """A layer, with its type."""
        layer = self.layers[index]
        assert isinstance(layer, nn.Linear)
        return layer


class Side:
    """A compiled model and the plain one beside it."""

    def __init__(self, k: int | None = 2, m: int | None = 1, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model, self.x = Stack(), torch.randn(3, WIDTH)
        self.plain = copy.deepcopy(self.model)
        self.run = compile_offloaded(self.model, k=k, m=m, seed=seed)
        self.optimizers: list[torch.optim.Optimizer] = []

    @property
    def both(self) -> tuple[Stack, Stack]:
        return self.model, self.plain

    def call(self) -> list[Event]:
        """One call, whose result must be right; returns its events."""
        before = len(self.run.events)
        with torch.no_grad():
            assert torch.equal(self.run.model(self.x), self.plain(self.x))
        return self.run.events[before:]


def compiled(model: nn.Module, *, dynamic: bool | None = None, **options: Any) -> Callable[..., Tensor]:
    """One more compiled form of an offloaded model, or of a part of it."""
    fast: Callable[..., Tensor] = torch.compile(
        model, backend="superpipeline", dynamic=dynamic, options={"compiler": "eager", **options}
    )
    return fast


def copied(events: Iterable[Event]) -> list[object]:
    """Pages copied, in order."""
    return [event[1] for event in events if event[-1] == "copy"]


LAYERS = [f"layers.{index}" for index in range(5)]


# What one iteration does.


def compact(events: Iterable[Event]) -> list[str]:
    """``prefetch 2 into 0: copy``, ``run 0``: an event list that can be read."""
    texts = []
    for event in events:
        if event[0] in ("prefetch", "load"):
            texts.append(f"{event[0]} {str(event[1])[-1]} into {event[2]}: {event[3]}")
        elif event[0] == "evict":
            texts.append(f"evict {str(event[1])[-1]} from {event[2]}")
        elif event[0] == "run":
            texts.append(f"run {str(event[1])[-1]}")
        else:
            texts.append(f"begin, phase {event[1]}")
    return texts


def test_a_warm_iteration_one_by_one() -> None:
    """Five pages through two slots: each iteration finds its first two pages in place, in slots that took turns."""
    side = Side(k=2, m=1)
    side.call()
    assert compact(side.call()) == [
        "begin, phase 1",
        "prefetch 0 into 1: hit",
        "prefetch 1 into 0: hit",
        "load 0 into 1: hit",
        "run 0",
        "evict 0 from 1",
        "prefetch 2 into 1: copy",
        "load 1 into 0: hit",
        "run 1",
        "evict 1 from 0",
        "prefetch 3 into 0: copy",
        "load 2 into 1: hit",
        "run 2",
        "evict 2 from 1",
        "prefetch 4 into 1: copy",
        "load 3 into 0: hit",
        "run 3",
        "evict 3 from 0",
        "prefetch 0 into 0: copy",
        "load 4 into 1: hit",
        "run 4",
        "evict 4 from 1",
        "prefetch 1 into 1: copy",
    ]


def test_a_warm_iteration_in_batches() -> None:
    """Five pages, three slots, two at a time; the last batch of the iteration is one page."""
    side = Side(k=3, m=2)
    side.call()
    side.call()
    assert compact(side.call()) == [
        "begin, phase 2",
        "prefetch 0 into 1: hit",
        "prefetch 1 into 2: hit",
        "prefetch 2 into 0: hit",
        "load 0 into 1: hit",
        "run 0",
        "load 1 into 2: hit",
        "run 1",
        "evict 0 from 1",
        "evict 1 from 2",
        "prefetch 3 into 1: copy",
        "prefetch 4 into 2: copy",
        "load 2 into 0: hit",
        "run 2",
        "load 3 into 1: hit",
        "run 3",
        "evict 2 from 0",
        "evict 3 from 1",
        "prefetch 0 into 0: copy",
        "prefetch 1 into 1: copy",
        "load 4 into 2: hit",
        "run 4",
        "evict 4 from 2",
        "prefetch 2 into 2: copy",
    ]


def test_a_warm_iteration_copies_each_page_once() -> None:
    side = Side()
    assert copied(side.call()) == [*LAYERS, "layers.0", "layers.1"]
    for _ in range(4):
        assert sorted(map(str, copied(side.call()))) == LAYERS


# Other graphs in between.


def test_a_graph_of_a_part_of_the_model_in_between() -> None:
    side = Side()
    part, plain_part = nn.Sequential(*side.model.layers[3:]), nn.Sequential(*side.plain.layers[3:])
    fast = compiled(part, k=1)
    for _ in range(3):
        side.call()
        with torch.no_grad():
            assert torch.equal(fast(side.x), plain_part(side.x))
    assert len(side.run.store.runtimes()) == 2
    assert len(side.run.store.pages) == 5


def test_two_sizes_with_a_graph_each_go_on_where_the_other_one_stopped() -> None:
    """The slots take turns with a period of 2: each graph has to start in the phase that the other one prepared."""
    side = Side()
    fast = compiled(side.model, dynamic=False, k=2, m=1)
    inputs = [torch.randn(rows, WIDTH) for rows in (2, 5)]
    with torch.no_grad():
        for x in [*inputs, *inputs, inputs[1], inputs[0], inputs[0]]:
            side.run.events.clear()
            assert torch.equal(fast(x), side.plain(x))
        assert len(side.run.store.runtimes()) == 2
        for x in [*inputs, *inputs, inputs[1], inputs[0], inputs[0]]:
            side.run.events.clear()
            assert torch.equal(fast(x), side.plain(x))
            assert sorted(map(str, copied(side.run.events))) == LAYERS


@pytest.mark.parametrize("seed", range(4))
def test_graphs_with_other_windows_alternate(seed: int) -> None:
    side = Side(k=2, m=1, seed=seed)
    others = [compiled(side.model, k=k, m=m) for k, m in ((1, 1), (3, 2), (4, 4))]
    with torch.no_grad():
        for fast in [*others, *others[::-1], *others]:
            assert torch.equal(fast(side.x), side.plain(side.x))
            side.call()


# Exceptions.


class RefusalError(Exception):
    """Raised on purpose inside a segment."""


def refuse(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Let the segment call of this number, counted from now on, raise; the ones before and after work."""
    forward, counter = CompiledSegment.forward, itertools.count()

    def sometimes(segment: CompiledSegment, values: list[object]) -> object:
        if next(counter) == call:
            raise RefusalError
        return forward(segment, values)

    monkeypatch.setattr(CompiledSegment, "forward", sometimes)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("call", [0, 2, 4])
@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 1), (3, 2), (4, 4)])
def test_an_exception_in_a_segment(monkeypatch: pytest.MonkeyPatch, k: int, m: int, call: int, seed: int) -> None:
    side = Side(k=k, m=m, seed=seed)
    side.call()
    with monkeypatch.context() as patch:
        refuse(patch, call)
        with pytest.raises(RefusalError):
            side.call()
    assert_same_weights(side)
    for _ in range(3):
        side.call()


@pytest.mark.parametrize("node", ["prefetch", "load", "evict"])
@pytest.mark.parametrize("call", [0, 1, 3])
@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 1), (4, 2)])
def test_an_exception_while_work_is_issued(
    monkeypatch: pytest.MonkeyPatch, k: int, m: int, call: int, node: str
) -> None:
    """As on a GPU, where the host is interrupted half-way: pages are loaded, in use, and not evicted."""
    side = Side(k=k, m=m)
    side.call()
    counter, method = itertools.count(), getattr(Transfers, node)

    def sometimes(runtime: Transfers, *args: int) -> object:
        if next(counter) == call:
            raise RefusalError
        return method(runtime, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Transfers, node, sometimes)
        with pytest.raises(RefusalError):
            side.call()
    for _ in range(3):
        side.call()


def test_an_exception_in_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    side = Side()
    with monkeypatch.context() as patch:
        refuse(patch, 2)
        with pytest.raises(RefusalError):
            side.call()
    for _ in range(3):
        side.call()


def test_an_exception_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    side = Side()
    side.run.model(side.x).sum().backward()
    side.model.zero_grad()
    with monkeypatch.context() as patch:
        refuse(patch, 5 + 2)
        result = side.run.model(side.x)
        with pytest.raises(RefusalError):
            result.sum().backward()
    side.model.zero_grad()
    for each in (side.run.model, side.plain):
        each(side.x).sum().backward()
    for actual, expected in zip(side.model.parameters(), side.plain.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def assert_same_weights(side: Side) -> None:
    for (name, actual), expected in zip(side.model.named_parameters(), side.plain.parameters(), strict=True):
        assert torch.equal(actual, expected), name


# Edits of weights.


def in_place(side: Side) -> None:
    with torch.no_grad():
        for model in side.both:
            for parameter in model.parameters():
                parameter.mul_(1.5)


def in_place_one(side: Side) -> None:
    with torch.no_grad():
        for model in side.both:
            model.linear(1).weight.add_(0.25)


def load_state(side: Side) -> None:
    state = {name: value + 0.125 for name, value in side.plain.state_dict().items()}
    for model in side.both:
        model.load_state_dict(state)


def assign_state(side: Side) -> None:
    state = {name: value + 0.125 for name, value in side.plain.state_dict().items()}
    for model in side.both:
        model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)


def other_memory(side: Side) -> None:
    for model in side.both:
        weight = model.linear(2).weight
        weight.data = weight.data * 2


def other_parameter(side: Side) -> None:
    for model in side.both:
        layer = model.linear(2)
        layer.weight = nn.Parameter(layer.weight.detach() * 2)


def through_data(side: Side) -> None:
    for model in side.both:
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
    spcompile.refresh(side.model)


def step_of(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[Side], None]:
    def step(side: Side) -> None:
        if not side.optimizers:
            side.optimizers = [make(list(model.parameters())) for model in side.both]
        for model, optimizer in zip(side.both, side.optimizers, strict=True):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.5)
            optimizer.step()

    return step


EDITS: dict[str, Callable[[Side], None]] = {
    "in place": in_place,
    "one weight in place": in_place_one,
    "load_state_dict": load_state,
    "load_state_dict, assign": assign_state,
    "data = other memory": other_memory,
    "another parameter": other_parameter,
    "data.mul_ and refresh": through_data,
    "SGD": step_of(lambda parameters: torch.optim.SGD(parameters, lr=0.1)),
    "fused SGD": step_of(lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True)),
    "Adam": step_of(lambda parameters: torch.optim.Adam(parameters, lr=0.1, foreach=True)),
    "fused Adam": step_of(lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True)),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("k", "m"), [(2, 1), (4, 2), (5, 1)])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_between_calls(edit: str, k: int, m: int, seed: int) -> None:
    side = Side(k=k, m=m, seed=seed)
    side.call()
    for _ in range(2):
        EDITS[edit](side)
        side.call()
        side.call()
    assert_same_weights(side)


@pytest.mark.parametrize(
    "edit", [name for name in EDITS if name not in ("load_state_dict, assign", "another parameter")]
)
def test_an_edit_costs_one_reload_of_what_was_ahead(edit: str) -> None:
    side = Side(k=2, m=1)
    side.call()
    assert sorted(map(str, copied(side.call()))) == LAYERS
    EDITS[edit](side)
    stale = {"one weight in place": ["layers.1"], "data = other memory": []}.get(edit, ["layers.0", "layers.1"])
    assert sorted(map(str, copied(side.call()))) == sorted([*LAYERS, *stale])
    assert sorted(map(str, copied(side.call()))) == LAYERS


def test_without_refresh_an_edit_through_data_may_be_missed() -> None:
    """What refresh is for. If this fails, such edits are seen now: say so in the documentation."""
    side = Side(k=4, m=1)
    side.call()
    with torch.no_grad():
        for model in side.both:
            for parameter in model.parameters():
                parameter.data.mul_(1.5)
        assert not torch.equal(side.run.model(side.x), side.plain(side.x))
    spcompile.refresh(side.model)
    side.call()


# Residents come and go.


def residents(store: PageStore) -> list[str]:
    return [name for name, weight in store.weights.items() if weight.resident is not None]


def test_all_resident_and_back() -> None:
    side = Side(k=5)
    store = side.run.store
    side.call()
    assert len(residents(store)) == 10
    assert copied(side.run.events) == []
    in_place(side)  # the device copy is the truth now
    narrow = compiled(side.model, k=2, m=1)
    with torch.no_grad():
        assert torch.equal(narrow(side.x), side.plain(side.x))
    assert residents(store) == []
    assert_same_weights(side)
    in_place(side)
    torch.compiler.reset()
    wide = compiled(side.model, k=5)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(wide(side.x), side.plain(side.x))
    assert len(residents(store)) == 10
    assert_same_weights(side)
    spcompile.restore(side.model)
    assert_same_weights(side)


def test_a_narrow_graph_moves_out_the_residents_of_another() -> None:
    """The first graph was compiled for residents: it reads what its arguments look at, wherever that is."""
    side = Side(k=5)
    side.call()
    narrow = compiled(side.model, k=2, m=1)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(narrow(side.x), side.plain(side.x))
        side.call()
        in_place(side)


PAGE_BYTES = 4 * WIDTH * WIDTH + 256
"""What a layer of `Stack` takes in the arena: a matrix, and a bias rounded up."""


def free_bytes_for(pages: int) -> int:
    """Free memory of the device in which so many pages find a place, residents and slots together, but not one more."""
    activations_bytes = PAGE_BYTES // 2
    return int((pages * PAGE_BYTES + activations_bytes) / 0.95) + 1


@pytest.mark.parametrize("pages", [2, 3, 4])
@pytest.mark.parametrize("seed", range(2))
def test_without_options_free_memory_decides(monkeypatch: pytest.MonkeyPatch, pages: int, seed: int) -> None:
    monkeypatch.setattr("spcompile.capture.free_device_bytes", lambda _: free_bytes_for(pages))
    side = Side(k=None, m=None, seed=seed)
    for _ in range(3):
        side.call()
    plan = side.run.plan
    assert len(plan.slots) == 2
    assert len(plan.residents) == pages - 2
    assert len(residents(side.run.store)) == 2 * len(plan.residents)
    assert plan.peak_weight_bytes <= 0.95 * free_bytes_for(pages)
    in_place(side)
    side.call()


def test_without_options_a_second_graph_keeps_the_residents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spcompile.capture.free_device_bytes", lambda _: free_bytes_for(3))
    side = Side(k=None, m=None)
    side.call()
    first = residents(side.run.store)
    # What is placed already is no longer free.
    taken = side.run.store.device_bytes()
    monkeypatch.setattr("spcompile.capture.free_device_bytes", lambda _: free_bytes_for(3) - taken)
    with torch.no_grad():
        for rows in (2, 7):
            x = torch.randn(rows, WIDTH)
            assert torch.equal(side.run.model(x), side.plain(x))
    assert residents(side.run.store) == first
    side.call()


def test_a_smaller_window_gives_the_arena_of_a_larger_one_back() -> None:
    """The options given last count; what was compiled before takes its memory again when it runs."""
    side = Side(k=4)
    side.call()
    arena, large_bytes = side.run.store.arena, side.run.plan.arena_bytes
    assert arena.memory.numel() == large_bytes
    small = compiled(side.model, k=2)
    with torch.no_grad():
        expected = side.plain(side.x)
        assert torch.equal(small(side.x), expected)
        small_plan = spcompile.plan(small)
        assert arena.memory.numel() == small_plan.arena_bytes < large_bytes
        side.call()
        assert arena.memory.numel() == large_bytes
        assert torch.equal(small(side.x), expected)
