"""Take one thing away, and see that it shows: a wait, a transfer node, a number of the plan.

The emulated device is only worth something if a missing wait makes results wrong on it, and the verifier only if it
finds what would go wrong. A chain of layers runs under several seeds of the emulated device, as it is and with one
mistake each; what the verifier lets pass must be right under all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, fx, nn

from spcompile import backend, ops, pipeline
from spcompile.errors import VerificationError
from spcompile.ir import ALIGNMENT_BYTES, Interval, Plan
from spcompile.passes import make_schedule as make_schedule_module
from spcompile.passes.base import Pass, Program
from spcompile.passes.insert_transfers import insert_transfers
from spcompile.runtime.arena import Arena
from spcompile.runtime.streams import EmulatedEvent, EmulatedStreams
from tests.running import Run, compile_offloaded

SEEDS = range(20)

WINDOWS = [(k, m) for k in range(1, 5) for m in range(1, k + 1)]

LAYERS = 5


class Chain(nn.Module):
    """Layers of two sizes, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=index % 2 == 0) for index in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@dataclass
class Case:
    """An input, what the plain model makes of it, and the compiled model."""

    run: Run
    x: Tensor
    expected: Tensor

    def call(self, seed: int) -> Tensor:
        streams = self.run.store.arena.streams
        assert isinstance(streams, EmulatedStreams)
        streams.random.seed(seed)
        with torch.no_grad():
            result: Tensor = self.run.model(self.x)
            return result

    def is_right(self) -> bool:
        """Whether all calls are, one after the other, each under another seed, on a device that stays warm."""
        return all(torch.equal(self.call(seed), self.expected) for seed in SEEDS)


def make_case(k: int, m: int, *, verify: bool = False) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Chain().eval(), torch.randn(3, 8)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        return Case(compile_offloaded(model, k=k, m=m, verify=verify), x, plain(x))


@pytest.mark.parametrize(("k", "m"), WINDOWS)
def test_as_it_is(k: int, m: int) -> None:
    case = make_case(k, m)
    assert case.is_right()
    assert len(case.run.plan.intervals) == LAYERS


@pytest.mark.parametrize(("k", "m"), WINDOWS)
@pytest.mark.parametrize("wait", ["compute_wait", "side_wait"])
def test_without_a_wait_results_are_wrong(monkeypatch: pytest.MonkeyPatch, wait: str, k: int, m: int) -> None:
    """Compute waits for the copy; the copy waits for the last reader: [Note: who waits for whom]."""
    monkeypatch.setattr(EmulatedStreams, wait, lambda *_: None)
    assert not make_case(k, m).is_right()


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, EmulatedEvent | None]]:
    """What the emulated device is asked for from now on: events of compute, waits of copies for events, and copies."""
    found: list[tuple[str, EmulatedEvent | None]] = []
    record, wait, copy_ = EmulatedStreams.compute_record, EmulatedStreams.side_wait, EmulatedStreams.side_copy

    def compute_record(streams: EmulatedStreams) -> EmulatedEvent:
        event = record(streams)
        found.append(("record", event))
        return event

    def side_wait(streams: EmulatedStreams, event: EmulatedEvent) -> None:
        found.append(("wait", event))
        wait(streams, event)

    def side_copy(streams: EmulatedStreams, target: Tensor, source: Tensor) -> None:
        found.append(("copy", None))
        copy_(streams, target, source)

    monkeypatch.setattr(EmulatedStreams, "compute_record", compute_record)
    monkeypatch.setattr(EmulatedStreams, "side_wait", side_wait)
    monkeypatch.setattr(EmulatedStreams, "side_copy", side_copy)
    return found


def test_the_first_copy_of_an_iteration_waits_for_what_compute_did_before_it(
    commands: list[tuple[str, EmulatedEvent | None]],
) -> None:
    """It may have written the weights themselves."""
    case = make_case(2, 1)
    for seed in range(3):
        commands.clear()
        case.call(seed)
        events = [event for command, event in commands if command == "record"]
        begun = events[0] if seed else events[1]  # the first call makes the arena before
        assert ("wait", begun) in commands[: commands.index(("copy", None))]


def test_copies_into_a_new_arena_wait_for_what_compute_did_before(
    commands: list[tuple[str, EmulatedEvent | None]],
) -> None:
    """Whoever had this memory before may still be at it."""
    arena = Arena(torch.device("cpu"), EmulatedStreams())
    for nbytes in (1024, 4096):
        commands.clear()
        arena.reserve(nbytes)
        ((_, event), last) = commands
        assert last == ("wait", event)
    commands.clear()
    arena.reserve(2048)  # there is more already
    assert commands == []


