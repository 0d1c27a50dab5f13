"""Plans with one mistake each, made from a right plan: what a verifier of plans must reject.

Shared by the tests of the verifier on plans written by hand and on those of the planner. `mutants` changes one field.
Often several rules reject such a mutant, and the one that was meant could be missing. `mutants_of_places` are for
plans with an address for each stay: all else is put right again (k, the order of issue), so that nothing but
who holds which bytes when can reject them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from typing import TypeVar

from spcompile.ir import ALIGNMENT_BYTES, Interval, Page, Plan, Slot

T = TypeVar("T")


def mutants(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """All mutants of one mistake, with names that say what was done; those equal to the plan are left out."""
    for make in (_of_header, _of_mapped, _of_pages, _of_slots, _of_intervals, _of_interval_pairs):
        for name, mutant in make(plan):
            if mutant != plan:
                yield name, mutant


def mutants_of_places(plan: Plan) -> Iterator[tuple[str, str, Plan]]:
    """Mutants of bytes and times, as (class, name, plan). Some are right all the same: an oracle must tell which."""
    makers = {
        "slot moved": _slots_moved,
        "slot moved in one phase": _slots_moved_in_one_phase,
        "slot enlarged": _slots_enlarged,
        "copy starts earlier": _starts_earlier,
        "stay ends later": _ends_later,
        "gap cut short": _gaps_cut_short,
        "loaded again": _loaded_again,
        "left to the next iteration": _left_to_the_next,
    }
    for kind, make in makers.items():
        for name, mutant in make(plan):
            if mutant != plan:
                intervals = tuple(sorted(mutant.intervals, key=lambda interval: interval.start_step))
                yield kind, name, replace(mutant, intervals=intervals, k=2 * len(intervals) + 1)


def changed(items: tuple[T, ...], index: int, item: T) -> tuple[T, ...]:
    return (*items[:index], item, *items[index + 1 :])


def _of_header(plan: Plan) -> Iterator[tuple[str, Plan]]:
    yield "k - 1", replace(plan, k=plan.k - 1)
    yield "m = 0", replace(plan, m=0)
    yield "m = k + 1", replace(plan, m=plan.k + 1)
    yield "period - 1", replace(plan, period=plan.period - 1)
    yield "period + 1", replace(plan, period=plan.period + 1)
    yield "no wrap", replace(plan, wraps=False)
    yield "intervals reversed", replace(plan, intervals=plan.intervals[::-1])
    yield "resident out of range", replace(plan, residents=(*plan.residents, len(plan.pages)))
    for index, page in enumerate(plan.residents):
        others = (*plan.residents[:index], *plan.residents[index + 1 :])
        yield f"resident {page} removed", replace(plan, residents=others)
    for page in sorted({interval.page for interval in plan.intervals}):
        yield f"resident {page} added", replace(plan, residents=(*plan.residents, page))


def _of_mapped(plan: Plan) -> Iterator[tuple[str, Plan]]:
    for page in plan.mapped:
        yield f"mapped {page} removed", replace(plan, mapped=tuple(each for each in plan.mapped if each != page))
        yield f"mapped {page} resident", replace(plan, residents=(*plan.residents, page))
    gathered = {page for step in plan.steps for page, _ in step.gathers}
    for page in range(len(plan.pages)):
        if page not in gathered:
            yield f"mapped {page} added", replace(plan, mapped=(*plan.mapped, page))


def _of_pages(plan: Plan) -> Iterator[tuple[str, Plan]]:
    for index, (one, two) in enumerate(zip(plan.pages, plan.pages[1:], strict=False)):
        renamed = Page(one.name, two.weights)
        yield f"page {index + 1} named as {index}", replace(plan, pages=changed(plan.pages, index + 1, renamed))
        shared = Page(two.name, (*two.weights, *one.weights[:1]))
        yield f"weight of page {index} also in {index + 1}", replace(plan, pages=changed(plan.pages, index + 1, shared))
    for index, step in enumerate(plan.steps):
        repeated = replace(step, reads=(*step.reads, *step.reads[:1]))
        yield f"step {index} reads twice", replace(plan, steps=changed(plan.steps, index, repeated))
        beyond = replace(step, reads=(*step.reads, len(plan.pages)))
        yield f"step {index} reads out of range", replace(plan, steps=changed(plan.steps, index, beyond))


def _of_slots(plan: Plan) -> Iterator[tuple[str, Plan]]:
    for index, slot in enumerate(plan.slots):
        for name, other in (
            ("shrunk", Slot(slot.offset_bytes, slot.nbytes - ALIGNMENT_BYTES)),
            ("emptied", Slot(slot.offset_bytes, 0)),
            ("moved down", Slot(slot.offset_bytes - ALIGNMENT_BYTES, slot.nbytes)),
            ("misaligned", Slot(slot.offset_bytes + 1, slot.nbytes)),
        ):
            yield f"slot {index} {name}", replace(plan, slots=changed(plan.slots, index, other))
        if index + 1 < len(plan.slots):
            other = Slot(slot.offset_bytes + ALIGNMENT_BYTES, slot.nbytes)
            yield f"slot {index} moved up", replace(plan, slots=changed(plan.slots, index, other))
        if index:
            other = Slot(plan.slots[index - 1].offset_bytes, slot.nbytes)
            yield f"slot {index} over {index - 1}", replace(plan, slots=changed(plan.slots, index, other))
    if plan.slots:
        yield "last slot gone", replace(plan, slots=plan.slots[:-1])
    yield "slot nobody takes", replace(plan, slots=(*plan.slots, Slot(plan.arena_bytes, ALIGNMENT_BYTES)))


def _of_intervals(plan: Plan) -> Iterator[tuple[str, Plan]]:
    def with_interval(index: int, **fields: object) -> Plan:
        interval: Interval = replace(plan.intervals[index], **fields)  # type: ignore[arg-type]
        return replace(plan, intervals=changed(plan.intervals, index, interval))

    for index, interval in enumerate(plan.intervals):
        dropped = (*plan.intervals[:index], *plan.intervals[index + 1 :])
        yield f"interval {index} dropped", replace(plan, intervals=dropped)
        doubled = (*plan.intervals[: index + 1], *plan.intervals[index:])
        yield f"interval {index} doubled", replace(plan, intervals=doubled)
        yield f"interval {index} starts earlier", with_interval(index, start_step=interval.start_step - 1)
        yield f"interval {index} starts later", with_interval(index, start_step=interval.start_step + 1)
        yield f"interval {index} ends earlier", with_interval(index, end_step=interval.end_step - 1)
        yield f"interval {index} ends later", with_interval(index, end_step=interval.end_step + 1)
        yield f"interval {index} starts an iteration ahead", with_interval(index, start_step=-len(plan.steps))
        yield f"interval {index} of another page", with_interval(index, page=interval.page + 1)
        yield f"interval {index} of no page", with_interval(index, page=-1)
        yield f"interval {index} lacks its last phase", with_interval(index, slots=interval.slots[:-1])
        for phase in range(len(interval.slots)):
            nowhere = changed(interval.slots, phase, -1)
            yield f"interval {index} nowhere in phase {phase}", with_interval(index, slots=nowhere)


def _of_interval_pairs(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Two intervals change places: in all phases, and in one phase only."""
    for one, two in combinations(range(len(plan.intervals)), 2):
        slots_one, slots_two = plan.intervals[one].slots, plan.intervals[two].slots
        ways = [("", slots_two, slots_one)]
        both = min(len(slots_one), len(slots_two))
        if both > 1:
            ways += [
                (
                    f" in phase {phase}",
                    changed(slots_one, phase, slots_two[phase]),
                    changed(slots_two, phase, slots_one[phase]),
                )
                for phase in range(both)
            ]
        for where, new_one, new_two in ways:
            intervals = changed(plan.intervals, one, replace(plan.intervals[one], slots=new_one))
            intervals = changed(intervals, two, replace(intervals[two], slots=new_two))
            yield f"slots of intervals {one} and {two} swapped{where}", replace(plan, intervals=intervals)


