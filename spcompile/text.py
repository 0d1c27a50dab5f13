"""The text of a plan: what people read before they decide, and what a failed check marks.

One plan has one text, ordered by step, page and slot, so two plans can be compared with ``diff``. It has a header with
the totals, the pages, the slots, a timeline of the slots where the plan is short enough to be drawn, and the whole
schedule, one action a line. Everything is plain ASCII and fits `WIDTH` columns.

`plan_text` also says which line speaks of which interval, slot, step or page, so that a verifier can put its mark
there. For that reason nothing here may fail on a plan that is wrong: an index that points nowhere is printed as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap

from spcompile.errors import OptionError
from spcompile.ir import Action, ActionKind, Interval, Plan

WIDTH = 100
"""Columns of the widest line."""

TIMELINE_STEPS = 40
"""Plans with more steps than this get no timeline: it could no longer be seen at a glance."""

INLINE_PHASES = 6
"""Plans with a longer period list the slots of each interval in a table of their own, below the schedule."""

COLLAPSED_PAGES = 8
"""So many alike pages in a row, or more, are one row of the table of pages."""

NAME_COLUMNS = 28
"""Longer names are shown by their two ends; the number in front of them tells them apart."""

SLOT_COLUMNS = 17

LineKey = tuple[str, int | None]
"""What a line speaks of: ``("header", None)``, or ``("page" | "slot" | "step" | "interval", index)``."""

_Lines = Iterator[tuple[str, Sequence[LineKey]]]
"""Lines, each with what it speaks of."""


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


def format_bytes(nbytes: int) -> str:
    """Bytes for people: ``"512 B"``, ``"1.23 GiB"``."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    scaled = nbytes / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if abs(round(scaled, 2)) < 1024:
            return f"{scaled:.2f} {unit}"
        scaled /= 1024
    return f"{scaled:.2f} TiB"


def format_plan(plan: Plan) -> str:
    """The text of a plan. Equal plans have equal texts."""
    return "\n".join(plan_text(plan).lines)


def plan_text(plan: Plan) -> PlanText:
    """The text of a plan as lines, with the line of each page, slot, step and interval. Wrong plans have a text too."""
    lines: list[str] = []
    line_of: dict[LineKey, int] = {}
    for section in (_header, _pages, _slots, _timeline, _schedule, _slots_by_phase):
        for line, keys in section(plan):
            for key in keys:
                line_of.setdefault(key, len(lines))
            lines.append(line.rstrip())
    for index, interval in enumerate(plan.intervals):  # one that never comes into the schedule is found at its page
        line_of.setdefault(("interval", index), line_of.get(("page", interval.page), 0))
    return PlanText(tuple(lines), line_of)


def _header(plan: Plan) -> _Lines:
    counts = (_count(len(plan.pages), "page"), _count(len(plan.layers), "layer"), _count(len(plan.steps), "step"))
    yield f"Plan for {_fit(plan.device, NAME_COLUMNS)}: {', '.join(counts)}", [("header", None)]
    ahead = "the end of an iteration prefetches for the next one" if plan.wraps else "no prefetch across iterations"
    yield f"k = {plan.k}, m = {plan.m}, period {plan.period}, {ahead}", []
    if plan.backward_step is not None:
        yield f"training: forward is steps 0 to {plan.backward_step - 1}, backward what follows", []
    yield from ((f"note: {line}", []) for line in wrap(_printable(plan.note), WIDTH - len("note: ")))
    yield "", []
    residents = _sum_pages_bytes(plan, plan.residents)
    leftovers = sum(weight.nbytes for weight in plan.leftovers)
    weights = sum(page.nbytes for page in plan.pages) + leftovers
    arena = max((slot.offset_bytes + slot.nbytes for slot in plan.slots), default=0)
    peak = arena + residents + leftovers
    moved = _sum_pages_bytes(plan, [interval.page for interval in plan.intervals])
    share = f" ({peak / weights:.1%})" if 0 < peak < 100 * weights else ""
    beside, all_else = _beside(plan)
    rows = [
        ("weights", weights, "all that the graph reads"),
        ("leftovers", leftovers, f"{_count(len(plan.leftovers), 'small weight')} outside the pages"),
        ("residents", residents, f"{_count(len(plan.residents), 'page')}, never evicted"),
        ("arena", arena, f"{_count(len(plan.slots), 'slot')} for what is streamed"),
        ("peak weight bytes", peak, f"on the device at once{share}"),
        ("activations", plan.activations_bytes, "most that other values take at once"),
        ("peak bytes", peak + beside, all_else),
        ("bytes moved", moved, f"per iteration, {_count(len(plan.intervals), 'copy', 'copies')}"),
    ]
    if plan.gradients_bytes:
        n_sends = sum(step.gradients_bytes > 0 for step in plan.steps)
        rows.append(
            ("gradients", plan.gradients_bytes, f"per iteration to host memory, from {_count(n_sends, 'step')}")
        )
    if plan.mapped:
        in_place = sum(plan.gathered_bytes(step) for step in range(len(plan.steps)))
        rows.append(("read in place", in_place, f"per iteration, rows of {_count(len(plan.mapped), 'mapped page')}"))
    columns = max(len(f"{nbytes:,}") for _, nbytes, _ in rows)
    for name, nbytes, note in rows:
        yield f"  {name:<17}  {format_bytes(nbytes):>11}  {nbytes:>{columns},} bytes   {note}", []


