"""Which pages stay on the device when no k is given.

As many as fit, and the streamed ones spread evenly among them in order of use, so that each copy has the compute of
residents to hide behind (design.md, decision 5). For a cyclic order of uses a fixed set of residents moves the fewest
bytes: no policy of exchanging them does better (Belady).
"""

from __future__ import annotations

from collections.abc import Sequence

WINDOW = 2
"""Slots for what is streamed: one is read while the other is filled."""


def choose_residents(slot_bytes: Sequence[int], capacity_bytes: int, settled: frozenset[int]) -> tuple[int, ...]:
    """Indices of the pages that stay.

    Pages of like size, the normal case, are placed optimally: fewest bytes are streamed. Where sizes differ, the
    number of streamed pages is the smallest for which an even spread fits; a cleverer choice of which could stream
    less, by at most the largest page per streamed one.

    Args:
        slot_bytes: bytes of each page on the device, in order of use.
        capacity_bytes: what residents and two slots of the largest streamed page may take.
        settled: pages that earlier graphs of the model keep on the device; they stay.
    """
    free = [page for page in range(len(slot_bytes)) if page not in settled]
    for n_streamed in range(len(free) + 1):
        streamed = {free[(2 * index + 1) * len(free) // (2 * n_streamed)] for index in range(n_streamed)}
        residents = tuple(page for page in range(len(slot_bytes)) if page not in streamed)
        slots_bytes = WINDOW * max((slot_bytes[page] for page in streamed), default=0)
        if sum(slot_bytes[page] for page in residents) + slots_bytes <= capacity_bytes:
            return residents
    return tuple(sorted(settled))
