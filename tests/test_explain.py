"""Explanations: figures of hand-made recordings, and what is said of real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.errors import OptionError
from spcompile.explain import Explanation, Explanations
from spcompile.ir import Machine, Plan, Step
from spcompile.lanes import Recording
from spcompile.planner.choose import find_tradeoff
from spcompile.planner.machine import PROFILES
from spcompile.planner.make_plan import make_plan, place_graph
from spcompile.planner.simulate import predict_iteration_us, simulate
from tests.hand_plans import page
from tests.running import compile_offloaded

MB = 10**6
MACHINE = replace(PROFILES["h100"], name="one byte per ns", copy_us=0.0, h2d_bytes_per_s=1e9, both_bytes_per_s=1e9)
N_LAYERS = 8


def chain(compute_us: float, k: int, *, machine: Machine = MACHINE) -> Plan:
    """Layers of 1 MB, copied in 1 ms each."""
    plan = make_plan(
        device="cuda:0",
        pages=tuple(page(f"layers.{index}", MB) for index in range(N_LAYERS)),
        leftovers=(),
        steps=tuple(Step(f"layers.{index}", f"layers.{index}", (index,), compute_us) for index in range(N_LAYERS)),
        k=k,
        m=1,
        wraps=True,
    )
    return replace(plan, machine=machine)


def recorded(plan: Plan, machine: Machine = MACHINE, slower: float = 1.0, iterations: int = 5) -> Recording:
    """What would be measured if the machine were as is said, and every step took ``slower`` times as long."""
    steps = tuple(replace(step, compute_us=step.compute_us * slower) for step in plan.steps)
    real = replace(plan, steps=steps)
    simulation = simulate(real, machine, iterations=iterations)
    last = [
        max(s.end_us for s in simulation.spans if (s.lane, s.iteration) == ("compute", i)) for i in range(iterations)
    ]
    shifted = simulate(real, machine, iterations=iterations).stalls
    period_us = simulation.iteration_us
    told_us = shifted[0].start_us if shifted else 0.0
    told = next(index for index, end_us in enumerate(last) if told_us < end_us)
    stalls = tuple(
        replace(stall, start_us=stall.start_us + (each - told) * period_us)
        for each in range(1, iterations)
        for stall in shifted
    )
    return Recording(
        plan=plan,
        spans=simulation.spans,
        stalls=stalls,
        iteration_starts_us=(0.0, *last[:-1]),
        iteration_ends_us=tuple(last),
        lags_us=(1e9,) * iterations,
        moved_bytes=(plan.bytes_moved,) * iterations,
        sent_bytes=(0,) * iterations,
        peak_bytes=plan.peak_bytes(),
        is_emulated=False,
    )


@pytest.mark.parametrize(("compute_us", "k", "limit"), [(100.0, 2, "link"), (3000.0, 3, "compute"), (900.0, 1, "room")])
def test_figures_are_those_of_the_recording(compute_us: float, k: int, limit: str) -> None:
    plan = chain(compute_us, k)
    explanation = Explanation(plan, recorded(plan), recompiles=0)
    simulation = simulate(plan, MACHINE)
    assert explanation.iteration_us == pytest.approx(simulation.iteration_us)
    assert explanation.busy_us("compute") == pytest.approx(simulation.compute_us)
    assert explanation.busy_us("H2D") == pytest.approx(simulation.link_us)
    assert explanation.busy_us("D2H") == 0
    assert explanation.floor_us == pytest.approx(simulation.bound_us)
    assert explanation.link_bytes_per_s == pytest.approx(1e9)
    assert sum(stall.us for stall in explanation.stalls) == pytest.approx(sum(each.us for each in simulation.stalls))
    assert explanation.limited_by == limit


@pytest.mark.parametrize(("compute_us", "limit"), [(100.0, "link"), (3000.0, "host")])
def test_a_device_that_waits_for_the_host(compute_us: float, limit: str) -> None:
    """It has then done an iteration as soon as that is issued. Where copies keep the link busy they are the limit."""
    plan = chain(compute_us, 3)
    recording = recorded(plan)
    typical_us = recording.iteration_us
    prompt = replace(recording, lags_us=(0.05 * typical_us,) * len(recording.lags_us))
    assert Explanation(plan, prompt, recompiles=0).limited_by == limit
    late = replace(recording, lags_us=(0.2 * typical_us,) * len(recording.lags_us))
    assert Explanation(plan, late, recompiles=0).limited_by == {"host": "compute"}.get(limit, limit)


@pytest.mark.parametrize(
    ("compute_us", "k", "times"),
    [(100.0, 2, 10), (300.0, 2, 3), (600.0, 2, 1), (3000.0, 3, 1), (10.0, 1, 1), (300.0, 1, 1)],
)
def test_a_larger_batch_that_takes_as_long(compute_us: float, k: int, times: int) -> None:
    """A page takes 1000 us. With one slot compute and copies take turns, and a larger batch takes longer."""
    plan = chain(compute_us, k)
    explanation = Explanation(plan, recorded(plan), recompiles=0)
    assert explanation.free_batch == times
    larger = chain(compute_us * times, k)
    assert simulate(larger, MACHINE).iteration_us <= 1.001 * simulate(plan, MACHINE).iteration_us
    assert any("batch" in each for each in explanation.conclusions) == (times > 1)


def test_the_first_iteration_does_not_count() -> None:
    """It finds its first pages there, or is cold."""
    plan = chain(100.0, 2)
    recording = recorded(plan)
    ends_us = (recording.iteration_ends_us[0] + 1e9, *recording.iteration_ends_us[1:])
    skewed = replace(recording, iteration_ends_us=ends_us)
    assert Explanation(plan, skewed, 0).iteration_us == Explanation(plan, recording, 0).iteration_us
    alone = recorded(plan, iterations=2)
    single = replace(alone, iteration_starts_us=(0.0,), iteration_ends_us=alone.iteration_ends_us[:1])
    assert single.counted == range(1)


def test_advice_is_the_best_bargain_on_the_machine_as_measured() -> None:
    """Predicted for a link ten times as fast, where nothing would help; the recording shows the slow one."""
    quick = replace(MACHINE, h2d_bytes_per_s=1e10)
    plan = chain(100.0, 2, machine=quick)
    explanation = Explanation(plan, recorded(plan, slower=2.0), recompiles=0)
    advice = explanation.advice
    assert advice is not None
    real = replace(chain(200.0, 2), machine=MACHINE)
    now_us = predict_iteration_us(real, MACHINE)
    bargains = {
        point.peak_bytes: (now_us - point.iteration_us) / (point.peak_bytes - plan.peak_bytes())
        for point in find_tradeoff(real)
        if point.peak_bytes > plan.peak_bytes() and point.iteration_us < 0.97 * now_us
    }
    assert advice.peak_bytes in bargains
    gained = -advice.change_us / advice.change_bytes
    assert gained == pytest.approx(max(bargains.values()))
    assert advice.n_pages > 0
    assert str(advice).startswith("+")
    assert f"keeps {advice.n_pages} more page" in str(advice)


def test_advice_of_less_memory_where_compute_hides_all_copies() -> None:
    plan = chain(5000.0, N_LAYERS)
    advice = Explanation(plan, recorded(plan), recompiles=0).advice
    assert advice is not None
    assert advice.change_bytes < 0
    assert advice.peak_bytes <= 3 * MB + 1024
    assert "less would do" in str(advice)


def embedding(compute_us: float, **wanted: Any) -> Plan:
    """A table of 4 MB, of which the first of eight steps reads 275 kB (500 us in place), and layers of 1 MB."""
    names = ("table", *(f"layers.{index}" for index in range(1, N_LAYERS)))
    steps = tuple(
        Step(name, name, (index,), compute_us, gathers=((0, 275_000),) if name == "table" else ())
        for index, name in enumerate(names)
    )
    pages = tuple(page(name, 4 * MB if name == "table" else MB) for name in names)
    graph = make_plan(device="cuda:0", pages=pages, leftovers=(), steps=steps, k=N_LAYERS, wraps=True)
    return place_graph(replace(graph, machine=MACHINE), **wanted)


def test_advice_to_read_a_table_in_place() -> None:
    """With k and m by hand it is streamed, which takes 4000 us of the link in place of 500."""
    plan = embedding(100.0, k=2, m=1)
    assert plan.mapped == ()
    advice = Explanation(plan, recorded(plan), recompiles=0).advice
    assert advice is not None
    assert advice.in_place == ("table",)
    assert "reads table in place: -" in str(advice)


def test_rows_that_are_read_quicker_than_predicted_promise_no_more_than_was_measured() -> None:
    """The page cannot save more time in device memory than its step takes."""
    plan = embedding(100.0, capacity_bytes=8 * MB)
    assert plan.mapped == (0,)
    steps = (replace(plan.steps[0], compute_us=0.0, gathers=((0, 55_000),)), *plan.steps[1:])
    cached = recorded(replace(plan, steps=steps))
    measured = replace(cached, plan=plan)
    (first_us,) = {span.end_us - span.start_us for span in measured.spans if (span.lane, span.step) == ("compute", 0)}
    assert first_us == pytest.approx(100.0)
    as_measured = Explanation(plan, measured, recompiles=0)._as_measured(MACHINE)
    assert predict_iteration_us(as_measured, MACHINE) == pytest.approx(800.0)
    assert as_measured.steps[0].compute_us == 0
    slower = replace(recorded(plan, slower=2.0), plan=plan)  # 200 us of compute and 500 of reading
    as_measured = Explanation(plan, slower, recompiles=0)._as_measured(MACHINE)
    assert predict_iteration_us(as_measured, MACHINE) == pytest.approx(8 * 200.0 + 500.0)
    assert as_measured.steps[0].gathers == plan.steps[0].gathers


def test_the_picture_says_what_the_text_concludes() -> None:
    plan = chain(100.0, 2)
    explanation = Explanation(plan, recorded(plan), recompiles=0)
    (view,) = explanation.visualize().views
    limit, advice, *_ = explanation.conclusions
    assert limit == "Limited by link: copies keep it busy all the time"
    assert advice == f"What would help most: {explanation.advice}"
    assert view.notes[:2] == (limit, advice)
    assert [lanes.title for lanes in view.lanes] == ["predicted", "measured"]
    (unmeasured,) = Explanation(plan, None, recompiles=0).visualize().views
    assert len(unmeasured.lanes) == 1
    assert not any(note.startswith("Limited") for note in unmeasured.notes)


def test_no_advice_without_times() -> None:
    plan = chain(100.0, 2)
    emulated = replace(recorded(plan), is_emulated=True)
    assert Explanation(plan, emulated, 0).advice is None
    assert Explanation(plan, None, 0).advice is None
    assert Explanation(replace(plan, machine=None), recorded(plan), 0).advice is None


def test_the_text(golden: Callable[[str, str], None]) -> None:
    plan = chain(100.0, 2)
    golden("explanation_measured", str(Explanation(plan, recorded(plan, slower=2.0), recompiles=1)))
    golden("explanation_not_recorded", str(Explanation(plan, None, recompiles=0)))
    golden(
        "explanation_emulated", str(Explanation(plan, replace(recorded(plan), is_emulated=True, peak_bytes=None), 0))
    )


class Stack(nn.Module):
    """Five layers, with a graph break in the middle if asked for."""

    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = torch.relu(layer(x))
        if self.breaks:
            torch._dynamo.graph_break()
        for layer in self.layers[2:]:
            x = torch.relu(layer(x))
        return x


def test_a_real_run_is_explained() -> None:
    run = compile_offloaded(Stack(), k=2, m=1)
    with torch.no_grad():
        run.model(torch.ones(2, 32))
        before: Any = spcompile.explain(run.model)
        assert before.recording is None
        with spcompile.record(run.model) as recordings:
            run.model(torch.ones(2, 32))
            run.model(torch.ones(2, 32))
    explanation = spcompile.explain(run.model)
    assert explanation.recording is recordings[0]
    assert explanation.plan is run.plan
    assert explanation.recompiles == 0
    assert not explanation.is_timed
    with torch.no_grad():
        run.model(torch.ones(3, 32))  # another batch size
    explanations: Any = spcompile.explain(run.model)
    assert {each.recompiles for each in explanations} == {1}
    other = torch.compile(run.model._orig_mod, backend="superpipeline", options={"compiler": "eager", "k": 3})  # type: ignore[attr-defined]
    with torch.no_grad():
        other(torch.ones(2, 32))
    assert spcompile.explain(other).recompiles == 0  # another call of torch.compile is no recompilation


def test_each_graph_is_explained() -> None:
    run = compile_offloaded(Stack(breaks=True), k=2, m=1)
    with torch.no_grad():
        run.model(torch.ones(2, 32))
        with spcompile.record(run.model) as recordings:
            run.model(torch.ones(2, 32))
    explanations = spcompile.explain(run.model)
    assert isinstance(explanations, Explanations)
    assert [each.recording for each in explanations] == recordings
    assert [each.recompiles for each in explanations] == [0, 0]
    assert str(explanations).startswith("Graph 1 of 2\nRecorded on the emulated device, 1 iteration")


def test_what_never_ran_cannot_be_explained() -> None:
    with pytest.raises(OptionError, match="run the compiled model once"):
        spcompile.explain(torch.compile(Stack(), backend="superpipeline"))


class Packed(nn.Module):
    """Weights that are buffers, as some quantizers make them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.ones(4, 4, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.get_buffer("packed").to(x.dtype)


class Marked(Tensor):
    """A tensor subclass, as others make them."""


def test_of_a_model_without_streamable_weights_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    fast = torch.compile(Packed(), backend="superpipeline", options={"compiler": "eager", "k": 2, "device": "cpu"})
    reason = "it has no parameters, and its buffers stay where they are"
    with torch.no_grad():
        fast(torch.ones(2, 4))
        assert f"nothing of this Packed can be streamed: {reason}" in caplog.text
        with pytest.raises(OptionError, match=rf"nothing of this model is streamed \({reason}"):
            spcompile.explain(fast)
        with pytest.raises(OptionError, match=reason), spcompile.record(fast):
            pass
        spcompile.plan(fast)
        assert f"no plan is in force: nothing of this model is streamed ({reason})" in caplog.text
        marked = nn.Linear(2, 2, bias=False)
        marked.weight = nn.Parameter(torch.ones(2, 2).as_subclass(Marked))
        with pytest.raises(OptionError, match="such as 'weight': it is a Marked, a tensor subclass"):
            spcompile.explain(marked)


def test_a_piece_without_weights_of_a_model_that_has_some_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Packed):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            torch._dynamo.graph_break()
            for layer in self.layers:
                x = layer(x)
            return x

    run = compile_offloaded(Broken(), k=2, m=1)
    with torch.no_grad():
        run.model(torch.ones(2, 4))
    assert "can be streamed" not in caplog.text
