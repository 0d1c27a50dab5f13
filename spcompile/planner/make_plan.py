"""From pages and steps to a plan: what stays, what is streamed, when, and through which slots.

What: the one entry of the planner. Explicit k and m give the window of the Superpipeline paper (arXiv 2410.08791):
nothing is resident, and every page moves once per use. With a capacity in bytes instead, as much as fits stays
resident, and the rest goes through a narrow window (``residents.py``).
How: residents first, then the window over the streamed rest (``window.py``), then slots for its stays (``slots.py``).

The odd cases: with k of at least all pages of the model, or memory for all, nothing moves. A page that no step reads
stays on the host, unless all pages are resident.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from spcompile.errors import OptionError
from spcompile.ir import Interval, Page, Plan, Slot, Step, Weight
from spcompile.planner.residents import MIN_SLOTS, smallest_capacity_bytes, spread_residents
from spcompile.planner.slots import assign_slots, hold_slots, slot_period
from spcompile.planner.window import plan_window

MAX_PERIOD = 256
"""Where slots would repeat after more iterations than this, and than k, they are held fast instead. A chain never
needs more than k; an irregular order may need millions, and the plan lists the slots of every phase."""


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
    residents: Collection[int] = (),
    elsewhere_pages: int = 0,
    activations_bytes: int = 0,
) -> Plan:
    """Plan one graph.

    Args:
        device, pages, leftovers, steps, wraps: as in `Plan`.
        k: most pages that hold slots at any step; all pages or more: everything is resident. Otherwise nothing is.
        m: pages evicted and then loaded together, 1 by default. Needs k.
        capacity_bytes: device memory for weights, leftovers included. Only used without k; None: room for all.
        residents: indices of pages that another graph of the model already keeps on the device. Without k they are
            kept before all others, as far as they fit.
        elsewhere_pages: pages that only other graphs of the model read. k counts them, too: only where it covers them
            all is everything resident.
        activations_bytes: as in `Plan`; not placed.

    Raises:
        OptionError: k or m is out of range, k is less than the most pages that one step reads, or ``capacity_bytes``
            has no room for the smallest plan.
    """
    _check_options(k, m)
    if k is None:
        kept = _choose_residents(pages, leftovers, steps, capacity_bytes, residents)
    else:
        kept = tuple(range(len(pages))) if k >= len(pages) + elsewhere_pages else ()
    streamed = [tuple(page for page in step.reads if page not in kept) for step in steps]
    if len(kept) == len(pages):
        k, m = len(pages), max(1, min(m or 1, len(pages)))
    elif k is None:
        k, m = max((MIN_SLOTS, *map(len, streamed))), 1
    _check_window(steps, streamed, k)
    intervals, period = _intervals(streamed, k, m or 1, wraps)
    return Plan(
        device=device,
        k=k,
        m=m or 1,
        wraps=wraps,
        pages=pages,
        leftovers=leftovers,
        residents=kept,
        steps=steps,
        slots=_slots(pages, intervals),
        period=period,
        intervals=intervals,
        activations_bytes=activations_bytes,
    )


def _check_options(k: int | None, m: int | None) -> None:
    if k is not None and k < 1:
        raise OptionError(f"option 'k' must be a number of pages, 1 or more, not {k}")
    if m is None:
        return
    if k is None:
        raise OptionError(f"option 'm' needs option 'k', and must be between 1 and k; m = {m} was given alone")
    if not 1 <= m <= k:
        raise OptionError(f"option 'm' must be between 1 and k = {k}, not {m}")


def _check_window(steps: Sequence[Step], streamed: Sequence[Sequence[int]], k: int) -> None:
    index = max(range(len(steps)), key=lambda step: len(streamed[step]), default=None)
    if index is None or len(streamed[index]) <= k:
        return
    most = len(streamed[index])
    where = f"segment {steps[index].segment!r} (step {index}) reads {most} pages at once"
    raise OptionError(f"option 'k' must be at least {most} for this model, not {k}: {where}")


def _choose_residents(
    pages: Sequence[Page],
    leftovers: Sequence[Weight],
    steps: Sequence[Step],
    capacity_bytes: int | None,
    preferred: Collection[int],
) -> tuple[int, ...]:
    if capacity_bytes is None:
        return tuple(range(len(pages)))
    page_bytes = [page.slot_bytes for page in pages]
    reads = [step.reads for step in steps]
    leftovers_bytes = sum(weight.nbytes for weight in leftovers)
    least_bytes = leftovers_bytes + smallest_capacity_bytes(page_bytes, reads)
    if capacity_bytes < least_bytes:
        raise OptionError(
            f"{capacity_bytes:,} bytes of device memory for weights are too few: the smallest plan for this model "
            f"needs {least_bytes:,} bytes"
        )
    return spread_residents(page_bytes, reads, capacity_bytes - leftovers_bytes, preferred)


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