def _beside(plan: Plan) -> tuple[int, str]:
    """What the device holds beside the weights at most, and what to say of it."""
    try:
        return plan.beside_bytes(), "with inputs, workspaces and all else"
    except OptionError as error:
        return 0, f"weights alone: {error}"


def _pages(plan: Plan) -> _Lines:
    yield "", []
    yield "Pages, in order of first use", []
    if not plan.pages:
        yield "  none", []
        return
    uses: list[list[int]] = [[] for _ in plan.pages]
    for step, each in enumerate(plan.steps):
        for page in each.reads:
            if 0 <= page < len(plan.pages):
                uses[page].append(step)
    runs = _page_runs(plan, uses)
    rows = [_page_row(plan, uses, run) for run in runs]
    number_columns = max(len(row[0]) for row in rows)
    name_columns = max(4, *(len(row[1]) for row in rows))
    byte_columns = max(5, *(len(f"{page.nbytes:,}") for page in plan.pages))
    head = f"{'#':>{number_columns}}  {'page':<{name_columns}}  placement  {'size':>10}  {'bytes':>{byte_columns}}"
    yield f"  {head}  weights  read at steps", []
    for run, (numbers, name, steps) in zip(runs, rows, strict=True):
        page_ = plan.pages[run[0]]
        cells = f"{numbers:>{number_columns}}  {name:<{name_columns}}  {_placement(plan, run[0]):<9}"
        sizes = f"{format_bytes(page_.nbytes):>10}  {page_.nbytes:>{byte_columns},}  {len(page_.weights):>7}"
        line = f"  {cells}  {sizes}  "
        yield line + _fit_list(steps, WIDTH - len(line)), [("page", each) for each in run]


def _page_row(plan: Plan, uses: Sequence[Sequence[int]], run: range) -> tuple[str, str, Sequence[str]]:
    """Number, name and steps in the row of one page, or of a run of alike pages."""
    first, last = run[0], run[-1]
    if first == last:
        return f"{first}", _fit(plan.pages[first].name, NAME_COLUMNS), [str(step) for step in uses[first]]
    one, two = _numbers_apart(plan.pages[first].name), _numbers_apart(plan.pages[last].name)
    changed = next(index for index, part in enumerate(two) if part != one[index])
    end = "".join(two[changed:])
    name = f"{_fit(plan.pages[first].name, NAME_COLUMNS - 4 - len(end))} .. {end}"
    return f"{first}..{last}", name, [f"{uses[first][0]}..{uses[last][-1]}, {len(uses[first])} each"]


def _page_runs(plan: Plan, uses: Sequence[Sequence[int]]) -> list[range]:
    """All pages in order, cut into runs that one row describes without loss: every page of a run has those figures."""
    runs: list[range] = []
    start = 0
    for page in range(1, len(plan.pages) + 1):
        if page < len(plan.pages) and _continues_run(plan, uses, start, page):
            continue
        alike = page - start >= COLLAPSED_PAGES
        runs.extend([range(start, page)] if alike else [range(each, each + 1) for each in range(start, page)])
        start = page
    return runs


def _continues_run(plan: Plan, uses: Sequence[Sequence[int]], start: int, page: int) -> bool:
    """Whether the page is like the one before it, but for the next number in its name and the next steps."""
    one, two = plan.pages[page - 1], plan.pages[page]
    before, after = uses[page - 1], uses[page]
    steps = [*before, *after]
    return (
        len(before) == len(after) > 0
        and steps == list(range(steps[0], steps[0] + len(steps)))
        and one.nbytes == two.nbytes
        and len(one.weights) == len(two.weights)
        and _placement(plan, page - 1) == _placement(plan, page)
        and _counts_up(plan.pages[start].name, two.name, page - start)
    )


