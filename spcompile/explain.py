"""What a compiled model really did, beside what was predicted: `record` and `explain`.

    with spcompile.record(fast):
        for batch in batches:
            fast(batch)
    print(spcompile.explain(fast))

A recording costs a few events for each segment and copy, so it is off unless asked for (``runtime/recording.py``). An
explanation sets its figures beside the simulation of the same plan, says what the iteration waited for, and which one
change would help most: the plan is placed again, on a machine that is as fast as the recording shows, with other
amounts of memory.

The odd case: on the emulated device times mean nothing, so only bytes and their order are explained.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from spcompile.errors import OptionError
from spcompile.ir import Machine, Plan
from spcompile.lanes import CAUSES, Recording, Stall
from spcompile.planner.choose import TradeoffPoint
from spcompile.planner.simulate import Simulation, predict_iteration_us, simulate
from spcompile.planning import plans_in_force
from spcompile.runtime.recording import Recorder
from spcompile.runtime.store import PageStore, find_store
from spcompile.runtime.streams import EmulatedStreams
from spcompile.runtime.weights import why_nothing_streams
from spcompile.text import format_bytes
from spcompile.viz import visualize
from spcompile.viz.picture import Picture
from spcompile.wording import format_us

WORTHWHILE = 0.03
"""A change that saves less than this part of an iteration is not proposed: the next recording may differ by as much."""

SAME_TIME = 1.01
"""Iterations that take at most so many times as long take equally long, when memory is to be saved."""

MOSTLY = 0.9
"""What is busy for this part of an iteration, or more, limits it."""

PROMPT = 0.1
"""Compute that has done an iteration within this part of it after its last step was issued has waited for the host."""

SHOWN_STALLS = 8
"""Stalls that the text lists, the longest first."""


@contextmanager
def record(model: torch.nn.Module | Callable[..., Any]) -> Iterator[list[Recording]]:
    """Measure what happens on the device while the block runs, for `explain` and for pictures.

    Resets ``torch.cuda``'s peak memory statistics, and waits for the device at both ends. Segments get NVTX ranges with
    their names for the time. Of a long block the first 256 runs of graphs are measured.

    Args:
        model: what torch.compile returned, or the module inside; it has to have run once.

    Returns:
        In the with statement, a list: behind the block it holds a `Recording` for each plan that ran.

    Raises:
        OptionError: the model has not run yet, or is being recorded already.
    """
    store = _store_of(model)
    is_emulated = isinstance(store.arena.streams, EmulatedStreams)
    with store.lock:
        if store.recorder is not None:
            raise OptionError("this model is being recorded already: end that recording first")
        if not is_emulated:
            torch.cuda.reset_peak_memory_stats(store.device)
        recorder = store.recorder = Recorder(store.arena.streams, is_emulated=is_emulated)
    recordings: list[Recording] = []
    try:
        yield recordings
    finally:
        with store.lock:
            store.recorder = None
            recordings += recorder.finish(None if is_emulated else torch.cuda.max_memory_allocated(store.device))
            store.recordings = list(recordings)


def explain(model: torch.nn.Module | Callable[..., Any]) -> Explanation | Any:
    """What the plans in force are predicted to do and, of those that were recorded (see `record`), what they did.

    Args:
        model: what torch.compile returned, or the module inside; it has to have run once.

    Returns:
        An `Explanation`; `Explanations`, a tuple in order of capture, where there are several graphs.

    Raises:
        OptionError: the model has not run yet.
    """
    store = _store_of(model)
    recordings = {id(each.plan): each for each in store.recordings}
    plans = plans_in_force(model)
    # The pieces between graph breaks read different pages; what reads the same was compiled again.
    recompiles = len(plans) - len({frozenset(plan.pages) for plan in plans})
    explained = [Explanation(plan, recordings.get(id(plan)), recompiles) for plan in plans]
    return explained[0] if len(explained) == 1 else Explanations(explained)


def _store_of(model: Any) -> PageStore:
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, torch.nn.Module):
        raise OptionError(f"a torch.nn.Module is needed, or what torch.compile made of one, not {type(model).__name__}")
    store = find_store(inner.parameters())
    if store is None or not store.runtimes():
        reason = why_nothing_streams(inner)
        if reason is not None:
            raise OptionError(f"there is nothing to explain or record: nothing of this model is streamed ({reason})")
        raise OptionError("there is nothing to explain or record yet: run the compiled model once")
    return store


@dataclass(frozen=True)
class Advice:
    """The one change that would help most.

    Attributes:
        peak_bytes: of the other plan: the budget that leads to it.
        iteration_us: its iteration, predicted from the measured times.
        change_bytes: memory that it takes more (or, where negative, less) than the plan that ran.
        change_us: time that it saves (negative) or takes.
        n_pages: how many more pages stay on the device.
        in_place: names of the pages that it reads in place and the plan that ran does not.
    """

    peak_bytes: int
    iteration_us: float
    change_bytes: int
    change_us: float
    n_pages: int
    in_place: tuple[str, ...]

    def __str__(self) -> str:
        budget = f"budget={_as_budget(self.peak_bytes)!r}"
        before_us = self.iteration_us - self.change_us
        if self.change_bytes < 0:
            return f"{format_bytes(-self.change_bytes)} less would do: {budget} takes as long"
        return f"+{format_bytes(self.change_bytes)} {self._use}: {self.change_us / before_us:+.0%} ({budget})"

    @property
    def _use(self) -> str:
        """What the memory is used for."""
        uses = []
        if self.n_pages > 0:
            uses.append(f"keeps {self.n_pages} more page{'s' if self.n_pages > 1 else ''}")
        if self.in_place:
            uses.append(f"reads {', '.join(self.in_place)} in place")
        return " and ".join(uses) or "lets copies start earlier"


@dataclass(frozen=True)
class Explanation:
    """What one plan does: predicted, and measured where there is a recording. What is measured is of its typical
    iteration (`Recording.typical`).

    Attributes:
        plan: as it is in force.
        recording: of this plan, if there is one.
        recompiles: how many of the graphs in force were compiled again, for other shapes, modes, or anything else that
            Dynamo guards on.
    """

    plan: Plan
    recording: Recording | None
    recompiles: int

    @cached_property
    def predicted(self) -> Simulation | None:
        """The plan on the machine that it was timed on."""
        return None if self.plan.machine is None else simulate(self.plan, self.plan.machine)

    @property
    def is_timed(self) -> bool:
        """Whether there are measured times that mean something."""
        return self.recording is not None and not self.recording.is_emulated

    @property
    def iteration_us(self) -> float:
        """See `Recording.iteration_us`."""
        return self._recorded.iteration_us

    def busy_us(self, lane: str) -> float:
        """See `Recording.busy_us`."""
        return self._recorded.busy_us(lane)

    @property
    def floor_us(self) -> float:
        """See `Recording.floor_us`."""
        return self._recorded.floor_us

    @property
    def link_bytes_per_s(self) -> float | None:
        """See `Recording.link_bytes_per_s`."""
        return self._recorded.link_bytes_per_s

    @cached_property
    def stalls(self) -> tuple[Stall, ...]:
        """Those of the typical iteration, in order."""
        return self._recorded.stalls_of(self._recorded.typical)

    @cached_property
    def limited_by(self) -> str:
        """``"compute"``, ``"host"`` (which issues work no faster than it is done), ``"link"``, ``"gradients"``, or the
        cause for which compute waits longest."""
        lanes = {"compute": "compute", "H2D": "link", "D2H": "gradients"}
        busy = {name: self.busy_us(lane) for lane, name in lanes.items()}
        most = max(busy, key=lambda name: busy[name])
        if most == "compute" and self._recorded.lags_us[self._recorded.typical] < PROMPT * self.iteration_us:
            return "host"
        if busy[most] >= MOSTLY * self.iteration_us or not self.stalls:
            return most
        waits: defaultdict[str, float] = defaultdict(float)
        for stall in self.stalls:
            waits[stall.cause] += stall.us
        return max(waits, key=lambda cause: waits[cause])

    @cached_property
    def advice(self) -> Advice | None:
        """The one change that would help most; None where none is worthwhile, or nothing was timed."""
        machine = self.plan.machine
        if machine is None or not self.is_timed:
            return None
        machine = replace(machine, h2d_bytes_per_s=self.link_bytes_per_s or machine.h2d_bytes_per_s)
        as_measured = self._as_measured(machine)
        now_us, now_bytes = predict_iteration_us(as_measured, machine), self.plan.peak_bytes()
        curve = replace(as_measured, budget_bytes=None).tradeoff()
        quicker = [
            point
            for point in curve
            if now_bytes < point.peak_bytes <= machine.device_bytes and point.iteration_us < (1 - WORTHWHILE) * now_us
        ]
        smaller = [
            point
            for point in curve
            if point.peak_bytes < (1 - WORTHWHILE) * now_bytes and point.iteration_us <= SAME_TIME * now_us
        ]
        if quicker:
            best = max(quicker, key=lambda point: (now_us - point.iteration_us) / (point.peak_bytes - now_bytes))
        elif smaller:
            best = min(smaller, key=lambda point: point.peak_bytes)
        else:
            return None
        return self._advice(best, now_us, now_bytes)

    def _advice(self, point: TradeoffPoint, now_us: float, now_bytes: int) -> Advice:
        n_pages = len(point.plan.residents) - len(self.plan.residents)
        in_place = tuple(
            page.name
            for index, page in enumerate(self.plan.pages)
            if index in point.plan.mapped and index not in self.plan.mapped
        )
        change_us, change_bytes = point.iteration_us - now_us, point.peak_bytes - now_bytes
        return Advice(point.peak_bytes, point.iteration_us, change_bytes, change_us, n_pages, in_place)

    def _as_measured(self, machine: Machine) -> Plan:
        """The plan on this machine, with the times of its steps as they were measured.

        Where rows are read in place the link has its part of that time; all of it where that is what it was predicted
        to take or less: rows that were read twice then came from a cache, and count less.
        """
        times: dict[int, list[float]] = {}
        for span in self._recorded.spans:
            if span.lane == "compute" and span.iteration in self._recorded.counted:
                times.setdefault(span.step, []).append(span.end_us - span.start_us)
        steps = []
        for index, step in enumerate(self.plan.steps):
            if index not in times:
                steps.append(step)
                continue
            measured_us, in_place_bytes = statistics.median(times[index]), self.plan.gathered_bytes(index)
            in_place_us = machine.gather_time_us(in_place_bytes) if in_place_bytes else 0.0
            read = min(1.0, measured_us / in_place_us) if in_place_us else 1.0
            gathers = tuple((page, int(nbytes * read)) for page, nbytes in step.gathers)
            steps.append(replace(step, compute_us=max(0.0, measured_us - in_place_us), gathers=gathers))
        return replace(self.plan, steps=tuple(steps), machine=machine)

    @cached_property
    def free_batch(self) -> int:
        """How many times as large a batch would take about as long: 1 unless copies keep the link busy whatever compute
        does. They do not grow with the batch, and compute grows no faster than it; its activations need memory."""
        compute_us = self.busy_us("compute")
        waits_for_room = any(stall.cause in ("room", "late") for stall in self.stalls)
        if not compute_us or waits_for_room or self.floor_us < MOSTLY * self.iteration_us:
            return 1
        return max(1, int(self.floor_us / compute_us))

    @property
    def conclusions(self) -> tuple[str, ...]:
        """What limits the iteration, and what would help most; nothing where there are no times."""
        if not self.is_timed:
            return ()
        limits = CAUSES | {
            "compute": "the GPU is busy all the time",
            "host": "the GPU has done its work as soon as the program has issued it",
            "link": "copies keep it busy all the time",
        }
        found = [
            f"Limited by {self.limited_by}: {limits[self.limited_by]}",
            f"What would help most: {self.advice or 'nothing that memory can buy'}",
        ]
        if self.free_batch > 1:
            share = f"The GPU computes for {self.busy_us('compute') / self.iteration_us:.0%} of the time"
            found.append(f"{share}: a batch {self.free_batch} times as large would take about as long")
        return tuple(found)

    @property
    def _recorded(self) -> Recording:
        if self.recording is None:
            raise OptionError("nothing was recorded: run the model inside `with spcompile.record(model):`")
        return self.recording

    def visualize(self, path: str | Path | None = None) -> Picture:
        """The plan's picture, with the measured lanes beside the predicted ones where there are any; see
        `Plan.visualize`."""
        recording = self.recording if self.is_timed else None
        return visualize([self.plan], path, recording=recording, remarks=self.conclusions)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


class Explanations(tuple[Explanation, ...]):
    """The explanations of several graphs of one model, in the order of their capture."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n\n".join(f"Graph {index} of {len(self)}\n{each}" for index, each in enumerate(self, start=1))


