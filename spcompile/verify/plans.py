"""Check a plan against the rules of the words it is written in, not against the planner.

Nothing here is shared with what makes plans: what each field means is derived again from the docstrings of ``ir``. Most
rules of time and place are checked by replaying iterations position by position, the way the arena would live through
them: pages leave, pages come, the step runs. The replay begins cold (no copy is under way: those that the iteration
before should have started are issued at once) and goes on until every phase has followed every other one warm. The
other starts, a cold one in another phase or one after another graph has used the arena, hold a part of what the warm
iteration of that phase holds, so they break no rule that it does not break.

All rules are always checked. A plan may be so wrong that one mistake shows up under several of them; what an index that
points nowhere would have meant is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from spcompile.errors import OptionError
from spcompile.ir import ALIGNMENT_BYTES, Interval, Plan
from spcompile.sizes import Polynomial, value_of
from spcompile.text import LineKey, format_bytes, plan_text
from spcompile.verify.violations import Violation

_Finding = tuple[LineKey, str]

_HEADER: LineKey = ("header", None)


def verify_plan(plan: Plan, budget_bytes: int | None = None) -> list[Violation]:
    """All violations of the rules of a plan, ordered by their line in ``format_plan(plan)``; none in a right plan.

    Args:
        plan: any plan; a wrong one makes violations, not exceptions.
        budget_bytes: most bytes of the device at any step, for weights and all else with the sizes at capture; None for
            no limit.
    """
    findings = [
        *_check_counts(plan),
        *_check_pages(plan),
        *_check_steps(plan),
        *_check_slots(plan),
        *_check_intervals(plan),
        *_check_batches(plan),
        *(_Replay(plan).run() if plan.steps else ()),
        *_check_bytes(plan),
        *(() if budget_bytes is None else _check_budget(plan, budget_bytes)),
    ]
    if not findings:
        return []
    text = plan_text(plan)
    return sorted((Violation(text.line(key), message) for key, message in findings), key=lambda each: each.line)


def _check_counts(plan: Plan) -> Iterator[_Finding]:
    if plan.pages and not 1 <= plan.m <= plan.k:
        yield _HEADER, f"m is {plan.m}, but must be between 1 and k = {plan.k}"
    if plan.period < 1:
        yield _HEADER, f"the period is {plan.period}, but slots repeat after 1 iteration at the earliest"


def _check_pages(plan: Plan) -> Iterator[_Finding]:
    for name, count in Counter(page.name for page in plan.pages).items():
        if count > 1:
            last = max(index for index, page in enumerate(plan.pages) if page.name == name)
            yield ("page", last), f"{count} pages are called {name}"
    yield from _check_weights(plan)
    for page, count in Counter(plan.residents).items():
        if not _is_page(plan, page):
            yield _HEADER, f"page {page} is resident, but there are only {len(plan.pages)} pages"
        if count > 1:
            yield ("page", page), f"{_name(plan, page)} is listed {count} times among the residents"
    used = [page for step in plan.steps for page in dict.fromkeys(step.reads) if _is_page(plan, page)]
    first_uses = list(dict.fromkeys(used))
    for before, after in pairwise(first_uses):
        if before > after:
            message = f"{_name(plan, after)} stands before {_name(plan, before)}, but is first read after it"
            yield ("page", after), message


def _check_weights(plan: Plan) -> Iterator[_Finding]:
    """A weight is one storage: were it in two places, one of them would go stale."""
    places: dict[str, list[tuple[LineKey, str]]] = {}
    for index, page in enumerate(plan.pages):
        for weight in page.weights:
            places.setdefault(weight.name, []).append((("page", index), page.name))
            if weight.nbytes < 0:
                yield ("page", index), f"weight {weight.name} has {weight.nbytes} bytes"
    for weight in plan.leftovers:
        places.setdefault(weight.name, []).append((_HEADER, "the leftovers"))
        if weight.nbytes < 0:
            yield _HEADER, f"weight {weight.name} has {weight.nbytes} bytes"
    for name, found in places.items():
        if len(found) > 1:
            yield found[-1][0], f"weight {name} is in {len(found)} places: {', '.join(place for _, place in found)}"


def _check_steps(plan: Plan) -> Iterator[_Finding]:
    for index, step in enumerate(plan.steps):
        for page, count in Counter(step.reads).items():
            if not _is_page(plan, page):
                message = f"step {index} reads page {page}, but there are only {len(plan.pages)} pages"
                yield ("step", index), message
            if count > 1:
                yield ("step", index), f"step {index} lists {_name(plan, page)} {count} times among its reads"
        for page, _ in step.gathers:
            if page not in step.reads:
                yield ("step", index), f"step {index} gathers rows of {_name(plan, page)}, which it does not read"
    gathered = {page for step in plan.steps for page, _ in step.gathers}
    for page in plan.mapped:
        if page not in gathered:
            yield ("page", page), f"{_name(plan, page)} is to be read in place, but no step gathers rows of it"
        if page in plan.residents:
            yield ("page", page), f"{_name(plan, page)} is resident, and to be read in place as well"


def _check_slots(plan: Plan) -> Iterator[_Finding]:
    taken = {slot for interval in plan.intervals for slot in interval.slots}
    for index, slot in enumerate(plan.slots):
        if slot.offset_bytes < 0:
            yield ("slot", index), f"slot {index} starts {-slot.offset_bytes} bytes before the arena"
        if slot.nbytes < 0:
            yield ("slot", index), f"slot {index} has {slot.nbytes} bytes"
        if slot.offset_bytes % ALIGNMENT_BYTES:
            message = f"slot {index} starts at byte {slot.offset_bytes}, which is no multiple of {ALIGNMENT_BYTES}"
            yield ("slot", index), message
        if slot.offset_bytes + slot.nbytes > plan.arena_bytes:
            end_bytes = slot.offset_bytes + slot.nbytes
            yield ("slot", index), f"slot {index} ends at byte {end_bytes}, but the arena has {plan.arena_bytes} bytes"
        if index not in taken:
            yield ("slot", index), f"slot {index} ({format_bytes(slot.nbytes)}) is reserved, but no page ever takes it"


def _check_intervals(plan: Plan) -> Iterator[_Finding]:
    latest = 0
    for index, interval in enumerate(plan.intervals):
        if not _is_page(plan, interval.page):
            message = f"an interval is for page {interval.page}, but there are only {len(plan.pages)} pages"
            yield ("interval", index), message
        elif interval.page in plan.residents:
            message = f"{_name(plan, interval.page)} is resident, but is copied for {_span(interval)} as well"
            yield ("interval", index), message
        if index and interval.start_step < latest:
            stay = f"{_name(plan, interval.page)} in {_span(interval)}"
            message = f"{stay} stands after an interval that starts at {latest}: copies are not in order of issue"
            yield ("interval", index), message
        latest = interval.start_step if not index else max(latest, interval.start_step)
        for message in (*_time_faults(plan, interval), *_place_faults(plan, interval)):
            yield ("interval", index), message


def _time_faults(plan: Plan, interval: Interval) -> Iterator[str]:
    n_steps, stay = len(plan.steps), f"{_name(plan, interval.page)} in {_span(interval)}"
    start, end = interval.start_step, interval.end_step
    if start >= end:
        yield f"{stay} ends before it starts"
    if start <= -n_steps:
        yield f"{stay} starts more than an iteration ahead: the plan has {n_steps} steps"
    if start < 0 and not plan.wraps:
        yield f"{stay} starts in the iteration before, but the plan does not wrap"
    if not 0 < end <= n_steps:
        yield f"{stay} ends outside the iteration, which has {n_steps} steps"
    uses = _uses(plan, interval)
    if not uses:
        yield f"{stay} is copied for nothing: no step in this interval reads it"
    elif uses[-1] != end - 1 and not _waits_for_batch(plan, interval):
        yield f"{stay} keeps its slot until after step {end - 1}, but is last read at step {uses[-1]}"


def _waits_for_batch(plan: Plan, interval: Interval) -> bool:
    """Whether the page stays past its last use only to be evicted together with its batch of m.

    At most m - 1 pages wait, and no longer than until the page that completes their batch has been read (in the last
    step of the stay), or a copy needs room before that, or the iteration ends.
    """
    end, n_steps = interval.end_step, len(plan.steps)
    together = [each for each in plan.intervals if each.end_step == end]
    waiting = [each for each in together if _uses(plan, each)[-1:] != [end - 1]]
    if len(waiting) >= plan.m:
        return False
    starts = {each.start_step for each in plan.intervals}
    room_is_needed = end in starts or (plan.wraps and end - n_steps in starts)
    return len(waiting) < len(together) or room_is_needed or end == n_steps


def _place_faults(plan: Plan, interval: Interval) -> Iterator[str]:
    stay = f"{_name(plan, interval.page)} in {_span(interval)}"
    if len(interval.slots) != plan.period:
        yield f"{stay} has slots for {len(interval.slots)} phases, but the period is {plan.period}"
    for slot in dict.fromkeys(interval.slots):
        phase = interval.slots.index(slot)
        if not 0 <= slot < len(plan.slots):
            yield f"{stay} takes slot {slot} in phase {phase}, but there are only {len(plan.slots)} slots"
        elif _is_page(plan, interval.page) and plan.slots[slot].nbytes < _needed_bytes(plan, interval.page):
            has, needs = plan.slots[slot].nbytes, _needed_bytes(plan, interval.page)
            yield f"{stay} takes slot {slot} in phase {phase}, which has {has} bytes, but it needs {needs}"


def _needed_bytes(plan: Plan, page: int) -> int:
    """Bytes of the page in a slot: each weight starts at a multiple of the alignment, and so does what follows."""
    return sum(weight.nbytes + -weight.nbytes % ALIGNMENT_BYTES for weight in plan.pages[page].weights)


def _check_batches(plan: Plan) -> Iterator[_Finding]:
    """In a chain (a step reads one streamed page at most, a page is read once), batches of m leave together.

    A last batch of less than m is never complete: it may leave once it has been used, or wait until the iteration ends.
    """
    steps = range(len(plan.steps))
    streamed = [[page for page in _read_on_device(plan, step) if page not in plan.residents] for step in steps]
    order = [(pages[0], step) for step, pages in enumerate(streamed) if pages]
    is_chain = all(len(pages) <= 1 for pages in streamed) and len({page for page, _ in order}) == len(order)
    if not is_chain or plan.m < 1:
        return
    for first in range(0, len(order), plan.m):
        batch = order[first : first + plan.m]
        pages, complete = [page for page, _ in batch], batch[-1][1]
        for index, interval in enumerate(plan.intervals):
            ends = {complete + 1, len(plan.steps) if len(batch) < plan.m else complete + 1}
            if interval.page in pages and interval.end_step not in ends:
                names = ", ".join(_name(plan, page) for page in pages)
                message = (
                    f"{_name(plan, interval.page)} leaves after step {interval.end_step - 1}, "
                    f"but its batch ({names}) is evicted together after step {complete}"
                )
                yield ("interval", index), message


def _check_bytes(plan: Plan) -> Iterator[_Finding]:
    """The plan's own totals: the arena is made from them, and people decide by them."""
    arena, peak = _arena_bytes(plan), sum(_weights_parts(plan).values())
    if arena != plan.arena_bytes:
        yield _HEADER, f"the slots end at byte {arena}, but the plan says that the arena has {plan.arena_bytes} bytes"
    if all(_is_page(plan, page) for page in plan.residents) and peak != plan.peak_weight_bytes:
        yield _HEADER, f"weights take {peak} bytes at once, but the plan says {plan.peak_weight_bytes}"
    yield from _check_values(plan)


