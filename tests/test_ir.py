"""The plan as data: what it computes from its fields, its actions in order, and its JSON text."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given

from spcompile.errors import PlanFormatError
from spcompile.ir import ALIGNMENT_BYTES, FORMAT_VERSION, Layer, Page, Plan, Step, Weight, align
from tests.hand_plans import MIB, PLANS
from tests.random_plans import plans


@given(plans())
def test_json_round_trip(plan: Plan) -> None:
    """Any plan comes back equal, hashable and with the same text, also one that breaks every rule."""
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.to_json() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not the JSON text of a plan"),
        ("{", "not the JSON text of a plan"),
        ("3", "not the JSON text of a plan"),
        ("[]", "not the JSON text of a plan"),
        ("null", "not the JSON text of a plan"),
        ("{}", "not the JSON text of a plan: KeyError\\('format'\\)"),
        ('{"format": 0}', f"this plan has format 0; this version reads format {FORMAT_VERSION}"),
        (f'{{"format": {FORMAT_VERSION}}}', "not the JSON text of a plan: KeyError\\('device'\\)"),
    ],
)
def test_text_that_is_no_plan(text: str, message: str) -> None:
    with pytest.raises(PlanFormatError, match=message):
        Plan.from_json(text)


@pytest.mark.parametrize("name", list(json.loads(PLANS["chain_in_batches"].to_json())))
def test_every_field_is_needed(name: str) -> None:
    fields = json.loads(PLANS["chain_in_batches"].to_json())
    del fields[name]
    with pytest.raises(PlanFormatError, match=name):
        Plan.from_json(json.dumps(fields))


@pytest.mark.parametrize("group", ["slots", "steps", "intervals"])
def test_unknown_fields_are_refused(group: str) -> None:
    fields = json.loads(PLANS["chain_in_batches"].to_json())
    with pytest.raises(PlanFormatError, match="colour"):
        Plan.from_json(json.dumps({**fields, "colour": 1}))
    fields[group][0]["colour"] = 1
    with pytest.raises(PlanFormatError, match="colour"):
        Plan.from_json(json.dumps(fields))


@pytest.mark.parametrize(("nbytes", "aligned"), [(0, 0), (1, 256), (256, 256), (257, 512)])
def test_align(nbytes: int, aligned: int) -> None:
    assert align(nbytes) == aligned


def test_weights_in_a_page_start_aligned() -> None:
    page = Page("p", (Weight("a", 1), Weight("b", 0), Weight("c", 256), Weight("d", 257)))
    assert page.nbytes == 514
    assert page.offsets_bytes == (0, 256, 256, 512)
    assert page.slot_bytes == 1024
    assert all(offset % ALIGNMENT_BYTES == 0 for offset in page.offsets_bytes)


def test_totals() -> None:
    plan = PLANS["two_pages_in_one_step"]
    assert plan.weights_bytes == 3 * MIB + 300 + 7
    assert plan.leftovers_bytes == 0
    assert plan.residents_bytes == 7
    assert plan.arena_bytes == 3 * MIB + 512
    assert plan.peak_weight_bytes == 3 * MIB + 519
    assert plan.bytes_moved == 3 * MIB + 300


def test_tied_page_moves_once_per_copy() -> None:
    assert PLANS["tied_ends"].bytes_moved == 6 * MIB
    assert PLANS["all_resident"].bytes_moved == 0
    assert PLANS["all_resident"].arena_bytes == 0


def test_layers_in_order_of_first_use() -> None:
    plan = PLANS["tied_ends"]
    again = replace(plan, steps=(*plan.steps, Step("again", "layers.0", (2, 1))))
    assert again.layers == (Layer("layers.0", (1, 4), (1, 2)), Layer("layers.1", (2,), (2,)))


def actions(plan: Plan) -> list[str]:
    """One word per action: kind, page (or segment), and a prime for the next iteration."""
    words = []
    for action in plan.actions():
        if action.interval is None:
            words.append(f"{action.step} run {plan.steps[action.step].segment}")
        else:
            page = plan.pages[plan.intervals[action.interval].page].name
            words.append(f"{action.step} {action.kind.value} {page}" + "'" * action.ahead)
    return words


def test_actions_of_tied_ends() -> None:
    """Evict before prefetch, prefetch before load, load before run; the next iteration is prefetched at the end."""
    assert actions(PLANS["tied_ends"]) == [
        "0 prefetch embed",
        "0 prefetch layers.0",
        "0 load embed",
        "0 run embed",
        "0 evict embed",
        "1 prefetch layers.1",
        "1 load layers.0",
        "1 run layers_0",
        "1 evict layers.0",
        "2 prefetch embed",
        "2 load layers.1",
        "2 run layers_1",
        "2 evict layers.1",
        "3 load embed",
        "3 run head",
        "3 evict embed",
        "4 prefetch embed'",
        "4 prefetch layers.0'",
    ]


def test_actions_without_wrap() -> None:
    found = actions(PLANS["chain_without_wrap"])
    assert found[-1] == "3 evict layers.3"
    assert not [word for word in found if word.endswith("'")]


def test_actions_ahead_come_at_their_step() -> None:
    ahead = [word for word in actions(PLANS["chain_in_batches"]) if word.endswith("'")]
    assert ahead == ["4 prefetch layers.0'", "4 prefetch layers.1'", "5 prefetch layers.2'"]


@pytest.mark.parametrize("name", PLANS)
def test_every_copy_is_awaited_and_given_back(name: str) -> None:
    plan = PLANS[name]
    found = actions(plan)
    for interval in plan.intervals:
        page = plan.pages[interval.page].name
        assert f"{plan.load_step(interval)} load {page}" in found
        assert f"{interval.end_step - 1} evict {page}" in found
