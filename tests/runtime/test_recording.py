"""Recordings: on a clocked device they say what the simulation says, on the emulated one what ran in which order."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.errors import OptionError
from spcompile.ir import Plan
from spcompile.lanes import Recording, Span
from spcompile.planner.machine import PROFILES
from spcompile.planner.simulate import simulate
from spcompile.runtime import recording as recording_module
from spcompile.runtime.recording import Recorder
from tests.running import compile_offloaded
from tests.slow_device import SlowStreams

LINK_BYTES_PER_S = 1e6
"""A byte takes a microsecond, a layer of `Stack` 8.5 ms."""

STEP_US = (3000.0, 9000.0, 1000.0, 20000.0, 2000.0)

N_ITERATIONS = 5


class Stack(nn.Module):
    """Layers of different widths."""

    def __init__(self, widths: Sequence[int] = (64, 64, 64, 64, 64)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, width, bias=False), nn.Linear(width, 16, bias=False)) for width in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def recorded_on_slow_device(model: nn.Module, factor: float, **options: int) -> tuple[Recording, Plan]:
    """Iterations from a cold start, and the plan with the times that its steps take there."""
    run = compile_offloaded(model, **options)
    streams = run.store.arena.streams = SlowStreams(run.events, [us * factor for us in STEP_US], LINK_BYTES_PER_S)
    recorder = run.store.recorder = Recorder(streams, is_emulated=True)
    x = torch.ones(2, 16)
    with torch.no_grad():
        expected = model(x)
        assert all(torch.equal(run.model(x), expected) for _ in range(N_ITERATIONS))
    (recording,) = recorder.finish(None)
    times_us = itertools.cycle(us * factor for us in STEP_US)  # a budget may have cut layers
    steps = (replace(step, compute_us=us) for step, us in zip(recording.plan.steps, times_us, strict=False))
    return recording, replace(recording.plan, steps=tuple(steps))


@pytest.mark.parametrize(
    ("options", "factor", "widths"),
    [
        *product(
            [{"k": k, "m": m} for k, m in ((1, 1), (2, 1), (3, 2), (4, 4))],
            [0.1, 1.0, 10.0],
            [(64,) * 5, (64, 16, 32, 128, 16)],
        ),
        # Within a budget places overlap: a copy may find its place free because one before it has waited.
        *product(
            [{"budget": 18_500}, {"budget": 22_000}, {"budget": 28_000}], [0.1, 1.0, 10.0], [(16, 128, 16, 64, 32)]
        ),
    ],
    ids=str,
)
def test_on_a_clocked_device_a_recording_is_what_was_simulated(
    options: dict[str, int], factor: float, widths: tuple[int, ...]
) -> None:
    recording, plan = recorded_on_slow_device(Stack(widths), factor, **options)
    machine = replace(PROFILES["h100"], copy_us=0.0, h2d_bytes_per_s=LINK_BYTES_PER_S)
    simulation = simulate(plan, machine, iterations=N_ITERATIONS)
    assert sorted(map(at, recording.spans)) == sorted(map(at, simulation.spans))
    for index, expected in enumerate(simulation.stalls_by_iteration):  # the cold one included, whose copies are late
        stalls = recording.stalls_of(index)
        assert [(each.step, each.page, each.cause) for each in stalls] == [
            (each.step, each.page, each.cause) for each in expected
        ]
        assert [each.us for each in stalls] == pytest.approx([each.us for each in expected])
    assert recording.iteration_ends_us[0] == pytest.approx(simulation.cold_us)


def test_a_wait_for_what_is_there_is_no_stall() -> None:
    """On a GPU it takes its time. Only the cold iteration really waits; then compute hides all copies."""
    run = compile_offloaded(Stack(), k=3, m=1)
    streams = SlowStreams(run.events, [100_000.0] * 5, LINK_BYTES_PER_S, wait_us=15.0)
    run.store.arena.streams = streams
    recorder = run.store.recorder = Recorder(streams, is_emulated=True)
    with torch.no_grad():
        for _ in range(3):
            run.model(torch.ones(2, 16))
    (recording,) = recorder.finish(None)
    assert recording.stalls_of(0) == recording.stalls
    assert recording.stalls[0].us == pytest.approx(15.0 + 8192.0)  # the first page
    assert recording.busy_us("compute") == pytest.approx(500_000.0)
    assert recording.iteration_us == pytest.approx(500_000.0 + 5 * 15.0)


def test_how_far_the_device_is_behind_the_host() -> None:
    """Of a host that issues all at once, one whose clock is the device's, which issues the next iteration when the last
    one is done, and one that takes a second for each thing that it says."""
    run = compile_offloaded(Stack(), k=1000)
    streams = run.store.arena.streams = SlowStreams(run.events, STEP_US, LINK_BYTES_PER_S)
    ticks = itertools.count()
    clocks = (lambda: 0.0, lambda: streams.now_us / 1e6, lambda: float(next(ticks)))
    lags_us = []
    for clock in clocks:
        recorder = run.store.recorder = Recorder(streams, is_emulated=True, clock=clock)
        with torch.no_grad():
            for _ in range(3):
                run.model(torch.ones(2, 16))
        (recording,) = recorder.finish(None)
        lags_us.append(recording.lags_us)
        run.store.recorder = None
    all_us = sum(STEP_US)
    assert lags_us[0] == pytest.approx((all_us, 2 * all_us, 3 * all_us))
    assert lags_us[1] == pytest.approx((all_us,) * 3)
    assert lags_us[2] == (0.0,) * 3


def at(span: Span) -> tuple[str, str, int, float, float]:
    return span.lane, span.label, span.iteration, round(span.start_us, 3), round(span.end_us, 3)


def lane(recording: Recording, name: str) -> list[Span]:
    return [span for span in recording.spans if span.lane == name]


def test_training_is_one_iteration_of_forward_and_backward() -> None:
    run = compile_offloaded(Stack(), k=2, m=1)
    x = torch.ones(2, 16)
    run.model(x).sum().backward()
    with spcompile.record(run.model) as recordings:
        for _ in range(3):
            run.model(x).sum().backward()
        run.model(x)  # a forward alone is one, too
    (recording,) = recordings
    plan = recording.plan
    assert [span.step for span in lane(recording, "compute")] == [
        *range(len(plan.steps)),
        *range(len(plan.steps)),
        *range(len(plan.steps)),
        *range(len(plan.steps) // 2),
    ]
    assert [span.iteration for span in lane(recording, "D2H")] == [each for each in range(3) for _ in range(5)]
    assert recording.moved_bytes[:3] == (plan.bytes_moved,) * 3
    assert recording.sent_bytes == (plan.gradients_bytes,) * 3 + (0,)
    assert recording.is_emulated
    assert recording.peak_bytes is None


def test_copies_belong_to_the_iteration_that_reads_them() -> None:
    run = compile_offloaded(Stack(), k=2, m=1)
    x = torch.ones(2, 16)
    with torch.no_grad():
        run.model(x)
        with spcompile.record(run.model) as recordings:
            for _ in range(3):
                run.model(x)
    (recording,) = recordings
    copies = Counter(span.iteration for span in lane(recording, "H2D"))
    assert copies == {0: 3, 1: 5, 2: 5, 3: 2}  # the first two pages were there, those of a fourth are on their way
    for name in ("compute", "H2D"):
        assert all(one.end_us <= two.start_us for one, two in pairwise(lane(recording, name)))
    assert len(recording.iteration_starts_us) == len(recording.iteration_ends_us) == len(recording.moved_bytes) == 3


def test_everything_resident_is_recorded_too() -> None:
    run = compile_offloaded(Stack(), k=100)
    x = torch.ones(2, 16)
    with torch.no_grad():
        run.model(x)
        with spcompile.record(run.model) as recordings:
            run.model(x)
    assert [span.lane for span in recordings[0].spans] == ["compute"] * len(recordings[0].plan.steps)
    assert recordings[0].moved_bytes == (0,)


class Broken(Stack):
    """With a graph break in the middle."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = torch.tanh(layer(x))
        torch._dynamo.graph_break()
        for layer in self.layers[2:]:
            x = torch.tanh(layer(x))
        return x


