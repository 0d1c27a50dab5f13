"""Compile an offloaded model on the emulated device and look at what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import spcompile
from spcompile.ir import ActionKind, Plan
from spcompile.runtime.store import PageStore, find_store
from spcompile.runtime.streams import EmulatedStreams
from spcompile.runtime.transfers import Transfers

Event = tuple[object, ...]


@dataclass
class Run:
    """A compiled model and the store of its weights."""

    model: Callable[..., Any]
    store: PageStore

    @property
    def runtime(self) -> Transfers:
        """The runtime of the graph compiled last."""
        runtime = self.store.runtimes()[-1]
        assert isinstance(runtime, Transfers)
        return runtime

    @property
    def plan(self) -> Plan:
        return self.runtime.plan

    @property
    def events(self) -> list[Event]:
        assert self.store.log is not None
        return self.store.log


def compile_offloaded(model: nn.Module, *, seed: int = 0, **options: Any) -> Run:
    """Offload the model to the emulated device and compile it, recording events from the first call on."""
    torch._dynamo.reset()
    spcompile.offload(model, device="cpu")
    store = find_store(model.parameters())
    assert store is not None
    assert isinstance(store.arena.streams, EmulatedStreams)
    store.arena.streams.random.seed(seed)
    store.log = []
    return Run(torch.compile(model, backend="superpipeline", options={"compiler": "eager", **options}), store)


def moved_by_plan(store: PageStore) -> list[tuple[Plan, int]]:
    """Per plan in force, the bytes that its graphs have moved so far; forward and backward share one."""
    moved: dict[int, int] = {}
    plans: dict[int, Plan] = {}
    for runtime in store.runtimes():
        plans[id(runtime.plan)] = runtime.plan
        moved[id(runtime.plan)] = moved.get(id(runtime.plan), 0) + runtime.bytes_moved
    return [(plan, moved[key]) for key, plan in plans.items()]


def expected_events(plan: Plan, iterations: int) -> list[Event]:
    """The whole event list of a graph that runs alone, from a cold start on."""
    on_the_way: set[tuple[int, int]] = set()
    return [each for index in range(iterations) for each in _expected_iteration(plan, index, on_the_way)]


def _expected_iteration(plan: Plan, iteration: int, on_the_way: set[tuple[int, int]]) -> Iterator[Event]:
    phase = iteration % plan.period
    if plan.intervals:
        yield "begin", phase
    for action in plan.actions():
        if action.interval is None:
            yield "run", action.step
            continue
        interval = plan.intervals[action.interval]
        page = plan.pages[interval.page].name
        slot = interval.slots[(phase + action.ahead) % plan.period]
        if action.kind is ActionKind.EVICT:
            yield "evict", page, slot
            continue
        key = (iteration + action.ahead, action.interval)
        yield action.kind.value, page, slot, "hit" if key in on_the_way else "copy"
        on_the_way.add(key)


def with_steps(events: list[Event]) -> list[Event]:
    """Name the runs by their place in the iteration instead of their segment."""
    named: list[Event] = []
    step = 0
    for each in events:
        if each[0] == "begin":
            step = 0
        if each[0] == "run":
            named.append(("run", step))
            step += 1
        else:
            named.append(each)
    return named