def _lines(each: Explanation) -> Iterator[str]:
    plan, recording = each.plan, each.recording
    if recording is None:
        yield f"Not recorded: run the model inside `with spcompile.record(model):` to see what it does on {plan.device}"
        if each.predicted is not None:
            times = format_us(each.predicted.iteration_us)
            yield f"  predicted   {times} an iteration, {format_bytes(plan.peak_bytes())}"
    elif recording.is_emulated:
        yield f"Recorded on the emulated device, {len(recording.moved_bytes)} iterations: bytes count, times do not"
    else:
        yield from _timed_lines(each, recording)
    if recording is not None:
        moved_bytes, sent_bytes = recording.moved_bytes[recording.typical], recording.sent_bytes[recording.typical]
        yield f"  moved       {format_bytes(moved_bytes)} an iteration (plan: {format_bytes(plan.bytes_moved)})"
        if plan.gradients_bytes:
            yield f"  sent        {format_bytes(sent_bytes)} an iteration (plan: {format_bytes(plan.gradients_bytes)})"
        if recording.peak_bytes is not None:
            yield f"  peak        {format_bytes(recording.peak_bytes)} (plan: {format_bytes(plan.peak_bytes())})"
    yield f"  recompiles  {each.recompiles}"
    if each.is_timed:
        yield from _stall_lines(each)


