"""What pictures show: by hand on small plans, and against plan and simulation for any plan that can be placed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import spcompile
from spcompile.errors import OptionError
from spcompile.ir import Plan
from spcompile.planner.machine import PROFILES
from spcompile.planner.make_plan import place_graph
from spcompile.planner.simulate import simulate
from spcompile.text import format_bytes
from spcompile.viz.chrome_trace import make_trace
from spcompile.viz.find_rows import ink_on, outside_name, row_colours, short_names
from spcompile.viz.make_view import make_view
from spcompile.viz.page import page_data
from spcompile.viz.show_memory import step_levels
from spcompile.viz.view import Lanes, View
from tests.hand_plans import PLANS
from tests.random_plans import graphs
from tests.viz.recordings import recording_of
from tests.viz.timed_plans import MACHINE, inference, training

Drawn = tuple[str, str, int, float, float]
"""Lane, label, iteration, start and end."""


def drawn(lanes: Lanes) -> list[Drawn]:
    return [(bar.lane, bar.label, bar.iteration, bar.start, bar.end) for bar in lanes.bars]


def waited(lanes: Lanes) -> list[tuple[int, int, float, float, str, str]]:
    return [(each.iteration, each.step, each.start, each.end, each.page, each.cause) for each in lanes.waits]


def shares(view: View) -> dict[str, tuple[int, ...]]:
    return {share.name: share.nbytes for share in view.memory.shares}


# By hand.


def test_inference_with_one_slot() -> None:
    """Copies of 512 us and runs of 100 take turns; two iterations are shown, as one prefetches for the next."""
    (lanes,) = make_view(inference(k=1)).lanes
    names = [f"model.layers.{index}" for index in range(3)]
    starts = [(iteration, index, 1836.0 * iteration + 612.0 * index) for iteration in range(2) for index in range(3)]
    assert drawn(lanes) == [
        *(("compute", names[index], iteration, start + 512, start + 612) for iteration, index, start in starts),
        *(("H2D", names[index], iteration, start, start + 512) for iteration, index, start in starts),
    ]
    assert waited(lanes) == [
        (iteration, index, start, start + 512, names[index], "room") for iteration, index, start in starts
    ]
    assert [(part.name, part.start, part.end) for part in lanes.parts] == [
        ("iteration 1", 0, 1836),
        ("iteration 2", 1836, 3672),
    ]


def test_copies_that_began_before_are_shown_with_a_negative_start() -> None:
    (lanes,) = make_view(inference(k=2)).lanes
    copies = [each for each in drawn(lanes) if each[0] == "H2D"]
    assert copies[0] == ("H2D", "model.layers.0", 0, -100.0, 412.0)
    assert copies[-1] == ("H2D", "model.layers.0", 2, 2972.0, 3484.0)


def test_memory_with_two_slots() -> None:
    """A slot is taken when its copy starts and given back when its reader is done; 88 bytes are beside the weights."""
    view = make_view(inference(k=2))
    times = [0, 412, 512, 924, 1024, 1436, 1536, 1948, 2048, 2460, 2560, 2972]
    assert view.memory.times == tuple(times)
    assert shares(view) == {
        "workspace": (50,) * 12,
        "inputs": (8,) * 12,
        "weights that stay": (7,) * 12,
        "arena, in use": (512, 1024) * 6,
        "arena, free": (512, 0) * 6,
        "activations": (0, 30, 30, 30, 30, 30) * 2,  # none at the start, where compute waits for the first page
    }
    assert max(view.memory.totals_bytes) == view.memory.peak_bytes == inference(k=2).peak_bytes() == 1119


def test_training() -> None:
    """An embedding, a layer and a head: gradients leave on a lane of their own, and the end waits for them."""
    view = make_view(training(1, k=2))
    (lanes,) = view.lanes
    assert lanes.lanes == ("compute", "H2D", "D2H")
    assert [each for each in drawn(lanes) if each[0] == "D2H"] == [
        ("D2H", "model.head.backward", 0, 1836, 2348),
        ("D2H", "model.layers.0.backward", 0, 2348, 2860),
        ("D2H", "model.embed.backward", 0, 2860, 3372),
    ]
    assert waited(lanes) == [
        (0, 0, 0, 512, "model.embed", "late"),
        (0, 1, 612, 1024, "model.layers.0", "link"),
        (0, 2, 1124, 1536, "model.head", "link"),
        (0, 5, 2036, 2348, "model.head.backward", "gradients"),
        (0, 6, 2548, 3372, "model.embed.backward", "gradients"),
    ]
    assert [(part.name, part.start, part.end) for part in lanes.parts] == [
        ("forward", 0, 1636),
        ("backward", 1636, 3372),
    ]
    assert list(view.memory.times) == [0, 512, 612, 1024, 1536, 1636, 1836, 2348]
    assert shares(view)["activations"] == (0, 40, 40, 80, 120, 632, 80, 40)
    assert shares(view)["gradients"] == (0, 0, 0, 0, 0, 512, 1024, 1024)
    assert [cause for cause, _ in view.causes] == ["link", "late", "gradients"]


def test_rows_of_training() -> None:
    rows = make_view(training(1, k=2)).rows
    assert [(row.name, row.is_layer, row.nbytes, row.placement, row.gradients_bytes) for row in rows] == [
        ("model.embed", False, 512, "streamed 2x", 512),
        ("model.layers.0", True, 512, "streamed", 512),
        ("model.head", False, 512, "streamed", 512),
    ]
    works = [row.predicted for row in rows]
    assert [(work.compute, work.copy, work.send, work.stall) for work in works if work is not None] == [
        (300, 1024, 512, 1648),
        (300, 512, 512, 412),
        (300, 512, 512, 412),
    ]
    assert works[0] is not None
    assert works[0].waits == (
        ("late", "model.embed"),
        ("gradients", "model.head.backward"),
        ("gradients", "model.embed.backward"),
    )


def test_lines_of_training() -> None:
    lines = make_view(training(1, k=2)).lines
    assert [line.code for line in lines] == [
        "# forward",
        "prefetch_0 = prefetch(runtime, 0, model.embed)",
        "prefetch_1 = prefetch(runtime, 1, model.layers.0)",
        "load_0 = load(runtime, 0, model.embed)",
        "model_embed = self.model_embed(..., load_0)",
        "evict_0 = evict(runtime, 0, model.embed)",
        "prefetch_2 = prefetch(runtime, 2, model.head)",
        "load_1 = load(runtime, 1, model.layers.0)",
        "model_layers_0 = self.model_layers_0(..., load_1)",
        "load_2 = load(runtime, 2, model.head)",
        "model_head = self.model_head(..., load_2)",
        "# backward",
        "prefetch_1 = prefetch(runtime, 1, model.layers.0)",
        "prefetch_2 = prefetch(runtime, 2, model.head)",
        "load_2 = load(runtime, 2, model.head)",
        "model_head_backward = self.model_head_backward(..., load_2)",
        "send_3 = send(runtime, 3, model.head.backward, ...)",
        "evict_2 = evict(runtime, 2, model.head)",
        "prefetch_3 = prefetch(runtime, 3, model.embed)",
        "load_1 = load(runtime, 1, model.layers.0)",
        "model_layers_0_backward = self.model_layers_0_backward(..., load_1)",
        "send_4 = send(runtime, 4, model.layers.0.backward, ...)",
        "evict_1 = evict(runtime, 1, model.layers.0)",
        "load_3 = load(runtime, 3, model.embed)",
        "model_embed_backward = self.model_embed_backward(..., load_3)",
        "send_5 = send(runtime, 5, model.embed.backward, ...)",
        "evict_3 = evict(runtime, 3, model.embed)",
        "finish = finish(runtime)",
    ]
    meanings = {line.code: line.meaning for line in lines[12:]}  # of backward
    assert meanings["prefetch_1 = prefetch(runtime, 1, model.layers.0)"] == "a hint: kept since forward, or on its way"
    assert meanings["prefetch_3 = prefetch(runtime, 3, model.embed)"] == "start the copy of 512 B on the side stream"
    assert meanings["load_3 = load(runtime, 3, model.embed)"] == "compute waits for it; 1 step of overlap"


def test_summary_and_figures() -> None:
    plan = inference(k=2)
    view = make_view(replace(plan, budget_bytes=2000))
    assert view.summary == (
        "1.51 KiB of weights run in 1.09 KiB of device memory, 88 B of it for what is not weights. "
        "An iteration is predicted to take 1.54 ms, limited by the link (compute takes 300 us)."
    )
    assert {figure.name: figure.value for figure in view.figures} == {
        "peak memory": 1119,
        "budget": 2000,
        "weights": 1543,
        "iteration": 1536,
        "compute": 300,
        "copies": 1536,
        "stalls": 1236,
        "moved": 1536,
        "pages": 3,
        "k, m": 2,
    }
    assert view.figure("budget").note == "881 B left"
    with pytest.raises(KeyError):
        view.figure("no such figure")


def test_a_budget_that_is_not_kept_is_said() -> None:
    view = make_view(replace(inference(k=2), budget_bytes=1000))
    assert "That is more than the budget of 1000 B." in view.summary
    assert view.figure("budget").note == "119 B over"


def test_all_resident() -> None:
    view = make_view(inference())
    assert view.summary.endswith("limited by compute. Nothing is streamed.")
    assert [part.name for part in view.lanes[0].parts] == ["iteration 1", "iteration 2"]
    assert {row.placement for row in view.rows} == {"resident"}
    assert not {"streamed", "prefetch", "arena, slot", "budget", "send"} & {word for word, _ in view.words}


def test_curve_has_the_plan_and_all_others_once() -> None:
    plan = inference(k=2)
    curve = make_view(plan).curve
    assert [(point.peak_bytes, point.iteration_us, point.is_chosen) for point in curve] == [
        (607, 2436, False),
        (1119, 1536, True),
        (1631, 300, False),
    ]
    assert [(point.peak_bytes, point.iteration_us) for point in plan.tradeoff()] == [
        (point.peak_bytes, point.iteration_us) for point in curve
    ]
    assert curve[0].meaning == (
        "607 B of device memory: 1.84 ms per iteration, counted as 2.44 ms, as no copy overlaps with compute. "
        "0 pages resident, 3 streamed, at most 1 of them in slots; 1.50 KiB are copied to the device per iteration."
    )


def test_without_a_machine_steps_stand_for_times() -> None:
    """012 012 234 234 401: each page from the step before which it may be copied to the one after which it leaves."""
    plan = PLANS["chain_in_batches"]
    view = make_view(plan)
    assert (view.unit, view.curve, len(view.notes)) == ("step", (), 1)
    (lanes,) = view.lanes
    stays = [(bar.label, bar.start, bar.arrives, bar.end) for bar in lanes.bars if bar.lane == "slots"]
    assert sorted(stays)[:4] == [
        ("layers.0", -1, 0, 2),
        ("layers.0", 4, 5, 7),
        ("layers.0", 9, 10, 12),
        ("layers.1", -1, 1, 2),
    ]
    assert max(bar.track for bar in lanes.bars) == plan.k - 1
    assert set(shares(view)["arena, in use"]) == {3 * 2**20}
    assert all(row.predicted is None for row in view.rows)


def test_a_machine_of_another_name() -> None:
    plan = inference(k=2)
    view = make_view(plan, machine="rtx4090")
    assert view.figure("iteration").value == simulate(plan, PROFILES["rtx4090"]).iteration_us
    assert view.notes == ("Copies are timed on rtx4090; the times of steps are those of the plan, on one byte per us.",)
    assert make_view(PLANS["chain_in_batches"], machine="h100").unit == "us"
    with pytest.raises(OptionError, match="option 'machine' must be one of h100, rtx4090"):
        make_view(plan, machine="abacus")


def test_measured_beside_predicted() -> None:
    plan = inference(k=2)
    recording = recording_of(plan, MACHINE, slower=2.0, peak_bytes=1200)
    view = make_view(plan, recording=recording)
    predicted, measured = view.lanes
    assert (predicted.title, measured.title) == ("predicted", "measured")
    assert [part.end for part in (*predicted.parts, *measured.parts)] == [1536, 3072]
    runs = [bar for bar in measured.bars if bar.lane == "compute"]
    assert [(bar.start, bar.end) for bar in runs] == [(824, 1024), (1848, 2048), (2872, 3072)]
    assert [row.measured and row.measured.stall for row in view.rows] == [824, 824, 824]
    assert view.figure("measured iteration").value == 3072
    assert view.figure("measured / floor").value == 1.0
    assert view.figure("link rate").value == pytest.approx(0.5e6)
    assert view.figure("link rate").note == "reached while copies ran; 50% of 1 MB/s"
    assert view.figure("measured peak").value == view.memory.measured_peak_bytes == 1200


def test_what_is_said_of_a_recording() -> None:
    plan = inference(k=2)
    emulated = make_view(plan, recording=recording_of(plan, MACHINE, is_emulated=True))
    assert emulated.notes == ("Measured on the emulated device: its times mean nothing but an order.",)
    assert "emulated device" in {word for word, _ in emulated.words}
    other = make_view(inference(k=1), recording=recording_of(plan, MACHINE))
    assert other.notes == ("What was recorded is a run of another plan than the one that is shown.",)


@pytest.mark.parametrize(
    ("segment", "name"),
    [("embed#1", "embed"), ("embed.backward#2", "embed"), ("#1", "#1"), ("model.head", "model.head"), ("", "")],
)
def test_outside_name(segment: str, name: str) -> None:
    assert outside_name(segment) == name


def test_short_names() -> None:
    names = ["embed", "model.layers.1", "model.layers.10", "model.layers.2"]
    assert short_names(names, frozenset(names[1:])) == ["embed", "1", "10", "2"]
    assert short_names(["layer"], frozenset(["layer"])) == ["layer"]
    assert short_names(["a.1", "b.1"], frozenset(["a.1", "b.1"])) == ["a.1", "b.1"]


def test_neighbours_have_different_colours_and_readable_ink() -> None:
    colours = row_colours([False, *[True] * 80, False])
    assert all(one != other for one, other in pairwise(colours))
    assert all(contrast(colour, ink_on(colour)) >= 4.5 for colour in colours)


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# Of every plan.


@st.composite
def placed(draw: st.DrawFn) -> Plan:
    """A graph placed by k and m, by memory, or with everything resident; perhaps as if nothing had a time."""
    graph = draw(graphs())
    if draw(st.booleans()):
        graph = as_training(graph, draw(st.integers(1, len(graph.steps) - 1)), draw(st.sampled_from([0, 8, 300])))
    widest = max(len(step.reads) for step in graph.steps)
    k = draw(st.integers(widest, len(graph.pages)))
    if draw(st.booleans()):
        plan = place_graph(graph, k=k, m=draw(st.integers(1, k)))
    else:
        least_bytes = place_graph(graph, k=widest, m=1).peak_weight_bytes
        plan = place_graph(graph, capacity_bytes=draw(st.integers(least_bytes, 2 * least_bytes)))
    return draw(st.sampled_from([plan, replace(plan, machine=None)]))


def as_training(graph: Plan, backward_step: int, gradients_bytes: int) -> Plan:
    """The same reads, the later ones in backward, whose steps make gradients."""
    steps = tuple(
        replace(step, gradients_bytes=gradients_bytes, activations_bytes=step.activations_bytes + 2 * gradients_bytes)
        if index >= backward_step
        else step
        for index, step in enumerate(graph.steps)
    )
    most_bytes = max(step.activations_bytes for step in steps)
    return replace(graph, wraps=False, steps=steps, backward_step=backward_step, activations=((("1", most_bytes),),))


@given(placed(), st.none() | st.integers(1, 10**6))
@settings(max_examples=60)
def test_every_plan_can_be_drawn(plan: Plan, budget_bytes: int | None) -> None:
    plan = replace(plan, budget_bytes=budget_bytes)
    view = make_view(plan)
    (graph,) = json.loads(page_data([view]))["graphs"]
    assert graph == json.loads(json.dumps(asdict(view)))
    json.loads(make_trace([view]))
    assert_memory_is_of_the_plan(plan, view)
    assert_rows_are_of_the_plan(plan, view)
    shown = {(bar.label, bar.step) for bar in view.lanes[0].bars if bar.lane == "compute"}
    assert shown == {(each.segment, step) for step, each in enumerate(plan.steps)}
    kinds = [line.kind for line in view.lines if line.kind not in ("graph", "finish")]
    assert kinds == [each.kind.value for each in plan.actions()]
    assert view.figure("moved").value == plan.bytes_moved
    assert format_bytes(plan.weights_bytes) in view.summary


@given(placed(), st.sampled_from([1.0, 1.5, 3.0]))
@settings(max_examples=30)
def test_every_recording_can_be_drawn(plan: Plan, slower: float) -> None:
    if plan.machine is None:
        return
    view = make_view(plan, recording=recording_of(plan, plan.machine, slower=slower))
    predicted, measured = view.lanes
    assert len([bar for bar in measured.bars if bar.lane == "compute"]) == len(plan.steps)
    assert measured.parts[0].start == predicted.parts[0].start == 0
    if slower == 1:
        assert measured.end == pytest.approx(predicted.end)


def assert_memory_is_of_the_plan(plan: Plan, view: View) -> None:
    """The stack lies between the weights and the peak, and reaches it; the arena is always whole."""
    memory = view.memory
    assert memory.times[0] == 0
    assert all(before < after for before, after in pairwise(memory.times))
    fixed_bytes = plan.peak_bytes() - plan.activations_bytes
    assert all(fixed_bytes <= nbytes <= plan.peak_bytes() for nbytes in memory.totals_bytes)
    assert max(memory.totals_bytes) == memory.peak_bytes == plan.peak_bytes()
    assert all(nbytes >= 0 for share in memory.shares for nbytes in share.nbytes)
    arena = [shares(view).get(f"arena, {part}", (0,) * len(memory.times)) for part in ("in use", "free")]
    assert {sum(pair) for pair in zip(*arena, strict=True)} == {plan.arena_bytes}


def assert_rows_are_of_the_plan(plan: Plan, view: View) -> None:
    """Sums of the rows are those of plan and simulation."""
    assert sum(row.nbytes for row in view.rows) == plan.weights_bytes - plan.leftovers_bytes
    assert sum(row.gradients_bytes for row in view.rows) == plan.gradients_bytes
    if plan.machine is None:
        return
    simulation = simulate(plan, plan.machine)
    works = [row.predicted for row in view.rows if row.predicted is not None]
    assert sum(work.compute for work in works) == pytest.approx(simulation.compute_us)
    assert sum(work.copy for work in works) == pytest.approx(simulation.link_us)
    assert sum(work.stall for work in works) == pytest.approx(sum(stall.us for stall in simulation.stalls))
    assert view.figure("iteration").value == simulation.iteration_us


def test_levels_are_activations_of_the_step() -> None:
    plan = training(2, k=2)
    assert [sum(level) for level in step_levels(plan)] == [step.activations_bytes for step in plan.steps]


class Chain(nn.Module):
    """Layers whose backward reads their weights, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("trains", [False, True])
def test_plan_of_a_model(trains: bool) -> None:
    """Nothing but a model and its input: the stack reaches the predicted peak, gradients of backward included."""
    torch._dynamo.reset()
    with torch.set_grad_enabled(trains):
        plan = spcompile.plan(Chain(), (torch.randn(16, 64),), k=2, machine="h100", device="cpu")
    view = make_view(plan)
    assert_memory_is_of_the_plan(plan, view)
    assert_rows_are_of_the_plan(plan, view)
    assert [row.name for row in view.rows if row.is_layer] == [layer.name for layer in plan.layers]
    assert ("gradients" in shares(view)) == ("D2H" in view.lanes[0].lanes) == trains
