"""Where in the arena each stay of a streamed page lies, by its lifetime: offsets in place of equal slots.

What: one offset per stay and phase, such that stays that meet in time never meet in address, in few bytes.
Why: equal slots are each as large as the largest page. Where pages differ (an embedding table, the stages of a
convolutional net, attention and MLP cut apart), two small pages may lie where a large one lay.

How: this is dynamic storage allocation, on a circle where iterations follow each other. Three ways, cheapest first,
until one is near the most bytes that are held at any position, which no packing can undercut:

1. *By order.* Stays are put one after the other at the lowest address that is free for all of their time. Whatever
   sticks out above the bound moves up in the order, and all are put again (squeaky wheel optimization, Joslin and
   Clements, 1999). Always period 1.
2. *Equal slots* (``slots.py``), each as large as the largest page it ever holds. Exact where all pages are equal.
3. *In time*, with backtracking: copies are followed in the order in which they are issued, into a block of a given
   size.
   Each goes to an end of a free gap, first to the one that leaves the rest of the gap beside who leaves sooner. The
   iterations go on until one begins like one before it: those in between are the period.

       pages of 1 2 1 2 units, three held, 5 units     before step 0    after it
       lowest address first                            0 1 1 2 _        _ 1 1 2 _    page 3 does not fit
       what the search finds                           0 _ 2 1 1        _ _ 2 1 1    it does

The odd cases: around a circle, period 1 may be unable to reach the most bytes held. Five equal pages, two held at a
time, need three places, because no place can serve more than two of the five (`_bound_of_places_bytes`); with period 2
two places are enough. And whatever the period, offsets are sums of whole pages: where sizes alternate between 1 and a
little over 2, five pages held at a time need 12 % more than their bytes (the tests prove it by trying everything).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from spcompile.ir import ALIGNMENT_BYTES
from spcompile.planner.slots import assign_slots, most_held, slot_period
from spcompile.planner.window import Stay

NEAR = 1.05
"""A packing this close to the most bytes held is taken: period 1 first, then nothing further is tried."""

GOOD = 1.01
"""A packing this close is not improved any more: the kernels' workspace varies by more."""

ROUNDS = 16
"""Times that an order of stays is changed and tried again. Measured: of the models in the tests none gained later."""

TRIES = 6000
TRIES_IN_ALL = 10_000
"""Offsets that one search in time may try, and all of them: some 5 us each. Measured: of the models in the tests the
hardest (attention and MLP of Llama-7B apart, k = 5) takes 4,533."""

LARGEST = 4
"""Sizes, from the largest down, for which `_bound_of_places_bytes` is worked out."""

TARGETS = (1.1, 1.04, 1.02, 1.0)
"""Sizes of the block that the search in time tries, times the most bytes held, until it fails."""


@dataclass(frozen=True)
class Packing:
    """Addresses of the stays of one iteration.

    Attributes:
        offsets_bytes: per stay, its offset in the arena in iterations of each phase.
        period: after how many iterations the offsets repeat.
        arena_bytes: end of the last address that is used.
        bound_bytes: no packing of these stays with this period takes less.
    """

    offsets_bytes: tuple[tuple[int, ...], ...]
    period: int
    arena_bytes: int
    bound_bytes: int


def pack(
    stays: Sequence[Stay],
    sizes_bytes: Sequence[int],
    n_steps: int,
    *,
    wraps: bool,
    max_period: int = 256,
    search: bool = True,
) -> Packing:
    """Give every stay an offset in every phase.

    Args:
        stays: of one iteration, in the order in which their copies are issued (`spcompile.planner.window.plan_window`).
        sizes_bytes: of each stay's page, padding included; multiples of `spcompile.ir.ALIGNMENT_BYTES`.
        n_steps: steps of an iteration.
        wraps: whether iterations follow each other. If not, each starts with an empty arena, and the period is 1.
        max_period: most iterations after which offsets may repeat.
        search: whether addresses are searched for where orders and slots lead to none that are near the bound, which
            takes tenths of a second.

    Returns:
        A packing of period 1 where one is within 5 % of the most bytes held, otherwise the smallest that was found.

    Raises:
        ValueError: a size is no multiple of the alignment, a stay lies outside its iteration (or, where
            iterations do not follow each other, begins before it) or is so long that it meets itself in the next one.
    """
    _check(stays, sizes_bytes, n_steps, wraps)
    held_most_bytes = max(held_bytes(stays, sizes_bytes, n_steps), default=0)
    problem = _Problem(tuple(stays), tuple(sizes_bytes), n_steps, wraps, held_most_bytes)
    offsets = _best(problem, max_period, search)
    period = len(offsets[0]) if offsets else 1
    bound_bytes = held_most_bytes
    if wraps and period == 1:
        bound_bytes = max(bound_bytes, _bound_of_places_bytes(problem))
    return Packing(offsets, period, problem.arena_bytes(offsets), bound_bytes)


