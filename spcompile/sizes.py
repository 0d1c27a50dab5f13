"""Byte counts that depend on a graph's symbolic sizes, as plain data that JSON can hold.

A `Polynomial` is a tuple of pairs: a monomial in Python's spelling (``"s0*s1**2"``, ``"s0*((s1 + 7)//8)"``; "1" for the
constant) and its coefficient. `value_of` puts numbers in the place of the names, `expression_of` sympy's symbols. The
text may come from a file, so it is walked and never handed to ``eval``.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy

from spcompile.errors import OptionError

Polynomial = tuple[tuple[str, int], ...]
"""A number of bytes: pairs of a monomial and its coefficient, in order of the monomials."""

MOST_POWER = 64
"""Sizes have small powers; a large one in a file would keep us busy for ever."""


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(exponent, int) and exponent > MOST_POWER:
        raise OverflowError(f"power {exponent}")
    return base**exponent


OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}

Functions = dict[str, Callable[..., Any]]

FUNCTIONS: Functions = {
    "Max": max,
    "Min": min,
    "FloorDiv": operator.floordiv,
    "PythonMod": operator.mod,
    "Mod": operator.mod,
    "floor": lambda value: value // 1,
    "CeilDiv": lambda one, other: -(-one // other),
}
"""The functions that torch's sizes are written with."""

SYMBOLIC: Functions = FUNCTIONS | {"Max": sympy.Max, "Min": sympy.Min, "floor": sympy.floor}


def value_of(polynomial: Polynomial, sizes: Mapping[str, int]) -> int:
    """The number of bytes for given sizes.

    Raises:
        OptionError: a size has no value, or the text is no arithmetic.
    """
    total = 0
    for monomial, count in polynomial:
        try:
            total += count * _evaluate(_parsed(monomial), sizes, FUNCTIONS)
        except (ArithmeticError, TypeError) as error:
            raise OptionError(f"{monomial!r} is not a size: {error}") from error
    return total


def expression_of(polynomial: Polynomial, symbols: Mapping[str, sympy.Symbol]) -> sympy.Expr:
    """The number of bytes as an expression of sympy."""
    terms = (count * _evaluate(_parsed(monomial), symbols, SYMBOLIC) for monomial, count in polynomial)
    return sympy.Add(*terms)


def _parsed(monomial: str) -> ast.expr:
    try:
        return ast.parse(monomial, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise OptionError(f"{monomial!r} is not a size: {error}") from error


def _evaluate(node: ast.expr, sizes: Mapping[str, Any], functions: Functions) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in sizes:
            raise OptionError(f"size {node.id!r} has no value; given are {', '.join(sizes) or 'none'}")
        return sizes[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, sizes, functions)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = (_evaluate(each, sizes, functions) for each in (node.left, node.right))
        return OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
        return functions[node.func.id](*(_evaluate(each, sizes, functions) for each in node.args))
    raise OptionError(f"{ast.unparse(node)!r} is no arithmetic of sizes")
