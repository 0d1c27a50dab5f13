"""Slots: replayed over several periods, and compared with a list of free slots followed without any theory."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spcompile.planner.slots import assign_slots, hold_slots, most_held, slot_period
from spcompile.planner.window import Stay, plan_window
from tests.planner.planner_cases import Reads, chain, replay, windows

MOST_ITERATIONS = 40
"""Longer periods are not replayed in full: their first iterations and the last one beside the first are."""


def assert_never_shared(stays: Sequence[Stay], n_steps: int, slots: Sequence[Sequence[int]], period: int) -> None:
    """Replay from cold through more than one period: two stays that meet never have the same slot."""
    for steps in replay(stays, n_steps, min(2 * period, MOST_ITERATIONS) + 2):
        for held in steps:
            taken = [slots[index][iteration % period] for iteration, index in held]
            assert len(set(taken)) == len(taken)
    for phase in range(period):  # all phases beside the next one, warm
        for step in range(n_steps):
            own = [slots[index][phase] for index, each in enumerate(stays) if each.start_step <= step < each.end_step]
            next_phase = (phase + 1) % period
            own += [slots[index][next_phase] for index, each in enumerate(stays) if each.start_step + n_steps <= step]
            assert len(set(own)) == len(own)


def free_list_by_hand(stays: Sequence[Stay], n_steps: int, n_slots: int, n_iterations: int) -> list[list[int]]:
    """Slots per iteration, from one list that is followed position by position."""
    free = list(range(n_slots))
    slots: dict[tuple[int, int], int] = {}
    for index, stay in enumerate(stays):
        if stay.start_step <= 0:
            slots[0, index] = free.pop(0)
    for iteration in range(n_iterations):
        for position in range(1, n_steps + 1):
            free += [slots[iteration, index] for index, stay in enumerate(stays) if stay.end_step == position]
            for index, stay in enumerate(stays):
                if stay.start_step == position:
                    slots[iteration, index] = free.pop(0)
            for index, stay in enumerate(stays):
                if stay.start_step <= 0 and n_steps + stay.start_step == position:
                    slots[iteration + 1, index] = free.pop(0)
    return [[slots[iteration, index] for index in range(len(stays))] for iteration in range(n_iterations)]


@settings(max_examples=600)
@given(windows(), st.booleans())
def test_slots_are_never_shared(window: tuple[Reads, int, int], wraps: bool) -> None:
    reads, k, m = window
    stays = plan_window(reads, k, m, wraps)
    slots, period = assign_slots(stays, len(reads), k, wraps)
    assert all(len(each) == period for each in slots)
    n_slots = most_held(stays, len(reads))
    assert n_slots <= k
    assert {slot for each in slots for slot in each} == set(range(n_slots))
    assert_never_shared(stays, len(reads), slots, period)


@settings(max_examples=600)
@given(windows())
def test_period_is_that_of_the_free_list_from_the_first_iteration_on(window: tuple[Reads, int, int]) -> None:
    """Purely periodic: no iteration before the cycle begins, and none too many in it."""
    reads, k, m = window
    stays = plan_window(reads, k, m, wraps=True)
    slots, period = assign_slots(stays, len(reads), k, wraps=True)
    assert slot_period(stays, len(reads)) == period
    by_hand = free_list_by_hand(stays, len(reads), most_held(stays, len(reads)), 2 * period)
    assert by_hand == [[each[iteration % period] for each in slots] for iteration in range(2 * period)]


@settings(max_examples=300)
@given(windows())
def test_held_slots_have_period_1(window: tuple[Reads, int, int]) -> None:
    reads, k, m = window
    stays = plan_window(reads, k, m, wraps=True)
    held, slots = hold_slots(stays, len(reads))
    assert [(stay.page, stay.end_step) for stay in held] == [(stay.page, stay.end_step) for stay in stays]
    for stay, before in zip(held, stays, strict=True):
        assert before.start_step <= stay.start_step <= max(before.start_step, 0)
    starts = [stay.start_step for stay in held]
    assert starts == sorted(starts)
    assert most_held(held, len(reads)) <= k
    assert_never_shared(held, len(reads), slots, 1)


def test_period_of_chains() -> None:
    for n in range(1, 14):
        for k in range(1, n + 1):
            for m in range(1, k + 1):
                stays = plan_window(chain(n), k, m, wraps=True)
                assert assign_slots(stays, n, k, wraps=True)[1] == k // gcd(k, n), (n, k, m)


@given(windows())
def test_no_wrap_starts_every_iteration_alike(window: tuple[Reads, int, int]) -> None:
    reads, k, m = window
    assert assign_slots(plan_window(reads, k, m, wraps=False), len(reads), k, wraps=False)[1] == 1


@pytest.mark.parametrize(("n", "k", "period"), [(5, 2, 2), (5, 3, 3), (7, 3, 3), (6, 4, 2), (9, 6, 2), (80, 7, 7)])
def test_k_does_not_divide_chain_m_1_needs_no_further_slot(n: int, k: int, period: int) -> None:
    """The bug of ``index % slots``: around the cycle it asks for a slot that is still taken, or for one more than k."""
    stays = plan_window(chain(n), k, 1, wraps=True)
    slots, found = assign_slots(stays, n, k, wraps=True)
    assert found == period
    assert slots == tuple(tuple((page + phase * n) % k for phase in range(period)) for page in range(n))
    assert_never_shared(stays, n, slots, period)


def test_index_modulo_slots_would_be_wrong() -> None:
    """The check of this file finds that bug."""
    stays = plan_window(chain(5), 2, 1, wraps=True)
    with pytest.raises(AssertionError):
        assert_never_shared(stays, 5, [(page % 2,) for page in range(5)], 1)


def test_too_few_slots() -> None:
    with pytest.raises(ValueError, match="3 stays meet, but there are only 2 slots"):
        assign_slots(plan_window(chain(5), 3, 1, wraps=True), 5, 2, wraps=True)


def test_no_stays() -> None:
    assert assign_slots((), 0, 1, wraps=True) == ((), 1)
    assert assign_slots((), 3, 1, wraps=False) == ((), 1)
    assert hold_slots((), 3) == ((), ())
