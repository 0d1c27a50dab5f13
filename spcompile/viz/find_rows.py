"""The rows of the table of layers, and which row each step and page belongs to.

A row is a layer, or a piece outside the layers (embedding, head), in the order in which they run. A page belongs to the
row that reads it first. Colours go by row, so that one layer has one colour in every lane: a scale of rising lightness,
which people who confuse red and green read as well, every other one a little darker, so that neighbours can be told
apart; grey for what is outside the layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from spcompile.ir import Plan
from spcompile.lanes import Span, Stall
from spcompile.viz.view import Row, Work

LAYER_COLOURS = (
    *("#6a4c9c", "#5566b0", "#3f80b5", "#2f97a8", "#2aa88f"),
    *("#48b878", "#7cc661", "#b0d04a", "#dcd53c"),
)
"""The hues of matplotlib's viridis in rising lightness, its dark end lighter, so that it stands out on a dark page."""

OUTSIDE_COLOURS = ("#8c8c8c", "#a6a6a6")


@dataclass(frozen=True)
class RowIndex:
    """Rows by name, and the row of each step and page."""

    names: tuple[str, ...]
    layers: frozenset[str]
    of_step: tuple[int, ...]
    of_page: tuple[int, ...]
    by_label: Mapping[str, int]

    def of_span(self, span: Span) -> int:
        """The row whose page is copied, whose segment runs or whose gradients leave."""
        if span.lane == "H2D" or not 0 <= span.step < len(self.of_step):
            return self.by_label.get(span.label, self.of_step[span.step])
        return self.of_step[span.step]

    def of_stall(self, stall: Stall) -> int:
        """The row that waits; at the end of an iteration, which has no step, the one that is waited for."""
        if stall.step < len(self.of_step):
            return self.of_step[stall.step]
        return self.by_label.get(stall.page, self.of_step[-1])


def index_rows(plan: Plan) -> RowIndex:
    """Which row each step and page belongs to."""
    names = [step.layer if step.layer is not None else outside_name(step.segment) for step in plan.steps]
    index = {name: row for row, name in enumerate(dict.fromkeys(names))}
    of_step = tuple(index[name] for name in names)
    of_page: dict[int, int] = {}
    for step, row in zip(plan.steps, of_step, strict=True):
        for page in step.reads:
            of_page.setdefault(page, row)
    for page, each in enumerate(plan.pages):  # that no step reads
        if page not in of_page:
            of_page[page] = index.setdefault(each.name, len(index))
    segments = {step.segment: row for step, row in zip(plan.steps, of_step, strict=True)}
    return RowIndex(
        names=tuple(index),
        layers=frozenset(step.layer for step in plan.steps if step.layer is not None),
        of_step=of_step,
        of_page=tuple(of_page[page] for page in range(len(plan.pages))),
        by_label=segments | {page.name: of_page[index] for index, page in enumerate(plan.pages)},
    )


def outside_name(segment: str) -> str:
    """The name that segments of one piece outside the layers share: ``"embed"`` of ``"embed.backward#1"``."""
    return re.sub(r"#[0-9]+$", "", segment).removesuffix(".backward") or segment


def make_rows(
    plan: Plan, rows: RowIndex, predicted: Sequence[Work] | None, measured: Sequence[Work] | None
) -> tuple[Row, ...]:
    """All rows.

    Args:
        plan: what they belong to.
        rows: as from `index_rows`.
        predicted, measured: by row, as from `work_of`; None where there are none.
    """
    pages: list[list[int]] = [[] for _ in rows.names]
    for page, row in enumerate(rows.of_page):
        pages[row].append(page)
    gradients_bytes = [0] * len(rows.names)
    for step, row in zip(plan.steps, rows.of_step, strict=True):
        gradients_bytes[row] += step.gradients_bytes
    shorts = short_names(rows.names, rows.layers)
    colours = row_colours([name in rows.layers for name in rows.names])
    return tuple(
        Row(
            name=name,
            short=shorts[row],
            is_layer=name in rows.layers,
            colour=colours[row],
            ink=ink_on(colours[row]),
            nbytes=sum(plan.pages[page].nbytes for page in pages[row]),
            placement=_placement(plan, rows, row, pages[row]),
            gradients_bytes=gradients_bytes[row],
            predicted=predicted[row] if predicted is not None else None,
            measured=measured[row] if measured is not None else None,
        )
        for row, name in enumerate(rows.names)
    )


