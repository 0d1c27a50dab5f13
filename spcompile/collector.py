"""Python's collector of cyclic garbage, paused.

Tracing and compiling make millions of objects that stay, and the collector would go through all of them again and
again: a tenth of the first call.
"""

from __future__ import annotations

import gc


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
            gc.enable()

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *_: object) -> None:
        self.end()
