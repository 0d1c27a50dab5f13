"""Copies start as early as bytes allow, in order, and never too late."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spcompile.planner.early import Visit, start_early, visits_of
from spcompile.planner.window import Stay, plan_window
from tests.planner.planner_cases import READS, Reads, chain


def held_at(stays: tuple[Stay, ...], position: int, n_steps: int) -> list[int]:
    """Indices of what is held during a step of a warm iteration, copies for the next one included."""
    return [
        index
        for index, stay in enumerate(stays)
        for shift in (0, n_steps)
        if stay.start_step <= position - shift < stay.end_step
    ]


def least_room(reads: Reads, sizes: dict[int, int]) -> int:
    return max((sum(sizes[page] for page in pages) for pages in reads), default=0)


@given(READS, st.lists(st.integers(1, 5), min_size=12, max_size=12), st.integers(0, 12), st.booleans())
def test_whatever_is_read_is_there_and_fits(reads: Reads, sizes: list[int], more: int, wraps: bool) -> None:
    room = least_room(reads, dict(enumerate(sizes))) + more
    visits = visits_of(reads)
    stays = start_early(visits, [sizes[visit.page] for visit in visits], len(reads), room, wraps)
    assert [stay.page for stay in stays] == [visit.page for visit in visits]
    assert all(one.start_step <= other.start_step for one, other in pairwise(stays))
    for step, pages in enumerate(reads):
        held = [stays[index].page for index in held_at(stays, step, len(reads))]
        assert set(pages) <= set(held)
        assert len(held) == len(set(held)), "no page has two places"
        assert sum(sizes[page] for page in held) <= room
    assert wraps or all(stay.start_step >= 0 for stay in stays)


@given(READS, st.integers(0, 8), st.booleans())
def test_no_copy_could_start_one_step_earlier(reads: Reads, more: int, wraps: bool) -> None:
    sizes = dict.fromkeys(range(12), 1)
    room = least_room(reads, sizes) + more
    visits = visits_of(reads)
    stays = start_early(visits, [1] * len(visits), len(reads), room, wraps)
    for index, stay in enumerate(stays):
        if stay.start_step <= 0:
            continue
        before = [stays[each] for each in held_at(stays, stay.start_step - 1, len(reads))]
        is_first = index == 0 or stays[index - 1].start_step < stay.start_step
        assert not is_first or len(before) >= room or stay.page in [each.page for each in before]


@given(st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_alike_pages_go_through_the_window_of_the_paper(n_pages: int, k: int, wraps: bool) -> None:
    stays = start_early(visits_of(chain(n_pages)), [7] * n_pages, n_pages, 7 * min(k, n_pages), wraps)
    assert stays == plan_window(chain(n_pages), min(k, n_pages), 1, wraps)


def test_the_example() -> None:
    stays = start_early(visits_of(chain(4)), [2, 1, 1, 2], 4, 4, True)
    assert stays == (Stay(0, -1, 1), Stay(1, 0, 2), Stay(2, 0, 3), Stay(3, 1, 4))


def test_visits_are_runs_of_steps() -> None:
    reads = ((0,), (0, 1), (1,), (0,), (), (0,))
    assert visits_of(reads) == (Visit(0, 0, 1), Visit(1, 1, 2), Visit(0, 3, 3), Visit(0, 5, 5))


def test_a_step_that_needs_more_room() -> None:
    with pytest.raises(ValueError, match="step 1 needs more than 3 bytes"):
        start_early(visits_of(((0,), (1, 2))), [1, 2, 2], 2, 3, True)
