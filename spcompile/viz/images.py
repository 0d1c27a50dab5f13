"""Lanes, memory and trade-off curve as an image, for papers and reports: SVG or PNG, drawn by matplotlib.

One figure holds all graphs, one below the other. matplotlib is an extra: ``pip install 'spcompile[viz]'``. It is used
through its object interface, so nothing of the caller's own figures, backends or styles changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spcompile.errors import OptionError
from spcompile.text import format_bytes
from spcompile.viz.view import Lanes, View, Wait

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

WAIT_COLOUR, WAIT_LINE, WAIT_GROUND = "#b3261e", "#e3a5a0", "#f9dedc"

WIDTH, LANE_HEIGHT, MEMORY_HEIGHT, CURVE_HEIGHT = 12.0, 0.42, 2.2, 2.6
"""Inches."""

AXIS_WIDTH = WIDTH - 2.0
"""About what is left for the axis of time beside labels and legend."""

CHARACTER = 0.075
"""Width of a letter in inches, at the size of the labels."""

LEAST_PART, THIN_PART = 1 / 1200, 1 / 150
"""Parts of the axis: bars are drawn no narrower than the first, and below the second without lines around them."""

PNG_DPI = 150

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "spcompile",  # names of the parts of a file are not drawn at random
}
"""Typed loosely, as matplotlib's types list the settings of its own version."""