def work_of(rows: RowIndex, spans: Iterable[Span], stalls: Iterable[Stall], iteration: int) -> list[Work]:
    """The times of each row in one iteration; ``stalls`` are those of that iteration alone."""
    us = {lane: [0.0] * len(rows.names) for lane in ("compute", "H2D", "D2H")}
    for span in spans:
        if span.iteration == iteration:
            us[span.lane][rows.of_span(span)] += span.end_us - span.start_us
    waits: list[list[Stall]] = [[] for _ in rows.names]
    for stall in stalls:
        waits[rows.of_stall(stall)].append(stall)
    return [
        Work(
            compute=us["compute"][row],
            copy=us["H2D"][row],
            send=us["D2H"][row],
            stall=sum(stall.us for stall in each),
            waits=tuple(dict.fromkeys((stall.cause, stall.page) for stall in each)),
        )
        for row, each in enumerate(waits)
    ]


def short_names(names: Sequence[str], layers: frozenset[str]) -> list[str]:
    """Names of layers without what all layers begin with, up to a dot; other names as they are."""
    least, most = (min(layers), max(layers)) if len(layers) > 1 else ("", "")  # whatever both begin with, all do
    same = next((at for at, pair in enumerate(zip(least, most, strict=False)) if pair[0] != pair[1]), len(least))
    start = least.rfind(".", 0, same) + 1
    return [name[start:] if name in layers else name for name in names]


def row_colours(are_layers: Sequence[bool]) -> list[str]:
    """A colour for each row."""
    n_layers, seen = sum(are_layers), 0
    colours: list[str] = []
    for is_layer in are_layers:
        if not is_layer:
            colours.append(OUTSIDE_COLOURS[(len(colours) - seen) % 2])
            continue
        colours.append(_mixed(LAYER_COLOURS, seen / max(1, n_layers - 1), 0.84 if seen % 2 else 1.0))
        seen += 1
    return colours


def ink_on(colour: str) -> str:
    """Black or white, whichever is read better on a colour (WCAG 2.2: the larger contrast of luminances)."""
    red, green, blue = (_linear(part / 255) for part in _parts(colour))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


def _mixed(scale: Sequence[str], at: float, shade: float) -> str:
    place = at * (len(scale) - 1)
    low = min(int(place), len(scale) - 2)
    pairs = zip(_parts(scale[low]), _parts(scale[low + 1]), strict=True)
    return "#" + "".join(f"{round(shade * (one + (other - one) * (place - low))):02x}" for one, other in pairs)


def _parts(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4


def _placement(plan: Plan, rows: RowIndex, row: int, pages: Sequence[int]) -> str:
    found = list(dict.fromkeys(word for page in pages for word in placements(plan, page)))
    if found:
        return " + ".join(found)
    owners = {rows.of_page[page] for step, each in zip(plan.steps, rows.of_step, strict=True) if each == row
              for page in step.reads}  # fmt: skip
    return f"shared with {', '.join(rows.names[owner] for owner in sorted(owners))}" if owners else "no pages"


def placements(plan: Plan, page: int) -> list[str]:
    """Where a page is, in the words of design.md; a page that is loaded twice says so."""
    loads = Counter(interval.page for interval in plan.intervals)[page]
    words = [f"streamed {loads}x" if loads > 1 else "streamed"] if loads else []
    if page in plan.mapped:
        words.insert(0, "mapped")
    return ["resident"] if page in plan.residents else words or ["nowhere"]
