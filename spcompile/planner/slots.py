"""Which slot each stay of a streamed page gets, offline, for as many iterations as it takes to repeat.

What: equal slots, handed out by a first-in-first-out list of free ones, followed around the cycle of iterations.
Why a period: five pages around a cycle of two slots cannot have fixed slots. In the chain 01 12 23 34 40 each copy has
to take the one slot that is free at that moment, and after one iteration pages 0 and 1 have changed places. Reuse by
``index % slots`` within an iteration is wrong at exactly this point.

How: call the state at the start of an iteration who sits where: the slot of each stay of the start set, then the free
slots in the order of their list. Every iteration makes the same stays, and the list hands out its head and takes back
at its tail without a look at the name of a slot. So each iteration does the same to the *places* of the state: the slot
at place ``moved[i]`` goes to place ``i``. Every slot is at one place before and after, so ``moved`` is a permutation.
An iteration can therefore be undone, and a sequence that can be undone cannot enter a cycle from outside: the first
state is also the first to come again, after P = order of ``moved`` iterations (least common multiple of its cycles).

For a chain of N distinct pages on k <= N slots, slots are freed in the order of the copies, so the list goes round and
round: copy number i, counted over all iterations, gets slot ``i % k``, and P = k / gcd(k, N).

The odd case: for irregular orders the least common multiple can be huge (100 slots: up to 232,792,560, Landau's
function). `hold_slots` then gives every stay one slot for good, and lets a copy for the next iteration wait for it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from spcompile.planner.window import Stay


def assign_slots(stays: Sequence[Stay], n_steps: int, k: int, wraps: bool) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Give every stay a slot in every phase.

    Args:
        stays: of one iteration, in the order in which their copies are issued (`plan_window`).
        n_steps: steps of an iteration.
        k: most slots that may be used.
        wraps: whether iterations follow each other. If not, each starts from the same assignment, and P = 1.

    Returns:
        Per stay its slot in each phase, and the period P in iterations. Slots are numbered from 0, and there are as
        many as stays ever meet.

    Raises:
        ValueError: more than k stays meet.
    """
    n_slots = most_held(stays, n_steps)
    if n_slots > k:
        raise ValueError(f"{n_slots} stays meet, but there are only {k} slots")
    slots, moved = _follow_iteration(stays, n_steps, n_slots)
    period = _order(moved) if wraps else 1
    at_place = list(range(n_slots))
    phases = []
    for _ in range(period):
        phases.append([at_place[slot] for slot in slots])
        at_place = [at_place[place] for place in moved]
    return tuple(zip(*phases, strict=True)), period


def slot_period(stays: Sequence[Stay], n_steps: int) -> int:
    """The period that `assign_slots` finds where iterations follow each other, without writing it all down."""
    return _order(_follow_iteration(stays, n_steps, most_held(stays, n_steps))[1])


def hold_slots(stays: Sequence[Stay], n_steps: int) -> tuple[tuple[Stay, ...], tuple[tuple[int, ...], ...]]:
    """The same stays with period 1: each copy for the next iteration waits until the slot it had in this one is free.

    Returns:
        The stays, some of the start set with a later ``start_step`` (0 at most), and per stay its only slot.
    """
    slots, _ = _follow_iteration(stays, n_steps, most_held(stays, n_steps))
    last_end: dict[int, int] = {}
    for stay, slot in zip(stays, slots, strict=True):
        last_end[slot] = max(last_end.get(slot, 0), stay.end_step)
    held, earliest = [], -n_steps
    for stay, slot in zip(stays, slots, strict=True):
        if stay.start_step > 0:
            held.append(stay)
            continue
        earliest = max(earliest, stay.start_step, last_end[slot] - n_steps)  # copies stay in order of use
        held.append(replace(stay, start_step=earliest))
    return tuple(held), tuple((slot,) for slot in slots)


def most_held(stays: Iterable[Stay], n_steps: int) -> int:
    """Most stays at any step of a warm iteration, copies for the next one included."""
    held = [0] * n_steps
    for stay in stays:
        for step in range(stay.start_step, stay.end_step):
            held[step % n_steps] += 1
    return max(held, default=0)


def _follow_iteration(stays: Sequence[Stay], n_steps: int, n_slots: int) -> tuple[list[int], list[int]]:
    """One iteration from the state in which each slot has the number of its place.

    Returns:
        Per stay its slot, and the state at the start of the next iteration (``moved`` in the module docstring).
    """
    n_start = sum(stay.start_step <= 0 for stay in stays)
    freed: list[list[int]] = [[] for _ in range(n_steps + 1)]
    taken: list[list[int]] = [[] for _ in range(n_steps + 1)]
    for index, stay in enumerate(stays):
        freed[stay.end_step].append(index)
    for index in (*range(n_start, len(stays)), *range(n_start)):  # copies for the next iteration are issued last
        start_step = stays[index].start_step
        taken[start_step if index >= n_start else n_steps + start_step].append(index)
    slots = list(range(n_start)) + [-1] * (len(stays) - n_start)
    ahead: list[int] = []
    free = deque(range(n_start, n_slots))
    for freed_here, taken_here in zip(freed, taken, strict=True):
        free.extend(slots[index] for index in freed_here)
        for index in taken_here:
            if index >= n_start:
                slots[index] = free.popleft()
            else:
                ahead.append(free.popleft())
    return slots, [*ahead, *free]


def _order(permutation: Sequence[int]) -> int:
    """After how many repetitions a permutation is back where it began."""
    lengths, seen = [], set[int]()
    for first in permutation:
        length, place = 0, first
        while place not in seen:
            seen.add(place)
            length, place = length + 1, permutation[place]
        lengths.append(length or 1)
    return math.lcm(*lengths)
