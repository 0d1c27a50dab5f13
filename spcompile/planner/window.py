"""When each streamed page is on the device: the moving window of k pages, evicted m at a time.

What: from the pages that each step reads to the stays, one per copy, in the order in which the copies are issued.
Why here: the window is the only decision that explicit k and m leave open; slots (``slots.py``) follow from its stays.
How: all uses of an iteration are scanned once, in order, by a pointer that runs ahead of the step that executes. A use
of a page that is held extends its stay; any other use starts a copy while fewer than k pages are held. After each step,
whole batches of m pages whose scanned uses are all over are evicted, and the pointer runs on.

    chain of 5, k = 3, m = 2      before step 0   copies 0 1 2
                                  after step 1    evict 0 1, copy 3 4
                                  after step 3    evict 2 3, copy 0 1 of the next iteration
                                  after step 4    evict 4 (a short batch), copy 2 of the next iteration

The odd cases: a step that reads several pages may find the window full of used pages that wait for their batch to be
complete; they then leave early (``_Window.unblock``). At the end of an iteration, a page that comes first in the next
one may still be held: it is not copied before that stay is over, so that no page ever has two slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stay:
    """One copy of a page and what follows: half-open ``[start_step, end_step)``, counted as in `spcompile.ir.Interval`.

    ``start_step <= 0`` in a window that wraps: issued in the iteration before, just before its step ``n + start_step``
    (0: after its last step, when all its pages are evicted).
    """

    page: int
    start_step: int
    end_step: int


def plan_window(reads: Sequence[Sequence[int]], k: int, m: int, wraps: bool) -> tuple[Stay, ...]:
    """The stays of one iteration, in the order in which their copies are issued.

    Args:
        reads: per step, the distinct streamed pages that it reads, in order of first read.
        k: most pages held at any time, counted from the start of their copy; at least the most that one step reads.
        m: pages evicted together, ``1 <= m <= k``.
        wraps: whether slots that are free at the end of an iteration go to the first pages of the next one.

    Raises:
        ValueError: k or m is out of range.
    """
    if not 1 <= m <= k:
        raise ValueError(f"m must be between 1 and k = {k}, not {m}")
    if any(len(pages) > k for pages in reads):
        raise ValueError(f"k = {k} is less than the most pages that one step reads, {max(map(len, reads))}")
    window = _Window(reads, k, m)
    window.scan(0)
    start_set = [stay.page for stay in window.stays]
    ahead_starts: list[int] = []
    for step in range(len(reads)):
        window.evict_batches(step)
        window.scan(step + 1)
        window.unblock(step)
        if wraps and window.all_scanned:
            room = k - len(window.held) - len(ahead_starts)
            ahead_starts += [step + 1 - len(reads)] * window.leading_free(start_set[len(ahead_starts) :], room)
    starts = [*ahead_starts, *[0] * (len(start_set) - len(ahead_starts))]
    starts += [stay.start_step for stay in window.stays[len(start_set) :]]
    return tuple(Stay(stay.page, start, stay.end_step) for stay, start in zip(window.stays, starts, strict=True))


@dataclass
class _OpenStay:
    """A stay in the making. ``end_step`` is one past its last scanned use until it is evicted."""

    page: int
    start_step: int
    end_step: int


class _Window:
    """What is held between two steps of one iteration, and how far its uses are scanned."""

    def __init__(self, reads: Sequence[Sequence[int]], k: int, m: int) -> None:
        self.reads = reads
        self.k = k
        self.m = m
        self.uses = [(step, page) for step, pages in enumerate(reads) for page in pages]
        self.n_scanned = 0
        self.held: dict[int, _OpenStay] = {}  # by page, in order of loading
        self.stays: list[_OpenStay] = []

    @property
    def all_scanned(self) -> bool:
        return self.n_scanned == len(self.uses)

    def scan(self, position: int) -> None:
        """Extend held stays and start copies just before step ``position``, up to the use that finds no room."""
        while not self.all_scanned:
            step, page = self.uses[self.n_scanned]
            if page in self.held:
                self.held[page].end_step = step + 1
            elif len(self.held) < self.k:
                self.held[page] = _OpenStay(page, position, step + 1)
                self.stays.append(self.held[page])
            else:
                return
            self.n_scanned += 1

    def evict_batches(self, step: int) -> None:
        """Evict the oldest whole batches of what is used up after ``step``; after the last step, everything."""
        used = self._used(step)
        is_last = step == len(self.reads) - 1
        self._evict(used if is_last else used[: len(used) // self.m * self.m], step)

    def unblock(self, step: int) -> None:
        """Evict short batches where the next step would otherwise find no room for what it reads.

        What stays is read by the next step: the scan stopped there, so no use beyond it holds a page. Hence a k of the
        most pages that one step reads is always enough.
        """
        wanted = self.reads[step + 1] if step + 1 < len(self.reads) else ()
        if all(page in self.held for page in wanted):
            return
        self._evict([stay for stay in self._used(step) if stay.page not in wanted], step)
        self.scan(step + 1)

    def leading_free(self, pages: Sequence[int], room: int) -> int:
        """How many of the first ``pages`` may be copied for the next iteration: up to the first that is still held."""
        count = 0
        while count < min(room, len(pages)) and pages[count] not in self.held:
            count += 1
        return count

    def _used(self, step: int) -> list[_OpenStay]:
        """Held pages without a scanned use after ``step``, in order of loading."""
        return [stay for stay in self.held.values() if stay.end_step <= step + 1]

    def _evict(self, stays: Sequence[_OpenStay], step: int) -> None:
        for stay in stays:
            stay.end_step = step + 1
            del self.held[stay.page]