def held_bytes(stays: Sequence[Stay], sizes_bytes: Sequence[int], n_steps: int) -> tuple[int, ...]:
    """Bytes held during each step of a warm iteration, copies for the next one included."""
    change_bytes = [0] * (n_steps + 1)
    held_at_start_bytes = 0
    for stay, nbytes in zip(stays, sizes_bytes, strict=True):
        first, last = stay.start_step % n_steps, (stay.end_step - 1) % n_steps
        change_bytes[first] += nbytes
        change_bytes[last + 1] -= nbytes
        held_at_start_bytes += nbytes * (first > last)
    return tuple(itertools.accumulate(change_bytes[:n_steps], initial=held_at_start_bytes))[1:]


def _check(stays: Sequence[Stay], sizes_bytes: Sequence[int], n_steps: int, wraps: bool) -> None:
    for stay, nbytes in zip(stays, sizes_bytes, strict=True):
        if nbytes < 0 or nbytes % ALIGNMENT_BYTES:
            raise ValueError(f"page {stay.page}: {nbytes} bytes are no multiple of {ALIGNMENT_BYTES}")
        earliest_step = 1 - n_steps if wraps else 0
        if not earliest_step <= stay.start_step < stay.end_step <= n_steps or stay.end_step < 1:
            raise ValueError(f"{stay} lies outside an iteration of {n_steps} steps")
        if stay.end_step - stay.start_step > n_steps:
            raise ValueError(f"{stay} is longer than an iteration of {n_steps} steps and meets itself")


Offsets = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Problem:
    """What is to be packed: the arguments of `pack`, checked, and the most bytes held at any position."""

    stays: tuple[Stay, ...]
    sizes_bytes: tuple[int, ...]
    n_steps: int
    wraps: bool
    held_most_bytes: int

    def arena_bytes(self, offsets: Offsets) -> int:
        ends = (max(each) + nbytes for each, nbytes in zip(offsets, self.sizes_bytes, strict=True))
        return max(ends, default=0)

    def is_near(self, offsets: Offsets, factor: float = NEAR) -> bool:
        return self.arena_bytes(offsets) <= factor * self.held_most_bytes


def _best(problem: _Problem, max_period: int, search: bool) -> Offsets:
    """The packing that is wanted: candidates are made until one is near the bound."""
    candidates: list[Offsets] = []
    # Most chains fit at once, in order or in slots: only what does not is improved, which takes longer.
    for some in (partial(_pack_by_order, problem, 1), partial(_pack_in_slots, problem, max_period)):
        candidates += some()
        if candidates and problem.is_near(candidates[-1], GOOD):
            return candidates[-1]
    candidates += _pack_by_order(problem, ROUNDS)
    least_bytes = min(map(problem.arena_bytes, candidates))
    if search and least_bytes > NEAR * problem.held_most_bytes:
        candidates += _pack_in_time(problem, least_bytes, max_period)
    with_period_1 = [offsets for offsets in candidates if len(offsets[0]) == 1]
    near = [offsets for offsets in with_period_1 if problem.is_near(offsets)]
    return min(near or candidates, key=lambda offsets: (problem.arena_bytes(offsets), len(offsets[0])))


def _pack_in_slots(problem: _Problem, max_period: int) -> list[Offsets]:
    """Equal slots; none where they would repeat too late."""
    stays, n_steps = problem.stays, problem.n_steps
    if problem.wraps and slot_period(stays, n_steps) > max_period:
        return []
    slots, _ = assign_slots(stays, n_steps, most_held(stays, n_steps), problem.wraps)
    slot_bytes: dict[int, int] = defaultdict(int)
    for own, nbytes in zip(slots, problem.sizes_bytes, strict=True):
        for slot in own:
            slot_bytes[slot] = max(slot_bytes[slot], nbytes)
    offset_of = list(itertools.accumulate((slot_bytes[slot] for slot in range(len(slot_bytes))), initial=0))
    return [tuple(tuple(offset_of[slot] for slot in own) for own in slots)]


