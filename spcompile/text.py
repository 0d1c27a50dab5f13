"""The text of a plan: what people read before they decide, and what a failed check marks.

One plan has one text, ordered by step, page and slot, so two plans can be compared with ``diff``. It has a header with
the totals, the pages, the slots, a timeline of the slots, and the whole schedule, one action a line. Everything is
plain ASCII and fits `WIDTH` columns. Names are shortened to fit; ``plan_details`` adds what is lost by that, and
``plan_summary`` makes the shorter form that ``print(plan)`` shows.

`plan_text` also says which line speaks of which interval, slot, step or page, so that a verifier can put its mark
there. For that reason nothing here may fail on a plan that is wrong: an index that points nowhere is printed as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from spcompile.errors import OptionError
from spcompile.ir import Action, ActionKind, Interval, Plan
from spcompile.page_table import page_table
from spcompile.timeline import slot_in_phase, timeline
from spcompile.wording import WIDTH, LineKey, Lines, bands, count, fit, fit_list, format_bytes, printable, wrap

__all__ = ["WIDTH", "LineKey", "PlanText", "format_bytes", "format_overview", "format_plan", "plan_text"]

INLINE_PHASES = 6
"""Plans with a longer period list the slots of each interval in a table of their own, below the schedule."""

NAME_COLUMNS = 22
"""Longer names are shown by their two ends; the number in front of them tells them apart."""

SLOT_COLUMNS = 8

SCHEDULE_STEPS = 12
"""Longer plans have no schedule in their overview, which it would make several screens long."""


@dataclass(frozen=True)
class PlanText:
    """The lines of a plan's text, and where each thing is spoken of.

    Attributes:
        lines: the text, without line ends.
        line_of: index into ``lines`` of each `LineKey` that has a line.
    """

    lines: tuple[str, ...]
    line_of: Mapping[LineKey, int]

    def line(self, key: LineKey) -> int:
        """Index of the line that speaks of ``key``; of the first line where none does."""
        return self.line_of.get(key, 0)


def format_plan(plan: Plan) -> str:
    """The text of a plan. Equal plans have equal texts."""
    return "\n".join(plan_text(plan).lines)


def plan_text(plan: Plan) -> PlanText:
    """The text of a plan as lines, with the line of each page, slot, step and interval. Wrong plans have a text too."""
    lines: list[str] = []
    line_of: dict[LineKey, int] = {}
    for section in (*OVERVIEW, *SCHEDULE):
        for line, keys in section(plan):
            for key in keys:
                line_of.setdefault(key, len(lines))
            lines.append(line.rstrip())
    for index, interval in enumerate(plan.intervals):  # one that never comes into the schedule is found at its page
        line_of.setdefault(("interval", index), line_of.get(("page", interval.page), 0))
    return PlanText(tuple(lines), line_of)


def format_overview(plan: Plan, remarks: Sequence[str] = ()) -> str:
    """What people need to see first: all of `format_plan`'s text but a schedule that is longer than a screen.

    Args:
        plan: any plan.
        remarks: lines to be shown below the totals, which only others know how to tell.
    """
    lines = [line for line, _ in _header(plan)]
    lines.extend(["", *remarks] if remarks else [])
    is_short = len(plan.steps) <= SCHEDULE_STEPS
    for section in (*OVERVIEW[1:], *(SCHEDULE if is_short else ())):
        lines.extend(line for line, _ in section(plan))
    if not is_short:
        n_actions = sum(1 for _ in plan.actions())
        lines.extend(["", f"Schedule: {n_actions} lines, shown by print(plan.to_text())"])
    return "\n".join(line.rstrip() for line in lines)


def _header(plan: Plan) -> Lines:
    counts = (count(len(plan.pages), "page"), count(len(plan.layers), "layer"), count(len(plan.steps), "step"))
    yield f"Plan for {fit(plan.device, NAME_COLUMNS)}: {', '.join(counts)}", [("header", None)]
    ahead = "the end of an iteration prefetches for the next" if plan.wraps else "no prefetch across iterations"
    yield f"k = {plan.k}, m = {plan.m}, period {plan.period}; {ahead}", []
    if plan.backward_step is not None:
        yield f"training: forward ends before step {plan.backward_step}, where backward begins", []
    yield from ((line, []) for line in wrap(printable(plan.note), "      ", "note: "))
    yield "", []
    residents = _sum_pages_bytes(plan, plan.residents)
    leftovers = sum(weight.nbytes for weight in plan.leftovers)
    weights = sum(page.nbytes for page in plan.pages) + leftovers
    arena = max((slot.offset_bytes + slot.nbytes for slot in plan.slots), default=0)
    peak = arena + residents + leftovers
    moved = _sum_pages_bytes(plan, [interval.page for interval in plan.intervals])
    share = f" ({peak / weights:.1%})" if 0 < peak < 100 * weights else ""
    beside, unknown = _beside(plan)
    rows = [
        ("weights", weights, "all that the graph reads"),
        ("leftovers", leftovers, f"{count(len(plan.leftovers), 'small weight')}, in no page"),
        ("residents", residents, f"{count(len(plan.residents), 'page')}, never evicted"),
        ("arena", arena, f"{count(len(plan.slots), 'slot')} for what is streamed"),
        ("peak weight bytes", peak, f"on the device at once{share}"),
        ("activations", plan.activations_bytes, "most other values at once"),
        ("peak bytes", peak + (beside or 0), "weights alone" if beside is None else "with all else on the device"),
        ("bytes moved", moved, f"per iteration, {count(len(plan.intervals), 'copy', 'copies')}"),
    ]
    if plan.gradients_bytes:
        n_sends = sum(step.gradients_bytes > 0 for step in plan.steps)
        rows.append(("gradients", plan.gradients_bytes, f"per iteration, {count(n_sends, 'send')}"))
    if plan.mapped:
        in_place = sum(plan.gathered_bytes(step) for step in range(len(plan.steps)))
        rows.append(("read in place", in_place, f"per iteration, {count(len(plan.mapped), 'mapped page')}"))
    columns = max(len(f"{nbytes:,}") for _, nbytes, _ in rows)
    yield f"  {'':<17}  {'':>10}  {'bytes':>{columns}}", []
    for name, nbytes, note in rows:
        line = f"  {name:<17}  {format_bytes(nbytes):>10}  {nbytes:>{columns},}  "
        yield f"{line}{note[: max(0, WIDTH - len(line))]}", []
    if beside is None:
        yield from ((line, []) for line in wrap(f"What else the device holds is not known: {unknown}", "  "))


def _beside(plan: Plan) -> tuple[int | None, str]:
    """What the device holds beside the weights at most, or None and why it cannot be told."""
    try:
        return plan.beside_bytes(), ""
    except OptionError as error:
        return None, printable(str(error))


def _pages(plan: Plan) -> Lines:
    yield "", []
    yield "Pages, in order of first use", []
    yield from page_table(plan)


def _slots(plan: Plan) -> Lines:
    yield "", []
    yield "Slots of the arena", []
    if not plan.slots:
        yield "  none: nothing is streamed", []
        return
    tenants: list[list[str]] = [[] for _ in plan.slots]
    for interval in plan.intervals:
        first = slot_in_phase(interval, 0)
        if 0 <= first < len(tenants):
            tenants[first].append(f"#{interval.page}")
    offset_columns = max(12, *(len(f"{slot.offset_bytes:,}") for slot in plan.slots))
    byte_columns = max(5, *(len(f"{slot.nbytes:,}") for slot in plan.slots))
    when = "holds, in order" if plan.period == 1 else "holds in phase 0, in order"
    head = f"{'#':>3}  {'offset bytes':>{offset_columns}}  {'bytes':>{byte_columns}}"
    yield f"  {head}  {when}", []
    for index, slot in enumerate(plan.slots):
        line = f"  {index:>3}  {slot.offset_bytes:>{offset_columns},}  {slot.nbytes:>{byte_columns},}  "
        yield line + fit_list(tenants[index], WIDTH - len(line)), [("slot", index)]


def _schedule(plan: Plan) -> Lines:
    slot_columns = _inline_slot_columns(plan)
    yield "", []
    if plan.period == 1:
        where = ""
    elif slot_columns:
        where = f", with slots in phase {'/'.join(str(phase) for phase in range(plan.period))}"
    else:
        where = ", with slots in phase 0 (other phases: below)"
    yield f"Schedule of one iteration{where}", []
    if not plan.steps:
        yield "  none: there is nothing to run", []
        return
    columns = _name_columns(plan)
    yield f"  {'step':>4}  {'action':<8}  {'#':>4}  {'page or segment':<{columns}}  slot", []
    for action in plan.actions():
        if action.interval is None:
            line_of = _send_line if action.kind is ActionKind.SEND else _run_line
            yield line_of(plan, action, columns), [("step", action.step)]
            continue
        interval = plan.intervals[action.interval]
        name = f"{f'#{interval.page}':>4}  {fit(_page_name(plan, interval.page), columns):<{columns}}"
        slots = _format_slots(interval, range(action.ahead, action.ahead + (plan.period if slot_columns else 1)))
        line = f"  {action.step:>4}  {action.kind.value:<8}  {name}  {slots:<{max(slot_columns, 4)}}"
        yield f"{line}  {_note(plan, action, interval)}", [("interval", action.interval)]


def _run_line(plan: Plan, action: Action, columns: int) -> str:
    step = plan.steps[action.step]
    line = f"> {action.step:>4}  {action.kind.value:<8}        {fit(step.segment, columns):<{columns}}  "
    if not step.reads:
        return line
    needed = plan.needs(action.step)
    reads = [f"#{page}" if page in needed else f"#{page} in place" for page in step.reads]
    return line + fit_list(reads, WIDTH - len(line), start="reads ")


def _send_line(plan: Plan, action: Action, columns: int) -> str:
    step = plan.steps[action.step]
    line = f"  {action.step:>4}  {action.kind.value:<8}        {fit(step.segment, columns):<{columns}}  "
    return f"{line}gradients, {format_bytes(step.gradients_bytes)}"


def _note(plan: Plan, action: Action, interval: Interval) -> str:
    if action.ahead:
        return "for the next iteration"
    if action.kind is not ActionKind.EVICT and action.step == plan.backward_step and interval.start_step < action.step:
        return "kept, or on its way"
    if action.kind is ActionKind.PREFETCH and plan.wraps and interval.start_step <= 0:
        return "when cold"  # warm, the iteration before has started it and the hint costs nothing
    if action.kind is ActionKind.LOAD:
        steps = action.step - interval.start_step
        return f"{count(steps, 'step')} of overlap" if steps else "no overlap"
    return ""


def _inline_slot_columns(plan: Plan) -> int:
    """Columns for the slots of an interval in all phases; 0 where they are too many for the lines of the schedule."""
    if not 0 < plan.period <= INLINE_PHASES:
        return 0
    starts = (0, 1)  # of this iteration and of the next one
    columns = max(
        (len(_format_slots(each, range(start, start + plan.period))) for each in plan.intervals for start in starts),
        default=1,
    )
    return columns if columns <= SLOT_COLUMNS else 0


def _format_slots(interval: Interval, phases: range) -> str:
    return "/".join(str(slot_in_phase(interval, phase)) for phase in phases)


def _slots_by_phase(plan: Plan) -> Lines:
    if _inline_slot_columns(plan):
        return
    columns = _name_columns(plan)
    yield "", []
    yield f"Slots by phase, from phase 0 to {plan.period - 1}", []
    for index, interval in enumerate(plan.intervals):
        head = f"  {f'#{interval.page}':>5}  {fit(_page_name(plan, interval.page), columns):<{columns}} "
        width = max((len(str(slot)) for slot in interval.slots), default=1) + 1
        for band in bands(0, len(interval.slots), (WIDTH - len(head)) // width):
            yield head + "".join(f"{interval.slots[phase]:>{width}}" for phase in band), [("interval", index)]
            head = " " * len(head)


def _page_name(plan: Plan, page: int) -> str:
    return plan.pages[page].name if 0 <= page < len(plan.pages) else "(no such page)"


def _name_columns(plan: Plan) -> int:
    names = [*(page.name for page in plan.pages), *(step.segment for step in plan.steps)]
    return min(NAME_COLUMNS, max(15, *(len(printable(name)) for name in names), 0))


def _sum_pages_bytes(plan: Plan, pages: Iterable[int]) -> int:
    return sum(plan.pages[page].nbytes for page in pages if 0 <= page < len(plan.pages))


_Section = Callable[[Plan], Lines]

OVERVIEW: tuple[_Section, ...] = (_header, _pages, _slots, timeline)
SCHEDULE: tuple[_Section, ...] = (_schedule, _slots_by_phase)
