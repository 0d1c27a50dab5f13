"""The ASCII timeline of a plan: which page each slot holds while each step runs.

    step       0   1   2   3   4
    slot 0    #0  -0  ~3  #3 ~0'       page 0 is read, kept; page 3 copied, read; page 0 copied for the next iteration
    slot 1    ~1  #1  ~4  ~4  #4
    held       2   2   2   2   2

Columns that do not fit one line go on below in another band. A plan with more steps than `TIMELINE_STEPS` shows the
first steps, those around the turn from forward to backward, and the last ones; of what lies between, and looks alike in
most models, it says in words how much is copied and held.
"""

from __future__ import annotations

from collections.abc import Iterator

from spcompile.ir import Interval, Plan
from spcompile.wording import WIDTH, Lines, bands, count, fit_list, wrap

TIMELINE_STEPS = 40
"""Plans with more steps show only some of them: all could no longer be seen at a glance."""

TIMELINE_SLOTS = 24
"""Slots beyond this many in a band are only counted: a screen has as many lines."""

HEAD_COLUMNS = 10
"""Before the first step's column."""


def timeline(plan: Plan) -> Lines:
    """The lines of the timeline; none where nothing is streamed or nothing runs."""
    cells, held = _cells(plan)
    if not cells:
        return
    yield "", []
    phase = "" if plan.period == 1 else f" (phase 0 of {plan.period})"
    yield f"Timeline of a warm iteration{phase}: slots while each step runs", []
    ahead = "   3' next iteration" if any("'" in cell for cell in cells.values()) else ""
    yield f"  ~3 page 3 is copied   #3 read   !3 no overlap   -3 kept{ahead}", []
    columns = max(3, *(len(cell) for cell in cells.values())) + 1
    per_band = (WIDTH - HEAD_COLUMNS) // columns
    shown_until = 0
    for part in _parts(plan, per_band):
        if part.start > shown_until:
            yield "", []
            yield from ((line, []) for line in _in_words(plan, range(shown_until, part.start), held))
        for band in bands(part.start, part.stop, per_band):
            yield "", []
            yield from ((line, []) for line in _band(plan, band, cells, held, columns))
        shown_until = part.stop


def slot_in_phase(interval: Interval, phase: int) -> int:
    """The slot that an interval has in iterations of a phase; -1 where the plan is wrong and gives it none."""
    return interval.slots[phase % len(interval.slots)] if interval.slots else -1


def _parts(plan: Plan, per_band: int) -> list[range]:
    """The steps that are drawn, in order, without overlap."""
    n_steps = len(plan.steps)
    if n_steps <= TIMELINE_STEPS:
        return [range(n_steps)]
    first, last = range(per_band), range(n_steps - per_band, n_steps)
    if plan.backward_step is None or not first.stop < plan.backward_step < last.start:
        return [first, last]
    start = plan.backward_step - per_band // 2
    turn = range(max(start, first.stop), min(start + per_band, last.start))
    return [first, turn, last]


def _in_words(plan: Plan, steps: range, held: list[int]) -> list[str]:
    """What happens in steps that are not drawn."""
    copied = [f"#{each.page}" for each in plan.intervals if each.start_step % len(plan.steps) in steps]
    least, most = min(held[steps.start : steps.stop]), max(held[steps.start : steps.stop])
    holds = f"{least} to {most} pages hold slots" if least < most else f"{count(most, 'page')} {_hold(most)} slots"
    text = f"steps {steps.start} to {steps.stop - 1}: {holds}; {count(len(copied), 'copy', 'copies')} started"
    two_lines = 2 * WIDTH - 12  # less what wrapping may leave empty
    return wrap(fit_list(copied, two_lines, f"... {text}{': ' if copied else ''}"), "  ")


def _hold(pages: int) -> str:
    return "holds" if pages == 1 else "hold"


def _band(plan: Plan, steps: range, cells: dict[tuple[int, int], str], held: list[int], columns: int) -> Iterator[str]:
    yield "  step    " + "".join(f"{step:>{columns}}" for step in steps)
    busy = [index for index in range(len(plan.slots)) if any((index, step) in cells for step in steps)]
    for index in busy[:TIMELINE_SLOTS]:
        row = "".join(f"{cells.get((index, step), '.'):>{columns}}" for step in steps)
        yield f"  {f'slot {index}':<8}{row}"
    if len(busy) > TIMELINE_SLOTS:
        yield f"  ... and {len(busy) - TIMELINE_SLOTS} slots more"
    yield "  held    " + "".join(f"{held[step]:>{columns}}" for step in steps)


def _cells(plan: Plan) -> tuple[dict[tuple[int, int], str], list[int]]:
    """What to write at (slot, step), and how many pages hold slots at each step."""
    n_steps = len(plan.steps)
    cells: dict[tuple[int, int], str] = {}
    held = [0] * n_steps
    for interval in plan.intervals:
        first = max(interval.start_step, 1 - n_steps if plan.wraps else 0)
        for step in range(first, min(interval.end_step, n_steps)):
            ahead = step < 0  # the last steps of this iteration already work for the next one, in the next phase
            at = slot_in_phase(interval, 1 if ahead else 0), step % n_steps
            cells[at] = cells.get(at, "") + _mark(plan, interval, step) + str(interval.page) + ("'" if ahead else "")
            held[step % n_steps] += 1
    return cells, held


def _mark(plan: Plan, interval: Interval, step: int) -> str:
    load_step = plan.load_step(interval)
    if load_step < 0:
        return "-"
    if step == load_step == interval.start_step:
        return "!"
    if step < load_step:
        return "~"
    return "#" if interval.page in plan.needs(step) else "-"
