"""Several graphs of one model: pieces between graph breaks share pages and arena, and prefetch for each other."""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.ir import Plans
from spcompile.runtime.store import PageStore, find_store
from spcompile.runtime.streams import EmulatedStreams
from tests.running import Event

WIDTH = 16

WAYS = pytest.mark.parametrize("way", ["offloaded", "on the device", "re-homed"])


class Block(nn.Module):
    """A layer of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


class Broken(nn.Module):
    """Six layers and a head, with a graph break after the third layer, or after each."""

    def __init__(self, after: tuple[int, ...]) -> None:
        super().__init__()
        self.after = after
        self.layers = nn.ModuleList(Block() for _ in range(6))
        self.head = nn.Linear(WIDTH, 40)

    def forward(self, x: Tensor) -> Tensor:
        if self.after == (2,):
            for layer in self.layers[:3]:
                x = layer(x)
            torch._dynamo.graph_break()
            for layer in self.layers[3:]:
                x = layer(x)
        else:
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
        y: Tensor = self.head(x)
        return y


MIDDLE, LOOP = (2,), tuple(range(6))


class Side:
    """A compiled model with its events, and a plain one."""

    def __init__(self, after: tuple[int, ...], way: str, **options: Any) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = Broken(after).eval()
        self.plain = copy.deepcopy(self.model)
        self.x = torch.randn(3, WIDTH)
        device = {"device": "cpu"} if way == "on the device" else {}
        if way == "offloaded":
            spcompile.offload(self.model, device="cpu")
        self.fast: Callable[[Tensor], Tensor] = torch.compile(
            self.model, backend="superpipeline", options={"compiler": "eager", "k": 2, "m": 1, **device, **options}
        )

    @property
    def store(self) -> PageStore:
        store = find_store(self.model.parameters())
        assert store is not None
        return store

    def call(self) -> list[Event]:
        """One exact call; its events."""
        if find_store(self.model.parameters()) is not None:
            self.store.log = []
        with torch.no_grad():
            assert torch.equal(self.fast(self.x), self.plain(self.x))
        return self.store.log or []


def copied(events: list[Event]) -> list[str]:
    return sorted(str(event[1]) for event in events if event[-1] == "copy")


@WAYS
def test_prefetch_goes_on_across_a_break(way: str) -> None:
    side = Side(MIDDLE, way)
    for _ in range(3):
        side.call()
    events = side.call()
    pages = spcompile.plan(side.model).pages
    assert copied(events) == sorted(page.name for page in pages), "each page once"
    second = events.index(("begin", 0), 1)
    before = [event for event in events[:second] if event[-1] == "copy"]
    assert [str(event[1])[-8:] for event in before[-2:]] == ["layers.3", "layers.4"]
    assert all(event[-1] == "hit" for event in events if event[0] == "load")


@WAYS
def test_one_graph_serves_all_layers_of_a_loop(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo compiles the layer once and calls it with the weights of each."""
    side = Side(LOOP, way)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            side.call()
    assert sum("one compiled graph serves several layers" in each.message for each in caplog.records) == 1
    events = side.call()
    names = copied(events)
    assert len(names) == len(set(names)) >= 6
    assert all(event[-1] == "hit" for event in events if event[0] == "load")
    assert side.store.arena.memory.numel() < sum(each.nbytes for each in side.model.parameters()) / 2


@WAYS
def test_nothing_is_prefetched_for_a_graph_whose_arena_is_not_there(way: str) -> None:
    """Its slots may lie behind the end of the one that is, which is that of a plan with less room."""
    side = Side(MIDDLE, way)
    side.call()
    arena = side.store.arena
    assert isinstance(arena.streams, EmulatedStreams)
    (first, _) = side.store.runtimes()
    arena.shrink(first.plan.arena_bytes - 1)
    first.prefetch_heads(2, first.plan.pages)
    assert not arena.streams.side.queue
    side.call()


