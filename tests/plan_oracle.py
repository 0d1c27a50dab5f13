"""Whether a plan may run at all, decided by writing out who holds which bytes during each step.

A second opinion on the verifier of plans, from formulas instead of a replay and for small plans only: it says nothing
of order, batches or waste, only whether a step could find wrong bytes or more than k pages could be on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from spcompile.ir import Interval, Plan


def may_run(plan: Plan) -> bool:
    """Whether every read finds its page, untouched, in every phase of the warm iteration."""
    return is_sound(plan) and not faults(plan)


def is_sound(plan: Plan) -> bool:
    """Whether pages, slots and steps of all intervals exist, and the slots are large enough for their pages."""
    return plan.period >= 1 and all(_is_sound(plan, interval) for interval in plan.intervals)


def faults(plan: Plan) -> frozenset[str]:
    """What goes wrong in any step of any phase of a sound plan.

    ``"shared"``: two pages that are held share bytes. ``"twice"``: a page is held twice. ``"crowded"``: more than k are
    held. ``"missing"``: a step reads a page that is not held on behalf of its iteration.
    """
    cells = [(phase, step) for phase in range(plan.period) for step in range(len(plan.steps))]
    return frozenset(fault for phase, step in cells for fault in _faults_of_step(plan, phase, step))


def _is_sound(plan: Plan, interval: Interval) -> bool:
    n_steps = len(plan.steps)
    if not 0 <= interval.page < len(plan.pages) or len(interval.slots) != plan.period:
        return False
    if not all(0 <= slot < len(plan.slots) for slot in interval.slots):
        return False
    if any(plan.slots[slot].nbytes < plan.pages[interval.page].slot_bytes for slot in interval.slots):
        return False
    first = 1 - n_steps if plan.wraps else 0
    return first <= interval.start_step < interval.end_step <= n_steps


def _faults_of_step(plan: Plan, phase: int, step: int) -> Iterator[str]:
    own = [each for each in plan.intervals if each.start_step <= step < each.end_step]
    ahead = [each for each in plan.intervals if each.start_step <= step - len(plan.steps)]
    slots = [each.slots[phase] for each in own] + [each.slots[(phase + 1) % plan.period] for each in ahead]
    held = [each.page for each in (*own, *ahead)]
    loaded = {each.page for each in own}
    if len(held) > plan.k:
        yield "crowded"
    if len(set(held)) < len(held):
        yield "twice"
    if any(_share(plan, one, two) for one, two in combinations(slots, 2)):
        yield "shared"
    if not all(page in loaded or page in plan.residents for page in _copied(plan, step)):
        yield "missing"


def _copied(plan: Plan, step: int) -> list[int]:
    in_place = {page for page, _ in plan.steps[step].gathers}
    return [page for page in plan.steps[step].reads if not (page in plan.mapped and page in in_place)]


def _share(plan: Plan, one: int, two: int) -> bool:
    a, b = plan.slots[one], plan.slots[two]
    bytes_in_common = min(a.offset_bytes + a.nbytes, b.offset_bytes + b.nbytes) - max(a.offset_bytes, b.offset_bytes)
    return one == two or bytes_in_common > 0