def _check_values(plan: Plan) -> Iterator[_Finding]:
    """What depends on sizes has a value with those at capture, and the steps agree with it."""
    for polynomial in (plan.inputs, *plan.activations):
        try:
            value_of(polynomial, dict(plan.sizes))
        except OptionError as error:
            yield _HEADER, f"with the sizes at capture there is no value: {error}"
    most_bytes = max((step.activations_bytes for step in plan.steps), default=0)
    said_bytes = max((_value_bytes(plan, each) for each in plan.activations), default=most_bytes)
    if said_bytes != most_bytes:
        message = f"the values of one step take {most_bytes} bytes at most, but as a formula of sizes {said_bytes}"
        yield _HEADER, message


def _check_budget(plan: Plan, budget_bytes: int) -> Iterator[_Finding]:
    """At each step: what weights hold (the arena is one block, held as a whole), its own values, and all else.

    Where what is always there is too much by itself, no step is to blame, and the header says so once.
    """
    always = {
        **_weights_parts(plan),
        "inputs": _value_bytes(plan, plan.inputs),
        "workspace": plan.workspace_bytes,
        "all else": plan.other_bytes,
    }
    if sum(always.values()) > budget_bytes:
        yield _HEADER, f"any step takes {_over_budget(always, budget_bytes)}"
        return
    for index, step in enumerate(plan.steps):
        parts = {**always, "its values": step.activations_bytes}
        if sum(parts.values()) > budget_bytes:
            yield ("step", index), f"step {index} takes {_over_budget(parts, budget_bytes)}"


