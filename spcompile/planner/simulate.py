"""What a plan does on a machine, and when: lanes, stalls and their causes, memory over time.

What: a replay of the schedule with predicted times in place of a device. The rules are those of the runtime (see
[Note: who waits for whom] in ``runtime/streams.py``): the host issues the lines of `Plan.actions` in order and runs
ahead of the device without limit; steps run one after the other, each when its pages have arrived; copies run one after
the other in the order in which they are issued, each when the last readers of all places that it overwrites are done.
Why: planners compare plans by it, and people see where an iteration loses its time.

    H2D      0    1    2    3    4    0'   1'       k = 2: page 2 takes the slot of page 0,
    compute       0....1....2....3....4....0'       page 3 that of page 1
                       stalls: "link" where the copies stand end to end, "room" where the link waits for a slot

In training gradients leave on a lane of their own. Compute waits for those of the send before the last one, to have
their memory, and at the end for all. While gradients and pages share the link, each way is as slow as it then is.

How: a slot is given back at a position of the schedule, so all that a copy waits for, beside the copies before it, is
that compute reaches one position. This can be told from the plan alone (`_Schedule`), and an iteration is then one walk
over steps and copies (`_replay`) without a thought for slots. The first copy that an iteration issues also waits until
all compute before the iteration is done, as the runtime has it (the weights themselves may have been written there),
and with it all later ones. So no copy waits for a position before its iteration, and what one iteration hands to the
next is only how far the copies ahead have come. Where that comes again, everything does: a steady state.

The odd cases: slots that change places every iteration mostly change nothing in time, and then one phase stands for
all. How far copies come ahead may take many iterations to settle; after `MOST_ITERATIONS` the last period counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from spcompile.ir import ActionKind, Machine, Plan, Slot
from spcompile.lanes import Span, Stall, Stay

MOST_ITERATIONS = 64
"""No steady state is awaited for longer, except for two periods. Of 20,000 random chains 394 took more than one warm
iteration; in all of them only the copies ahead were still to settle, and iterations took equally long from the first.
"""

ROUNDING = 1e-9
"""Times that differ by less than this part of an iteration are equal."""


@dataclass(frozen=True)
class Simulation:
    """What happens when.

    Attributes:
        iteration_us: average of the last period. An iteration lasts from the end of the one before to its own: until
            its last step has run and its gradients are in host memory.
        compute_us: sum of the steps of one iteration.
        link_us: sum of the copies to the device of one iteration.
        down_us: sum of the copies of gradients from the device.
        spans: of all simulated iterations, the cold one first, in order of start; copies for the one that would follow
            included.
        stalls: of the first iteration of the last period.
        stalls_by_iteration: those of every simulated iteration; ``stalls`` is one of these.
        typical: the iteration of ``stalls``: the first of the last period.
        stays: of pages in slots, in the order in which their copies start; the last ones may have no end.
        iteration_starts_us: when compute reaches the begin of each simulated iteration, and lastly the end of all.
        memory: pairs of a time in us and how many bytes of weights (in slots from the start of their copy to their
            eviction, residents, leftovers) and of activations of the running step take memory from then on.
        cold_us: duration of iteration 0.
    """

    iteration_us: float
    compute_us: float
    link_us: float
    down_us: float
    spans: tuple[Span, ...]
    stalls: tuple[Stall, ...]
    stalls_by_iteration: tuple[tuple[Stall, ...], ...]
    typical: int
    stays: tuple[Stay, ...]
    iteration_starts_us: tuple[float, ...]
    memory: tuple[tuple[float, int], ...]
    cold_us: float

    @property
    def bound_us(self) -> float:
        """No schedule with these copies has shorter iterations."""
        return max(self.compute_us, self.link_us, self.down_us)


def simulate(plan: Plan, machine: Machine, *, iterations: int | None = None) -> Simulation:
    """Replay a plan from a cold start.

    Args:
        plan: one that the verifier accepts. What other graphs of the model do is not looked at.
        machine: whose link is used; times of steps are those of the plan.
        iterations: how many, the cold one included. By default until a period is as the one before, at least the cold
            one, two periods and one more. Phases that only differ in the names of slots are one: a period of 1.

    Raises:
        ValueError: less than two iterations.
    """
    if iterations is not None and iterations < 2:
        raise ValueError(f"a cold iteration and a warm one are 2 iterations, not {iterations}")
    schedule = _Schedule(plan, machine)
    period = len(schedule.warm)
    if iterations is None:
        history = _until_steady(schedule, 2 * period + 2)
    else:
        history = list(islice(_replay(schedule), iterations))
    causes = _causes(history)
    stalls = tuple(tuple(_stalls(plan, schedule, each, index, causes)) for index, each in enumerate(history))
    typical = max(1, len(history) - period)
    return Simulation(
        iteration_us=_average_us(history, period),
        compute_us=schedule.compute_us,
        link_us=schedule.link_us,
        down_us=sum(schedule.send_us),
        spans=tuple(sorted(_spans(plan, history), key=lambda span: span.start_us)),
        stalls=stalls[typical],
        stalls_by_iteration=stalls,
        typical=typical,
        stays=tuple(sorted(_stays(plan, history), key=lambda stay: stay.start_us)),
        iteration_starts_us=(*(each.reached_us[0] for each in history), history[-1].end_us),
        memory=tuple(_memory(plan, history)),
        cold_us=history[0].end_us,
    )


def predict_iteration_us(plan: Plan, machine: Machine) -> float:
    """`Simulation.iteration_us` alone, for planners that compare many plans; arguments as in `simulate`."""
    schedule = _Schedule(plan, machine)
    return _average_us(_until_steady(schedule), len(schedule.warm))


class _Issue(NamedTuple):
    """A copy as the schedule has it.

    Attributes:
        interval: index in the plan.
        ahead: 1 for the next iteration, else 0.
        room: the copy may start once compute has reached this position of the iteration that issues it.
    """

    interval: int
    ahead: int
    room: int


_Issues = tuple[tuple[_Issue, ...], ...]
"""The copies of an iteration, by the position before which they are issued (the last one is its end)."""


class _Schedule:
    """What the times of a plan depend on.

    Attributes:
        step_us: time of each step.
        copy_us: time of the copy of each interval.
        send_us: for each step, time of the copies of the gradients that it makes; 0 where it makes none.
        loads: for each step, the intervals whose copies it waits for.
        cold: the copies of a cold iteration.
        warm: those of a warm one in each phase; of one phase where the others are the same.
    """

    def __init__(self, plan: Plan, machine: Machine) -> None:
        # Copies that backward issues share the link with the gradients that go the other way.
        returns = len(plan.steps) if plan.backward_step is None or not plan.gradients_bytes else plan.backward_step
        # What is read in place takes compute's time: its kernel waits for the link.
        gathered_bytes = [plan.gathered_bytes(step) for step in range(len(plan.steps))]
        self.step_us = [
            step.compute_us + (machine.gather_time_us(nbytes) if nbytes else 0.0)
            for step, nbytes in zip(plan.steps, gathered_bytes, strict=True)
        ]
        self.copy_us = [
            machine.copy_time_us(plan.pages[interval.page].nbytes, both=interval.start_step >= returns)
            for interval in plan.intervals
        ]
        self.send_us = [
            machine.copy_time_us(step.gradients_bytes, both=True) if step.gradients_bytes else 0.0
            for step in plan.steps
        ]
        self.loads: list[list[int]] = [[] for _ in plan.steps]
        self.requests: list[tuple[int, int, int]] = []  # position, interval, ahead
        for action in plan.actions():
            if action.interval is None or action.kind is ActionKind.EVICT:
                continue
            self.requests.append((action.step, action.interval, action.ahead))
            if action.kind is ActionKind.LOAD:
                self.loads[action.step].append(action.interval)
        sharing = _sharing(plan.slots)
        heads = [interval for _, interval, ahead in self.requests if ahead]
        self.cold = self._issues(plan, sharing, 0, ())
        warm = tuple(self._issues(plan, sharing, phase, heads) for phase in range(plan.period))
        self.warm = warm if any(issues != warm[0] for issues in warm) else warm[:1]

    @property
    def compute_us(self) -> float:
        return sum(self.step_us)

    @property
    def link_us(self) -> float:
        return sum(self.copy_us)

    def _issues(self, plan: Plan, sharing: Sequence[Sequence[int]], phase: int, heads: Iterable[int]) -> _Issues:
        """The requests of one iteration that are really copies, those on their way from before being left out."""
        issues: list[list[_Issue]] = [[] for _ in range(len(plan.steps) + 1)]
        on_their_way = {(index, 0) for index in heads}
        given_back = [0] * len(plan.slots)  # position; what the iteration before gave back is free at its start
        for index, _ in on_their_way:
            given_back[plan.intervals[index].slots[phase]] = plan.intervals[index].end_step
        for position, index, ahead in self.requests:
            if (index, ahead) in on_their_way:
                continue
            on_their_way.add((index, ahead))
            interval = plan.intervals[index]
            slot = interval.slots[(phase + ahead) % plan.period]
            room = max((given_back[other] for other in sharing[slot]), default=0)
            given_back[slot] = interval.end_step + ahead * len(plan.steps)
            issues[position].append(_Issue(index, ahead, room))
        return tuple(map(tuple, issues))


def _sharing(slots: Sequence[Slot]) -> list[list[int]]:
    """For each slot those that have bytes in common with it, itself included."""
    sharing: list[list[int]] = [[] for _ in slots]
    order = sorted(range(len(slots)), key=lambda index: (slots[index].offset_bytes, slots[index].nbytes))
    for rank, index in enumerate(order):
        end_bytes = slots[index].offset_bytes + slots[index].nbytes
        for other in islice(order, rank, None):
            if slots[other].offset_bytes >= end_bytes:
                break
            sharing[index].append(other)
            if other != index:
                sharing[other].append(index)
    return sharing


class _Copy(NamedTuple):
    """A copy as it happened; ``free_us`` is when all was there that it needs except the link."""

    issue: _Issue
    free_us: float
    start_us: float
    end_us: float
    link_idled: bool


class _Iteration(NamedTuple):
    """An iteration as it happened.

    Attributes:
        copies: those that it issued, for itself and for the next one.
        starts_us, ends_us: of its steps.
        sends: steps that send gradients, each with start and end of the copies.
        reached_us: when compute reached each position: its begin, and what follows each step.
        arrived_us: when the pages for it arrived, by interval.
    """

    copies: list[_Copy]
    starts_us: list[float]
    ends_us: list[float]
    sends: list[tuple[int, float, float]]
    reached_us: list[float]
    arrived_us: dict[int, float]

    @property
    def end_us(self) -> float:
        return self.reached_us[-1]


def _replay(schedule: _Schedule) -> Iterator[_Iteration]:
    """One iteration after the other, without an end."""
    now_us = link_us = down_us = 0.0
    arrived_us: dict[int, float] = {}
    issues = schedule.cold
    n_warm = 0
    while True:
        done = _Iteration([], [], [], [], [now_us], arrived_us)
        ahead_us: dict[int, float] = {}
        for position, issued in enumerate(issues):
            for issue in issued:
                free_us = done.reached_us[issue.room]
                start_us = max(free_us, link_us)
                copy = _Copy(issue, free_us, start_us, start_us + schedule.copy_us[issue.interval], free_us > link_us)
                link_us = copy.end_us
                done.copies.append(copy)
                (ahead_us if issue.ahead else arrived_us)[issue.interval] = link_us
            if position == len(schedule.step_us):
                break
            for interval in schedule.loads[position]:
                now_us = max(now_us, arrived_us[interval])
            done.starts_us.append(now_us)
            now_us += schedule.step_us[position]
            done.ends_us.append(now_us)
            if schedule.send_us[position]:
                started_us = max(now_us, down_us)
                now_us = max(now_us, down_us)  # those of the send before are awaited, to have their memory
                down_us = started_us + schedule.send_us[position]
                done.sends.append((position, started_us, down_us))
            done.reached_us.append(now_us)
        now_us = done.reached_us[-1] = max(now_us, down_us)
        yield done
        arrived_us = ahead_us
        n_warm += 1
        issues = schedule.warm[n_warm % len(schedule.warm)]


def _until_steady(schedule: _Schedule, least: int = 0) -> list[_Iteration]:
    """Iterations until one hands on what it also did a period before, ``least`` at least."""
    period = len(schedule.warm)
    history: list[_Iteration] = []
    handed_on: list[list[float]] = []  # by each iteration: how long after its end the copies ahead arrive
    for iteration in islice(_replay(schedule), max(MOST_ITERATIONS, 2 * period + 2)):
        history.append(iteration)
        handed_on.append([max(0.0, copy.end_us - iteration.end_us) for copy in iteration.copies if copy.issue.ahead])
        tolerance_us = ROUNDING * (iteration.end_us - iteration.reached_us[0])
        is_late_enough = len(history) > period and len(history) >= least
        if is_late_enough and _are_close(handed_on[-1], handed_on[-1 - period], tolerance_us):
            break
    return history


def _are_close(left: Sequence[float], right: Sequence[float], tolerance_us: float) -> bool:
    return all(abs(one - other) <= tolerance_us for one, other in zip(left, right, strict=True))


def _average_us(history: Sequence[_Iteration], period: int) -> float:
    n_last = min(period, len(history) - 1)
    return (history[-1].end_us - history[-1 - n_last].end_us) / n_last


def _spans(plan: Plan, history: Sequence[_Iteration]) -> Iterator[Span]:
    names = [page.name for page in plan.pages]
    load_steps = [plan.load_step(interval) for interval in plan.intervals]
    for index, iteration in enumerate(history):
        for copy in iteration.copies:
            issue = copy.issue
            label, step = names[plan.intervals[issue.interval].page], load_steps[issue.interval]
            yield Span("H2D", label, step, index + issue.ahead, copy.start_us, copy.end_us)
        for step, start_us in enumerate(iteration.starts_us):
            yield Span("compute", plan.steps[step].segment, step, index, start_us, iteration.ends_us[step])
        for step, start_us, end_us in iteration.sends:
            yield Span("D2H", plan.steps[step].segment, step, index, start_us, end_us)


def _stays(plan: Plan, history: Sequence[_Iteration]) -> Iterator[Stay]:
    for index, iteration in enumerate(history):
        for copy in iteration.copies:
            reader = index + copy.issue.ahead
            end_step = plan.intervals[copy.issue.interval].end_step
            end_us = history[reader].reached_us[end_step] if reader < len(history) else None
            yield Stay(copy.issue.interval, reader, copy.start_us, copy.end_us, end_us)


def _stalls(
    plan: Plan, schedule: _Schedule, iteration: _Iteration, index: int, causes: Mapping[tuple[int, int], str]
) -> Iterator[Stall]:
    """The stalls of one iteration, of this index; ``causes`` as from `_causes`."""
    tolerance_us = ROUNDING * (iteration.end_us - iteration.reached_us[0])
    sent = ""
    senders = {step for step, _, _ in iteration.sends}
    for step, loads in enumerate(schedule.loads):
        since_us = iteration.reached_us[step]
        stall_us = iteration.starts_us[step] - since_us
        if stall_us > tolerance_us:
            awaited = max(loads, key=lambda interval: iteration.arrived_us[interval])
            name = plan.pages[plan.intervals[awaited].page].name
            yield Stall(step, since_us, stall_us, name, causes[index, awaited])
        is_end = step + 1 == len(plan.steps)
        sent_last = plan.steps[step].segment if step in senders else sent
        stall_us = iteration.reached_us[step + 1] - iteration.ends_us[step]
        if stall_us > tolerance_us:
            yield Stall(step + 1, iteration.ends_us[step], stall_us, sent_last if is_end else sent, "gradients")
        sent = sent_last


def _causes(history: Sequence[_Iteration]) -> dict[tuple[int, int], str]:
    """Why each copy did not come earlier, by iteration that reads it and interval: see `Stall`."""
    causes: dict[tuple[int, int], str] = {}
    first: _Copy | None = None  # of those that have kept the link busy without a break
    for index, iteration in enumerate(history):
        for copy in iteration.copies:
            if first is None or copy.link_idled:
                first = copy
            waited_for = "room" if first.issue.room > 0 else "late"
            is_link = copy is not first and first.start_us <= copy.free_us
            causes[index + copy.issue.ahead, copy.issue.interval] = "link" if is_link else waited_for
    return causes


def _memory(plan: Plan, history: Sequence[_Iteration]) -> Iterator[tuple[float, int]]:
    """A staircase from time 0 on, without steps of height 0."""
    changes = {0.0: 0}
    for time_us, nbytes in _changes(plan, history):
        changes[time_us] = changes.get(time_us, 0) + nbytes
    taken_bytes = plan.residents_bytes + plan.leftovers_bytes
    for time_us, nbytes in sorted(changes.items()):
        taken_bytes += nbytes
        if nbytes or time_us == 0:
            yield time_us, taken_bytes


def _changes(plan: Plan, history: Sequence[_Iteration]) -> Iterator[tuple[float, int]]:
    for stay in _stays(plan, history):
        nbytes = plan.pages[plan.intervals[stay.interval].page].nbytes
        yield stay.start_us, nbytes
        if stay.end_us is not None:
            yield stay.end_us, -nbytes
    for iteration in history:
        for step, start_us in enumerate(iteration.starts_us):
            yield start_us, plan.steps[step].activations_bytes
            yield iteration.ends_us[step], -plan.steps[step].activations_bytes
