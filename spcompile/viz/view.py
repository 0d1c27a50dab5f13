"""All that a picture of a plan shows, as plain data.

What: lanes, memory over time, rows of the table of layers, lines of the rewritten graph, the trade-off curve, figures
and words. Why one structure: the page, the images and the trace are three drawings of the same numbers, and a test can
read them back. Nothing here is computed; ``make_view.py`` does that, once per picture.

Times are in ``View.unit``, counted from the start of the first iteration that is shown: microseconds, or steps where
nothing is known of the machine. They are negative for what began before. Bytes are whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """One stretch of work in a lane.

    Attributes:
        lane: ``"compute"``, ``"H2D"``, ``"D2H"``; or ``"slots"`` where no times are known: the stay of a page.
        label: name of the segment or page.
        row: index into ``View.rows``.
        step: that runs; the first that reads what is copied (-1 if none does); that made what is sent.
        interval: index into ``Plan.intervals`` of what is copied or stays; None for anything else.
        iteration: which it belongs to, 0 for the first that is shown.
        start, end: when.
        arrives: for a stay, until when its page may take to arrive; ``start`` for anything else.
        nbytes: what is copied or sent; for a run, what it reads in place.
        track: place in its lane, where several bars overlap in it.
    """

    lane: str
    label: str
    row: int
    step: int
    interval: int | None
    iteration: int
    start: float
    end: float
    arrives: float
    nbytes: int
    track: int = 0


@dataclass(frozen=True)
class Wait:
    """A stall: compute waits. ``cause`` is a word of `lanes.Stall`, ``page`` what it waits for."""

    row: int
    step: int
    iteration: int
    start: float
    end: float
    page: str
    cause: str


@dataclass(frozen=True)
class Part:
    """A stretch of time with a name: an iteration, its forward, its backward."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Lanes:
    """What happens in the iterations that are shown.

    Attributes:
        title: ``"predicted"``, ``"measured"`` or ``"planned"``.
        lanes: names of the lanes that have bars, from top to bottom.
    """

    title: str
    lanes: tuple[str, ...]
    bars: tuple[Bar, ...]
    waits: tuple[Wait, ...]
    parts: tuple[Part, ...]

    @property
    def end(self) -> float:
        """When the last iteration that is shown ends."""
        return max((part.end for part in self.parts), default=0.0)


@dataclass(frozen=True)
class Share:
    """A part of device memory, and what it takes from each time on; see `Memory`."""

    name: str
    colour: str
    meaning: str
    nbytes: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """Device memory over time: a staircase of shares, the lowest one first.

    Attributes:
        times: where a step of the staircase begins, the first at 0.
        shares: that take anything at any time.
        peak_bytes: as `Plan.peak_bytes`.
        budget_bytes: what may be taken; None where nothing was said.
        measured_peak_bytes: of the recording; None where there is none.
    """

    times: tuple[float, ...]
    shares: tuple[Share, ...]
    peak_bytes: int
    budget_bytes: int | None
    measured_peak_bytes: int | None

    @property
    def totals_bytes(self) -> tuple[int, ...]:
        """The height of the staircase."""
        return tuple(sum(share.nbytes[index] for share in self.shares) for index in range(len(self.times)))


@dataclass(frozen=True)
class Work:
    """Times of one row in one iteration. ``waits`` are the causes of its stalls, each with what is waited for."""

    compute: float
    copy: float
    send: float
    stall: float
    waits: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Row:
    """One layer, or one piece outside the layers.

    Attributes:
        name: of the layer; of the segment or page for what is outside.
        short: the part of the name in which it differs from the others.
        is_layer: whether it is a layer.
        colour, ink: its colour in all pictures, and that of text on it.
        nbytes: its weights; a page that several rows read counts for the first.
        placement: in words: resident, streamed, mapped.
        gradients_bytes: what leaves for host memory.
        predicted, measured: None where no times are known, or nothing was recorded.
    """

    name: str
    short: str
    is_layer: bool
    colour: str
    ink: str
    nbytes: int
    placement: str
    gradients_bytes: int
    predicted: Work | None
    measured: Work | None


@dataclass(frozen=True)
class Line:
    """One line of the rewritten graph, with what it means and the bars that it speaks of (see `Bar`)."""

    code: str
    meaning: str
    kind: str
    row: int
    step: int
    interval: int | None


@dataclass(frozen=True)
class CurvePoint:
    """One plan on the trade-off curve, and in words."""

    peak_bytes: int
    iteration_us: float
    meaning: str
    is_chosen: bool


@dataclass(frozen=True)
class Figure:
    """A number that the page shows, and how: ``value`` is exact, ``text`` for people."""

    name: str
    value: float
    text: str
    note: str


@dataclass(frozen=True)
class View:
    """See the module docstring.

    Attributes:
        title, summary: the head of the page.
        notes: what is not known, or to be known before one believes a figure.
        unit: ``"us"`` or ``"step"``.
        figures: by name, the ones worth a tile first.
        lanes: predicted, and measured where there is a recording.
        curve: of memory against time; empty where nothing is known of the machine.
        causes: the words for what compute waits for, of the causes that occur.
        words: glossary, of the words that the picture uses.
    """

    title: str
    summary: str
    notes: tuple[str, ...]
    unit: str
    figures: tuple[Figure, ...]
    lanes: tuple[Lanes, ...]
    memory: Memory
    rows: tuple[Row, ...]
    lines: tuple[Line, ...]
    curve: tuple[CurvePoint, ...]
    causes: tuple[tuple[str, str], ...]
    words: tuple[tuple[str, str], ...]

    def figure(self, name: str) -> Figure:
        """The figure of this name.

        Raises:
            KeyError: there is none.
        """
        found = next((each for each in self.figures if each.name == name), None)
        if found is None:
            raise KeyError(name)
        return found