def _counts_up(one: str, two: str, by: int) -> bool:
    """Whether the names differ in one number only, which is higher in the second one by ``by``."""
    parts_one, parts_two = _numbers_apart(one), _numbers_apart(two)
    if len(parts_one) != len(parts_two):
        return False
    changed = [pair for pair in zip(parts_one, parts_two, strict=True) if pair[0] != pair[1]]
    if len(changed) != 1:
        return False
    before, after = changed[0]
    return before.isdecimal() and after == str(int(before) + by)


def _numbers_apart(name: str) -> list[str]:
    return re.split(r"([0-9]+)", _printable(name))


def _slots(plan: Plan) -> _Lines:
    yield "", []
    yield "Slots of the arena", []
    if not plan.slots:
        yield "  none: nothing is streamed", []
        return
    tenants: list[list[str]] = [[] for _ in plan.slots]
    for interval in plan.intervals:
        first = _slot_in_phase(interval, 0)
        if 0 <= first < len(tenants):
            tenants[first].append(f"#{interval.page}")
    offset_columns = max(12, *(len(f"{slot.offset_bytes:,}") for slot in plan.slots))
    byte_columns = max(5, *(len(f"{slot.nbytes:,}") for slot in plan.slots))
    when = "holds, in order" if plan.period == 1 else "holds in phase 0, in order"
    head = f"{'#':>3}  {'offset bytes':>{offset_columns}}  {'size':>10}  {'bytes':>{byte_columns}}"
    yield f"  {head}  {when}", []
    for index, slot in enumerate(plan.slots):
        place = f"{index:>3}  {slot.offset_bytes:>{offset_columns},}"
        line = f"  {place}  {format_bytes(slot.nbytes):>10}  {slot.nbytes:>{byte_columns},}  "
        yield line + _fit_list(tenants[index], WIDTH - len(line)), [("slot", index)]


