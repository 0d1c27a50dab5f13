"""Which pages stay on the device between two of their uses, where there is room, instead of being loaded again.

What: visits (``early.py``) that a gap separates become one where the page is kept across it.
Why: a page that separated steps of one iteration read (a layer that is used again, a tied weight, forward and then
backward) would be copied once for each. All uses are known ahead, so this is offline caching.

    four pages forward and backward, room for three      # read   = kept   . away

        page 0   #......#      of all gaps that meet where the room is exceeded, the one that ends last goes
        page 1    #====#
        page 2     #==#
        page 3      ##

How: the steps are gone through in order with all gaps kept; where the room is exceeded, the gap that ends last goes
(Belady: what is used again last). *For gaps of equal size this is exact*, whatever the room at each step. Take the
first step that is exceeded: some gap across it must go. If a best choice drops another one there and keeps the one that
ends last, let the two change places: before this step all gaps fit together, and from it on the other one needs no step
that the last one does not. So a best choice without the one that ends last exists, and the same holds for what remains.
(For the same room at all steps: Faigle and Nawijn, Discrete Applied Mathematics 58, 1995; Carlisle and Lloyd, ibid. 59,
1995.)

Gaps of different sizes are general caching with costs as sizes, NP-hard already at a single step (subset sum). A second
choice is made by local ratio: Bar-Noy, Bar-Yehuda, Freund, Naor, Schieber, "A unified approach to approximating
resource allocation and scheduling", J. ACM 48 (2001), general caching. *The bytes of the gaps that it drops are at most
4 times the least possible* (the first copy of each page comes on top of both). The better of the two choices is then
improved by a few exchanges. On random orders of 4 to 9 pages (600 with each of five sets of sizes, forward and backward
and in any order) the bytes dropped came to 1.000 to 1.005 times the least, and to 1.62 times at worst.

The odd cases: a gap that does not fit even alone is dropped first, and one across which nothing is exceeded is never
looked at, so sizes need only be equal among the rest. Where a step alone reads more than the room, nothing is kept
across it. An iteration is closed: nothing is kept from its end to the start of the next.
"""

from __future__ import annotations

from bisect import insort_left
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from spcompile.planner.early import Visit

MOST_EXCHANGES = 16
"""Dropped gaps, the largest first, for which others are tried in exchange. Twice as many gained under 0.01 % with the
160 gaps of 160 layers of random sizes, forward and backward, and took 70 ms instead of 35."""


@dataclass(frozen=True)
class _Gap:
    """The steps between two visits of a page, half-open ``[start_step, end_step)``, before the visit of this index."""

    visit: int
    start_step: int
    end_step: int
    nbytes: int

    @property
    def steps(self) -> slice:
        return slice(self.start_step, self.end_step)


def keep_gaps(
    visits: Sequence[Visit], sizes_bytes: Sequence[int], n_steps: int, room_bytes: Sequence[int] | int
) -> tuple[Visit, ...]:
    """The visits that remain where pages are kept between them, in the order of first use.

    Args:
        visits: in the order of first use; those of one page do not overlap.
        sizes_bytes: per visit, what its page takes: the same for all visits of a page.
        n_steps: steps of an iteration.
        room_bytes: for what is read and what is kept together, at each step or (one number) at all steps. At a step
            that alone reads more, nothing is kept.

    Returns:
        A visit that was merged spans all from its page's first to its last step in it. The bytes copied per iteration,
        the sum over the visits, are least where the pages with gaps are equally large; otherwise those beyond the first
        copy of each page are at most 4 times the least.

    Raises:
        ValueError: there is room for another number of steps, or a size for another number of visits.
    """
    free_bytes = _free_bytes(visits, sizes_bytes, n_steps, room_bytes)
    gaps = _gaps_of(visits, sizes_bytes)
    kept = {gap.visit for gap in gaps} - {gap.visit for gap in _choose_dropped(gaps, free_bytes)}
    merged: list[Visit] = []
    latest: dict[int, int] = {}  # where each page's latest visit went
    for index, visit in enumerate(visits):
        if index in kept:
            at = latest[visit.page]
            merged[at] = replace(merged[at], last_step=visit.last_step)
        else:
            latest[visit.page] = len(merged)
            merged.append(visit)
    return tuple(merged)


def _free_bytes(
    visits: Sequence[Visit], sizes_bytes: Sequence[int], n_steps: int, room_bytes: Sequence[int] | int
) -> list[int]:
    """Per step, the room beside what is read."""
    free_bytes = [room_bytes] * n_steps if isinstance(room_bytes, int) else list(room_bytes)
    if len(free_bytes) != n_steps:
        raise ValueError(f"room is given for {len(free_bytes)} steps, but there are {n_steps}")
    for visit, nbytes in zip(visits, sizes_bytes, strict=True):
        for step in range(visit.first_step, visit.last_step + 1):
            free_bytes[step] -= nbytes
    return [max(0, nbytes) for nbytes in free_bytes]


def _gaps_of(visits: Sequence[Visit], sizes_bytes: Sequence[int]) -> list[_Gap]:
    """All gaps, in the order in which they end."""
    gaps: list[_Gap] = []
    latest: dict[int, Visit] = {}
    for index, visit in enumerate(visits):
        if visit.page in latest:
            gaps.append(_Gap(index, latest[visit.page].last_step + 1, visit.first_step, sizes_bytes[index]))
        latest[visit.page] = visit
    return gaps


