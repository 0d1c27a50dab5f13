"""The table of pages: alike ones share a row, and nothing is lost by that."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from spcompile.ir import Page, Plan, Step, Weight
from spcompile.page_table import COLLAPSED_PAGES, page_table, placement_of
from tests.hand_plans import MIB, PLANS, page
from tests.random_plans import plans
from tests.text.plan_cases import language_model, mapped_table, training


def rows_of(plan: Plan) -> list[str]:
    return [line.strip() for line, _ in page_table(plan)][1:]


def placed(plan: Plan, residents: tuple[int, ...], mapped: tuple[int, ...] = ()) -> Plan:
    staying = {*residents, *mapped}
    intervals = tuple(each for each in plan.intervals if each.page not in staying)
    return replace(plan, residents=residents, mapped=mapped, intervals=intervals)


def test_layers_of_any_placement_share_a_row() -> None:
    plan = placed(language_model(12, 2), (0, 2, 3, 9), mapped=(5,))
    assert rows_of(plan) == [
        "0  model.embed_tokens    250.00 MiB  resident   0",
        "1..12  model.layers.0 .. 11   64.00 MiB  mixed      1..12",
        "1 mapped: #5",
        "3 resident: #2, #3, #9",
        "8 streamed: the others",
        "13  lm_head               250.00 MiB  streamed   13",
    ]


def test_steps_there_and_back() -> None:
    assert rows_of(training(9)) == [
        "0..7  layers.0 .. 7    1.00 MiB  streamed   0..7, 17..10",
        "8  layers.8         1.00 MiB  streamed   8, 9",
    ]


def test_layers_of_two_segments() -> None:
    plan = language_model(8, 2)
    halves = [
        Step(f"layers_{index}_{half}", f"layers.{index}", (index,)) for index in range(1, 9) for half in ("a", "b")
    ]
    plan = replace(plan, steps=(plan.steps[0], *halves, plan.steps[-1]))
    assert rows_of(plan)[1].split()[-3:] == ["1..16", "(2", "each)"]


def test_pages_that_differ_have_rows_of_their_own() -> None:
    plan = language_model(20, 2)
    assert [row.split()[0] for row in rows_of(plan)] == ["0", "1..20", "21"]
    other_size = replace(plan, pages=(*plan.pages[:10], page("model.layers.9", MIB), *plan.pages[11:]))
    assert [row.split()[0] for row in rows_of(other_size)] == ["0", "1..9", "10", "11..20", "21"]
    other_name = replace(plan, pages=(*plan.pages[:10], replace(plan.pages[10], name="extra"), *plan.pages[11:]))
    assert [row.split()[0] for row in rows_of(other_name)] == ["0", "1..9", "10", "11..20", "21"]
    read_twice = replace(plan, steps=(*plan.steps[:-1], replace(plan.steps[-1], reads=(10, 21))))
    assert [row.split()[0] for row in rows_of(read_twice)] == ["0", "1..9", "10", "11..20", "21"]


def test_few_pages_keep_rows_of_their_own() -> None:
    assert len(rows_of(language_model(COLLAPSED_PAGES - 1, 2))) == COLLAPSED_PAGES + 1
    assert len(rows_of(language_model(COLLAPSED_PAGES, 2))) == 3


def test_placements() -> None:
    plan = mapped_table()
    assert [placement_of(plan, index) for index in range(3)] == ["streamed", "streamed", "streamed"]
    assert placement_of(replace(plan, intervals=()), 0) == "mapped"
    assert placement_of(replace(plan, intervals=()), 1) == "nowhere"
    assert placement_of(PLANS["all_resident"], 1) == "resident"


@given(plans(), st.integers(0, 20))
def test_every_page_has_a_line(plan: Plan, n_alike: int) -> None:
    alike = tuple(Page(f"block.{index}", (Weight("w", 5),)) for index in range(n_alike))
    plan = replace(plan, pages=(*plan.pages, *alike))
    keys = [key for _, keys in page_table(plan) for key in keys]
    assert keys == [("page", index) for index in range(len(plan.pages))]
