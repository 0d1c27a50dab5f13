"""Devices whose link or compute is slow: a GPU, so that races show that a fast machine hides; and the emulated one.

The emulated device has no time of its own. `SlowStreams` gives it a clock: copies and steps take as long as is said,
each begins as soon as the waits before it in its queue allow, and what was done when is recorded. It knows no plan:
who waits for whom is only what the runtime has queued.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from spcompile.runtime.emulated import _Compute
from spcompile.runtime.streams import POISON, CudaStreams, Deferred, EmulatedEvent, EmulatedStreams
from spcompile.runtime.transfers import Transfers
from tests.running import Event

SPIN_CYCLES = 30_000_000
"""About 15 ms: longer than any copy or segment of these models, and than the host takes to issue one."""


class Slow:
    """Slows the link or compute of a store, and may take a wait away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, link: bool, compute: bool) -> None:
        copy_now, load_now = CudaStreams.side_copy, Transfers.load

        def side_copy(streams: CudaStreams, target: Tensor, source: Tensor) -> None:
            if link:
                with torch.cuda.stream(streams.side):
                    torch.cuda._sleep(SPIN_CYCLES)  # type: ignore[no-untyped-call]
            copy_now(streams, target, source)

        def load(runtime: Transfers, interval: int) -> tuple[Tensor, ...]:
            weights = load_now(runtime, interval)
            if compute:
                torch.cuda._sleep(SPIN_CYCLES)  # type: ignore[no-untyped-call]
            return weights

        monkeypatch.setattr(CudaStreams, "side_copy", side_copy)
        monkeypatch.setattr(Transfers, "load", load)


class Work(NamedTuple):
    """A copy of a page, or a step that ran; ``what`` is the page's name or the index of the step."""

    what: str | int
    start_us: float
    end_us: float


@dataclass(eq=False)
class SlowCopy:
    """A copy of a page, from when it is queued.

    Attributes:
        page: its name.
        begun: the event that compute reached the iteration which queued it.
        freed: the events that bytes which it writes were given back. (It need not wait for each of them itself, where a
            copy before it in the queue does.)
        pieces_us: start and end of each piece, once done.
    """

    page: str
    begun: SlowEvent
    freed: list[SlowEvent] = field(default_factory=list)
    pieces_us: list[tuple[float, float]] = field(default_factory=list)

    @property
    def work(self) -> Work:
        return Work(self.page, self.pieces_us[0][0], self.pieces_us[-1][1])

    @property
    def free_us(self) -> float:
        """Since when it could have started, had the link been free."""
        return max(event.at_us for event in (self.begun, *self.freed))

    @property
    def waited_for(self) -> str:
        """``"room"``: a step of the iteration that queued it. ``"late"``: that this iteration began."""
        return "room" if any(event.n_runs > self.begun.n_runs for event in self.freed) else "late"


class SlowEvent(EmulatedEvent):
    """Done at a time.

    Attributes:
        n_runs: how many steps compute had been given before it was recorded.
        copy: what it is recorded behind, on the side stream.
    """

    def __init__(self, n_runs: int, copy: SlowCopy | None = None) -> None:
        super().__init__()
        self.n_runs = n_runs
        self.copy = copy
        self.at_us = 0.0

    def finish(self, now_us: float) -> None:
        self.done, self.at_us = True, now_us


class Wait(NamedTuple):
    """Compute waited before a step of an iteration: for which page last, and why it did not come earlier."""

    iteration: int
    step: int
    page: str
    cause: str


@dataclass
class _Job:
    """Takes so long in its lane; ``done`` is called with its start and end."""

    do: Callable[[], None]
    us: float = 0.0
    done: Callable[[float, float], None] | None = None


class _Wait(NamedTuple):
    event: SlowEvent


class _Lane:
    """One queue and its clock."""

    def __init__(self) -> None:
        self.queue: deque[_Job | _Wait] = deque()
        self.now_us = 0.0

    def ready_us(self) -> float:
        """When the head of the queue could begin; infinite where it waits for what has not been done yet."""
        if not self.queue:
            return float("inf")
        head = self.queue[0]
        if isinstance(head, _Job):
            return self.now_us
        return max(self.now_us, head.event.at_us) if head.event.done else float("inf")

    def advance(self) -> None:
        start_us = self.ready_us()
        head = self.queue.popleft()
        self.now_us = start_us
        if isinstance(head, _Job):
            head.do()
            self.now_us += head.us
            if head.done is not None:
                head.done(start_us, self.now_us)


