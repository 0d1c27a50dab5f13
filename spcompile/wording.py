"""Bytes, times, counts and names as people read them: what all texts of plans are put together from.

Plain ASCII, and nothing here fails on what is wrong: a name that could break a line is escaped, one that is too long is
shown by its two ends, a list that is too long says how many more there are.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

WIDTH = 80
"""Columns of the widest line: a terminal has as many unless somebody widened it, and a text that depended on the one
it is printed in could neither be compared with ``diff`` nor be read back."""

LineKey = tuple[str, int | None]
"""What a line speaks of: ``("header", None)``, or ``("page" | "slot" | "step" | "interval", index)``."""

Lines = Iterator[tuple[str, Sequence[LineKey]]]
"""Lines, each with what it speaks of."""


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


def format_us(us: float) -> str:
    """A time for people, three digits or more: ``"245 ms"``, ``"1.20 s"``, ``"35.2 us"``."""
    for unit, scale in (("us", 1.0), ("ms", 1e3)):
        if abs(us) < 999.5 * scale:
            return f"{_digits(us / scale)} {unit}"
    return f"{_digits(us / 1e6)} s"


def _digits(number: float) -> str:
    if number == 0:
        return "0"
    whole = len(str(int(abs(number)))) if abs(number) >= 1 else 0
    return f"{number:,.{max(0, 3 - max(1, whole))}f}"


def count(number: int, one: str, many: str | None = None) -> str:
    """``"1 copy"``, ``"3 copies"``."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def printable(name: str) -> str:
    """The name, escaped where it could break the line or is not ASCII."""
    return name if name.isascii() and name.isprintable() else ascii(name)


def fit(name: str, columns: int) -> str:
    """The name, or its two ends where it is longer than ``columns``."""
    name = printable(name)
    if len(name) <= columns:
        return name
    tail = (columns - 2) * 2 // 3  # the end of a qualified name tells more than its start
    return f"{name[: columns - 2 - tail]}..{name[len(name) - tail :]}"


def fit_list(words: Sequence[str], columns: int, start: str = "") -> str:
    """The words with commas between them; where they are too many for ``columns``, how many more there are."""
    line = start + ", ".join(words)
    shown = len(words)
    while len(line) > columns and shown > 0:
        shown -= 1
        line = start + ", ".join([*words[:shown], f"+{len(words) - shown} more"])
    return line


def wrap(text: str, indent: str, first: str | None = None) -> list[str]:
    """The text on as many lines as it takes, each behind ``indent``, the first one behind ``first`` if it is given."""
    return textwrap.wrap(text, WIDTH, initial_indent=indent if first is None else first, subsequent_indent=indent)


def bands(start: int, stop: int, per_band: int) -> Iterator[range]:
    """``range(start, stop)`` in pieces of ``per_band``, which is 1 where it is less."""
    per_band = max(1, per_band)
    for first in range(start, stop, per_band):
        yield range(first, min(first + per_band, stop))