def _timed_lines(each: Explanation, recording: Recording) -> Iterator[str]:
    predicted, whole_us = each.predicted, each.iteration_us
    beside = f", predicted {format_us(predicted.iteration_us)}" if predicted is not None else ""
    yield f"Measured on {each.plan.device}, {len(recording.counted)} iterations: {format_us(whole_us)} each{beside}"
    known = (predicted.compute_us, predicted.link_us, predicted.down_us) if predicted is not None else (None,) * 3
    for lane, expected_us in zip(("compute", "H2D", "D2H"), known, strict=True):
        busy_us = each.busy_us(lane)
        if not busy_us:
            continue
        rate = f", {each.link_bytes_per_s / 1e9:.1f} GB/s" if lane == "H2D" and each.link_bytes_per_s else ""
        beside = f", predicted {format_us(expected_us)}" if expected_us is not None else ""
        yield f"  {lane:<10}  {format_us(busy_us)} busy ({busy_us / whole_us:.0%}{rate}{beside})"
    if whole_us:
        times = whole_us / each.floor_us
        yield f"  floor       {format_us(each.floor_us)}: the iteration takes {times:.3f} times as long"


def _stall_lines(each: Explanation) -> Iterator[str]:
    waited_us = sum(stall.us for stall in each.stalls)
    yield f"  stalls      {format_us(waited_us)} in {len(each.stalls)} waits"
    for stall in sorted(each.stalls, key=lambda stall: -stall.us)[:SHOWN_STALLS]:
        where = each.plan.steps[stall.step].segment if stall.step < len(each.plan.steps) else "the end"
        yield f"    {format_us(stall.us)} before {where}, for {stall.page}: {CAUSES[stall.cause]}"
    yield from each.conclusions


def _as_budget(nbytes: int) -> str:
    """What to give as a budget: never less than ``nbytes``."""
    gib = math.ceil(nbytes / 2**30 * 100) / 100
    return f"{gib:.2f}GiB" if gib >= 1 else f"{math.ceil(nbytes / 2**20)}MiB"
