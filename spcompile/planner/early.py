"""When copies start where bytes, and not a number of pages, are the limit: as early as there is room.

What: from stays that are known by their uses (which gaps are kept was decided before) to stays with a start.
Why: the window of k pages (``window.py``) is the paper's; it counts pages. A budget counts bytes: beside one large page
several small ones may be on their way.

How: copies are issued in the order of first use, as the link takes them one after the other. Each is issued before the
first step at which it fits beside everything issued before it and not yet over. That never comes too late: when a
step is due, what is held is only what it reads and what is kept across it, and that much has room by assumption.

    room for 4, pages of 2 1 1 2          before step 0   copies 0 1 2
                                          after step 0    copy 3
                                          after step 1    nothing fits yet
                                          after step 2    copy 0 of the next iteration

The odd case: a page that comes first in the next iteration may still be held at the end of this one: its copy, and all
behind it, wait until it is over, so that no page ever has two places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spcompile.planner.window import Stay


@dataclass(frozen=True)
class Visit:
    """A stay by its uses: the page is there from its first to its last step, both included."""

    page: int
    first_step: int
    last_step: int


def visits_of(reads: Sequence[Sequence[int]]) -> tuple[Visit, ...]:
    """One visit for each run of consecutive steps that read a page, in the order of first use."""
    visits: list[Visit] = []
    latest: dict[int, int] = {}  # index of each page's latest visit
    for step, pages in enumerate(reads):
        for page in pages:
            index = latest.get(page)
            if index is not None and visits[index].last_step == step - 1:
                visits[index] = replace(visits[index], last_step=step)
            else:
                latest[page] = len(visits)
                visits.append(Visit(page, step, step))
    return tuple(visits)


def start_early(
    visits: Sequence[Visit], sizes_bytes: Sequence[int], n_steps: int, room_bytes: int, wraps: bool
) -> tuple[Stay, ...]:
    """The stays of one iteration, in the order in which their copies are issued.

    Args:
        visits: in the order of first use.
        sizes_bytes: per visit, what its page takes.
        n_steps: steps of an iteration.
        room_bytes: for all that is held at any time, counted from the start of its copy.
        wraps: whether room that is free at the end of an iteration goes to the first pages of the next one.

    Raises:
        ValueError: some step needs more room.
    """
    starts: list[int] = []
    ahead: list[int] = []
    held: list[int] = []
    for position in range(n_steps + 1):
        held = [index for index in held if visits[index].last_step >= position]
        pages = {visits[index].page for index in held}
        left_bytes = room_bytes - sum(sizes_bytes[index] for index in (*held, *range(len(ahead))))
        while position < n_steps and len(starts) < len(visits):
            index = len(starts)
            if visits[index].page in pages or sizes_bytes[index] > left_bytes:
                break
            starts.append(position)
            held.append(index)
            pages.add(visits[index].page)
            left_bytes -= sizes_bytes[index]
        if len(starts) < len(visits):
            if visits[len(starts)].first_step <= position:
                raise ValueError(f"step {position} needs more than {room_bytes} bytes of room")
            continue
        while wraps and position > 0 and len(ahead) < starts.count(0):
            index = len(ahead)
            if visits[index].page in pages or sizes_bytes[index] > left_bytes:
                break
            ahead.append(position - n_steps)
            left_bytes -= sizes_bytes[index]
    starts[: len(ahead)] = ahead
    return tuple(Stay(visit.page, start, visit.last_step + 1) for visit, start in zip(visits, starts, strict=True))
