"""The moving window: replayed step by step, cold and warm, and compared with the paper's window on chains."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spcompile.planner.window import Stay, plan_window
from tests.planner.planner_cases import Reads, chain, replay, there_and_back, windows

CHAINS = [(n, k, m) for n, k in product(range(10), range(1, 12)) for m in range(1, k + 1)]


def spans(reads: Reads, k: int, m: int, wraps: bool) -> list[tuple[int, int, int]]:
    return [(stay.page, stay.start_step, stay.end_step) for stay in plan_window(reads, k, m, wraps)]


@settings(max_examples=1000)
@given(windows(), st.booleans())
def test_every_step_finds_its_pages_and_room(window: tuple[Reads, int, int], wraps: bool) -> None:
    reads, k, m = window
    stays = plan_window(reads, k, m, wraps)
    for iteration, steps in enumerate(replay(stays, len(reads), 4)):
        for step, held in enumerate(steps):
            assert len(held) <= k
            own = {stays[index].page for owner, index in held if owner == iteration}
            assert own.issuperset(reads[step])


@settings(max_examples=1000)
@given(windows(), st.booleans())
def test_stays_are_tight(window: tuple[Reads, int, int], wraps: bool) -> None:
    """Copies are in order, none is useless, and none could have started a step earlier."""
    reads, k, m = window
    stays = plan_window(reads, k, m, wraps)
    starts = [stay.start_step for stay in stays]
    assert starts == sorted(starts)
    for stay in stays:
        assert any(stay.page in pages for pages in reads[max(stay.start_step, 0) : stay.end_step])
        assert (0 if not wraps else 1 - len(reads)) <= stay.start_step < stay.end_step <= len(reads)
        if stay.start_step > 0:
            step = stay.start_step - 1
            assert sum(other.start_step <= step < other.end_step for other in stays) == k


@given(windows())
def test_wrap_changes_only_the_start_set(window: tuple[Reads, int, int]) -> None:
    """An iteration moves the same pages whether it was prefetched or starts cold."""
    cold = plan_window(*window, wraps=False)
    warm = plan_window(*window, wraps=True)
    assert all(stay.start_step >= 0 for stay in cold)
    assert tuple(Stay(stay.page, max(stay.start_step, 0), stay.end_step) for stay in warm) == cold
    pages = dict.fromkeys(page for pages in window[0] for page in pages)
    assert [stay.page for stay in cold if stay.start_step == 0] == list(pages)[: window[1]]


@given(windows())
def test_free_slots_go_to_the_next_iteration(window: tuple[Reads, int, int]) -> None:
    """At the end a slot stays free only where the next page to copy is still held, or nothing is left to copy."""
    reads, k, m = window
    stays = plan_window(reads, k, m, wraps=True)
    start_set = [stay for stay in stays if stay.start_step <= 0]
    last_start = max((stay.start_step for stay in stays), default=0)
    for step in range(max(last_start, 1), len(reads)):
        ahead = [stay for stay in start_set if stay.start_step + len(reads) <= step]
        held = [stay.page for stay in stays if stay.start_step <= step < stay.end_step]
        if len(ahead) < len(start_set) and len(held) + len(ahead) < k:
            assert start_set[len(ahead)].page in held


@pytest.mark.parametrize("wraps", [False, True])
def test_chain_loads_each_page_once_in_batches(wraps: bool) -> None:
    for n, k, m in CHAINS:
        stays = plan_window(chain(n), k, m, wraps)
        assert [stay.page for stay in stays] == list(range(n))
        assert [stay.end_step for stay in stays] == [min((page // m + 1) * m, n) for page in range(n)]


def paper_window(n: int, k: int, m: int) -> list[list[int]]:
    """The window of arXiv 2410.08791 on a chain: what is on the device during each step of a cold iteration."""
    window, used, upcoming, during = list(range(min(k, n))), 0, min(k, n), []
    for _ in range(n):
        during.append(list(window))
        used += 1
        if used == m:
            window = window[m:] + list(range(upcoming, min(upcoming + m, n)))
            used, upcoming = 0, min(upcoming + m, n)
    return during


def test_chain_is_the_window_of_the_paper() -> None:
    for n, k, m in CHAINS:
        stays = plan_window(chain(n), k, m, wraps=False)
        during = [[stay.page for stay in stays if stay.start_step <= step < stay.end_step] for step in range(n)]
        assert during == paper_window(n, k, m), (n, k, m)


def test_k_does_not_divide_chain_m_1() -> None:
    """Five pages on two slots: 01 12 23 34 40, and page 1 has to wait for the slot of page 4."""
    assert spans(chain(5), 2, 1, wraps=True) == [(0, -1, 1), (1, 0, 2), (2, 1, 3), (3, 2, 4), (4, 3, 5)]


def test_chain_in_batches_with_a_short_last_one() -> None:
    assert spans(chain(5), 3, 2, wraps=True) == [(0, -1, 2), (1, -1, 2), (2, 0, 4), (3, 2, 4), (4, 2, 5)]


def test_m_equal_to_k_has_no_overlap() -> None:
    assert spans(chain(4), 2, 2, wraps=True) == [(0, 0, 2), (1, 0, 2), (2, 2, 4), (3, 2, 4)]


def test_page_used_twice_in_the_window_is_copied_once() -> None:
    assert spans(((0,), (1,), (0,)), 2, 1, wraps=False) == [(0, 0, 3), (1, 0, 2)]


def test_page_used_but_not_yet_evicted_is_kept() -> None:
    """m = 2: after step 0 only pages 0 and 1 leave; page 2 is used too, and the scan meets it again behind page 3."""
    assert spans(((0, 1, 2), (3,), (2,)), 3, 2, wraps=False) == [(0, 0, 1), (1, 0, 1), (2, 0, 3), (3, 1, 3)]


def test_turning_point_of_there_and_back_is_copied_once() -> None:
    assert spans(there_and_back(3), 2, 1, wraps=False) == [(0, 0, 1), (1, 0, 5), (2, 1, 4), (0, 4, 6)]


def test_tied_ends_wait_for_their_own_stay() -> None:
    """The page that ends this iteration starts the next one: it never has two slots, and those behind it wait too."""
    assert spans(((0,), (1,), (2,), (0,)), 2, 1, wraps=True) == [(0, 0, 1), (1, 0, 2), (2, 1, 3), (0, 2, 4)]


def test_step_with_several_pages_breaks_a_batch() -> None:
    """m = 2: after step 0 only page 0 is used, but step 1 needs its slot."""
    assert spans(((0,), (1, 2)), 2, 2, wraps=False) == [(0, 0, 1), (1, 0, 2), (2, 1, 2)]


def test_broken_batch_keeps_what_the_next_step_reads() -> None:
    """Step 1 needs the slot of page 1, reads page 0 again, and page 0 is not copied a second time."""
    assert spans(((0, 1), (2, 0)), 2, 2, wraps=False)[0] == (0, 0, 1)
    assert spans(((0, 1, 3), (2, 0, 4)), 4, 4, wraps=False) == [(0, 0, 2), (1, 0, 1), (3, 0, 1), (2, 0, 2), (4, 1, 2)]


def test_nothing_to_stream() -> None:
    assert plan_window((), 1, 1, wraps=True) == ()
    assert plan_window(((), ()), 3, 2, wraps=True) == ()


@pytest.mark.parametrize(("k", "m"), [(1, 0), (1, 2), (0, 0), (0, 1)])
def test_m_out_of_range(k: int, m: int) -> None:
    with pytest.raises(ValueError, match="m must be between 1 and k"):
        plan_window(chain(2), k, m, wraps=True)


def test_k_less_than_one_step_reads() -> None:
    with pytest.raises(ValueError, match="k = 2 is less than the most pages that one step reads, 3"):
        plan_window(((0, 1, 2),), 2, 1, wraps=True)