def _pack_by_order(problem: _Problem, rounds: int) -> list[Offsets]:
    """Period 1: lowest address first, in several orders, each improved by what stuck out (module docstring, 1)."""
    stays, sizes = problem.stays, problem.sizes_bytes
    meeting = _meeting(stays, problem.n_steps)
    good_bytes = GOOD * problem.held_most_bytes
    best: list[int] = []
    best_bytes = math.inf
    for order in _orders(stays, sizes):
        for _ in range(rounds):
            offsets = _put_lowest(order, meeting, sizes)
            ends = [offset + nbytes for offset, nbytes in zip(offsets, sizes, strict=True)]
            if max(ends, default=0) < best_bytes:
                best, best_bytes = offsets, max(ends, default=0)
            if best_bytes <= good_bytes:
                return [tuple((offset,) for offset in best)]
            order = _moved_up(order, [end > problem.held_most_bytes for end in ends])
    return [tuple((offset,) for offset in best)]


def _orders(stays: Sequence[Stay], sizes: Sequence[int]) -> list[list[int]]:
    """Large ones first; in order of time; those that take most bytes times steps first."""
    area = [nbytes * (stay.end_step - stay.start_step) for stay, nbytes in zip(stays, sizes, strict=True)]
    start = [stay.start_step for stay in stays]
    indices = range(len(stays))
    return [
        sorted(indices, key=lambda index: (-sizes[index], start[index])),
        sorted(indices, key=lambda index: start[index]),
        sorted(indices, key=lambda index: (-area[index], start[index])),
    ]


def _moved_up(order: Sequence[int], sticks_out: Sequence[bool]) -> list[int]:
    """The order in which who sticks out comes half as late."""
    rank = {index: place / 2 - 1 if sticks_out[index] else place for place, index in enumerate(order)}
    return sorted(order, key=lambda index: rank[index])


def _meeting(stays: Sequence[Stay], n_steps: int) -> list[set[int]]:
    """Per stay, those that are held at the same time as it in any iteration: of two, one is held where one starts."""
    holders: list[list[int]] = [[] for _ in range(n_steps)]
    for index, stay in enumerate(stays):
        for step in range(stay.start_step, stay.end_step):
            holders[step % n_steps].append(index)
    meeting: list[set[int]] = [set() for _ in stays]
    for index, stay in enumerate(stays):
        for other in holders[stay.start_step % n_steps]:
            if other != index:
                meeting[index].add(other)
                meeting[other].add(index)
    return meeting


def _put_lowest(order: Sequence[int], meeting: Sequence[set[int]], sizes: Sequence[int]) -> list[int]:
    """Offsets when each stay in turn takes the lowest address that is free for all of its time."""
    offsets = [-1] * len(sizes)
    for index in order:
        nbytes, end = sizes[index], 0
        for low, high in sorted((offsets[other], offsets[other] + sizes[other]) for other in meeting[index]):
            if low < 0:
                continue
            if low - end >= nbytes:
                break
            end = max(end, high)
        offsets[index] = end
    return offsets


def _pack_in_time(problem: _Problem, below_bytes: int, max_period: int) -> list[Offsets]:
    """The packings in smaller and smaller blocks, up to the first one for which the search finds none."""
    packings: list[Offsets] = []
    tries_left = TRIES_IN_ALL
    for target in TARGETS:
        block_bytes = int(target * problem.held_most_bytes) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        if block_bytes >= below_bytes:
            continue
        for script in _scripts(problem):
            search = _Search(problem, block_bytes, script, max_period)
            found = search.run(min(TRIES, tries_left))
            tries_left -= search.n_tries
            if found is not None:
                packings.append(found)
                break
        else:
            return packings
    return packings


Held = tuple[tuple[int, int, int], ...]
"""What is held: (offset, end of the address range, index of the stay), by address."""