def test_a_new_arena_is_written_only_after_compute_has_left_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever had the memory before may still be at it; the emulated device fills it with poison at that moment."""
    side_wait, left_out = EmulatedStreams.side_wait, list[EmulatedEvent]()

    def skip_the_first_two(streams: EmulatedStreams, event: EmulatedEvent) -> None:
        if len(left_out) < 2:  # the arena's own, and that of the begin of the iteration
            left_out.append(event)
            return
        side_wait(streams, event)

    def first_call_is_right(seed: int) -> bool:
        left_out.clear()
        case = make_case(2, 1)
        return torch.equal(case.call(seed), case.expected)

    assert all(first_call_is_right(seed) for seed in range(4))
    monkeypatch.setattr(EmulatedStreams, "side_wait", skip_the_first_two)
    assert not all(first_call_is_right(seed) for seed in range(4))


# The outer graph.

GraphMutation = Callable[[fx.Graph], None]


def transfers(graph: fx.Graph, op: Callable[..., object]) -> list[fx.Node]:
    return [node for node in graph.nodes if ops.is_op(node, op)]


def dropped(op: Callable[..., object], index: int) -> GraphMutation:
    def mutate(graph: fx.Graph) -> None:
        node = transfers(graph, op)[index]
        if op is ops.load:  # its readers get another layer's weights
            other = transfers(graph, op)[index - 1]
            node.replace_all_uses_with(other)
        graph.erase_node(node)

    return mutate


def moved(op: Callable[..., object], index: int, distance: int) -> GraphMutation:
    """Past so many other nodes that are transfers or segment calls."""

    def mutate(graph: fx.Graph) -> None:
        node = transfers(graph, op)[index]
        stops = [each for each in graph.nodes if each.op == "call_module" or each.target in ops.TRANSFERS]
        place = stops.index(node) + distance
        anchor = stops[min(max(place, 1), len(stops) - 1)]  # begin stays first
        if distance > 0:
            anchor.append(node)
        else:
            anchor.prepend(node)

    return mutate


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant."""

    name: str
    rejected: bool
    right: bool


def outcome(monkeypatch: pytest.MonkeyPatch, name: str, mutate: GraphMutation, k: int, m: int) -> Outcome:
    def insert_wrongly(program: Program) -> None:
        insert_transfers(program)
        mutate(program.graph)

    wrong = Pass(insert_wrongly)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "PASSES", (*pipeline.PASSES[:-1], wrong))
        patch.setattr(backend, "REWRITING", (*pipeline.REWRITING[:-1], wrong))
        return Outcome(name, _is_rejected(k, m), _is_right(k, m))


def _is_rejected(k: int, m: int) -> bool:
    """Whether the verifier objects. What the runtime alone objects to got past the verifier."""
    try:
        make_case(k, m, verify=True).call(0)
    except (VerificationError, ValueError) as error:
        return "violation" in str(error)
    except (AssertionError, KeyError, RuntimeError):
        return False
    return False


def _is_right(k: int, m: int) -> bool:
    """False where results are wrong, and where the runtime notices."""
    try:
        return make_case(k, m).is_right()
    except (AssertionError, KeyError, RuntimeError):
        return False


GRAPH_WINDOWS = [(1, 1), (2, 1), (3, 2)]


@pytest.mark.parametrize(("k", "m"), GRAPH_WINDOWS)
def test_without_an_evict(monkeypatch: pytest.MonkeyPatch, k: int, m: int) -> None:
    for index in range(LAYERS):
        found = outcome(monkeypatch, f"evict {index} dropped", dropped(ops.evict, index), k, m)
        assert found.rejected, found
        if index + k < LAYERS:  # the slot is needed again in the same iteration
            assert not found.right, found


@pytest.mark.parametrize(("k", "m"), GRAPH_WINDOWS)
def test_without_a_load(monkeypatch: pytest.MonkeyPatch, k: int, m: int) -> None:
    for index in range(1, LAYERS):
        found = outcome(monkeypatch, f"load {index} dropped", dropped(ops.load, index), k, m)
        assert found.rejected, found
        assert not found.right, found


@pytest.mark.parametrize(("k", "m"), GRAPH_WINDOWS)
def test_without_a_prefetch_the_load_copies(monkeypatch: pytest.MonkeyPatch, k: int, m: int) -> None:
    """A prefetch is a hint: results stay right, but the plan is not kept, and the verifier says so."""
    for index in range(LAYERS):
        found = outcome(monkeypatch, f"prefetch {index} dropped", dropped(ops.prefetch, index), k, m)
        assert found.rejected, found
        assert found.right, found