class SlowStreams(EmulatedStreams):
    """The emulated device with a clock. Put it in place of ``store.arena.streams`` before the first call.

    Args:
        log: the store's, from which the names of pages and the begins of iterations are taken.
        step_us: time of each step, by its index; they repeat where there are more steps.
        bytes_per_s: of the link.
        wait_us: what a wait takes of compute, also where it waits for nothing.

    Attributes:
        copies: in the order in which they were queued.
        runs: steps in the order in which they ran.
    """

    def __init__(self, log: list[Event], step_us: Sequence[float], bytes_per_s: float, *, wait_us: float = 0) -> None:
        super().__init__()
        self.log, self.step_us, self.bytes_per_s, self.wait_us = log, step_us, bytes_per_s, wait_us
        self.copies: list[SlowCopy] = []
        self.runs: list[Work] = []
        self._stalls: list[tuple[int, SlowCopy]] = []  # how many steps had run, and what compute waited for
        self._compute, self._side = _Lane(), _Lane()
        self._n_queued = self._n_begun = 0
        self._begun = self._recorded = SlowEvent(0)
        self._freed: list[tuple[range, SlowEvent]] = []  # addresses, and when they were given back
        self._copy: SlowCopy | None = None  # whose pieces are being queued

    @property
    def now_us(self) -> float:
        """When compute has done what it has been given so far."""
        return self._compute.now_us

    def side_wait(self, event: EmulatedEvent) -> None:
        assert isinstance(event, SlowEvent)
        self._notice_begin()
        self._side.queue.append(_Wait(event))

    def side_copy(self, target: Tensor, source: Tensor) -> None:
        self._notice_begin()
        if self._copy is None:
            self._copy = SlowCopy(str(self.log[-1][1]), self._begun)
            self.copies.append(self._copy)
        written = _addresses(target)
        self._copy.freed += [event for other, event in self._freed if _meet(written, other)]
        copy, us = self._copy, source.numel() / self.bytes_per_s * 1e6
        self._side.queue.append(_Job(lambda: _copy(target, source), us, lambda *span: copy.pieces_us.append(span)))

    def side_record(self) -> EmulatedEvent:
        event = SlowEvent(self._n_queued, self._copy)
        self._copy = None
        self._side.queue.append(_Job(_nothing, 0.0, lambda _, now_us: event.finish(now_us)))
        return event

    def compute_wait(self, event: EmulatedEvent) -> None:
        assert isinstance(event, SlowEvent)
        since: list[float] = []
        self._compute.queue.append(_Job(lambda: since.append(self._compute.now_us)))
        self._compute.queue.append(_Wait(event))
        noted = _Job(_nothing, self.wait_us, lambda now_us, _: self._note_stall(event, now_us > since[0]))
        self._compute.queue.append(noted)

    def compute_record(self) -> EmulatedEvent:
        self._notice_begin()
        event = self._recorded = SlowEvent(self._n_queued)
        self._compute.queue.append(_Job(_nothing, 0.0, lambda _, now_us: event.finish(now_us)))
        return event

    def freed(self, memory: Tensor | Deferred) -> None:
        assert isinstance(memory, Tensor)  # inference has no gradients
        event = SlowEvent(self._n_queued)
        self._freed.append((_addresses(memory), event))
        self._compute.queue.append(_Job(lambda: _fill(memory), 0.0, lambda _, now_us: event.finish(now_us)))

    def run(self, work: Callable[[], None]) -> None:
        self._notice_begin()
        if not (isinstance(work, _Compute) and work.node.op == "call_module"):
            self._compute.queue.append(_Job(work))
            return
        step = self._n_queued - self._begun.n_runs
        self._n_queued += 1
        us = self.step_us[step % len(self.step_us)]
        self._compute.queue.append(_Job(work, us, lambda *span: self.runs.append(Work(step, *span))))

    def time_us(self, event: EmulatedEvent, origin: EmulatedEvent) -> float:
        assert isinstance(event, SlowEvent)
        assert isinstance(origin, SlowEvent)
        return event.at_us - origin.at_us

    def drain(self) -> None:
        """Execute all compute, and the copies that start before the last piece of it does."""
        while self._compute.queue:
            self._advance()

    def synchronize(self) -> None:
        while self._compute.queue or self._side.queue:
            self._advance()

    def close(self) -> None:
        self._compute.queue.clear()
        self._side.queue.clear()

    def waits(self, n_steps: int) -> list[Wait]:
        """The steps that waited, one entry each."""
        last = dict(self._stalls)  # of several pages the last one to arrive
        causes = self._causes()
        return [Wait(*divmod(n_runs, n_steps), copy.page, causes[copy]) for n_runs, copy in last.items()]

    def _causes(self) -> dict[SlowCopy, str]:
        """Why each copy did not come earlier: see `spcompile.lanes.Stall`."""
        causes: dict[SlowCopy, str] = {}
        first, link_us = None, 0.0
        for copy in self.copies:
            if first is None or copy.work.start_us > link_us:
                first = copy  # the link stood idle before it
            link_us = copy.work.end_us
            busy_since_it_could = first is not copy and first.work.start_us <= copy.free_us
            causes[copy] = "link" if busy_since_it_could else first.waited_for
        return causes

    def _note_stall(self, event: SlowEvent, has_waited: bool) -> None:
        if has_waited:
            assert event.copy is not None
            self._stalls.append((len(self.runs), event.copy))

    def _notice_begin(self) -> None:
        """An iteration notes that it begins right behind the event that all compute before it is done."""
        n_begun = sum(event[0] == "begin" for event in self.log)
        if n_begun > self._n_begun:
            self._n_begun, self._begun = n_begun, self._recorded

    def _advance(self) -> None:
        lane = min((self._compute, self._side), key=_Lane.ready_us)
        if lane.ready_us() == float("inf"):
            raise RuntimeError("slow device: compute and copies wait for each other")
        lane.advance()


def _nothing() -> None:
    """What an event does."""


def _addresses(memory: Tensor) -> range:
    return range(memory.data_ptr(), memory.data_ptr() + memory.numel())


def _meet(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


def _copy(target: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)


def _fill(memory: Tensor) -> None:
    with torch.no_grad():
        memory.fill_(POISON)
