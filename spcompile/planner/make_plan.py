"""From pages and steps to a plan: placement, stays, slots.

Two ways to ask. With k (and m), every page is streamed through a window of k slots; k = all pages means all resident.
Without, as many pages as fit stay on the device and the others go through two slots.
"""

from __future__ import annotations

from collections.abc import Sequence

from spcompile.errors import OptionError
from spcompile.ir import Interval, Page, Plan, Slot, Step, Weight
from spcompile.planner.residents import WINDOW, choose_residents
from spcompile.planner.slots import assign_slots, most_held
from spcompile.planner.window import plan_window


def make_plan(
    *,
    device: str,
    pages: tuple[Page, ...],
    leftovers: tuple[Weight, ...],
    steps: tuple[Step, ...],
    wraps: bool,
    k: int | None = None,
    m: int | None = None,
    capacity_bytes: int | None = None,
    settled: frozenset[int] = frozenset(),
) -> Plan:
    """The plan of one graph.

    Args:
        device: compute device as text.
        pages, leftovers, steps: what the graph reads; see `Plan`.
        wraps: whether the end of an iteration may prefetch for the next one.
        k, m: the window; m defaults to 1. Without k, placement goes by ``capacity_bytes``.
        capacity_bytes: device memory for weights; None: all of them fit.
        settled: pages that earlier graphs keep on the device. They stay, unless k is given.

    Raises:
        OptionError: k, m or the capacity cannot be had; the message says what can.
    """
    if k is None and m is not None:
        raise OptionError("option 'm' needs option 'k'")
    if k is not None and not 1 <= (1 if m is None else m) <= k:
        raise OptionError(f"options 'k' and 'm' must satisfy 1 <= m <= k; they are k = {k}, m = {m}")
    if k is None:
        residents = _residents(pages, leftovers, capacity_bytes, settled)
    else:
        residents = tuple(range(len(pages))) if k >= len(pages) else ()
    reads = [[page for page in step.reads if page not in residents] for step in steps]
    if not any(reads):
        all_pages = tuple(range(len(pages)))
        return Plan(device, max(len(pages), 1), min(m or 1, max(len(pages), 1)), wraps, pages, leftovers, all_pages, steps, (), 1, ())
    widest = max(range(len(steps)), key=lambda step: len(reads[step]))
    needed = len(reads[widest])
    if k is None:
        _check_capacity(pages, leftovers, residents, reads, capacity_bytes, max(WINDOW, needed))
        k = max(WINDOW, needed)
    if k < needed:
        names = ", ".join(pages[page].name for page in reads[widest])
        raise OptionError(
            f"option 'k' must be at least {needed}: segment {steps[widest].segment} reads {needed} pages at once ({names})"
        )
    m = 1 if m is None else m
    stays = plan_window(reads, k, m, wraps)
    assigned = assign_slots(stays, len(steps))
    if assigned is None:
        wraps = False
        stays = plan_window(reads, k, m, wraps)
        assigned = assign_slots(stays, len(steps))
        assert assigned is not None, "a plan that does not wrap has period 1"
    slots_of, period = assigned
    size = max(pages[stay.page].slot_bytes for stay in stays)
    return Plan(
        device=device,
        k=k,
        m=m,
        wraps=wraps,
        pages=pages,
        leftovers=leftovers,
        residents=residents,
        steps=steps,
        slots=tuple(Slot(index * size, size) for index in range(most_held(stays, len(steps)))),
        period=period,
        intervals=tuple(
            Interval(stay.page, stay.start_step, stay.end_step, slots) for stay, slots in zip(stays, slots_of, strict=True)
        ),
    )


def _residents(
    pages: Sequence[Page], leftovers: Sequence[Weight], capacity_bytes: int | None, settled: frozenset[int]
) -> tuple[int, ...]:
    if capacity_bytes is None:
        return tuple(range(len(pages)))
    room_bytes = capacity_bytes - sum(weight.nbytes for weight in leftovers)
    return choose_residents([page.slot_bytes for page in pages], room_bytes, settled)


def _check_capacity(
    pages: Sequence[Page],
    leftovers: Sequence[Weight],
    residents: Sequence[int],
    reads: Sequence[Sequence[int]],
    capacity_bytes: int | None,
    n_slots: int,
) -> None:
    streamed = {page for each in reads for page in each}
    slot_bytes = max(pages[page].slot_bytes for page in streamed)
    fixed_bytes = sum(weight.nbytes for weight in leftovers) + sum(pages[page].slot_bytes for page in residents)
    needed_bytes = fixed_bytes + n_slots * slot_bytes
    if capacity_bytes is not None and needed_bytes > capacity_bytes:
        largest = max(streamed, key=lambda page: pages[page].slot_bytes)
        raise OptionError(
            f"the weights need at least {needed_bytes:,} bytes on the device ({n_slots} slots for {pages[largest].name} "
            f"of {slot_bytes:,} bytes), and only {capacity_bytes:,} are free: free device memory, or give option 'k' as 1"
        )
