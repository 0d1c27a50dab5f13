"""What really happens on the device, and when: the lanes of a plan as they are measured.

What: while a `Recorder` hangs on a page store, the runtime tells it of every wait and copy, and it has events recorded
between them. When the recording ends these become a `Recording` for each plan that ran. Why so: what compute does
between two events of its stream is either a segment or a wait, so a few events per segment tell everything, and nothing
is recorded while nobody asked.

    compute   |begin          |loaded 0   |ran 0   |loaded 1 |ran 1 ...     from mark to mark
    H2D             [started  ready]  [started  ready]                      each copy between two events of its own

The segments themselves are watched from outside: for the time of a recording something stands before each (`watch`),
which also gives it an NVTX range with its name. On the emulated device the interpreter of the outer graph tells when
one is queued.

The odd cases: a copy for the next iteration belongs to the iteration that loads it. Copies that were on their way when
the recording began have no begin; so the recording first waits for them. A wait for what had happened before compute
got there takes its time too, some 15 us of a busy H200; that is no stall, and no work either. A gap in which the host
had nothing ready counts to the segment behind it, as the device's events cannot tell it from work. The host's own clock
can: where the device is done with an iteration as soon as its last step is issued, it has waited for the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from spcompile.ir import Plan, Slot
from spcompile.lanes import Recording, Span, Stall
from spcompile.runtime.arena import Tenant
from spcompile.runtime.streams import Streams

CONTIGUOUS_US = 20.0
"""Copies with a shorter break between them kept the link busy: the copy engine itself takes 1 to 2 us from one to the
next (measured on an H100), an event between them a few more."""

SHORTEST_STALL_US = 5.0
"""Shorter waits are the events' own time and no stall."""

MOST_RUNS = 256
"""Runs of graphs that one recording keeps. Later ones are left out: a forgotten recording shall eat neither memory nor
time."""


class _Mark(NamedTuple):
    """A point of the compute stream: what has just ended there."""

    kind: str  # "begin", "loaded", "ran", "settled"
    number: int  # interval of what was loaded, else step
    event: Any


@dataclass(eq=False)
class _Run:
    """One call of a graph."""

    plan: Plan
    is_backward: bool
    marks: list[_Mark]
    loaded: dict[int, _Copy | None] = field(default_factory=dict)  # by interval; None: the page was there already
    sends: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # by step: events before and behind
    moved_bytes: int = 0
    sent_bytes: int = 0
    issued_s: float = 0.0  # when the last mark was, by the host's clock


@dataclass(eq=False)
class _Copy:
    """A copy of a page.

    Attributes:
        page: its name.
        begun: event at the begin of the run that issued it; None for a run that is not kept.
        released: events of the last readers of what it overwrites, also those that a copy before it has waited for.
        started, ready: events before and behind it.
        is_read: whether a run that is kept has loaded it.
    """

    page: str
    begun: Any
    released: Sequence[Any]
    started: Any
    ready: Any = None
    is_read: bool = False


