"""What the tests of the planner share: orders of reading drawn at random, and a replay that trusts nothing."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from spcompile.planner.window import Stay

Reads = tuple[tuple[int, ...], ...]


def chain(n_pages: int) -> Reads:
    return tuple((page,) for page in range(n_pages))


def there_and_back(n_pages: int) -> Reads:
    """Forward, then backward."""
    return chain(n_pages) + chain(n_pages)[::-1]


def in_order_of_use(reads: Sequence[Sequence[int]]) -> Reads:
    """The same reads with pages numbered in order of first use."""
    number: dict[int, int] = {}
    return tuple(tuple(number.setdefault(page, len(number)) for page in pages) for pages in reads)


ANY_READS = st.lists(st.lists(st.integers(0, 7), max_size=4, unique=True), max_size=12).map(in_order_of_use)
READS = st.integers(0, 12).map(chain) | st.integers(0, 7).map(there_and_back) | ANY_READS


@st.composite
def windows(draw: st.DrawFn) -> tuple[Reads, int, int]:
    """Reads, k and m that are allowed together; k may be more than all pages."""
    reads = draw(READS)
    least = max((1, *map(len, reads)))
    k = draw(st.integers(least, least + 6))
    return reads, k, draw(st.integers(1, k))


def replay(stays: Sequence[Stay], n_steps: int, n_iterations: int) -> list[list[list[tuple[int, int]]]]:
    """Who holds a slot during each step of each iteration, as (iteration of the stay, index of the stay).

    From a cold start, position by position: at each, what ended is taken out first, then copies start. Fails where a
    stay ends that never began, or where the same page is held twice.
    """
    held: list[tuple[int, int]] = []
    history: list[list[list[tuple[int, int]]]] = []
    for iteration in range(n_iterations):
        history.append([])
        for position in range(n_steps + 1):
            for index, stay in enumerate(stays):
                if stay.end_step == position:
                    held.remove((iteration, index))
            for index, stay in enumerate(stays):
                if stay.start_step == position > 0 and position < n_steps:
                    held.append((iteration, index))
                if stay.start_step <= 0 and position == 0 and (iteration, index) not in held:
                    held.append((iteration, index))
            for index, stay in enumerate(stays):
                if stay.start_step <= 0 and n_steps + stay.start_step == position > 0:
                    held.append((iteration + 1, index))
            pages = [stays[index].page for _, index in held]
            assert len(set(pages)) == len(pages), f"a page is held twice at {position} of {iteration}: {pages}"
            if position < n_steps:
                history[-1].append(list(held))
    return history
