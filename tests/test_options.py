"""Options: what is accepted, and messages that name the option and say what is allowed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from spcompile.errors import OptionError, SuperpipelineError
from spcompile.options import COMPILERS, Options, parse_bytes, parse_options


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, Options()),
        ({}, Options(k=None, m=None, device=None, compiler="inductor", verify=True)),
        ({"k": 4}, Options(k=4)),
        ({"k": 1, "m": 1}, Options(k=1, m=1)),
        ({"k": 3, "m": 3}, Options(k=3, m=3)),
        ({"k": None, "m": None}, Options()),
        ({"device": "cpu", "verify": False}, Options(device="cpu", verify=False)),
        *[({"compiler": compiler}, Options(compiler=compiler)) for compiler in COMPILERS],
    ],
)
def test_accepted(given: dict[str, Any] | None, expected: Options) -> None:
    assert parse_options(given) == expected


WHOLE = "a whole number of pages, 1 or more"

REFUSED: list[tuple[dict[str, Any], str, list[str]]] = [
    *[({"k": value}, "'k'", [WHOLE, repr(value)]) for value in (0, -1, True, 1.0, "4", [4])],
    *[({"k": 2, "m": value}, "'m'", [WHOLE, repr(value)]) for value in (0, -3, False, 1.5, "1")],
    ({"m": 1}, "'m'", ["'k'"]),
    ({"k": 2, "m": 3}, "'m'", ["between 1 and k = 2", "3"]),
    *[({"compiler": value}, "'compiler'", [*COMPILERS, repr(value)]) for value in ("Inductor", "", None, 3)],
    *[({"verify": value}, "'verify'", ["True or False", repr(value)]) for value in (1, "yes", None)],
    *[
        ({"budget": value}, "'budget'", ["'8GiB'", repr(value)])
        for value in (0, -1, 1.5, True, "", "8 apples", "-1GB", [1])
    ],
    *[
        ({"max_slowdown": value}, "'max_slowdown'", ["1 or more", repr(value)])
        for value in (0.9, True, "1.1", math.inf)
    ],
    ({"k": 2, "budget": "1GiB"}, "'budget'", ["contradict", "'k'"]),
    ({"budget": "1GiB", "max_slowdown": 1.1}, "'max_slowdown'", ["contradict", "'budget'"]),
    *[({name: 1}, f"'{name}'", ["unknown"]) for name in ("K", "slots", "compile", "")],
]


@pytest.mark.parametrize(("given", "name", "parts"), REFUSED, ids=[str(given) for given, _, _ in REFUSED])
def test_refused(given: dict[str, Any], name: str, parts: list[str]) -> None:
    with pytest.raises(OptionError) as raised:
        parse_options(given)
    message = str(raised.value)
    assert name in message
    assert [part for part in parts if part not in message] == []


def test_an_unknown_option_lists_all_that_exist() -> None:
    with pytest.raises(OptionError, match="unknown option 'kk'") as raised:
        parse_options({"k": 2, "kk": 3})
    allowed = str(raised.value).partition("allowed are ")[2].split(", ")
    assert allowed == [field.name for field in dataclasses.fields(Options)]


@pytest.mark.parametrize("mode", [None, "default"])
def test_modes_that_mean_nothing(mode: str | None) -> None:
    assert parse_options({"k": 2}, mode) == Options(k=2)


@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead", ""])
def test_other_modes_are_refused_by_name(mode: str) -> None:
    with pytest.raises(OptionError, match=f"mode={mode!r} is not available"):
        parse_options({"k": 2}, mode)


def test_errors_are_value_errors_of_this_package() -> None:
    """Both are what people catch."""
    with pytest.raises(SuperpipelineError):
        Options(k=0)
    with pytest.raises(ValueError, match="'k'"):
        Options(k=0)


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().k = 3  # type: ignore[misc]


def test_what_was_given_is_not_changed() -> None:
    given = {"k": 2}
    parse_options(given)
    assert given == {"k": 2}


@pytest.mark.parametrize(
    ("given", "nbytes"),
    [
        *((1, 1), (8 << 30, 8 << 30), ("12", 12), ("12B", 12)),
        *(("8GiB", 8 << 30), ("7.5 GB", 7_500_000_000), ("800mb", 800_000_000), (" 3 kib ", 3072), ("0.5TiB", 1 << 39)),
    ],
)
def test_budgets_in_bytes_or_words(given: int | str, nbytes: int) -> None:
    assert parse_bytes(given) == nbytes
    assert parse_options({"budget": given}).budget == nbytes