class Recorder:
    """Collects events of one page store's runs.

    Args:
        streams: of the store's arena.
        is_emulated: whether they are those of the emulated device.
        clock: the host's, in seconds.
    """

    def __init__(self, streams: Streams, *, is_emulated: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self.is_emulated = is_emulated
        self._streams = streams
        self._clock = clock
        self._runs: list[_Run] = []
        self._copies: dict[Tenant, _Copy] = {}
        self._order: list[_Copy] = []
        self._released: dict[tuple[int, int], Tenant] = {}  # by range of the arena: who was evicted from it last
        self._open: _Run | None = None
        self._record = streams.compute_record
        self._streams.synchronize()
        streams.set_timed(True)
        self._origin, self._origin_s = streams.compute_record(), clock()  # an idle device is there at once

    @property
    def is_full(self) -> bool:
        """Whether what runs from now on is left out."""
        return self._open is None and len(self._runs) >= MOST_RUNS

    # What the runtime tells.

    def begin(self, plan: Plan, *, is_backward: bool) -> None:
        """A graph starts to run; not told when full."""
        self._record = self._streams.compute_recorder()
        self._open = _Run(plan, is_backward, [_Mark("begin", -1, self._record())])
        self._runs.append(self._open)

    def end(self) -> None:
        """The graph has been issued."""
        self._open = None

    def evicted(self, tenant: Tenant) -> None:
        """The last reader of a page has been issued."""
        self._released[tenant.offset_bytes, tenant.nbytes] = tenant

    def copying(self, page: str, nbytes: int, slot: Slot) -> Any:
        """The copy of a page into a slot comes next on its stream; returns what `copied` is to be told."""
        if self.is_full:
            return None
        last = self._released.values()
        released = [each.released for each in last if each.overlaps(slot.offset_bytes, slot.nbytes)]
        begun = None if self._open is None else self._open.marks[0].event
        copy = _Copy(page, begun, released, self._streams.side_record())
        if self._open is not None:
            self._open.moved_bytes += nbytes
        return copy

    def copied(self, copy: Any, tenant: Tenant) -> None:
        """It has been issued."""
        if copy is None:
            return
        copy.ready = tenant.ready
        self._copies[tenant] = copy
        self._order.append(copy)

    def loaded(self, interval: int, tenant: Tenant) -> None:
        """Compute waits for a copy, or finds the page there."""
        if self._open is None:
            return
        copy = self._copies.pop(tenant, None)
        if copy is not None:
            copy.is_read = True
        self._open.loaded[interval] = copy
        self._mark("loaded", interval)

    def ran(self, step: int) -> None:
        """A segment has been issued."""
        self._mark("ran", step)

    def sending(self) -> Any:
        """Gradients come next on their stream; returns what `sent` is to be told."""
        return self._streams.down_record()

    def sent(self, step: int, started: Any, nbytes: int) -> None:
        """They have been issued."""
        if self._open is not None:
            self._open.sends[step] = started, self._streams.down_record()
            self._open.sent_bytes += nbytes

    def settled(self, step: int) -> None:
        """Compute waits for the gradients that this step sent."""
        self._mark("settled", step)

    def _mark(self, kind: str, index: int) -> None:
        if self._open is not None:
            self._open.marks.append(_Mark(kind, index, self._record()))
            self._open.issued_s = self._clock()

    # What comes of it.

    def finish(self, peak_bytes: int | None) -> list[Recording]:
        """Wait for the device, and say what happened: a recording for each plan, in the order of their first runs."""
        self._streams.synchronize()
        self._streams.set_timed(False)
        groups: dict[int, list[list[_Run]]] = {}
        for run in self._runs:
            iterations = groups.setdefault(id(run.plan), [])
            if run.is_backward and iterations and not iterations[-1][-1].is_backward:
                iterations[-1].append(run)
            else:
                iterations.append([run])
        causes = self._causes()
        return [self._recording(iterations, causes, peak_bytes) for iterations in groups.values()]

    def _us(self, event: Any) -> float:
        return self._streams.time_us(event, self._origin)

    def _causes(self) -> dict[_Copy, str]:
        """Why each copy did not come earlier: see `spcompile.lanes.Stall`."""
        causes: dict[_Copy, str] = {}
        first: tuple[float, str] | None = None  # begin of the busy stretch of the link, and what it had waited for
        last_us = 0.0
        for copy in self._order:
            started_us = self._us(copy.started)
            begun_us = 0.0 if copy.begun is None else self._us(copy.begun)
            free_us = max((begun_us, *map(self._us, copy.released)))
            if first is None or started_us - last_us > CONTIGUOUS_US:
                first = started_us, "room" if free_us > begun_us else "late"
                causes[copy] = first[1]
            else:
                causes[copy] = "link" if first[0] <= free_us else first[1]
            last_us = self._us(copy.ready)
        return causes

    def _recording(
        self, iterations: Sequence[Sequence[_Run]], causes: Mapping[_Copy, str], peak_bytes: int | None
    ) -> Recording:
        plan = iterations[0][0].plan
        spans: list[Span] = []
        stalls: list[Stall] = []
        for index, runs in enumerate(iterations):
            for run in runs:
                spans += self._copy_spans(plan, run, index)
                for span_or_stall in self._walk(plan, run, index, causes):
                    (spans if isinstance(span_or_stall, Span) else stalls).append(span_or_stall)  # type: ignore[arg-type]
        ahead = [copy for copy in self._order if not copy.is_read and copy.page in {page.name for page in plan.pages}]
        spans += [self._span(copy, -1, len(iterations)) for copy in ahead]
        return Recording(
            plan=plan,
            spans=tuple(sorted(spans, key=lambda span: span.start_us)),
            stalls=tuple(stalls),
            iteration_starts_us=tuple(self._us(runs[0].marks[0].event) for runs in iterations),
            iteration_ends_us=tuple(self._us(runs[-1].marks[-1].event) for runs in iterations),
            lags_us=tuple(self._lag_us(runs[-1]) for runs in iterations),
            moved_bytes=tuple(sum(run.moved_bytes for run in runs) for runs in iterations),
            sent_bytes=tuple(sum(run.sent_bytes for run in runs) for runs in iterations),
            peak_bytes=peak_bytes,
            is_emulated=self.is_emulated,
        )

    def _lag_us(self, run: _Run) -> float:
        """How long after the host had issued the last of a run compute was done with it."""
        return max(0.0, self._us(run.marks[-1].event) - (run.issued_s - self._origin_s) * 1e6)

    def _span(self, copy: _Copy, step: int, iteration: int) -> Span:
        return Span("H2D", copy.page, step, iteration, self._us(copy.started), self._us(copy.ready))

    def _copy_spans(self, plan: Plan, run: _Run, iteration: int) -> Iterator[Span]:
        for interval, copy in run.loaded.items():
            if copy is not None:
                yield self._span(copy, plan.load_step(plan.intervals[interval]), iteration)
        for step, (started, ended) in run.sends.items():
            yield Span("D2H", plan.steps[step].segment, step, iteration, self._us(started), self._us(ended))

    def _walk(self, plan: Plan, run: _Run, iteration: int, causes: Mapping[_Copy, str]) -> Iterator[Span | Stall]:
        """What compute did from mark to mark."""
        since_us = self._us(run.marks[0].event)
        for position, mark in enumerate(run.marks[1:], start=1):
            now_us = self._us(mark.event)
            if mark.kind == "ran":
                yield Span("compute", plan.steps[mark.number].segment, mark.number, iteration, since_us, now_us)
            elif self._happened_us(run, mark) - since_us >= SHORTEST_STALL_US:
                yield self._stall(plan, run, position, since_us, now_us - since_us, causes)
            since_us = now_us

    def _happened_us(self, run: _Run, mark: _Mark) -> float:
        """When that had happened which compute waited for before a mark."""
        if mark.kind == "settled":
            send = run.sends.get(mark.number)  # None: of a run before, which an exception had ended
            return 0.0 if send is None else self._us(send[1])
        copy = run.loaded[mark.number]
        return 0.0 if copy is None else self._us(copy.ready)

    def _stall(
        self, plan: Plan, run: _Run, position: int, since_us: float, us: float, causes: Mapping[_Copy, str]
    ) -> Stall:
        mark = run.marks[position]
        following = (each.number for each in run.marks[position:] if each.kind == "ran")
        step = next(following, len(plan.steps))
        if mark.kind == "settled":
            return Stall(step, since_us, us, plan.steps[mark.number].segment, "gradients")
        copy = run.loaded[mark.number]
        assert copy is not None  # else it did not wait
        return Stall(step, since_us, us, copy.page, causes[copy])


class _Watched:
    """Stands before a segment and tells when it has been issued."""

    def __init__(self, segment: torch.nn.Module, recorder: Recorder, step: int, name: str) -> None:
        self._call, self._tell, self._step, self._name = segment.forward, recorder.ran, step, name

    def __call__(self, values: list[Any]) -> Any:
        torch.cuda.nvtx.range_push(self._name)  # type: ignore[no-untyped-call]
        try:
            return self._call(values)
        finally:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
            self._tell(self._step)


def watch(module: fx.GraphModule, steps: Mapping[str, int], plan: Plan, recorder: Recorder | None) -> None:
    """Put something before the segments of an outer graph, or (without a recorder) take it away.

    The segments stay where they are: an attribute of the instance is found before the submodule of its name. To set one
    costs a tenth of replacing a submodule, which the recorded iterations would have to bear.

    Args:
        module: the outer graph.
        steps: by the name of each of its segments, the step that it is.
        plan: that of the graph.
        recorder: what to tell.
    """
    for name, step in steps.items():
        vars(module).pop(name, None)
        if recorder is not None:
            segment = module.get_submodule(name)
            vars(module)[name] = _Watched(segment, recorder, step, plan.steps[step].segment)