@pytest.mark.parametrize(("k", "m"), GRAPH_WINDOWS)
def test_an_evict_before_the_last_reader(monkeypatch: pytest.MonkeyPatch, k: int, m: int) -> None:
    for index in range(LAYERS):
        mutate = _evict_before_its_segment(index)
        found = outcome(monkeypatch, f"evict {index} before its segment", mutate, k, m)
        assert found.rejected, found
        assert not found.right, found


def _evict_before_its_segment(index: int) -> GraphMutation:
    def mutate(graph: fx.Graph) -> None:
        load, evict = transfers(graph, ops.load)[index], transfers(graph, ops.evict)[index]
        assert load.args == evict.args
        load.append(evict)

    return mutate


@pytest.mark.parametrize(("k", "m"), [(2, 1), (3, 2)])
def test_what_the_verifier_lets_pass_is_right(monkeypatch: pytest.MonkeyPatch, k: int, m: int) -> None:
    found = [
        outcome(monkeypatch, f"{op.__name__} {index} moved by {distance}", moved(op, index, distance), k, m)
        for op in (ops.prefetch, ops.evict)
        for index in (1, 4)
        for distance in (-3, -1, 1, 3)
    ]
    assert [each for each in found if not each.rejected and not each.right] == []
    assert any(each.rejected and not each.right for each in found)
    assert any(each.right for each in found)


# The plan.


@dataclass(frozen=True)
class PlanMutation:
    """A mistake that a planner might make; None where the plan has no place for it."""

    name: str
    mutate: Callable[[Plan], Plan | None]


def _with_interval(plan: Plan, index: int, interval: Interval) -> Plan:
    return replace(plan, intervals=(*plan.intervals[:index], interval, *plan.intervals[index + 1 :]))


def swapped_slots(one: int, two: int) -> PlanMutation:
    def mutate(plan: Plan) -> Plan | None:
        first, second = plan.intervals[one], plan.intervals[two]
        if first.slots == second.slots:
            return None
        plan = _with_interval(plan, one, replace(first, slots=second.slots))
        return _with_interval(plan, two, replace(second, slots=first.slots))

    return PlanMutation(f"slots of intervals {one} and {two} swapped", mutate)


def shifted(index: int, start: int, end: int) -> PlanMutation:
    def mutate(plan: Plan) -> Plan:
        interval = plan.intervals[index]
        return _with_interval(
            plan, index, replace(interval, start_step=interval.start_step + start, end_step=interval.end_step + end)
        )

    return PlanMutation(f"interval {index} shifted by {start} and {end}", mutate)


def shrunk_slot(index: int) -> PlanMutation:
    def mutate(plan: Plan) -> Plan | None:
        if index >= len(plan.slots):
            return None
        slot = replace(plan.slots[index], nbytes=plan.slots[index].nbytes - ALIGNMENT_BYTES)
        return replace(plan, slots=(*plan.slots[:index], slot, *plan.slots[index + 1 :]))

    return PlanMutation(f"slot {index} too small", mutate)


def overlapping_slots() -> PlanMutation:
    def mutate(plan: Plan) -> Plan | None:
        if len(plan.slots) < 2:
            return None
        slots = (plan.slots[0], replace(plan.slots[1], offset_bytes=ALIGNMENT_BYTES), *plan.slots[2:])
        return replace(plan, slots=slots)

    return PlanMutation("slot 1 over slot 0", mutate)


def plan_mutations() -> Iterator[PlanMutation]:
    yield from (swapped_slots(one, two) for one, two in pairwise(range(LAYERS)))
    for index in (0, 2, 4):
        yield from (shifted(index, start, end) for start, end in ((-1, 0), (1, 0), (0, -1), (0, 1), (1, 1), (-1, -1)))
    yield from (shrunk_slot(index) for index in range(4))
    yield overlapping_slots()


@pytest.mark.parametrize(("k", "m"), GRAPH_WINDOWS)
def test_wrong_plans_do_not_get_through_the_compiler(monkeypatch: pytest.MonkeyPatch, k: int, m: int) -> None:
    """A few mutants are plans of another kind, later copies for instance, and right."""
    good = make_case(k, m, verify=True)
    good.call(0)
    plan = good.run.plan
    rejected, passed = [], []
    for mutation in plan_mutations():
        wrong = mutation.mutate(plan)
        if wrong is None:
            continue
        with monkeypatch.context() as patch:
            patch.setattr(make_schedule_module, "place_graph", lambda *_, wrong=wrong, **__: wrong)
            if _is_rejected(k, m):
                rejected.append(mutation.name)
            else:
                passed.append((mutation.name, _is_right(k, m)))
    assert [name for name, right in passed if not right] == []
    assert len(rejected) > 5 * len(passed)
