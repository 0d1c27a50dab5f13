"""How far long work has come: a line on stderr with rate and time left, and nothing where nobody would read it.

    with progress("pinning weights", total_bytes, "B") as advance:
        for block in blocks:
            ...
            advance(block.nbytes)

    pinning weights:  42%|#####7       | 5.64G/13.4G [00:03<00:04, 1.71GB/s]

It is shown where stderr is a terminal (``$SPCOMPILE_PROGRESS`` forces it on or off) and only once the work has taken
`DELAY_S`; at its end it is wiped out. Elsewhere ``advance`` does nothing and tqdm is not even imported.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from spcompile.environment import wants_progress

DELAY_S = 1.0
"""Shorter work shows nothing: it would only flicker."""

INTERVAL_S = 0.2
"""Between two updates of the line."""

Advance = Callable[[int], object]
"""Called with how much of the total is done in addition."""


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Advance]:
    """Show the progress of what is done inside.

    Args:
        what: the work, in a few words.
        total: how much there is to do, in units.
        unit: ``"B"`` for bytes, which are shown with prefixes; else the name of one piece.

    Raises:
        OptionError: the environment variable is wrong.
    """
    if not is_shown():
        yield _nothing
        return
    from tqdm import tqdm  # only where it is needed

    screen = shutil.get_terminal_size()  # tqdm by itself shows nothing on a terminal that does not tell its size

    class Bar(tqdm):  # type: ignore[misc]  # it ships no types
        monitor_interval = 0  # no thread of tqdm's own beside the compiler's

    with Bar(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        file=sys.stderr,
        delay=DELAY_S,
        mininterval=INTERVAL_S,
        miniters=1,
        leave=False,
        ncols=screen.columns,
        nrows=screen.lines,
    ) as bar:
        yield bar.update


def is_shown() -> bool:
    """Whether progress would be shown now."""
    wanted = wants_progress()
    if wanted is not None:
        return wanted
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def _nothing(_: int) -> None:
    pass