@dataclass(frozen=True)
class _Copy:
    """One copy as the search meets it: which stay begins, when, and which ones are over since the copy before."""

    index: int
    position: int
    over: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Script:
    """The copies of the first start set, then those of every iteration.

    Where iterations follow each other, each ends with the copies of the start set of the next one: of an iteration's
    own stays, none is left then. ``issued`` has each stay once, or, without wrap, those outside the start set.
    """

    start_set: tuple[_Copy, ...]
    issued: tuple[_Copy, ...]

    def place(self, depth: int) -> int:
        """The same for two copies if they stand at the same place of any two iterations."""
        n_start = len(self.start_set)
        return depth if depth < n_start else n_start + (depth - n_start) % len(self.issued)

    def copy(self, depth: int) -> _Copy:
        place = self.place(depth)
        n_start = len(self.start_set)
        return self.start_set[place] if place < n_start else self.issued[place - n_start]

    def begins(self, depth: int) -> bool:
        """Whether an iteration begins between the copies ``depth - 1`` and ``depth``."""
        return depth >= len(self.start_set) and self.place(depth) == len(self.start_set)


def _scripts(problem: _Problem) -> Iterator[_Script]:
    """The copies in time; those that are issued together in two orders: as they are, and large ones first."""
    stays, sizes, n_steps = problem.stays, problem.sizes_bytes, problem.n_steps
    start_set = [index for index, stay in enumerate(stays) if stay.start_step <= 0]
    position = [stay.start_step if stay.start_step > 0 else n_steps + stay.start_step for stay in stays]
    issued = [index for index, stay in enumerate(stays) if problem.wraps or stay.start_step > 0]
    for sign in (0, -1):
        start_set.sort(key=lambda index: sign * sizes[index])
        issued.sort(key=lambda index: (position[index], sign * sizes[index], index))
        yield _Script(tuple(_Copy(index, 0) for index in start_set), tuple(_followed(stays, issued, position)))


def _followed(stays: Sequence[Stay], issued: Sequence[int], position: Sequence[int]) -> Iterator[_Copy]:
    by_end = sorted(range(len(stays)), key=lambda index: stays[index].end_step)
    n_over = 0
    for index in issued:
        before = n_over
        while n_over < len(by_end) and stays[by_end[n_over]].end_step <= position[index]:
            n_over += 1
        yield _Copy(index, position[index], frozenset(by_end[before:n_over]))


class _Search:
    """Depth-first search for addresses in a block of a given size, copy after copy (module docstring, 3)."""

    def __init__(self, problem: _Problem, block_bytes: int, script: _Script, max_period: int) -> None:
        self.problem = problem
        self.block_bytes = block_bytes
        self.script = script
        self.max_period = max_period
        self.n_tries = 0
        self.path: list[tuple[Held, Iterator[int]]] = []  # per copy: what is held before it, offsets still to try
        self.begun: list[Held] = []  # what is held when the iterations on the path begin
        self.put: list[int] = []  # the offset of each copy on the path
        self.dead: set[tuple[int, Held]] = set()  # from here every way has been tried

    def run(self, max_tries: int) -> Offsets | None:
        """A packing; None if there is none with these choices, or none was found within the tries."""
        self._open(())
        while self.n_tries < max_tries:
            self.n_tries += 1
            while (offset := next(self.path[-1][1], None)) is None:
                self._close()
                if not self.path:
                    return None
            held = self._put(offset)
            if self._is_complete(held):
                return self._offsets(held)
            if len(self.begun) > self.max_period:
                return None
            if (self._place(), held) not in self.dead:
                self._open(held)
        return None

    def _open(self, held: Held) -> None:
        """Go on to the next copy."""
        if self._begins():
            self.begun.append(self._at_begin(held))
        copy = self.script.copy(len(self.path))
        held = tuple(each for each in held if each[2] not in copy.over)
        self.path.append((held, iter(self._choices(copy, held))))

    def _close(self) -> None:
        """Go back to the copy before."""
        held, _ = self.path.pop()
        self.dead.add((self._place(), held))
        if self._begins():
            self.begun.pop()

    def _put(self, offset: int) -> Held:
        held, _ = self.path[-1]
        index = self.script.copy(len(self.path) - 1).index
        del self.put[len(self.path) - 1 :]
        self.put.append(offset)
        return tuple(sorted((*held, (offset, offset + self.problem.sizes_bytes[index], index))))

    def _place(self) -> int:
        return self.script.place(len(self.path))

    def _begins(self) -> bool:
        return self.problem.wraps and self.script.begins(len(self.path))

    def _at_begin(self, held: Held) -> Held:
        """Only the start set of an iteration is held when it begins: the rest of the one before is over."""
        return tuple(each for each in held if self.problem.stays[each[2]].start_step <= 0)

    def _is_complete(self, held: Held) -> bool:
        if not self.problem.wraps:
            return len(self.path) == len(self.problem.stays)
        return self._begins() and self._at_begin(held) in self.begun

    def _choices(self, copy: _Copy, held: Held) -> list[int]:
        """Offsets for a stay, best first: where it was when this iteration began, then both ends of every gap.

        Tight gaps come first, and of a gap the end at the neighbour that stays longer (the ends of the block stay for
        ever): what is left of the gap then grows sooner.
        """
        nbytes = self.problem.sizes_bytes[copy.index]
        home = next((low for low, _, index in self.begun[-1] if index == copy.index), -1) if self.begun else -1
        ranked: list[tuple[bool, int, float, int]] = []
        end_below, stays_below = 0, math.inf
        for low, high, index in (*held, (self.block_bytes, self.block_bytes, -1)):
            stays_above = self._stays_until(index, copy.position)
            left_bytes = low - end_below - nbytes
            if left_bytes >= 0:
                if end_below < home < low - nbytes:
                    ranked.append((False, left_bytes, 0, home))
                ranked.append((end_below != home, left_bytes, -stays_below, end_below))
            if left_bytes > 0:
                ranked.append((low - nbytes != home, left_bytes, -stays_above, low - nbytes))
            end_below, stays_below = high, stays_above
        return [offset for *_, offset in sorted(ranked)]

    def _stays_until(self, index: int, position: int) -> float:
        """When who is held at a position is over; for ever if it is the end of the block."""
        if index < 0:
            return math.inf
        end_step = self.problem.stays[index].end_step
        return end_step if end_step > position else end_step + self.problem.n_steps  # a copy for the next iteration

    def _offsets(self, held: Held) -> Offsets:
        """Offsets per stay and phase, from the last time that an iteration began like the one that begins now."""
        stays, script = self.problem.stays, self.script
        if not self.problem.wraps:
            offset_of = {script.copy(depth).index: offset for depth, offset in enumerate(self.put)}
            return tuple((offset_of[index],) for index in range(len(stays)))
        phases: list[dict[int, int]] = []
        for iteration in range(self.begun.index(self._at_begin(held)), len(self.begun)):
            first = len(script.start_set) + iteration * len(script.issued)
            phase = {
                copy.index: offset
                for copy, offset in zip(script.issued, self.put[first : first + len(stays)], strict=True)
            }
            phases.append(phase | {index: low for low, _, index in self.begun[iteration]})
        return tuple(tuple(phase[index] for phase in phases) for index in range(len(stays)))