def test_each_graph_has_a_recording() -> None:
    run = compile_offloaded(Broken(), k=2, m=1)
    x = torch.ones(2, 16)
    with torch.no_grad():
        run.model(x)
        with spcompile.record(run.model) as recordings:
            run.model(x)
            run.model(x)
    plans: Any = spcompile.plan(run.model)
    assert [each.plan for each in recordings] == list(plans)
    assert [len(lane(each, "compute")) for each in recordings] == [2 * len(each.plan.steps) for each in recordings]


def test_an_exception_ends_the_recording_and_leaves_nothing_behind() -> None:
    run = compile_offloaded(Stack(), k=2, m=1)
    x = torch.ones(2, 16)
    with torch.no_grad():
        expected = run.model(x)
        recordings = interrupted(run.model, x)
        assert len(recordings) == 1
        assert run.store.recorder is None
        assert torch.equal(run.model(x), expected)


def interrupted(fast: Callable[..., Tensor], x: Tensor) -> list[Recording]:
    with suppress(KeyError), spcompile.record(fast) as recordings:
        fast(x)
        raise KeyError
    return recordings


def test_a_forgotten_recording_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_module, "MOST_RUNS", 2)
    run = compile_offloaded(Stack(), k=2, m=1)
    x = torch.ones(2, 16)
    with torch.no_grad():
        run.model(x)
        with spcompile.record(run.model) as recordings:
            for _ in range(2):
                run.model(x)
            recorder = run.store.recorder
            assert recorder is not None
            n_copies = len(recorder._order)
            for _ in range(3):
                run.model(x)
            assert len(recorder._order) == n_copies
    assert len(recordings[0].moved_bytes) == 2
    assert {span.iteration for span in lane(recordings[0], "compute")} == {0, 1}


def test_what_cannot_be_recorded_is_said() -> None:
    model = Stack()
    with pytest.raises(OptionError, match="run the compiled model once"), spcompile.record(model):
        pass
    with pytest.raises(OptionError, match=r"a torch\.nn\.Module is needed"), spcompile.record(len):
        pass
    run = compile_offloaded(model, k=2, m=1)
    with torch.no_grad():
        run.model(torch.ones(2, 16))
    with spcompile.record(run.model), pytest.raises(OptionError, match="already"), spcompile.record(run.model):
        pass
    assert run.store.recorder is None
