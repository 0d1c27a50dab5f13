"""Which pages stay on the device where memory, and not k, is given.

What: as many resident bytes as fit beside the slots of the window, spread evenly among the streamed pages.
Why: for a cyclic order, keeping a fixed set resident moves the fewest bytes (Belady), and a copy hides behind the
compute of the residents before it (docs/design.md, decision 18).

    6 pages of which 2 fit beside two slots      R S S R S S      R resident, S streamed

How: equal slots are as large as the largest streamed page, so the question is first how large that may be. For each
size that occurs, all larger pages are resident; what memory is then left is filled with smaller ones; the size that
moves the fewest bytes wins. Pages are taken in classes: those that another graph of the model already keeps on the
device, then those that would be copied most often per iteration (the two ends of a tied weight), and within a class
evenly in order of first use.

The odd case: this is a heuristic where sizes differ. What is left is smaller than any streamed page, so the resident
bytes are within one streamed page of the most that this size of slots allows. For equal sizes it is exact in number and
evenness.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

MIN_SLOTS = 2
"""Slots of the default window: one page computes while the next one is copied."""


def spread_residents(
    page_bytes: Sequence[int],
    reads: Sequence[Sequence[int]],
    capacity_bytes: int,
    preferred: Collection[int] = (),
    n_slots: int = MIN_SLOTS,
) -> tuple[int, ...]:
    """Choose the residents.

    Args:
        page_bytes: per page, what it takes on the device, resident or in a slot.
        reads: per step, the pages that it reads.
        capacity_bytes: device memory for residents and slots together.
        preferred: pages to keep resident before all others, because another graph of the model already does.
        n_slots: slots of the window, or more where one step reads more.

    Returns:
        Indices of the residents in ascending order; all pages where all fit, otherwise none that is never read.

    Raises:
        ValueError: less than `smallest_capacity_bytes`.
    """
    if sum(page_bytes) <= capacity_bytes:
        return tuple(range(len(page_bytes)))
    fitting = [floor for floor in _floors(page_bytes, reads, n_slots) if floor.nbytes <= capacity_bytes]
    if not fitting:
        needed_bytes = smallest_capacity_bytes(page_bytes, reads, n_slots)
        raise ValueError(f"{capacity_bytes} bytes are less than the {needed_bytes} needed")
    copies = _copies_per_iteration(reads)
    wanted = frozenset(preferred) & frozenset(copies)
    choices = [_fill(floor, page_bytes, copies, capacity_bytes - floor.nbytes, wanted) for floor in fitting]

    def cost_bytes(chosen: frozenset[int]) -> tuple[int, int]:
        moved_bytes = sum(count * page_bytes[page] for page, count in copies.items() if page not in chosen)
        return sum(page_bytes[page] for page in wanted - chosen), moved_bytes

    best: frozenset[int] = min(choices, key=cost_bytes)  # of equals the first, which has the smallest slots
    return tuple(sorted(best))


def smallest_capacity_bytes(page_bytes: Sequence[int], reads: Sequence[Sequence[int]], n_slots: int = MIN_SLOTS) -> int:
    """The least memory for which `spread_residents` finds a choice."""
    return min(floor.nbytes for floor in _floors(page_bytes, reads, n_slots))


@dataclass(frozen=True)
class _Floor:
    """The least that must be on the device for one size of slots.

    Attributes:
        residents: pages larger than a slot.
        nbytes: bytes of those and of the slots.
    """

    residents: frozenset[int]
    nbytes: int


def _floors(page_bytes: Sequence[int], reads: Sequence[Sequence[int]], least_slots: int) -> Iterator[_Floor]:
    """One floor per size of slots, the smallest first; without slots at all where that is 0."""
    read = {page for pages in reads for page in pages}
    for slot_bytes in sorted({0, *(page_bytes[page] for page in read)}):
        residents = frozenset(page for page in read if page_bytes[page] > slot_bytes)
        most_read = max((sum(page not in residents for page in pages) for pages in reads), default=0)
        n_slots = min(max(least_slots, most_read), len(read) - len(residents))
        yield _Floor(residents, n_slots * slot_bytes + sum(page_bytes[page] for page in residents))


def _copies_per_iteration(reads: Sequence[Sequence[int]]) -> dict[int, int]:
    """How often each page would be copied through a narrow window: once per run of steps that read it.

    In order of first use. An estimate: the window that follows may bridge a short gap.
    """
    copies: dict[int, int] = {}
    before: Sequence[int] = ()
    for pages in filter(None, reads):
        for page in pages:
            copies[page] = copies.get(page, 0) + (page not in before)
        before = pages
    return copies


def _fill(
    floor: _Floor, page_bytes: Sequence[int], copies: dict[int, int], room_bytes: int, preferred: frozenset[int]
) -> frozenset[int]:
    """The floor's residents and, class by class, what else fits into ``room_bytes``."""
    classes: dict[tuple[bool, int], list[int]] = {}
    for page, count in copies.items():
        if page not in floor.residents:
            classes.setdefault((page not in preferred, -count), []).append(page)
    chosen = set(floor.residents)
    for key in sorted(classes):
        more = _spread(classes[key], page_bytes, room_bytes)
        room_bytes -= sum(page_bytes[page] for page in more)
        chosen.update(more)
    return frozenset(chosen)


def _spread(pages: Sequence[int], page_bytes: Sequence[int], room_bytes: int) -> list[int]:
    """Pages that fit into ``room_bytes`` together, evenly by bytes, until no further one fits."""
    chosen = _take_evenly(pages, page_bytes, room_bytes)
    taken_bytes = sum(page_bytes[page] for page in chosen)
    # The room is rarely a whole number of pages. Aiming at what was reached spaces the same number of pages evenly.
    again = _take_evenly(pages, page_bytes, taken_bytes)
    if sum(page_bytes[page] for page in again) == taken_bytes:
        chosen = again
    room_bytes -= taken_bytes
    for page in sorted((page for page in pages if page not in chosen), key=lambda page: -page_bytes[page]):
        if page_bytes[page] <= room_bytes:
            chosen.append(page)
            room_bytes -= page_bytes[page]
    return chosen


def _take_evenly(pages: Sequence[int], page_bytes: Sequence[int], target_bytes: int) -> list[int]:
    """Walk in order of use and take a page wherever the bytes taken lag behind their share of the bytes seen.

    The first page is taken if any is: where the window does not wrap, its copy could hide behind nothing.
    """
    total_bytes = sum(page_bytes[page] for page in pages)
    chosen, seen_bytes, taken_bytes = [], 0, 0
    for page in pages:
        seen_bytes += page_bytes[page]
        lags = taken_bytes * total_bytes < target_bytes * seen_bytes
        if lags and page_bytes[page] <= target_bytes - taken_bytes:
            chosen.append(page)
            taken_bytes += page_bytes[page]
    return chosen
