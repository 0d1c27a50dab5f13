"""Byte counts that depend on symbolic sizes."""

from __future__ import annotations

import re

import pytest
import sympy

from spcompile.errors import OptionError
from spcompile.sizes import Polynomial, expression_of, value_of

CASES: list[tuple[Polynomial, dict[str, int], int]] = [
    ((), {}, 0),
    ((("1", 7),), {}, 7),
    ((("1", 1), ("s0", 2), ("s0**2", 3), ("s0*s1", 4)), {"s0": 10, "s1": 5}, 1 + 20 + 300 + 200),
    ((("s0*((s1 + 7)//8)", 2),), {"s0": 3, "s1": 9}, 12),
    (
        (("-s0", 1), ("Max(1, s0 - 4)", 10), ("Mod(s0, 4)", 100), ("FloorDiv(s0, 4)", 1000)),
        {"s0": 9},
        -9 + 50 + 100 + 2000,
    ),
    ((("CeilDiv(s0, 4)", 1),), {"s0": 9}, 3),
]


@pytest.mark.parametrize(("polynomial", "sizes", "expected"), CASES)
def test_values(polynomial: Polynomial, sizes: dict[str, int], expected: int) -> None:
    assert value_of(polynomial, sizes) == expected
    symbols = {name: sympy.Symbol(name, positive=True, integer=True) for name in sizes}
    expression = expression_of(polynomial, symbols)
    assert expression.subs({symbols[name]: value for name, value in sizes.items()}) == expected


@pytest.mark.parametrize(
    ("monomial", "message"),
    [
        ("s1", "size 's1' has no value; given are s0"),
        ("s0 +", "is not a size"),
        ("__import__('os')", "is no arithmetic of sizes"),
        ("s0.real", "is no arithmetic of sizes"),
        ("s0 / 2", "is no arithmetic of sizes"),
        ("'a' * 3", "is no arithmetic of sizes"),
        ("", "'' is not a size"),
        ("\0", "is not a size"),
        ("s0 // 0", "'s0 // 0' is not a size: integer division or modulo by zero"),
        ("Max()", "is not a size: max expected at least 1 argument"),
        ("9**9**9", "'9**9**9' is not a size: power 387420489"),
    ],
)
def test_what_is_no_size(monomial: str, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        value_of(((monomial, 1),), {"s0": 1})