def _bound_of_places_bytes(problem: _Problem) -> int:
    """Least bytes around a circle with period 1, where they are more than are held at any position.

    One address serves in turn stays that do not meet. So a place as wide as the smallest of a set of stays serves at
    most as many of them as can be chosen without two that meet, around the circle; and together all addresses serve
    all bytes of the set. Besides, offsets are sums of sizes once everything is pushed down as far as it goes, so the
    arena is a multiple of their greatest common divisor.
    """
    divisor = math.gcd(*problem.sizes_bytes)
    if not divisor:  # nothing but empty pages
        return 0
    best_bytes = 0
    for smallest_bytes in sorted(set(problem.sizes_bytes), reverse=True)[:LARGEST]:
        chosen = [index for index, nbytes in enumerate(problem.sizes_bytes) if nbytes >= smallest_bytes]
        most = _most_apart([problem.stays[index] for index in chosen], problem.n_steps)
        bytes_ = sum(problem.sizes_bytes[index] for index in chosen)
        best_bytes = max(best_bytes, -(-bytes_ // (most * divisor)) * divisor)
    return best_bytes


def _most_apart(stays: Sequence[Stay], n_steps: int) -> int:
    """Most stays of which no two meet around the circle.

    At most one that is held while an iteration begins can be chosen: each is tried in turn; the rest is a line.
    """
    by_end = sorted(stays, key=lambda stay: stay.end_step)
    around = [stay for stay in by_end if stay.start_step < 0]
    within = [stay for stay in by_end if stay.start_step >= 0]
    most = _most_apart_between(within, 0, n_steps)
    for stay in around:
        most = max(most, 1 + _most_apart_between(within, stay.end_step, n_steps + stay.start_step))
    return most


def _most_apart_between(by_end: Sequence[Stay], first: int, last: int) -> int:
    """On a line: always the next one that ends first (Gavril, 1972)."""
    count = 0
    for stay in by_end:
        if stay.start_step >= first and stay.end_step <= last:
            first, count = stay.end_step, count + 1
    return count