def draw(views: Sequence[View], path: Path) -> None:
    """Write an image of all graphs. Equal plans have equal files.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            "images need matplotlib: pip install 'spcompile[viz]', or save the picture as .html or .json"
        ) from error
    heights = [height for view in views for height in _heights(view)]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.75 * len(heights)), layout="constrained", facecolor="white")
        axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        remaining = iter(axes)
        for view in views:
            _draw_view(view, remaining)
        figure.savefig(path, dpi=PNG_DPI, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _heights(view: View) -> list[float]:
    lanes = [0.3 + LANE_HEIGHT * len(_tracks(each)) for each in view.lanes]
    return [*lanes, MEMORY_HEIGHT, *([CURVE_HEIGHT] if view.curve else [])]


def _draw_view(view: View, remaining: Any) -> None:
    end = max((lanes.end for lanes in view.lanes), default=0.0) or 1.0
    scale, unit = (1.0, "step") if view.unit == "step" else (1e3, "ms") if end >= 2e3 else (1.0, "us")
    for index, lanes in enumerate(view.lanes):
        axes = next(remaining)
        name = lanes.title if len(view.lanes) > 1 else ""
        title = "\n".join(filter(None, (view.title, view.summary, name))) if index == 0 else name
        axes.set_title(title, loc="left", fontsize=9, wrap=True)
        _draw_lanes(axes, view, lanes, end, scale)
    axes = next(remaining)
    _draw_memory(axes, view, end, scale)
    axes.set_xlabel(f"time in {unit}" if view.unit == "us" else "step")
    if view.curve:
        _draw_curve(next(remaining), view)


def _tracks(lanes: Lanes) -> list[tuple[str, int]]:
    return list(dict.fromkeys((bar.lane, bar.track) for bar in sorted(
        lanes.bars, key=lambda bar: (lanes.lanes.index(bar.lane), bar.track))))  # fmt: skip


def _draw_lanes(axes: Axes, view: View, lanes: Lanes, end: float, scale: float) -> None:
    tracks = _tracks(lanes)
    for wait in lanes.waits:
        _draw_wait(axes, wait, end, scale)
    for bar in lanes.bars:
        row = view.rows[bar.row]
        start = max(0.0, bar.start)
        width = max(min(end, bar.end) - start, end * LEAST_PART)
        y = tracks.index((bar.lane, bar.track))
        line = 0.3 if width > end * THIN_PART else 0.0
        axes.barh(y, width / scale, 0.8, start / scale, color=row.colour, edgecolor="white", linewidth=line)
        if bar.arrives > max(start, bar.start):  # its copy may still be on its way
            part = (min(end, bar.arrives) - start) / scale
            axes.barh(y, part, 0.8, start / scale, color="none", edgecolor="white", hatch="////", linewidth=0)
        label = next((name for name in (bar.label, row.short) if _fits(name, width / end)), None)
        if label is not None:
            text = _letter(axes, (start + width / 2) / scale, y, label, row.ink)
            text.set_bbox({"facecolor": row.colour, "edgecolor": "none", "pad": 0.8})
    axes.set_yticks(range(len(tracks)), [lane if track == 0 else "" for lane, track in tracks])
    axes.set_ylim(max(1, len(tracks)) - 0.5, -0.5)
    axes.set_xlim(0, end / scale)
    axes.tick_params(labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_wait(axes: Axes, wait: Wait, end: float, scale: float) -> None:
    start, stop = max(0.0, wait.start), min(end, wait.end)
    hatch = "////" if stop - start > end * THIN_PART else None
    place = (0, (stop - start) / scale, 0.8, start / scale)
    axes.barh(*place, color=WAIT_GROUND, edgecolor=WAIT_LINE, hatch=hatch, linewidth=0)
    if _fits(wait.cause, (stop - start) / end):
        text = _letter(axes, (start + stop) / 2 / scale, 0, wait.cause, WAIT_COLOUR)
        text.set_bbox({"facecolor": WAIT_GROUND, "edgecolor": "none", "pad": 0.8})


def _fits(name: str, part: float) -> bool:
    """Whether a name fits into this part of the axis of time."""
    return (len(name) + 1) * CHARACTER < part * AXIS_WIDTH


def _letter(axes: Axes, x: float, y: float, label: str, colour: str) -> Text:
    """A label in the middle of a bar."""
    place = {"horizontalalignment": "center", "verticalalignment": "center"}
    return axes.text(x, y, label, place, color=colour, fontsize=7, parse_math=False, clip_on=True)


def _draw_memory(axes: Axes, view: View, end: float, scale: float) -> None:
    memory = view.memory
    unit, size = _byte_unit(max(memory.peak_bytes, memory.budget_bytes or 0))
    times = [time / scale for time in (*memory.times, view.lanes[0].end)]
    below = [0.0] * len(memory.times)
    for share in memory.shares:
        above = [low + nbytes / size for low, nbytes in zip(below, share.nbytes, strict=True)]
        axes.fill_between(
            times,
            [*below, below[-1]],
            [*above, above[-1]],
            step="post",
            color=share.colour,
            linewidth=0,
            label=share.name,
        )
        below = above
    levels = ((memory.budget_bytes, "budget", "--"), (memory.measured_peak_bytes, "measured peak", ":"))
    for nbytes, name, line in levels:
        if nbytes is not None:
            axes.axhline(nbytes / size, color=WAIT_COLOUR, linestyle=line, label=f"{name}, {format_bytes(nbytes)}")
    axes.set_ylabel(f"device memory, {unit}")
    axes.set_xlim(0, end / scale)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False, reverse=True)


def _draw_curve(axes: Axes, view: View) -> None:
    unit, size = _byte_unit(max(point.peak_bytes for point in view.curve))
    curve = [point for point in view.curve if not point.is_chosen]
    axes.step(
        [point.peak_bytes / size for point in curve],
        [point.iteration_us / 1e3 for point in curve],
        where="post",
        marker="o",
        color="#0072b2",
        label="other plans",
    )
    for point in view.curve:
        if point.is_chosen:
            axes.plot(point.peak_bytes / size, point.iteration_us / 1e3, "D", color="#e69f00", label="this plan")
    if view.memory.budget_bytes is not None:
        axes.axvline(view.memory.budget_bytes / size, color=WAIT_COLOUR, linestyle="--", label="budget")
    axes.set_xlabel(f"device memory, most at any moment, {unit}")
    axes.set_ylabel("iteration in ms")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False)


def _byte_unit(nbytes: int) -> tuple[str, int]:
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    return next(((name, size) for name, size in units if nbytes >= size), ("bytes", 1))
