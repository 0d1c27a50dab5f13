"""Gaps: never more than the room, and copies compared with every choice there is, or with a flow of least cost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spcompile.planner import gaps as gaps_module
from spcompile.planner.early import Visit, start_early, visits_of
from spcompile.planner.gaps import keep_gaps
from tests.planner.planner_cases import READS, Reads, in_order_of_use, there_and_back

Gap = tuple[range, int]
"""Steps between two visits of a page, and the page's bytes."""

Case = tuple[Reads, list[int], list[int]]
"""Reads, bytes per page, and room per step."""


def sizes_of(visits: Sequence[Visit], page_bytes: Sequence[int]) -> list[int]:
    return [page_bytes[visit.page] for visit in visits]


def kept_gaps(reads: Reads, page_bytes: Sequence[int], room: Sequence[int] | int) -> tuple[Visit, ...]:
    visits = visits_of(reads)
    return keep_gaps(visits, sizes_of(visits, page_bytes), len(reads), room)


def copied_bytes(visits: Sequence[Visit], page_bytes: Sequence[int]) -> int:
    return sum(sizes_of(visits, page_bytes))


def first_copies_bytes(reads: Reads, page_bytes: Sequence[int]) -> int:
    return sum(page_bytes[page] for page in {page for pages in reads for page in pages})


def gaps_by_hand(reads: Reads, page_bytes: Sequence[int]) -> list[Gap]:
    gaps = []
    for page in {page for pages in reads for page in pages}:
        steps = [step for step, pages in enumerate(reads) if page in pages]
        gaps += [(range(one + 1, other), page_bytes[page]) for one, other in pairwise(steps) if one + 1 < other]
    return gaps


def free_by_hand(reads: Reads, page_bytes: Sequence[int], rooms: Sequence[int]) -> list[int]:
    read = [sum(page_bytes[page] for page in pages) for pages in reads]
    return [max(0, room - nbytes) for room, nbytes in zip(rooms, read, strict=True)]


def least_loaded_again(gaps: Sequence[Gap], free: Sequence[int]) -> int:
    """Over all subsets of the gaps: the fewest bytes outside one that fits."""
    if not gaps:
        return 0
    (steps, nbytes), others = gaps[0], gaps[1:]
    without = nbytes + least_loaded_again(others, free)
    if any(free[step] < nbytes for step in steps):
        return without
    taken = [left - nbytes if step in steps else left for step, left in enumerate(free)]
    return min(without, least_loaded_again(others, taken))


def most_kept_by_flow(gaps: Sequence[Gap], places: Sequence[int]) -> int:
    """How many gaps of one size can be kept in so many places at each step.

    Each unit of flow is a place. What flows past a step is its number of places: more come in, or some go out, between
    two steps. A place goes on to the next step for nothing, or is taken by a gap, which gains one.
    """
    flow = networkx.MultiDiGraph()
    n_steps = len(places)
    limits = [0, *(min(each, len(gaps)) for each in places), 0]
    for position in range(n_steps + 1):
        flow.add_node(position, demand=limits[position] - limits[position + 1])
    flow.add_edges_from((step, step + 1, {"weight": 0}) for step in range(n_steps))
    flow.add_edges_from((steps.start, steps.stop, {"weight": -1, "capacity": 1}) for steps, _ in gaps)
    cost, _ = networkx.network_simplex(flow)
    return -int(cost)


def assert_right(visits: Sequence[Visit], reads: Reads, page_bytes: Sequence[int], rooms: Sequence[int]) -> None:
    """Every read is covered once, the room is never exceeded, and visits begin and end with a read."""
    firsts = [visit.first_step for visit in visits]
    assert firsts == sorted(firsts)
    for step, (pages, room) in enumerate(zip(reads, rooms, strict=True)):
        held = [visit.page for visit in visits if visit.first_step <= step <= visit.last_step]
        assert len(set(held)) == len(held)
        assert set(pages) <= set(held)
        read = sum(page_bytes[page] for page in pages)
        assert sum(page_bytes[page] for page in held) <= max(room, read)
    for visit in visits:
        assert visit.page in reads[visit.first_step]
        assert visit.page in reads[visit.last_step]


def drawn(reads: Reads, page_bytes: Sequence[int], room: Sequence[int] | int) -> list[str]:
    """One line per page: # read, = kept, . away (between the first and the last read)."""
    visits = kept_gaps(reads, page_bytes, room)
    lines = []
    for page in range(len(page_bytes)):
        steps = [step for step, pages in enumerate(reads) if page in pages]
        line = [" "] * len(reads)
        line[steps[0] : steps[-1] + 1] = "." * (steps[-1] + 1 - steps[0])
        for visit in visits:
            if visit.page == page:
                line[visit.first_step : visit.last_step + 1] = "=" * (visit.last_step + 1 - visit.first_step)
        for step in steps:
            line[step] = "#"
        lines.append("".join(line).rstrip())
    return lines


def letters(order: str) -> Reads:
    return in_order_of_use([(ord(letter),) for letter in order])


