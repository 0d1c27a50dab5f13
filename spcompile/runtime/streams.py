"""Three streams and the events between them: on a GPU, and on the emulated device.

[Note: who waits for whom]
    Weights are copied on a side stream while segments run on the compute stream. Two waits keep them apart:

    1. *Compute waits for the copy.* A load makes the compute stream wait for the event recorded behind the copy.
       Without it a segment reads a slot that is half written.
    2. *The copy waits for the last reader.* An evict records an event on the compute stream; the next copy into that
       slot makes the side stream wait for it. Without it the copy overwrites weights that a segment still reads: the
       host runs far ahead of the GPU, so program order protects nothing.

    Gradients go the other way, on a stream of their own, as the link carries both directions at once:

    3. *The copy waits for the gradient.* A send makes the down stream wait for the event recorded behind the segment
       that made the gradient.
    4. *Compute waits for the copy* before the gradient's memory on the device is used for something else, and before
       anybody reads the gradient in host memory.

    And two at the begin of things:

    5. *The first copy of an iteration waits for what compute did before it*, which may have written the weights
       themselves (`Transfers.begin`).
    6. *Copies into a new arena wait for what compute did before*: whoever had this memory may still be at it
       (`Arena.reserve`).

    Copies one way are issued on one stream, so they do not overtake each other. The compute stream is whatever stream
    is current at the moment of each call, never one remembered from before. ``record_stream`` is not used: slots are
    never given back to the allocator while a plan lives, and gradients only once compute waits for their copies.

The **emulated device** has the CPU stand in for the GPU. Work is queued, not done: compute in one queue, copies each
way in one more, as on a GPU whose host runs ahead by a whole iteration. `EmulatedStreams.drain` then executes the
queues. Each copy runs at the earliest or at the latest moment that its waits allow, which a seeded generator decides;
freed slots are filled with 0xFF at the moment compute frees them. So a wait that is missing in either direction reads
poison or the wrong page under some seed. It cannot show hardware races or timing.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

POISON = 0xFF
"""Fills freed slots of the emulated device: NaN in every floating-point format that has one, -1 in the integers."""


class Streams(Protocol):
    """What the runtime asks of a device. "side" is the stream of copies to the device, "down" that of copies from it,
    "compute" the current stream of the caller. After ``set_timed(True)`` events also know when they happened."""

    def set_timed(self, timed: bool) -> None: ...

    def side_wait(self, event: Any) -> None: ...

    def side_copy(self, target: Tensor, source: Tensor) -> None: ...

    def side_record(self) -> Any: ...

    def down_wait(self, event: Any) -> None: ...

    def down_copy(self, target: Tensor, source: Tensor) -> None: ...

    def down_record(self) -> Any: ...

    def compute_wait(self, event: Any) -> None: ...

    def compute_record(self) -> Any: ...

    def compute_recorder(self) -> Callable[[], Any]: ...

    def freed(self, memory: Tensor) -> None: ...

    def time_us(self, event: Any, origin: Any) -> float: ...

    def synchronize(self) -> None: ...

    def close(self) -> None: ...


class TimedEvent(torch.cuda.Event):
    """An event that knows when it happened. A type of its own, as torch does not tell whether an event does."""

    def __new__(cls) -> TimedEvent:
        made: TimedEvent = super().__new__(cls, enable_timing=True)  # type: ignore[no-untyped-call]
        return made


READY_EVENTS = 2048
"""Events that are made before they are needed: making one takes longer than recording it."""


class CudaStreams:
    """The streams of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ready: deque[TimedEvent] | None = None
        self.side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.down: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def side_wait(self, event: torch.cuda.Event) -> None:
        self.side.wait_event(event)

    def side_copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)

    def side_record(self) -> Any:
        return self._record(self.side)

    def down_wait(self, event: torch.cuda.Event) -> None:
        self.down.wait_event(event)

    def down_copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.down), torch.no_grad():
            target.copy_(source, non_blocking=True)

    def down_record(self) -> Any:
        return self._record(self.down)

    def compute_wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def compute_record(self) -> Any:
        return self._record(torch.cuda.current_stream(self.device))

    def compute_recorder(self) -> Callable[[], Any]:
        """`compute_record` for a stretch in which the caller's stream does not change: asking for it takes its time."""
        return partial(self._record, torch.cuda.current_stream(self.device))

    def _record(self, stream: Any) -> Any:
        if self._ready is None:
            return stream.record_event()
        event = self._ready.popleft() if self._ready else TimedEvent()
        event.record(stream)
        return event

    def set_timed(self, timed: bool) -> None:
        """See `Streams`."""
        self._ready = deque() if timed else None
        for _ in range(READY_EVENTS if timed else 0):
            event = TimedEvent()
            event.record(self.side)  # only then CUDA makes it
            self._ready.append(event)  # type: ignore[union-attr]

    def time_us(self, event: Any, origin: TimedEvent) -> float:
        """When a past event happened, counted from another one; 0 for those from before events were timed."""
        return float(origin.elapsed_time(event)) * 1e3 if isinstance(event, TimedEvent) else 0.0

    def freed(self, memory: Tensor) -> None:
        """Nothing: only the emulated device poisons what is freed."""

    def synchronize(self) -> None:
        """Wait for all that the device has to do: callers may have computed on several streams."""
        torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Wait for copies on their way: the memory that they read and write is about to go."""
        self.side.synchronize()
        self.down.synchronize()


class EmulatedEvent:
    """An event of the emulated device: not yet, or done. ``queue`` is that of the copies it stands behind, if any."""

    def __init__(self, queue: _Copies | None = None) -> None:
        self.queue = queue
        self.done = False
        self.at_s = 0.0

    def happen(self) -> None:
        self.done = True
        self.at_s = time.perf_counter()


class _Record:
    """Work on the compute stream: its event is done once compute gets here."""

    def __init__(self) -> None:
        self.event = EmulatedEvent()

    def __call__(self) -> None:
        self.event.happen()


class Deferred:
    """A tensor that queued compute has not made yet."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None


