"""Python's collector of cyclic garbage, paused.

Tracing and compiling make a million objects. About half of them stay, and the collector would go through all of them
again and again: a tenth of the first call. So it rests, and goes through them once at the end.
"""

from __future__ import annotations

import gc

FROZEN_BY_PYTHON = 1000
"""At most so many objects an interpreter has frozen by itself (CPython 3.12: 375). Who freezes those of a process with
torch in it freezes hundreds of thousands."""


class CollectorPause:
    """Between `begin` and `end` nothing is collected. Whoever had the collector off already finds it off afterwards."""

    def __init__(self) -> None:
        self._was_enabled = False

    def begin(self) -> None:
        self._was_enabled = gc.isenabled() or self._was_enabled
        gc.disable()

    def end(self) -> None:
        if self._was_enabled:
            self._was_enabled = False
            gc.collect(0)
            _count_all_as_old()
            gc.enable()

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *_: object) -> None:
        self.end()


def _count_all_as_old() -> None:
    """Put what has survived in the oldest generation at once.

    Otherwise it would be gone through twice more within moments, as the first and as the second generation: 0.4 s of 12
    for 32 layers, in which next to nothing is found. Objects of a user who has frozen some would be thawed: then not.
    """
    if gc.get_freeze_count() <= FROZEN_BY_PYTHON:
        gc.freeze()
        gc.unfreeze()