def _choose_dropped(gaps: Sequence[_Gap], free_bytes: Sequence[int]) -> list[_Gap]:
    """As few bytes of gaps as can be found that must go for the others to fit."""
    taking = [gap for gap in gaps if gap.nbytes and free_bytes[gap.steps]]
    hopeless = [gap for gap in taking if min(free_bytes[gap.steps]) < gap.nbytes]
    hopeful = [gap for gap in taking if min(free_bytes[gap.steps]) >= gap.nbytes]
    dropped = _drop_last_to_end(hopeful, free_bytes)
    if len({gap.nbytes for gap in hopeful}) > 1:
        dropped = _keep_what_fits([*_without(hopeful, dropped), *_largest_first(dropped)], free_bytes)
        dropped = min(dropped, _drop_by_local_ratio(hopeful, free_bytes), key=_total_bytes)
        dropped = _exchange(hopeful, dropped, free_bytes)
    return hopeless + dropped


def _drop_last_to_end(gaps: Iterable[_Gap], free_bytes: Sequence[int]) -> list[_Gap]:
    """At each step, drop those that end last until the others fit; of those that end together, the longest."""
    dropped: list[_Gap] = []
    held: list[_Gap] = []  # the last to end at the end of the list
    coming = sorted(gaps, key=attrgetter("start_step"), reverse=True)
    for step, room_bytes in enumerate(free_bytes):
        held = [gap for gap in held if gap.end_step > step]
        while coming and coming[-1].start_step == step:
            insort_left(held, coming.pop(), key=attrgetter("end_step"))
        excess_bytes = _total_bytes(held) - room_bytes
        while excess_bytes > 0:
            dropped.append(held.pop())
            excess_bytes -= dropped[-1].nbytes
    return dropped


def _drop_by_local_ratio(gaps: Iterable[_Gap], free_bytes: Sequence[int]) -> list[_Gap]:
    """Drop what has no cost left, charging at the step that is exceeded by most; then keep again what fits after all.

    Why 4: at the step with the largest excess E, each gap across it is charged in proportion to min(size, E). Every
    choice drops at least E there, so it pays at least E of these. Ours: each gap that stays dropped meets a step at
    which it does not fit. Take those for which one is not after the step of E, and of them the gap for which it is the
    latest: all the others cross it, too. Of all gaps across it, kept and dropped, at most E is beyond the room, so the
    others are less than E together, for otherwise this one would fit. With it, which pays at most E, they pay less than
    2 E; so do those on the other side. What is charged in all is the cost, up to rounding.
    """
    costs = {gap: float(gap.nbytes) for gap in gaps}
    left_bytes = list(free_bytes)
    for gap in costs:
        _add(left_bytes, gap.steps, -gap.nbytes)
    dropped: list[_Gap] = []
    while (excess_bytes := -min(left_bytes)) > 0:
        step = left_bytes.index(-excess_bytes)
        shares = {gap: min(gap.nbytes, excess_bytes) for gap in costs if gap.start_step <= step < gap.end_step}
        rate = min(costs[gap] / share for gap, share in shares.items())
        for gap, share in shares.items():
            if costs[gap] / share > rate:
                costs[gap] -= rate * share
                continue
            del costs[gap]
            dropped.append(gap)
            _add(left_bytes, gap.steps, gap.nbytes)
    return _keep_what_fits([*costs, *reversed(dropped)], free_bytes)


def _exchange(gaps: Sequence[_Gap], dropped: list[_Gap], free_bytes: Sequence[int]) -> list[_Gap]:
    """For each of the largest dropped gaps, keep it instead of what is then in its way, if that is less."""
    orders: tuple[Callable[[_Gap], int], ...] = (lambda gap: -gap.nbytes, attrgetter("end_step"))
    best = dropped
    for wanted in _largest_first(dropped)[:MOST_EXCHANGES]:
        if wanted not in best:
            continue
        kept, others = _without(gaps, best), _without(_largest_first(best), (wanted,))
        found = [_keep_what_fits([wanted, *sorted(kept, key=order), *others], free_bytes) for order in orders]
        best = min(best, *found, key=_total_bytes)
    return best


def _keep_what_fits(gaps: Iterable[_Gap], free_bytes: Sequence[int]) -> list[_Gap]:
    """What does not fit beside those that come before it and do."""
    left_bytes = list(free_bytes)
    dropped: list[_Gap] = []
    for gap in gaps:
        if min(left_bytes[gap.steps]) < gap.nbytes:
            dropped.append(gap)
        else:
            _add(left_bytes, gap.steps, -gap.nbytes)
    return dropped


def _add(left_bytes: list[int], steps: slice, nbytes: int) -> None:
    left_bytes[steps] = [left + nbytes for left in left_bytes[steps]]


def _without(gaps: Iterable[_Gap], others: Collection[_Gap]) -> list[_Gap]:
    excluded = set(others)
    return [gap for gap in gaps if gap not in excluded]


def _largest_first(gaps: Iterable[_Gap]) -> list[_Gap]:
    return sorted(gaps, key=attrgetter("nbytes"), reverse=True)


def _total_bytes(gaps: Iterable[_Gap]) -> int:
    return sum(gap.nbytes for gap in gaps)