class _Copies:
    """The queue of one copy stream: work, or an event to wait for, each with whether it runs early."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Callable[[], None] | EmulatedEvent, bool]] = deque()

    def wait(self, event: EmulatedEvent) -> None:
        self.queue.append((event, True))

    def add(self, work: Callable[[], None], *, early: bool) -> None:
        self.queue.append((work, early))

    def record(self) -> EmulatedEvent:
        event = EmulatedEvent(self)
        self.queue.append((event.happen, True))
        return event

    def run_early(self) -> None:
        while self.queue:
            work, early = self.queue[0]
            if not early or (isinstance(work, EmulatedEvent) and not work.done):
                return
            self.advance()

    def advance(self) -> None:
        if not self.queue:
            raise RuntimeError("emulated device: compute waits for a copy that was never issued")
        work, _ = self.queue[0]
        if isinstance(work, EmulatedEvent):
            if not work.done:
                raise RuntimeError("emulated device: compute and copies wait for each other")
        else:
            work()
        self.queue.popleft()


class EmulatedStreams:
    """Three queues and the seeded scheduler that drains them.

    Args:
        seed: decides for each copy whether it runs as early or as late as its waits allow.
    """

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.compute: deque[Callable[[], None] | EmulatedEvent] = deque()
        self.side = _Copies()
        self.down = _Copies()

    def side_wait(self, event: EmulatedEvent) -> None:
        self.side.wait(event)

    def side_copy(self, target: Tensor, source: Tensor) -> None:
        self.side.add(lambda: _copy(target, source), early=self.random.random() < 0.5)

    def side_record(self) -> EmulatedEvent:
        return self.side.record()

    def down_wait(self, event: EmulatedEvent) -> None:
        self.down.wait(event)

    def down_copy(self, target: Tensor, source: Tensor | Deferred) -> None:
        self.down.add(lambda: _copy(target, source), early=self.random.random() < 0.5)

    def down_record(self) -> EmulatedEvent:
        return self.down.record()

    def compute_wait(self, event: EmulatedEvent) -> None:
        self.compute.append(event)

    def compute_record(self) -> EmulatedEvent:
        record = _Record()
        self.compute.append(record)
        return record.event

    def compute_recorder(self) -> Callable[[], EmulatedEvent]:
        return self.compute_record

    def freed(self, memory: Tensor | Deferred) -> None:
        self.compute.append(lambda: _free(memory))

    def set_timed(self, timed: bool) -> None:
        """Events know it always."""

    def time_us(self, event: EmulatedEvent, origin: EmulatedEvent) -> float:
        """When the CPU got to a past event, counted from another one: an order, not a time."""
        return max(0.0, event.at_s - origin.at_s) * 1e6

    def run(self, work: Callable[[], None]) -> None:
        """Queue a piece of compute."""
        self.compute.append(work)

    def drain(self) -> None:
        """Execute all queued compute, and the copies that it waits for or that choose to come early.

        Late copies that nothing waits for stay queued, as they would on a GPU at the end of an iteration. If a piece
        of compute raises, the rest of the compute is dropped and its events count as done, so that the copies that wait
        for them can still run.
        """
        try:
            while self.compute:
                self._run_early_copies()
                self._step()
            self._run_early_copies()
        except BaseException:
            self._abandon()
            raise

    def synchronize(self) -> None:
        """Execute everything that is queued."""
        self.drain()
        for copies in (self.side, self.down):
            while copies.queue:
                copies.advance()

    def close(self) -> None:
        """Forget what is queued. A model may die while another one is being traced, and what runs then is traced."""
        self.compute.clear()
        self.side.queue.clear()
        self.down.queue.clear()

    def _step(self) -> None:
        head = self.compute[0]
        if not isinstance(head, EmulatedEvent):
            self.compute.popleft()
            head()
            return
        while not head.done:
            if head.queue is None:
                raise RuntimeError("emulated device: compute waits for a copy that was never issued")
            head.queue.advance()
        self.compute.popleft()

    def _run_early_copies(self) -> None:
        self.side.run_early()
        self.down.run_early()

    def _abandon(self) -> None:
        """Drop queued compute; what it would have recorded is done, as nothing of it will run any more.

        Copies to the device stay as they are: those still on their way are waited for by whoever reads them next. There
        is no gradient to copy from it.
        """
        for work in self.compute:
            if isinstance(work, _Record):
                work()
        self.compute.clear()
        self.down.queue.clear()


def _copy(target: Tensor, source: Tensor | Deferred) -> None:
    tensor = source.tensor if isinstance(source, Deferred) else source
    if tensor is None:
        raise RuntimeError("emulated device: a gradient is copied before it is computed")
    with torch.no_grad():
        target.copy_(tensor)


def _free(memory: Tensor | Deferred) -> None:
    """Poison memory; that of a gradient only where nobody else has it."""
    if not isinstance(memory, Deferred):
        _fill(memory)
        return
    tensor, memory.tensor = memory.tensor, None
    storage: Any = tensor.untyped_storage() if tensor is not None else None
    if tensor is not None and torch._C._storage_Use_Count(storage._cdata) == 2:  # the two variables above
        _fill(torch.empty(0, dtype=torch.uint8).set_(storage))


def _fill(memory: Tensor) -> None:
    with torch.no_grad():
        memory.fill_(POISON)