@WAYS
@pytest.mark.parametrize("after", [MIDDLE, LOOP])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_budget_is_that_of_all_graphs(way: str, after: tuple[int, ...], part: float) -> None:
    """Each graph took it for itself; and one that serves all layers kept its own and read the others over the link."""
    weights_bytes = sum(each.nbytes for each in Broken(after).parameters())
    budget = int(part * weights_bytes)
    side = Side(after, way, k=None, m=None, budget=budget)
    for _ in range(3):
        events = side.call()
    moves = side.store.moves
    side.call()
    assert side.store.moves == moves, "no weight goes to and fro"
    assert copied(events)
    beside_bytes = max(runtime.plan.beside_bytes() for runtime in side.store.runtimes())
    assert side.store.device_bytes() + beside_bytes <= budget
    read = set(copied(events))
    moved = {weight.name for page in side.store.pages if page.name in read for weight in page.weights}
    assert set(at_home(side.store)) <= moved, "nothing is read over the link"


class TwoTowers(nn.Module):
    """Two stacks of layers that are not alike, a graph each."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.wide = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.narrow:
            x = torch.tanh(layer(x))
        torch._dynamo.graph_break()
        for layer in self.wide:
            x = layer(x)
        return x


@WAYS
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9, 2])
def test_what_other_graphs_keep_on_the_device_counts(way: str, part: float) -> None:
    torch._dynamo.reset()
    model = TwoTowers().eval()
    plain = copy.deepcopy(model)
    weights_bytes = sum(each.nbytes for each in model.parameters())
    if way == "offloaded":
        spcompile.offload(model, device="cpu")
    options: dict[str, Any] = {"compiler": "eager", "budget": int(part * weights_bytes)}
    if way == "on the device":
        options["device"] = "cpu"
    fast = torch.compile(model, backend="superpipeline", options=options)
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(fast(x), plain(x))
    store = find_store(model.parameters())
    assert store is not None
    moves = store.moves
    with torch.no_grad():
        fast(x)
    assert store.moves == moves, "no weight goes to and fro"
    plans = [runtime.plan for runtime in store.runtimes()]
    assert store.device_bytes() + max(plan.beside_bytes() for plan in plans) <= options["budget"]
    assert any(plan.intervals for plan in plans) == (part < 1)


def at_home(store: PageStore) -> list[str]:
    """The weights of layers that are not on the device. (Where a loop breaks in its body, the head is left eager.)"""
    return [each.name for each in store.weights.values() if each.resident is None and not each.name.startswith("head")]


@WAYS
@pytest.mark.parametrize("after", [MIDDLE, LOOP])
@pytest.mark.parametrize("factor", [None, 2])
def test_where_all_fits_all_stays_whatever_graph_reads_it(way: str, after: tuple[int, ...], factor: int | None) -> None:
    weights_bytes = sum(each.nbytes for each in Broken(after).parameters())
    side = Side(after, way, k=None, m=None, budget=None if factor is None else factor * weights_bytes)
    side.call()
    assert copied(side.call()) == []
    assert at_home(side.store) == []


@pytest.mark.parametrize(("k", "streams"), [(2, True), (3, True), (6, True), (7, False), (100, False)])
def test_k_counts_the_pages_of_all_graphs(k: int, streams: bool) -> None:
    """The first graph has three pages, but k = 3 is not "all pages" of the model."""
    side = Side(MIDDLE, "offloaded", k=k)
    for _ in range(2):
        side.call()
    plans = spcompile.plan(side.fast)
    assert isinstance(plans, Plans)
    assert [bool(plan.intervals) for plan in plans] == [streams, streams]


def test_plans_of_all_graphs() -> None:
    side = Side(MIDDLE, "offloaded")
    side.call()
    plans = spcompile.plan(side.fast)
    assert isinstance(plans, Plans)
    assert [len(plan.pages) for plan in plans] == [3, 4]
    assert len(plans.pages) == 7
    assert plans.arena_bytes == side.store.arena.memory.numel()
    assert plans.peak_bytes() == max(plan.peak_bytes() for plan in plans)
    assert str(plans).startswith("2 graphs of one model")
    assert "\n\nGraph 2 of 2\nPlan for cpu: 4 pages" in str(plans)


def test_training_and_evaluation_share_pages_and_arena() -> None:
    side = Side(MIDDLE, "offloaded")
    for _ in range(2):
        side.call()
        for call in (side.fast, side.plain):
            call(side.x).square().mean().backward()
        for mine, other in zip(side.model.parameters(), side.plain.parameters(), strict=True):
            assert mine.grad is not None
            assert other.grad is not None
            assert torch.equal(mine.grad, other.grad)
    plans = spcompile.plan(side.fast)
    assert isinstance(plans, Plans)
    assert len(plans) == 4, "two pieces: inference and training"
    assert len(plans.pages) == 7
    assert side.store.arena.memory.numel() == plans.arena_bytes


def test_two_threads_take_turns() -> None:
    side = Side(MIDDLE, "offloaded")
    inputs = [torch.randn(3, WIDTH) for _ in range(4)]
    with torch.no_grad():
        expected = [side.plain(x) for x in inputs]
    side.call()
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.no_grad():
            wrong.extend(index for _ in range(15) if not torch.equal(side.fast(inputs[index]), expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    side.call()


@pytest.mark.parametrize("way", ["offloaded", "re-homed"])
def test_an_optimizer_steps_beside_a_running_model(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens around a step waits until no iteration is issued."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the assertion below tells
    side = Side(MIDDLE, way)
    side.call()
    optimizer = torch.optim.SGD(spcompile.host_parameters(side.model), lr=0.0)
    calls = []

    def work() -> None:
        for _ in range(40):
            side.call()
            calls.append(True)

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            optimizer.step()
        thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    assert len(calls) == 40


OPERATIONS = ["side_wait", "side_copy", "side_record", "compute_wait", "compute_record", "freed"]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("call", [0, 1, 2, 5])
@pytest.mark.parametrize("way", ["offloaded", "re-homed"])
def test_an_interrupt_anywhere(monkeypatch: pytest.MonkeyPatch, operation: str, call: int, way: str) -> None:
    """Control-C between any two commands to the device: weights are intact, and the next calls are right."""
    side = Side(MIDDLE, way)
    for _ in range(2):
        side.call()
    count, now = [0], getattr(EmulatedStreams, operation)

    def interrupted(streams: EmulatedStreams, *args: Any) -> Any:
        count[0] += 1
        if count[0] == call + 1:
            raise KeyboardInterrupt
        return now(streams, *args)

    with monkeypatch.context() as patch:
        patch.setattr(EmulatedStreams, operation, interrupted)
        with pytest.raises(KeyboardInterrupt):
            side.call()
    for mine, other in zip(side.model.parameters(), side.plain.parameters(), strict=True):
        assert torch.equal(mine, other)
    for _ in range(3):
        side.call()


def test_nothing_to_stream_is_said(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model = spcompile.offload(nn.Linear(WIDTH, WIDTH), device="cpu")
    fast = torch.compile(model, backend="superpipeline", options={"compiler": "eager", "k": 1})
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        fast(torch.ones(2, WIDTH))
    assert any(each.message.startswith("nothing is streamed: all weights of") for each in caplog.records)


def test_no_room_for_the_arena_then_room(monkeypatch: pytest.MonkeyPatch) -> None:
    side = Side(MIDDLE, "offloaded")
    empty = torch.empty

    def refused(*args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], int) and args[0] > 4000 and kwargs.get("dtype") is torch.uint8:
            raise torch.OutOfMemoryError
        return empty(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", refused)
        with (
            torch.no_grad(),
            pytest.raises(spcompile.OffloadError, match="no room on cpu for an arena of"),
        ):
            side.fast(side.x)
    for _ in range(2):
        side.call()


@pytest.mark.parametrize("way", ["on the device", "re-homed"])
def test_no_room_in_host_memory_then_room(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Weights that came on the device stay there, intact, and the next call is right."""
    side = Side(MIDDLE, way)
    with monkeypatch.context() as patch:
        patch.setattr("spcompile.runtime.host.available_host_bytes", lambda: 100)
        with torch.no_grad(), pytest.raises(ValueError, match="not enough host memory: the weights need"):
            side.fast(side.x)
    for mine, other in zip(side.model.parameters(), side.plain.parameters(), strict=True):
        assert torch.equal(mine, other)
    for _ in range(2):
        side.call()