@st.composite
def cases(draw: st.DrawFn, sizes: st.SearchStrategy[int], most_gaps: int = 10) -> Case:
    """Some with less room than a step reads."""
    again = st.lists(st.integers(0, 4).map(lambda page: (page,)), max_size=14).map(in_order_of_use)
    reads = draw((READS | again).filter(lambda reads: len(gaps_by_hand(reads, [1] * 12)) <= most_gaps))
    page_bytes = draw(st.lists(sizes, min_size=12, max_size=12))
    most = 6 * max(page_bytes)
    same = st.integers(0, most).map(lambda room: [room] * len(reads))
    rooms = draw(same | st.lists(st.integers(0, most), min_size=len(reads), max_size=len(reads)))
    return reads, page_bytes, rooms


# Against every choice there is.


@given(st.sampled_from((1, 3)).flatmap(lambda nbytes: cases(st.just(nbytes))))
def test_for_equal_sizes_no_choice_copies_less(case: Case) -> None:
    reads, page_bytes, rooms = case
    visits = kept_gaps(reads, page_bytes, rooms)
    assert_right(visits, reads, page_bytes, rooms)
    least = least_loaded_again(gaps_by_hand(reads, page_bytes), free_by_hand(reads, page_bytes, rooms))
    assert copied_bytes(visits, page_bytes) == first_copies_bytes(reads, page_bytes) + least


@pytest.mark.parametrize("exchanges", [0, gaps_module.MOST_EXCHANGES])
@given(case=cases(st.sampled_from((1, 2, 3, 20))) | cases(st.sampled_from((0, 10, 11, 12, 13))))
def test_for_other_sizes_no_choice_loads_less_than_a_quarter_again(case: Case, exchanges: int) -> None:
    """Without exchanges, too: the bound is that of the local ratio method."""
    reads, page_bytes, rooms = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaps_module, "MOST_EXCHANGES", exchanges)
        visits = kept_gaps(reads, page_bytes, rooms)
    assert_right(visits, reads, page_bytes, rooms)
    least = least_loaded_again(gaps_by_hand(reads, page_bytes), free_by_hand(reads, page_bytes, rooms))
    again = copied_bytes(visits, page_bytes) - first_copies_bytes(reads, page_bytes)
    assert least <= again <= 4 * least


@given(cases(st.integers(1, 9)))
def test_nothing_that_is_dropped_would_fit(case: Case) -> None:
    reads, page_bytes, rooms = case
    visits = kept_gaps(reads, page_bytes, rooms)
    sizes = sizes_of(visits, page_bytes)
    assert keep_gaps(visits, sizes, len(reads), rooms) == visits


@given(cases(st.integers(1, 9)))
def test_room_for_everything_and_for_nothing(case: Case) -> None:
    reads, page_bytes, _ = case
    kept = kept_gaps(reads, page_bytes, sum(page_bytes))
    assert {visit.page for visit in kept} == {page for pages in reads for page in pages}
    assert len({visit.page for visit in kept}) == len(kept)
    just_read = [sum(page_bytes[page] for page in pages) for pages in reads]
    assert kept_gaps(reads, page_bytes, just_read) == kept_gaps(reads, page_bytes, 0) == visits_of(reads)


@given(cases(st.integers(1, 9)), st.integers(0, 20))
def test_copies_start_early_beside_what_is_kept(case: Case, more: int) -> None:
    """What is kept leaves each step its room: no step of the window comes too late."""
    reads, page_bytes, _ = case
    room = max((sum(page_bytes[page] for page in pages) for pages in reads), default=0) + more
    visits = kept_gaps(reads, page_bytes, room)
    stays = start_early(visits, sizes_of(visits, page_bytes), len(reads), room, wraps=True)
    assert [stay.end_step - 1 for stay in stays] == [visit.last_step for visit in visits]


def test_how_far_from_the_least_random_sizes_come() -> None:
    """Far better than the bound: the sum over 300 orders, drawn with one seed, and the worst of them."""
    draw = random.Random(0)
    total = total_least = 0
    worst = 1.0
    for _ in range(300):
        n_pages = draw.randint(4, 8)
        page_bytes = [draw.choice((3, 5, 7, 10, 20)) for _ in range(n_pages)]
        order = draw.choices(range(n_pages), k=16)
        reads = there_and_back(n_pages) if draw.random() < 0.5 else tuple((page,) for page in order)
        room = draw.randint(20, max(20, sum(page_bytes)))
        visits = kept_gaps(reads, page_bytes, room)
        free = free_by_hand(reads, page_bytes, [room] * len(reads))
        least = least_loaded_again(gaps_by_hand(reads, page_bytes), free)
        again = copied_bytes(visits, page_bytes) - first_copies_bytes(reads, page_bytes)
        total, total_least = total + again, total_least + least
        worst = max(worst, again / least if least else 1.0)
    assert total <= 1.005 * total_least
    assert worst <= 1.3


# Against a flow of least cost.


