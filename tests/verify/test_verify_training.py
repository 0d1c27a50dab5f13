"""One plan over forward and backward: what the verifier makes of its two graphs, and of mistakes in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import spcompile
from spcompile import ops
from spcompile.dry_run import capture_programs
from spcompile.ir import Action, ActionKind, Page, Plan, Step, Weight
from spcompile.joint import join_graphs
from spcompile.options import parse_options
from spcompile.passes.base import Program
from spcompile.pipeline import REWRITING, run_passes
from spcompile.planner.machine import PROFILES
from spcompile.planner.make_plan import make_plan
from spcompile.planner.simulate import simulate
from spcompile.verify.graphs import verify_graph
from spcompile.verify.plans import verify_plan


class Chain(nn.Module):
    """Layers whose backward reads their weights, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def programs(**options: object) -> tuple[Program, Program]:
    torch._dynamo.reset()
    checked = parse_options({"device": "cpu", "compiler": "eager", **options})
    (program,) = capture_programs(Chain(), (torch.randn(3, 8),), {}, checked)
    assert program.backward is not None
    return program, program.backward


def rewritten(**options: object) -> tuple[Program, Program]:
    both = programs(**options)
    for each in both:
        run_passes(each, REWRITING)
    return both


def messages(program: Program) -> list[str]:
    weights = {name: each.weight.name for name, each in program.weights.items()}
    found = verify_graph(program.module, program.plan, weights, steps=program.steps(), final=True)
    return [each.message for each in found]


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 1), (3, 2), (4, 4)])
def test_both_graphs_are_right(k: int, m: int) -> None:
    for program in rewritten(k=k, m=m):
        assert messages(program) == []


def test_the_printed_graph_shows_what_backward_does() -> None:
    _, backward = rewritten(k=2, m=1)
    names = [str(node.target) for node in backward.graph.nodes if node.op == "call_module"]
    assert names == [f"layers_{index}_backward" for index in (3, 2, 1, 0)]
    kinds = [node.target.__name__ for node in backward.graph.nodes if node.target in ops.TRANSFERS]
    assert kinds == [
        *("begin", "prefetch", "prefetch", "load", "send", "evict"),
        *("prefetch", "load", "send", "evict"),
        *("load", "send", "evict"),
        *("send", "finish"),  # nobody wants the gradient of the input: the first layer's weights are not read
    ]


Mutation = Callable[[fx.Graph], None]


def sends(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=ops.send))


def drop_a_send(graph: fx.Graph) -> None:
    node = sends(graph)[1]
    gradients = node.args[3]
    assert isinstance(gradients, (list, tuple))
    for item in list(node.users):
        item.replace_all_uses_with(gradients[item.args[1]])  # type: ignore[index, arg-type]
        graph.erase_node(item)
    graph.erase_node(node)


def send_later(graph: fx.Graph) -> None:
    first, second = sends(graph)[:2]
    second.prepend(first)


def return_what_was_sent(graph: fx.Graph) -> None:
    node = sends(graph)[0]
    gradients = node.args[3]
    assert isinstance(gradients, (list, tuple))
    for item in list(node.users):
        item.replace_all_uses_with(gradients[item.args[1]])  # type: ignore[index, arg-type]


def send_twice(graph: fx.Graph) -> None:
    node = sends(graph)[0]
    with graph.inserting_after(node):
        graph.node_copy(node)


def send_what_another_step_made(graph: fx.Graph) -> None:
    first, second = sends(graph)[:2]
    second.args = (*second.args[:3], first.args[3])


def never_finish(graph: fx.Graph) -> None:
    (node,) = graph.find_nodes(op="call_function", target=ops.finish)
    graph.erase_node(node)


def finish_early(graph: fx.Graph) -> None:
    (node,) = graph.find_nodes(op="call_function", target=ops.finish)
    sends(graph)[2].append(node)


MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "a send is missing": (drop_a_send, "the gradients of step 5 are never sent"),
    "a send comes later": (send_later, "sends gradients of step 4 behind step 5"),
    "the device's gradient is returned": (return_what_was_sent, "from the device, although it was sent"),
    "a send comes twice": (send_twice, "step 4 has sent its gradients already"),
    "gradients of another step": (send_what_another_step_made, "which step 5 has not made"),
    "nothing is awaited": (never_finish, "returns gradients that nothing has awaited"),
    "awaited before the last send": (finish_early, "returns gradients that nothing has awaited"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_send_is_seen(name: str) -> None:
    mutate, expected = MUTATIONS[name]
    _, backward = rewritten(k=2, m=1)
    mutate(backward.graph)
    assert any(expected in each for each in messages(backward)), messages(backward)


def test_a_page_that_forward_should_have_left() -> None:
    """Without its prefetch in forward the page of the last layer but one is not on the device when backward begins."""
    forward, _ = rewritten(k=3, m=1)
    plan = forward.planned()
    assert any(each.start_step < 4 < each.end_step for each in plan.intervals)
    last = list(forward.graph.find_nodes(op="call_function", target=ops.load))[-1]
    with forward.graph.inserting_before(forward.graph.output_node()):
        forward.graph.call_function(ops.evict, last.args)
    (message,) = messages(forward)
    assert message.endswith("is not left on the device for backward")


def test_joined_graphs_carry_what_is_saved() -> None:
    forward, backward = programs(k=2)
    joined, copies = join_graphs(forward.graph, backward.graph)
    joined.lint()
    placeholders = [node.name for node in joined.find_nodes(op="placeholder")]
    assert len(placeholders) == len(forward.graph.find_nodes(op="placeholder")) + 1, "the gradient of the result"
    saved = [node for node in backward.graph.find_nodes(op="placeholder") if node.name.startswith("tanh")]
    assert saved
    assert all(copies[node] is copies[_named(forward.graph, node.name)] for node in saved)
    assert len(joined.output_node().all_input_nodes) == 1 + 8, "the result, and gradients of eight weights"


def _named(graph: fx.Graph, name: str) -> fx.Node:
    (found,) = (node for node in graph.nodes if node.name == name)
    assert isinstance(found, fx.Node)
    return found


def test_a_plan_before_training_is_the_one_in_force() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(3, 8)
    options: dict[str, Any] = {"k": 2, "m": 1, "compiler": "eager"}
    before = spcompile.plan(model, (x,), device="cpu", **options)
    torch._dynamo.reset()
    spcompile.offload(model, device="cpu")
    fast = torch.compile(model, backend="superpipeline", options=options)
    fast(x).sum().backward()
    assert spcompile.plan(fast) == before == Plan.from_json(before.to_json())
    assert before.graphs == (range(4), range(4, 8))


# Plans by hand.


def training_plan(n_layers: int, k: int, m: int, *, gradients_bytes: int = 0, compute_us: float = 100.0) -> Plan:
    pages = tuple(Page(f"layers.{index}", (Weight(f"layers.{index}.w", 1 << 20),)) for index in range(n_layers))
    order = [*range(n_layers), *reversed(range(n_layers))]
    steps = tuple(
        Step(f"{index}", f"layers.{index}", (index,), compute_us, 0, (), gradients_bytes * (place >= n_layers))
        for place, index in enumerate(order)
    )
    plan = make_plan(device="cpu", pages=pages, leftovers=(), steps=steps, wraps=False, k=k, m=m)
    return replace(plan, backward_step=n_layers)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_actions_of_two_graphs(n_layers: int, k: int, m: int) -> None:
    """Each graph asks for what it reads, in order; a page that stays is evicted once, by who reads it last."""
    plan = training_plan(n_layers, max(k, m), m, gradients_bytes=8)
    assert verify_plan(plan) == []
    evicted: list[int | None] = []
    for steps in plan.graphs:
        held: set[int | None] = set()
        asked: set[int | None] = set()
        loaded = list[int]()
        for action in plan.actions(steps):
            assert action.step in steps
            if action.kind is ActionKind.PREFETCH:
                asked.add(action.interval)
            elif action.kind is ActionKind.LOAD:
                assert action.interval in asked
                held.add(action.interval)
                loaded.append(plan.intervals[action.interval or 0].page)
            elif action.kind is ActionKind.EVICT:
                assert action.interval in held
                evicted.append(action.interval)
        if plan.intervals:
            assert loaded == [plan.steps[step].reads[0] for step in steps]
    assert sorted(evicted, key=str) == sorted(range(len(plan.intervals)), key=str)
    assert [each.step for each in plan.actions() if each.kind is ActionKind.SEND] == list(plan.graphs[1])
    assert list(plan.actions()) == list(itertools.chain(*map(plan.actions, plan.graphs)))


def test_the_last_pages_of_forward_are_kept() -> None:
    plan = training_plan(6, 3, 1)
    assert plan.bytes_moved == (6 + 6 - 3) << 20
    kept = [index for index, each in enumerate(plan.intervals) if each.start_step < 6 < each.end_step]
    assert [plan.intervals[index].page for index in kept] == [3, 4, 5]
    loads = [action for action in plan.actions(plan.graphs[1]) if action.kind is ActionKind.LOAD]
    assert loads[:3] == [Action(ActionKind.LOAD, 6 + place, index) for place, index in enumerate(reversed(kept))]


def test_gradients_take_their_time() -> None:
    """Compute waits for the gradients of the send before the last one, and at the end for all of them."""
    machine = PROFILES["h100"]
    plan = training_plan(3, 1000, 1, gradients_bytes=100 << 20, compute_us=10.0)
    send_us = machine.copy_time_us(100 << 20, both=True)
    simulation = simulate(plan, machine)
    assert simulation.down_us == pytest.approx(3 * send_us)
    assert simulation.iteration_us == pytest.approx(4 * 10.0 + 3 * send_us)
    spans = [each for each in simulation.spans if each.lane == "D2H" and each.iteration == 1]
    assert [each.step for each in spans] == [3, 4, 5]
    assert all(one.end_us <= other.start_us for one, other in itertools.pairwise(spans))
    assert [(each.step, each.cause, each.page) for each in simulation.stalls] == [
        (5, "gradients", "2"),
        (6, "gradients", "0"),
    ]


def test_gradients_hide_behind_compute() -> None:
    machine = PROFILES["h100"]
    plan = training_plan(3, 1000, 1, gradients_bytes=1 << 20, compute_us=5000.0)
    simulation = simulate(plan, machine)
    assert simulation.iteration_us == pytest.approx(6 * 5000.0 + machine.copy_time_us(1 << 20, both=True))
