"""From what stays to the stays of the streamed pages and their slots.

What: the part of a plan that follows once residents are chosen. With k and m, a window that counts pages
(``window.py``); with room in bytes, copies as early as they fit (``early.py``). Then a place for each copy: equal slots
(``slots.py``) where all pages are equal, addresses by lifetime (``packing.py``) where that takes less.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import replace

from spcompile.errors import OptionError
from spcompile.ir import ALIGNMENT_BYTES, Interval, Plan, Slot, Step
from spcompile.planner.early import start_early, visits_of
from spcompile.planner.gaps import keep_gaps
from spcompile.planner.packing import Packing, held_bytes, pack
from spcompile.planner.slots import assign_slots, hold_slots, most_held, slot_period
from spcompile.planner.window import Stay, plan_window

MAX_PERIOD = 256
"""Where slots would repeat after more iterations than this, and than k, they are held fast instead. A chain never
needs more than k; an irregular order may need millions, and the plan lists the slots of every phase."""

LESS = 128
"""Where too much is lost between pages, at least this part of the room is given up before it is tried again."""


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
    plan = _with_window(plan, kept, k, m)
    if not any(streamed):
        return replace(plan, intervals=(), period=1, slots=())
    stays = plan_window(streamed, k, m, plan.wraps)
    in_slots = _in_slots(plan, stays)
    sizes_bytes = [plan.pages[stay.page].slot_bytes for stay in stays]
    if len(set(sizes_bytes)) == 1:  # no packing takes less
        return in_slots
    packed = _at_offsets(plan, stays, pack(stays, sizes_bytes, len(plan.steps), wraps=plan.wraps))
    return packed if packed.arena_bytes < in_slots.arena_bytes else in_slots


def stream_in_room(
    plan: Plan,
    residents: Collection[int],
    room_bytes: int,
    *,
    reserve_bytes: int | None = None,
    search: bool = True,
) -> Plan:
    """The plan with these residents and everything else streamed through so much memory.

    Args:
        plan: pages, steps and costs; how it streams so far does not matter.
        residents: indices of the pages that stay on the device.
        room_bytes: most bytes of the arena.
        reserve_bytes: what of it is not taken to keep pages between their uses; None: nothing is kept.
        search: see `spcompile.planner.packing.pack`.

    Raises:
        ValueError: some step needs more room.
    """
    kept = frozenset(residents)
    n_steps = len(plan.steps)
    all_visits = visits_of(_streamed(plan, kept))
    usable_bytes = room_bytes
    while True:
        visits = all_visits
        if reserve_bytes is not None:
            sizes_bytes = [plan.pages[visit.page].slot_bytes for visit in visits]
            visits = keep_gaps(visits, sizes_bytes, n_steps, max(0, usable_bytes - reserve_bytes))
        sizes_bytes = [plan.pages[visit.page].slot_bytes for visit in visits]
        stays = start_early(visits, sizes_bytes, n_steps, usable_bytes, plan.wraps)
        packing = pack(stays, sizes_bytes, n_steps, wraps=plan.wraps, search=search)
        if packing.arena_bytes <= room_bytes:
            break
        # What lies between the pages is lost. With less to hold it is less, too. The same copies run ahead in all room
        # that they do not fill; what is kept between uses may change with any of it.
        held_most_bytes = max(held_bytes(stays, sizes_bytes, n_steps))
        less_bytes = held_most_bytes if reserve_bytes is None else usable_bytes - usable_bytes // LESS
        usable_bytes = min(less_bytes - ALIGNMENT_BYTES, usable_bytes * room_bytes // packing.arena_bytes)
    plan = _with_window(plan, kept, max(1, most_held(stays, n_steps)), 1)
    return _at_offsets(plan, stays, packing)


def _with_window(plan: Plan, kept: Set[int], k: int, m: int) -> Plan:
    """The plan with these residents, of which none is read in place, and this window."""
    mapped = tuple(page for page in plan.mapped if page not in kept)
    return replace(plan, k=k, m=m, residents=tuple(sorted(kept)), mapped=mapped)


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


def _in_slots(plan: Plan, stays: Sequence[Stay]) -> Plan:
    """The plan with slots side by side, each as large as the largest page that it ever holds."""
    n_steps = len(plan.steps)
    if plan.wraps and slot_period(stays, n_steps) > max(plan.k, MAX_PERIOD):
        stays, slots_of = hold_slots(stays, n_steps)
        period = 1
    else:
        slots_of, period = assign_slots(stays, n_steps, plan.k, plan.wraps)
    sizes_bytes: dict[int, int] = {}
    for stay, own in zip(stays, slots_of, strict=True):
        for slot in own:
            sizes_bytes[slot] = max(sizes_bytes.get(slot, 0), plan.pages[stay.page].slot_bytes)
    slots, end_bytes = [], 0
    for index in range(len(sizes_bytes)):
        slots.append(Slot(end_bytes, sizes_bytes[index]))
        end_bytes += sizes_bytes[index]
    return replace(plan, intervals=_intervals(stays, slots_of), period=period, slots=tuple(slots))


def _at_offsets(plan: Plan, stays: Sequence[Stay], packing: Packing) -> Plan:
    """The plan with one slot for each place that is taken, at whatever times."""
    slots: dict[tuple[Slot, int | None], int] = {}  # places of nothing are all alike, but not the same
    slots_of = []
    for index, (stay, offsets_bytes) in enumerate(zip(stays, packing.offsets_bytes, strict=True)):
        nbytes = plan.pages[stay.page].slot_bytes
        keys = [(Slot(offset_bytes, nbytes), None if nbytes else index) for offset_bytes in offsets_bytes]
        slots_of.append(tuple(slots.setdefault(key, len(slots)) for key in keys))
    taken = tuple(slot for slot, _ in slots)
    return replace(plan, intervals=_intervals(stays, slots_of), period=packing.period, slots=taken)


def _intervals(stays: Sequence[Stay], slots_of: Sequence[tuple[int, ...]]) -> tuple[Interval, ...]:
    return tuple(
        Interval(stay.page, stay.start_step, stay.end_step, own) for stay, own in zip(stays, slots_of, strict=True)
    )
