"""What `Plan.visualize` returns: shows itself in a notebook, and writes files.

The suffix of a file says what is written: ``.html`` the page, ``.svg`` and ``.png`` an image, ``.json`` a trace for
Perfetto or chrome://tracing. In a notebook the page stands in a frame, so that its styles and scripts stay there.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spcompile.errors import OptionError
from spcompile.viz.chrome_trace import make_trace
from spcompile.viz.images import draw
from spcompile.viz.page import make_page
from spcompile.viz.view import View

FRAME_HEIGHT = 960
"""Of the frame in a notebook, in pixels: head, lanes and memory; the rest is scrolled to."""


@dataclass(frozen=True)
class Picture:
    """Plans as a picture.

    Attributes:
        views: what is shown of each graph.
    """

    views: tuple[View, ...]

    def save(self, path: str | Path) -> Path:
        """Write a file, of the kind that the suffix says; all graphs are in it.

        Returns:
            The path.

        Raises:
            OptionError: there is no such kind, or matplotlib is missing for an image.
        """
        path = Path(path)
        write = WRITERS.get(path.suffix.lower())
        if write is None:
            raise OptionError(
                f"a picture is written as {', '.join(WRITERS)}, and {path.name!r} has "
                f"{f'the suffix {path.suffix!r}' if path.suffix else 'no suffix'}: give the file one of these"
            )
        write(self.views, path)
        return path

    def to_html(self) -> str:
        """The page."""
        return make_page(self.views)

    def _repr_html_(self) -> str:
        page = html.escape(self.to_html(), quote=True)
        style = f"width: 100%; height: {FRAME_HEIGHT}px; border: 0"
        return f'<iframe title="superpipeline plan" style="{style}" srcdoc="{page}"></iframe>'

    def __repr__(self) -> str:
        return f"Picture({'; '.join(view.title for view in self.views)}): save it as {', '.join(WRITERS)}"


def _write_page(views: Sequence[View], path: Path) -> None:
    path.write_text(make_page(views), encoding="utf-8")


def _write_trace(views: Sequence[View], path: Path) -> None:
    path.write_text(make_trace(views), encoding="utf-8")


WRITERS: dict[str, Callable[[Sequence[View], Path], None]] = {
    ".html": _write_page,
    ".svg": draw,
    ".png": draw,
    ".json": _write_trace,
}
"""What writes a file, by its suffix."""
