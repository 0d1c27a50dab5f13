"""The table of a plan's pages: one row for each, or for a run of alike ones, and nothing lost by that.

       #  page                        size  placement  read at steps
       0  model.embed_tokens    250.00 MiB  mapped     0
    1..8  model.layers.0 .. 7   386.02 MiB  mixed      1..8, 17..10       page 1 is read at steps 1 and 17, ...
          2 resident: #3, #6
          6 streamed: the others

Pages are alike where they have as many bytes, a number in the name counts up, and the steps that read them count up or
down. Layers of one model mostly are, except for where a budget has placed them: so that is said below their row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from spcompile.ir import Plan
from spcompile.wording import WIDTH, Lines, fit, fit_list, format_bytes, printable, wrap

COLLAPSED_PAGES = 8
"""So many alike pages in a row, or more, are one row."""

NAME_COLUMNS = 26

_Uses = list[range]
"""The steps that read a page, in stretches without a gap."""


def page_table(plan: Plan) -> Lines:
    """The lines of the table; the line of a row speaks of all its pages."""
    if not plan.pages:
        yield "  none", []
        return
    uses = _uses(plan)
    runs = _runs(plan, uses)
    rows = [(_numbers(run), _name(plan, run), _steps(uses, run)) for run in runs]
    number_columns = max(len(number) for number, _, _ in rows)
    name_columns = max(4, *(len(name) for _, name, _ in rows))
    yield f"  {'#':>{number_columns}}  {'page':<{name_columns}}  {'size':>10}  placement  read at steps", []
    for run, (number, name, steps) in zip(runs, rows, strict=True):
        placements = [placement_of(plan, page) for page in run]
        placement = placements[0] if len(set(placements)) == 1 else "mixed"
        line = f"  {number:>{number_columns}}  {name:<{name_columns}}  {format_bytes(plan.pages[run[0]].nbytes):>10}"
        line = f"{line}  {placement:<9}  "
        yield line + fit_list(steps, WIDTH - len(line)), [("page", page) for page in run]
        if placement == "mixed":
            yield from ((below, []) for below in _placements(run, placements, " " * (number_columns + 4)))


def placement_of(plan: Plan, page: int) -> str:
    """The word for where a page is; ``nowhere`` in a plan that is wrong."""
    if page in plan.residents:
        return "resident"
    if any(interval.page == page for interval in plan.intervals):
        return "streamed"
    return "mapped" if page in plan.mapped else "nowhere"


def _uses(plan: Plan) -> list[_Uses]:
    uses: list[_Uses] = [[] for _ in plan.pages]
    for step, each in enumerate(plan.steps):
        for page in each.reads:
            if not 0 <= page < len(plan.pages):
                continue
            if uses[page] and uses[page][-1].stop == step:
                uses[page][-1] = range(uses[page][-1].start, step + 1)
            else:
                uses[page].append(range(step, step + 1))
    return uses


def _runs(plan: Plan, uses: Sequence[_Uses]) -> list[range]:
    """All pages in order, cut into runs of alike ones."""
    runs: list[range] = []
    start = 0
    for page in range(1, len(plan.pages) + 1):
        if page < len(plan.pages) and _is_alike(plan, uses, start, page):
            continue
        is_long = page - start >= COLLAPSED_PAGES
        runs.extend([range(start, page)] if is_long else [range(each, each + 1) for each in range(start, page)])
        start = page
    return runs


def _is_alike(plan: Plan, uses: Sequence[_Uses], start: int, page: int) -> bool:
    """Whether the page continues the run that begins at page ``start``."""
    one, two = plan.pages[start], plan.pages[page]
    if one.nbytes != two.nbytes or not _counts_up(one.name, two.name, page - start):
        return False
    first, second, own = uses[start], uses[start + 1], uses[page]
    if not len(first) == len(second) == len(own) > 0:
        return False
    shifts = [after.start - before.start for before, after in zip(first, second, strict=True)]
    expected = [
        range(each.start + (page - start) * shift, each.stop + (page - start) * shift)
        for each, shift in zip(first, shifts, strict=True)
    ]
    return own == expected and all(abs(shift) == len(each) for each, shift in zip(first, shifts, strict=True))


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
    return re.split(r"([0-9]+)", printable(name))


def _numbers(run: range) -> str:
    return f"{run[0]}" if len(run) == 1 else f"{run[0]}..{run[-1]}"


def _name(plan: Plan, run: range) -> str:
    first = plan.pages[run[0]].name
    if len(run) == 1:
        return fit(first, NAME_COLUMNS)
    one, two = _numbers_apart(first), _numbers_apart(plan.pages[run[-1]].name)
    changed = next(index for index, part in enumerate(two) if part != one[index])
    end = "".join(two[changed:])
    return f"{fit(first, NAME_COLUMNS - 4 - len(end))} .. {end}"


def _steps(uses: Sequence[_Uses], run: range) -> list[str]:
    if len(run) == 1:
        return [str(step) for stretch in uses[run[0]] for step in stretch]
    return list(map(_stretch, uses[run[0]], uses[run[-1]]))


def _stretch(first: range, last: range) -> str:
    """The steps of all pages of a run, from those of its first page to those of its last."""
    each = f" ({len(first)} each)" if len(first) > 1 else ""
    return f"{first[0]}..{last[-1]}{each}" if first.start < last.start else f"{first[-1]}..{last[0]}{each}"


def _placements(run: range, placements: Sequence[str], indent: str) -> Iterator[str]:
    """Which pages of a run are placed how; of those that are most, that they are the others."""
    words = sorted(set(placements), key=lambda word: (placements.count(word), word))
    for word in words[:-1]:
        pages = ", ".join(f"#{page}" for page, each in zip(run, placements, strict=True) if each == word)
        yield from wrap(f"{placements.count(word)} {word}: {pages}", indent)
    yield f"{indent}{placements.count(words[-1])} {words[-1]}: the others"