def _timeline(plan: Plan) -> _Lines:
    n_steps = len(plan.steps)
    cells, held = _timeline_cells(plan)
    if not cells or n_steps > TIMELINE_STEPS:
        return
    yield "", []
    phase = "" if plan.period == 1 else f" (phase 0 of {plan.period})"
    yield f"Timeline of one warm iteration{phase}: which page a slot holds while each step runs", []
    ahead = "   3' for the next iteration" if any("'" in cell for cell in cells.values()) else ""
    yield f"  ~3 page 3 being copied   #3 read   !3 read, no overlap   -3 kept{ahead}", []
    columns = max(3, *(len(cell) for cell in cells.values())) + 1
    for band in _bands(n_steps, (WIDTH - 10) // columns):
        yield "", []
        yield "  step    " + "".join(f"{step:>{columns}}" for step in band), []
        for index in range(len(plan.slots)):
            row = "".join(f"{cells.get((index, step), '.'):>{columns}}" for step in band)
            yield f"  {f'slot {index}':<8}{row}", []
        yield "  held    " + "".join(f"{held[step]:>{columns}}" for step in band), []


def _timeline_cells(plan: Plan) -> tuple[dict[tuple[int, int], str], list[int]]:
    """What to write at (slot, step), and how many pages hold slots at each step."""
    n_steps = len(plan.steps)
    cells: dict[tuple[int, int], str] = {}
    held = [0] * n_steps
    for interval in plan.intervals:
        first = max(interval.start_step, 1 - n_steps if plan.wraps else 0)
        for step in range(first, min(interval.end_step, n_steps)):
            ahead = step < 0  # the last steps of this iteration already work for the next one, in the next phase
            at = _slot_in_phase(interval, 1 if ahead else 0), step % n_steps
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


def _bands(count: int, per_band: int) -> Iterator[range]:
    per_band = max(1, per_band)
    for start in range(0, count, per_band):
        yield range(start, min(start + per_band, count))


def _schedule(plan: Plan) -> _Lines:
    slot_columns = _inline_slot_columns(plan)
    yield "", []
    if plan.period == 1:
        where = ""
    elif slot_columns:
        where = f", with slots in phase {'/'.join(str(phase) for phase in range(plan.period))}"
    else:
        where = ", with slots in phase 0 (those of the other phases: below)"
    yield f"Schedule of one iteration{where}", []
    if not plan.steps:
        yield "  none: there is nothing to run", []
        return
    columns = _name_columns(plan)
    yield f"  {'step':>5}  {'action':<8}  {'#':>4}  {'page or segment':<{columns}}  slot", []
    for action in plan.actions():
        if action.interval is None:
            line_of = _send_line if action.kind is ActionKind.SEND else _run_line
            yield line_of(plan, action, columns), [("step", action.step)]
            continue
        interval = plan.intervals[action.interval]
        name = f"{f'#{interval.page}':>4}  {_fit(_page_name(plan, interval.page), columns):<{columns}}"
        slots = _format_slots(interval, range(action.ahead, action.ahead + (plan.period if slot_columns else 1)))
        line = f"  {action.step:>5}  {action.kind.value:<8}  {name}  {slots:<{max(slot_columns, 4)}}"
        yield f"{line}  {_note(plan, action, interval)}", [("interval", action.interval)]


def _run_line(plan: Plan, action: Action, columns: int) -> str:
    step = plan.steps[action.step]
    line = f"> {action.step:>5}  {action.kind.value:<8}        {_fit(step.segment, columns):<{columns}}  "
    if not step.reads:
        return line
    needed = plan.needs(action.step)
    reads = [f"#{page}" if page in needed else f"#{page} in place" for page in step.reads]
    return line + _fit_list(reads, WIDTH - len(line), start="reads ")


def _send_line(plan: Plan, action: Action, columns: int) -> str:
    step = plan.steps[action.step]
    line = f"  {action.step:>5}  {action.kind.value:<8}        {_fit(step.segment, columns):<{columns}}  "
    return f"{line}gradients, {format_bytes(step.gradients_bytes)}"


def _note(plan: Plan, action: Action, interval: Interval) -> str:
    if action.ahead:
        return "for the next iteration"
    if action.kind is not ActionKind.EVICT and action.step == plan.backward_step and interval.start_step < action.step:
        return "kept since forward, or on its way"
    if action.kind is ActionKind.PREFETCH and plan.wraps and interval.start_step <= 0:
        return "when cold"  # warm, the iteration before has started it and the hint costs nothing
    if action.kind is ActionKind.LOAD:
        steps = action.step - interval.start_step
        return f"{_count(steps, 'step')} of overlap" if steps else "no overlap"
    return ""


def _inline_slot_columns(plan: Plan) -> int:
    """Columns for the slots of an interval in all phases; 0 where they are too many for the lines of the schedule."""
    if not 0 < plan.period <= INLINE_PHASES:
        return 0
    columns = max((len(_format_slots(interval, range(plan.period))) for interval in plan.intervals), default=1)
    return columns if columns <= SLOT_COLUMNS else 0


def _format_slots(interval: Interval, phases: range) -> str:
    return "/".join(str(_slot_in_phase(interval, phase)) for phase in phases)


def _slots_by_phase(plan: Plan) -> _Lines:
    if _inline_slot_columns(plan):
        return
    columns = _name_columns(plan)
    yield "", []
    yield f"Slots by phase, from phase 0 to {plan.period - 1}", []
    for index, interval in enumerate(plan.intervals):
        head = f"  {f'#{interval.page}':>5}  {_fit(_page_name(plan, interval.page), columns):<{columns}} "
        width = max((len(str(slot)) for slot in interval.slots), default=1) + 1
        for band in _bands(len(interval.slots), (WIDTH - len(head)) // width):
            yield head + "".join(f"{interval.slots[phase]:>{width}}" for phase in band), [("interval", index)]
            head = " " * len(head)


def _slot_in_phase(interval: Interval, phase: int) -> int:
    return interval.slots[phase % len(interval.slots)] if interval.slots else -1


def _placement(plan: Plan, page: int) -> str:
    if page in plan.residents:
        return "resident"
    if any(interval.page == page for interval in plan.intervals):
        return "streamed"
    return "mapped" if page in plan.mapped else "nowhere"


def _page_name(plan: Plan, page: int) -> str:
    return plan.pages[page].name if 0 <= page < len(plan.pages) else "(no such page)"


def _name_columns(plan: Plan) -> int:
    names = [*(page.name for page in plan.pages), *(step.segment for step in plan.steps)]
    return min(NAME_COLUMNS, max(15, *(len(_printable(name)) for name in names), 0))


def _sum_pages_bytes(plan: Plan, pages: Iterable[int]) -> int:
    return sum(plan.pages[page].nbytes for page in pages if 0 <= page < len(plan.pages))


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _printable(name: str) -> str:
    """The name, escaped where it could break the line or is not ASCII."""
    return name if name.isascii() and name.isprintable() else ascii(name)


def _fit(name: str, columns: int) -> str:
    """The name, or its two ends where it is longer than ``columns``."""
    name = _printable(name)
    if len(name) <= columns:
        return name
    tail = (columns - 2) * 2 // 3  # the end of a qualified name tells more than its start
    return f"{name[: columns - 2 - tail]}..{name[len(name) - tail :]}"


def _fit_list(words: Sequence[str], columns: int, start: str = "") -> str:
    """The words with commas between them; where they are too many for ``columns``, how many more there are."""
    line = start + ", ".join(words)
    shown = len(words)
    while len(line) > columns and shown > 0:
        shown -= 1
        line = start + ", ".join([*words[:shown], f"+{len(words) - shown} more"])
    return line