def _over_budget(parts: Mapping[str, int], budget_bytes: int) -> str:
    """By how much, and what takes it, most first."""
    taken_bytes = sum(parts.values())
    budget = f"the budget of {budget_bytes} bytes ({format_bytes(budget_bytes)})"
    by_size = sorted((item for item in parts.items() if item[1]), key=lambda item: -item[1])
    what = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in by_size)
    return f"{taken_bytes} bytes, {taken_bytes - budget_bytes} more than {budget}: {what}"


def _weights_parts(plan: Plan) -> dict[str, int]:
    """Bytes that weights hold on the device all the time, by what for."""
    return {
        "arena": _arena_bytes(plan),
        "residents": sum(_page_bytes(plan, page) for page in plan.residents),
        "leftovers": sum(weight.nbytes for weight in plan.leftovers),
    }


def _value_bytes(plan: Plan, polynomial: Polynomial) -> int:
    """With the sizes at capture; 0 where it has no value, which `_check_values` reports."""
    try:
        return value_of(polynomial, dict(plan.sizes))
    except OptionError:
        return 0


def _arena_bytes(plan: Plan) -> int:
    return max((slot.offset_bytes + slot.nbytes for slot in plan.slots), default=0)


@dataclass(frozen=True)
class _Stay:
    """One interval in one iteration of the replay. Positions are counted in steps from the start of the replay.

    ``slot`` is None where the plan names no slot that exists: such a stay holds room, but no place.
    """

    index: int
    page: int
    iteration: int
    first: int
    end: int
    slot: int | None


