"""What happened, or will happen, when: spans of work in lanes, and where compute waits.

A simulation (``planner/simulate.py``) and a recording of a real run (``runtime/recording.py``) speak of the same lanes
in the same words, so that pictures and explanations can put one beside the other. Plain data, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from spcompile.ir import Plan


@dataclass(frozen=True)
class Span:
    """One stretch of work in a lane.

    Attributes:
        lane: ``"compute"``, ``"H2D"`` or ``"D2H"`` (gradients; empty in inference).
        label: name of the segment, for gradients of the one that made them, or of the page.
        step: the step that runs; the first step that reads what is copied (-1 if none does); the step that made what is
            sent.
        iteration: which it belongs to, 0 for the cold one. A copy ahead belongs to the iteration that reads it.
        start_us, end_us: counted from the start of the cold iteration.
    """

    lane: str
    label: str
    step: int
    iteration: int
    start_us: float
    end_us: float


CAUSES = {
    "link": "earlier copies keep the link busy",
    "room": "its slot comes free too late",
    "late": "nothing copies it before the iteration begins",
    "gradients": "gradients have not left the device yet",
}
"""What the causes of a `Stall` mean, in a few words."""


@dataclass(frozen=True)
class Stall:
    """Compute waits before a step.

    Attributes:
        step: the step that could not start; the number of steps where it is the end of the iteration that waits.
        start_us: since when compute waits; counted from the start of the cold iteration.
        us: for how long.
        page: the page that it waits for, the last one to arrive; for gradients the segment that made them.
        cause: ``"link"``: earlier copies and this one have kept the link busy without a break ever since this one could
            start, that is, its slot was free and the iteration that issues it had begun. Otherwise the link stood idle,
            as this copy, or one before it in the queue, had something else to wait for: ``"room"``: that its slot comes
            free; ``"late"``: that the iteration which issues it begins, since the one before does not prefetch it.
            ``"gradients"``: those of an earlier step have not left the device yet.
    """

    step: int
    start_us: float
    us: float
    page: str
    cause: str


@dataclass(frozen=True)
class Stay:
    """One page in a slot.

    Attributes:
        interval: index in ``Plan.intervals``.
        iteration: that reads it, 0 for the cold one.
        start_us, arrived_us: start and end of its copy; counted from the start of the cold iteration.
        end_us: when it is evicted; None where that is not simulated any more.
    """

    interval: int
    iteration: int
    start_us: float
    arrived_us: float
    end_us: float | None


@dataclass(frozen=True)
class Recording:
    """What some iterations of one plan did on a device, as measured.

    Attributes:
        plan: the plan that ran.
        spans: in order of start, iterations counted from 0, the first that was recorded; times from its begin.
        stalls: of all recorded iterations, in order; ``iteration_starts_us`` tells them apart.
        iteration_starts_us: when compute reached the begin of each iteration.
        iteration_ends_us: when it had run the last step of each, gradients in host memory.
        lags_us: by iteration, how long after its last step had been issued compute was done with it.
        moved_bytes, sent_bytes: by iteration, what was really copied to the device, and from it.
        peak_bytes: most memory that torch had allocated on the device while they ran; None on the emulated device.
        is_emulated: times are those of the emulated device, where they mean nothing but an order.
    """

    plan: Plan
    spans: tuple[Span, ...]
    stalls: tuple[Stall, ...]
    iteration_starts_us: tuple[float, ...]
    iteration_ends_us: tuple[float, ...]
    lags_us: tuple[float, ...]
    moved_bytes: tuple[int, ...]
    sent_bytes: tuple[int, ...]
    peak_bytes: int | None
    is_emulated: bool

    @cached_property
    def durations_us(self) -> tuple[float, ...]:
        """How long each iteration took, from its begin to its end."""
        pairs = zip(self.iteration_starts_us, self.iteration_ends_us, strict=True)
        return tuple(end_us - start_us for start_us, end_us in pairs)

    @property
    def counted(self) -> range:
        """The iterations that count: all behind the first, which began with nothing on its way; it alone if there is no
        other."""
        count = len(self.iteration_ends_us)
        return range(min(1, count - 1), count)

    @cached_property
    def typical(self) -> int:
        """The iteration that stands for all: of those that count, the one of median length."""
        order = sorted(self.counted, key=lambda index: (self.durations_us[index], index))
        return order[(len(order) - 1) // 2]

    @property
    def iteration_us(self) -> float:
        """How long the typical iteration took, from its begin until the last step has run and its gradients are in host
        memory."""
        return self.durations_us[self.typical]

    def busy_us(self, lane: str) -> float:
        """How long a lane (``"compute"``, ``"H2D"``, ``"D2H"``) worked for the typical iteration."""
        spans = (span for span in self.spans if span.lane == lane and span.iteration == self.typical)
        return sum(span.end_us - span.start_us for span in spans)

    @property
    def floor_us(self) -> float:
        """No schedule of the same copies and steps takes less, at the rates that were reached."""
        return max(map(self.busy_us, ("compute", "H2D", "D2H")))

    def stalls_of(self, iteration: int) -> tuple[Stall, ...]:
        """The stalls of one iteration, in order."""
        start_us, following_us = (*self.iteration_starts_us, float("inf"))[iteration : iteration + 2]
        return tuple(stall for stall in self.stalls if start_us <= stall.start_us < following_us)

    @property
    def link_bytes_per_s(self) -> float | None:
        """Rate of the copies to the device while they ran; None where there were none."""
        page_bytes = {page.name: page.nbytes for page in self.plan.pages}
        copies = [span for span in self.spans if span.lane == "H2D" and span.label in page_bytes]
        busy_us = sum(span.end_us - span.start_us for span in copies)
        return sum(page_bytes[span.label] for span in copies) / busy_us * 1e6 if busy_us else None
