"""Plans drawn at random, right or wrong: for what must work on any plan (its text, its JSON, the verifier)."""

from __future__ import annotations

from hypothesis import strategies as st

from spcompile.ir import Interval, Page, Plan, Slot, Step, Weight

NAMES = st.text(max_size=60) | st.from_regex(r"[a-z]{1,8}(\.[a-z0-9_]{1,12}){0,5}", fullmatch=True)
SMALL = st.integers(-3, 12)
SIZES_BYTES = st.integers(-(2**10), 2**45)

WEIGHTS = st.builds(Weight, NAMES, SIZES_BYTES)
PAGES = st.builds(Page, NAMES, st.lists(WEIGHTS, max_size=3).map(tuple))
STEPS = st.builds(Step, NAMES, st.none() | NAMES, st.lists(SMALL, max_size=30).map(tuple))
SLOTS = st.builds(Slot, SIZES_BYTES, SIZES_BYTES)
INTERVALS = st.builds(
    Interval, SMALL, st.integers(-10, 10), st.integers(-10, 10), st.lists(SMALL, max_size=9).map(tuple)
)


def plans() -> st.SearchStrategy[Plan]:
    """Any plan whose fields have the right types."""
    return st.builds(
        Plan,
        device=NAMES,
        k=SMALL,
        m=SMALL,
        wraps=st.booleans(),
        pages=st.lists(PAGES, max_size=8).map(tuple),
        leftovers=st.lists(WEIGHTS, max_size=3).map(tuple),
        residents=st.lists(SMALL, max_size=3).map(tuple),
        steps=st.lists(STEPS, max_size=8).map(tuple),
        slots=st.lists(SLOTS, max_size=5).map(tuple),
        period=st.integers(-1, 9),
        intervals=st.lists(INTERVALS, max_size=8).map(tuple),
    )