def _slots_moved(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Each slot to where it shares all, the last or the first bytes of another one."""
    for index, slot in enumerate(plan.slots):
        for other, target in enumerate(plan.slots):
            if other == index:
                continue
            for offset_bytes in _offsets_that_meet(slot, target):
                moved = Slot(offset_bytes, slot.nbytes)
                name = f"slot {index} at {offset_bytes}, over {other}"
                yield name, replace(plan, slots=changed(plan.slots, index, moved))


def _offsets_that_meet(slot: Slot, target: Slot) -> list[int]:
    first = target.offset_bytes + ALIGNMENT_BYTES - slot.nbytes
    last = target.offset_bytes + max(0, target.nbytes - ALIGNMENT_BYTES)
    return sorted({max(0, first), target.offset_bytes, last})


def _slots_moved_in_one_phase(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """One stay of one phase to where another slot lies; slots that nobody takes any more go."""
    for index, interval in enumerate(plan.intervals):
        for phase, own in enumerate(interval.slots if plan.period > 1 else ()):
            for other, target in enumerate(plan.slots):
                moved = Slot(target.offset_bytes, plan.slots[own].nbytes)
                slots = changed(interval.slots, phase, len(plan.slots))
                intervals = changed(plan.intervals, index, replace(interval, slots=slots))
                mutant = replace(plan, slots=(*plan.slots, moved), intervals=intervals)
                yield f"interval {index} over slot {other} in phase {phase}", _without_idle_slots(mutant)


def _without_idle_slots(plan: Plan) -> Plan:
    taken = sorted({slot for interval in plan.intervals for slot in interval.slots})
    number = {slot: index for index, slot in enumerate(taken)}
    return replace(
        plan,
        slots=tuple(plan.slots[slot] for slot in taken),
        intervals=tuple(replace(each, slots=tuple(number[slot] for slot in each.slots)) for each in plan.intervals),
    )


def _slots_enlarged(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Upwards by one alignment, by as much again, and so that nothing lies above."""
    for index, slot in enumerate(plan.slots):
        for nbytes in sorted({slot.nbytes + ALIGNMENT_BYTES, 2 * slot.nbytes, plan.arena_bytes - slot.offset_bytes}):
            larger = Slot(slot.offset_bytes, nbytes)
            yield f"slot {index} enlarged to {nbytes}", replace(plan, slots=changed(plan.slots, index, larger))


def _starts_earlier(plan: Plan) -> Iterator[tuple[str, Plan]]:
    for index, interval in enumerate(plan.intervals):
        earlier = replace(interval, start_step=interval.start_step - 1)
        yield f"interval {index} starts earlier", replace(plan, intervals=changed(plan.intervals, index, earlier))


def _ends_later(plan: Plan) -> Iterator[tuple[str, Plan]]:
    for index, interval in enumerate(plan.intervals):
        later = replace(interval, end_step=interval.end_step + 1)
        yield f"interval {index} ends later", replace(plan, intervals=changed(plan.intervals, index, later))


def _gaps(plan: Plan) -> Iterator[tuple[int, int, int]]:
    """Interval, and two of its uses with steps between them that do not read its page."""
    for index, interval in enumerate(plan.intervals):
        steps = range(max(0, interval.start_step), min(interval.end_step, len(plan.steps)))
        uses = [step for step in steps if interval.page in plan.needs(step)]
        yield from ((index, one, two) for one, two in pairwise(uses) if two > one + 1)


def _gaps_cut_short(plan: Plan) -> Iterator[tuple[str, Plan]]:
    for index, one, two in _gaps(plan):
        interval = plan.intervals[index]
        for what, cut in (
            (f"ends after step {one}", replace(interval, end_step=one + 1)),
            (f"ends before step {two}", replace(interval, end_step=two)),
            (f"starts before step {two}", replace(interval, start_step=two)),
        ):
            yield f"interval {index} {what}", replace(plan, intervals=changed(plan.intervals, index, cut))


def _loaded_again(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Not kept but copied once more: right, as nobody else has taken what was kept."""
    for index, one, two in _gaps(plan):
        interval = plan.intervals[index]
        before, behind = replace(interval, end_step=one + 1), replace(interval, start_step=two)
        intervals = (*changed(plan.intervals, index, before), behind)
        yield f"interval {index} again before step {two}", replace(plan, intervals=intervals)


def _left_to_the_next(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """A later stay of a page goes; its bytes are there at the same time, but on behalf of the next iteration."""
    n_steps = len(plan.steps)
    for index, interval in enumerate(plan.intervals):
        same = [other for other in range(index) if plan.intervals[other].page == interval.page]
        start_step = max(interval.start_step, 1) - n_steps
        if not same or not plan.wraps or start_step > plan.intervals[same[0]].start_step:
            continue
        early = replace(plan.intervals[same[0]], start_step=start_step)
        intervals = changed(plan.intervals, same[0], early)
        name = f"interval {index} left to {same[0]} of the next iteration"
        yield name, _without_idle_slots(replace(plan, intervals=(*intervals[:index], *intervals[index + 1 :])))
