"""From what stays to the stays of the streamed pages and their slots.

What: the part of a plan that follows once residents are chosen. With k and m, a window that counts pages
(``window.py``) and slots for its stays (``slots.py``). With room in bytes, copies as early as they fit (``early.py``),
each at an address of its own (``packing.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import replace

from spcompile.errors import OptionError
from spcompile.ir import ALIGNMENT_BYTES, Interval, Page, Plan, Slot, Step
from spcompile.planner.early import start_early, visits_of
from spcompile.planner.packing import pack
from spcompile.planner.slots import assign_slots, hold_slots, most_held, slot_period
from spcompile.planner.window import plan_window

MAX_PERIOD = 256
"""Where slots would repeat after more iterations than this, and than k, they are held fast instead. A chain never
needs more than k; an irregular order may need millions, and the plan lists the slots of every phase."""


def stream(plan: Plan, residents: Collection[int], k: int, m: int) -> Plan:
    """The plan with these residents and everything else streamed through a window.

    Args:
        plan: pages, steps and costs; how it streams so far does not matter.
        residents: indices of the pages that stay on the device.
        k, m: the window's, as in `spcompile.planner.window.plan_window`. With all pages resident nothing moves.

    Raises:
        OptionError: k is less than the most streamed pages that one step reads.
    """
    kept = frozenset(residents)
    streamed = _streamed(plan, kept)
    _check_window(plan.steps, streamed, k)
    intervals, period = _intervals(streamed, k, m, plan.wraps)
    return replace(
        plan,
        k=k,
        m=m,
        residents=tuple(sorted(kept)),
        mapped=tuple(page for page in plan.mapped if page not in kept),
        intervals=intervals,
        period=period,
        slots=_slots(plan.pages, intervals),
    )


def stream_in_room(plan: Plan, residents: Collection[int], room_bytes: int) -> Plan:
    """The plan with these residents and everything else streamed through so much memory.

    Args:
        plan: pages, steps and costs; how it streams so far does not matter.
        residents: indices of the pages that stay on the device.
        room_bytes: most bytes of the arena.

    Raises:
        ValueError: some step needs more room.
    """
    kept = frozenset(residents)
    n_steps = len(plan.steps)
    visits = visits_of(_streamed(plan, kept))
    sizes_bytes = [plan.pages[visit.page].slot_bytes for visit in visits]
    usable_bytes = room_bytes
    while True:
        stays = start_early(visits, sizes_bytes, n_steps, usable_bytes, plan.wraps)
        packing = pack(stays, sizes_bytes, n_steps, wraps=plan.wraps)
        if packing.arena_bytes <= room_bytes:
            break
        # What lies between the pages is lost. With less to hold it is less, too.
        usable_bytes = min(usable_bytes - ALIGNMENT_BYTES, usable_bytes * room_bytes // packing.arena_bytes)
    # One slot for each place that is taken, at whatever times; places of nothing are all alike, but not the same.
    slots: dict[tuple[Slot, int | None], int] = {}
    intervals = []
    for index, (stay, offsets_bytes) in enumerate(zip(stays, packing.offsets_bytes, strict=True)):
        nbytes = sizes_bytes[index]
        keys = [(Slot(offset_bytes, nbytes), None if nbytes else index) for offset_bytes in offsets_bytes]
        own = tuple(slots.setdefault(key, len(slots)) for key in keys)
        intervals.append(Interval(stay.page, stay.start_step, stay.end_step, own))
    return replace(
        plan,
        k=max(1, most_held(stays, n_steps)),
        m=1,
        residents=tuple(sorted(kept)),
        mapped=tuple(page for page in plan.mapped if page not in kept),
        intervals=tuple(intervals),
        period=packing.period,
        slots=tuple(slot for slot, _ in slots),
    )


def _streamed(plan: Plan, kept: Set[int]) -> list[tuple[int, ...]]:
    """Per step, the pages that must have been copied for it."""
    return [tuple(page for page in plan.needs(step) if page not in kept) for step in range(len(plan.steps))]


def _check_window(steps: Sequence[Step], streamed: Sequence[Sequence[int]], k: int) -> None:
    index = max(range(len(steps)), key=lambda step: len(streamed[step]), default=None)
    if index is None or len(streamed[index]) <= k:
        return
    most = len(streamed[index])
    where = f"segment {steps[index].segment!r} (step {index}) reads {most} pages at once"
    raise OptionError(f"option 'k' must be at least {most} for this model, not {k}: {where}")


def _intervals(streamed: Sequence[Sequence[int]], k: int, m: int, wraps: bool) -> tuple[tuple[Interval, ...], int]:
    """The stays with their slots, and after how many iterations the slots repeat."""
    if not any(streamed):
        return (), 1
    n_steps = len(streamed)
    stays = plan_window(streamed, k, m, wraps)
    if wraps and slot_period(stays, n_steps) > max(k, MAX_PERIOD):
        stays, slots = hold_slots(stays, n_steps)
        period = 1
    else:
        slots, period = assign_slots(stays, n_steps, k, wraps)
    intervals = zip(stays, slots, strict=True)
    return tuple(Interval(stay.page, stay.start_step, stay.end_step, own) for stay, own in intervals), period


def _slots(pages: Sequence[Page], intervals: Sequence[Interval]) -> tuple[Slot, ...]:
    """The slots that the intervals name, side by side, each as large as the largest page that it ever holds.

    Where the period is 1, an embedding table that is larger than the layers so makes one slot large and not all.
    """
    sizes_bytes: dict[int, int] = {}
    for interval in intervals:
        for slot in interval.slots:
            sizes_bytes[slot] = max(sizes_bytes.get(slot, 0), pages[interval.page].slot_bytes)
    slots, end_bytes = [], 0
    for index in range(len(sizes_bytes)):
        slots.append(Slot(end_bytes, sizes_bytes[index]))
        end_bytes += sizes_bytes[index]
    return tuple(slots)