class _Replay:
    """The arena through one cold and then warm iterations, position by position.

    Each fault is kept once, as the first iteration shows it. ``run`` may be called once.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.n_steps = len(plan.steps)
        self.phases = max(1, min(plan.period, max((len(each.slots) for each in plan.intervals), default=1)))
        self.sharing = _slots_that_share(plan)
        self.at_page: dict[int, list[_Stay]] = {}
        self.at_slot: dict[int | None, list[_Stay]] = {}
        self.held = 0
        self.moved_bytes: Counter[int] = Counter()
        self.found: dict[tuple[object, ...], _Finding] = {}

    def run(self) -> Iterator[_Finding]:
        iterations = self.phases + 2  # one cold, then warm ones until each phase has followed a warm one
        come: dict[int, list[_Stay]] = {}
        leave: dict[int, list[_Stay]] = {}
        for iteration in range(iterations):
            for stay in self._stays(iteration):
                come.setdefault(stay.first, []).append(stay)
                leave.setdefault(stay.end, []).append(stay)
        for position in range(self.n_steps * iterations):
            for stay in leave.get(position, ()):
                self._leave(stay)
            for stay in come.get(position, ()):
                self._come(stay)
            self._check_room(position)
            self._check_reads(position)
        yield from self.found.values()
        yield from self._check_moved()

    def _stays(self, iteration: int) -> Iterator[_Stay]:
        begin = iteration * self.n_steps
        for index, interval in enumerate(self.plan.intervals):
            if not _is_replayed(self.plan, interval):
                continue
            phase = iteration % self.phases
            slot = interval.slots[phase] if phase < len(interval.slots) else -1
            first = max(0, begin + interval.start_step)  # cold: what should be under way is issued now
            end = begin + interval.end_step
            place = slot if 0 <= slot < len(self.plan.slots) else None
            if first < end:
                yield _Stay(index, interval.page, iteration, first, end, place)

    def _leave(self, stay: _Stay) -> None:
        self.at_page[stay.page].remove(stay)
        self.at_slot[stay.slot].remove(stay)
        self.held -= 1

    def _come(self, stay: _Stay) -> None:
        for other in self.at_page.get(stay.page, ()):
            message = f"{self._issue(stay)}, but is on the device already: {self._until(other)}"
            self._report(("twice", stay.index, other.index), ("interval", stay.index), message)
        for slot in self.sharing.get(stay.slot, ()):
            for other in self.at_slot.get(slot, ()):
                place = f"slot {stay.slot}" if slot == stay.slot else f"slot {stay.slot}, which overlaps slot {slot}"
                message = f"{self._issue(stay)} into {place}, where {_name(self.plan, other.page)} still sits"
                message += f": {self._until(other)}"
                self._report(("taken", stay.index, other.index), ("interval", stay.index), message)
        self.at_page.setdefault(stay.page, []).append(stay)
        self.at_slot.setdefault(stay.slot, []).append(stay)
        self.held += 1
        self.moved_bytes[stay.first // self.n_steps] += _page_bytes(self.plan, stay.page)

    def _check_room(self, position: int) -> None:
        if self.held <= self.plan.k:
            return
        step = position % self.n_steps
        names = [_name(self.plan, page) for page, stays in sorted(self.at_page.items()) for _ in stays]
        message = f"{self.held} pages hold slots at step {step}, but k is {self.plan.k}: {', '.join(names)}"
        self._report(("room", step), ("step", step), message)

    def _check_reads(self, position: int) -> None:
        iteration, step = divmod(position, self.n_steps)
        for page in _read_on_device(self.plan, step):
            if not _is_page(self.plan, page) or page in self.plan.residents:
                continue
            own = [stay for stay in self.at_page.get(page, ()) if stay.iteration == iteration]
            if own:
                continue
            spans = [_span(each) for each in self.plan.intervals if each.page == page]
            why = f"it is there only in {', '.join(spans)}" if spans else "it is neither resident nor ever copied"
            message = f"{_name(self.plan, page)} is read at step {step}, but sits in no slot then: {why}"
            self._report(("read", step, page), ("step", step), message)

    def _check_moved(self) -> Iterator[_Finding]:
        """The first warm iteration moves what the plan says, no matter on behalf of which iteration."""
        if not all(_is_replayed(self.plan, interval) for interval in self.plan.intervals):
            return
        moved = self.moved_bytes[1]
        if moved != self.plan.bytes_moved:
            yield _HEADER, f"a warm iteration moves {moved} bytes, but the plan says {self.plan.bytes_moved}"

    def _report(self, fault: tuple[object, ...], key: LineKey, message: str) -> None:
        self.found.setdefault(fault, (key, message))

    def _issue(self, stay: _Stay) -> str:
        """``layers.3 is copied before step 2 of phase 1``, said from the iteration in which the copy is issued."""
        iteration, step = divmod(stay.first, self.n_steps)
        return f"{_name(self.plan, stay.page)} is copied before step {step}{self._in_phase(iteration)}"

    def _until(self, stay: _Stay) -> str:
        iteration, step = divmod(stay.end - 1, self.n_steps)
        return f"it leaves after step {step}{self._in_phase(iteration)}"

    def _in_phase(self, iteration: int) -> str:
        return "" if self.phases == 1 else f" of phase {iteration % self.phases}"


def _slots_that_share(plan: Plan) -> dict[int | None, set[int]]:
    """For each slot all slots that have bytes in common with it; itself included, even where it has no bytes."""
    sharing: dict[int | None, set[int]] = {index: {index} for index in range(len(plan.slots))}
    order = sorted((slot.offset_bytes, slot.nbytes, index) for index, slot in enumerate(plan.slots) if slot.nbytes > 0)
    for rank, (offset_bytes, nbytes, index) in enumerate(order):
        for other_offset_bytes, _, other in order[rank + 1 :]:
            if other_offset_bytes >= offset_bytes + nbytes:
                break
            sharing[index].add(other)
            sharing[other].add(index)
    return sharing


def _is_replayed(plan: Plan, interval: Interval) -> bool:
    return _is_page(plan, interval.page) and interval.start_step < interval.end_step


def _is_page(plan: Plan, page: int) -> bool:
    return 0 <= page < len(plan.pages)


def _uses(plan: Plan, interval: Interval) -> list[int]:
    """The steps of its own iteration in which the interval's page is read while it is there."""
    steps = range(max(interval.start_step, 0), min(interval.end_step, len(plan.steps)))
    return [step for step in steps if interval.page in _read_on_device(plan, step)]


def _read_on_device(plan: Plan, step: int) -> list[int]:
    """The pages that a step reads, each once, without those of which it gathers rows where they are."""
    in_place = {page for page, _ in plan.steps[step].gathers if page in plan.mapped}
    return [page for page in dict.fromkeys(plan.steps[step].reads) if page not in in_place]


def _page_bytes(plan: Plan, page: int) -> int:
    return sum(weight.nbytes for weight in plan.pages[page].weights) if _is_page(plan, page) else 0


def _name(plan: Plan, page: int) -> str:
    return plan.pages[page].name if _is_page(plan, page) else f"page {page}"


def _span(interval: Interval) -> str:
    return f"[{interval.start_step}, {interval.end_step})"