@pytest.mark.parametrize("seed", range(12))
def test_large_orders_against_a_flow(seed: int) -> None:
    draw = random.Random(seed)
    n_pages, n_steps = draw.randint(10, 40), draw.randint(50, 200)
    there = there_and_back(n_pages)
    reads = (
        there
        if seed % 3 == 0
        else tuple(tuple(draw.sample(range(n_pages), draw.randint(0, 3))) for _ in range(n_steps))
    )
    rooms = [draw.randint(3, n_pages) for _ in reads] if seed % 2 else [n_pages // 2] * len(reads)
    visits = kept_gaps(reads, [256] * n_pages, [256 * room for room in rooms])
    assert_right(visits, reads, [256] * n_pages, [256 * room for room in rooms])
    gaps = gaps_by_hand(reads, [1] * n_pages)
    n_kept = len(visits_of(reads)) - len(visits)
    assert 0 < n_kept == most_kept_by_flow(gaps, free_by_hand(reads, [1] * n_pages, rooms))


@given(cases(st.just(1)))
def test_the_flow_against_every_choice(case: Case) -> None:
    """The flow is the oracle of large orders: here it is one of what it is."""
    reads, page_bytes, rooms = case
    gaps, free = gaps_by_hand(reads, page_bytes), free_by_hand(reads, page_bytes, rooms)
    assert len(gaps) - most_kept_by_flow(gaps, free) == least_loaded_again(gaps, free)


# By name.


@pytest.mark.parametrize("n_pages", [1, 2, 5, 30])
def test_forward_and_backward_keep_the_last_layers(n_pages: int) -> None:
    for room in range(1, n_pages + 2):
        visits = kept_gaps(there_and_back(n_pages), [7] * n_pages, 7 * room)
        last = range(max(0, n_pages - room), n_pages)
        assert {visit.page for visit in visits if visit.first_step < n_pages <= visit.last_step} == set(last)
        assert len(visits) == 2 * n_pages - len(last)


def test_forward_and_backward_drawn() -> None:
    assert drawn(there_and_back(4), [1] * 4, 3) == [
        "#......#",
        " #====#",
        "  #==#",
        "   ##",
    ]


def test_what_is_used_again_last_goes() -> None:
    """Room for two, as a cache would do it: when c comes, b is farther away than a."""
    assert drawn(letters("abcacb"), [1] * 3, 2) == [
        "#==#",
        " #...#",
        "  #=#",
    ]


def test_a_tied_weight_is_kept_where_the_steps_between_leave_room() -> None:
    reads = ((0,), (1,), (2,), (3,), (0,))
    assert drawn(reads, [5, 2, 2, 2], 7) == ["#===#", " #", "  #", "   #"]
    assert drawn(reads, [5, 2, 3, 2], 7) == ["#...#", " #", "  #", "   #"]


def test_one_narrow_step() -> None:
    """Kept up to a step without room, a gap is of no use: it is dropped whole, and others have its place before."""
    assert drawn(letters("abacaba"), [1] * 3, [2, 2, 2, 1, 2, 2, 2]) == ["#=#.#=#", " #...#", "   #"]


def test_a_step_that_reads_more_than_the_room() -> None:
    reads: Reads = ((0,), (1, 2), (0,), (3,), (0,))
    assert drawn(reads, [1, 1, 1, 1], [2, 1, 2, 2, 2]) == ["#.#=#", " #", " #", "   #"]


def test_a_large_gap_that_never_fits_does_not_blur_what_is_exact() -> None:
    """Page 0 fits nowhere; the others are equally large, and two of the three can be kept."""
    assert drawn(letters("abcdedcba"), [9, 1, 1, 1, 1], 3) == ["#.......#", " #.....#", "  #===#", "   #=#", "    #"]


def test_one_byte_too_many_does_not_cost_a_large_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """At x, where the gap that ends last and the one that ends first are large: local ratio takes the small one."""
    monkeypatch.setattr(gaps_module, "MOST_EXCHANGES", 0)
    assert drawn(letters("abcdxdbca"), [20, 0, 1, 20, 1], 41) == [
        "#=======#",
        " #====#",
        "  #....#",
        "   #=#",
        "    #",
    ]


def test_an_exchange() -> None:
    """Beside d only one of them fits. Both methods keep a, which comes again first; b is worth more."""
    assert drawn(letters("abcdabc"), [2, 3, 2, 3], 6) == ["#...#", " #===#", "  #...#", "   #"]


def test_what_takes_no_room_is_kept() -> None:
    assert drawn(letters("abab"), [0, 5], 5) == ["#=#", " #=#"]
    assert drawn(letters("abab"), [0, 5], 4) == ["#=#", " #.#"]
    apart = (Visit(0, 0, 0), Visit(0, 1, 2))
    assert keep_gaps(apart, [5, 5], 3, 1) == (Visit(0, 0, 2),)
    assert keep_gaps((), [], 0, 0) == ()


def test_room_for_another_number_of_steps() -> None:
    with pytest.raises(ValueError, match="room is given for 2 steps, but there are 3"):
        kept_gaps(letters("aba"), [1, 1], [2, 2])
