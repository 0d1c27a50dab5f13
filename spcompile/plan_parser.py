"""Read the text of a plan back: `read_plan`.

Reading uses the section "Details" alone, whose lines ``plan_details`` describes. Then the plan that they make must have
exactly this text: a text that was edited in one place and not in the others, where people would read one thing and the
machine another, is refused. So is every line that is not what it should be, with a mark under it:

      step 1 segment=layers_1 layer=layers.1 reads=[1.5]
      ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
      reads must be of type tuple[int, ...]
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from spcompile.errors import PlanFormatError
from spcompile.ir import Interval, Machine, Page, Plan, Slot, Step, Weight
from spcompile.plan_details import PLAIN_NAME, TITLE, WORDS_OF_JSON, write_plan

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CONTEXT_LINES = 2
"""Lines that an error shows before and behind the guilty one."""

MOST = 2**63
"""No number of a plan is as large as this; texts of larger ones could not even be printed."""

_Made = TypeVar("_Made", bound="DataclassInstance")


def read_plan(text: str) -> Plan:
    """The plan that a text of `write_plan` was made from.

    Raises:
        PlanFormatError: the text has no details, or those of another format version; a line is not what it should be;
            or the details and the part above them do not say the same. The message shows the line. Or it is no text.
    """
    if not isinstance(text, str):
        raise PlanFormatError(f"the text of a plan must be a str, not {type(text).__name__}: read the file first")
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    titles = [index for index, line in enumerate(lines) if line.startswith("Details, format ")]
    if not titles:
        raise PlanFormatError(
            "this text has no section 'Details': it is no plan's, or a shortened one, as print(plan) shows it; "
            "plan.to_text() and plan.to_json() have all of a plan"
        )
    start = titles[-1]
    if lines[start] != TITLE:
        raise PlanFormatError(f"this plan says {lines[start]!r}; this version reads {TITLE!r}: make the plan anew")
    plan = _Reader(lines, start + 1).plan()
    _check_same(lines, write_plan(plan).splitlines())
    return plan


_TERM = ("monomial", "coefficient", "int")


def _is_int(value: object) -> bool:
    return type(value) is int and abs(value) < MOST


def _are_ints(value: object) -> bool:
    return isinstance(value, tuple) and all(map(_is_int, value))


CHECKS: dict[str, Callable[[object], bool]] = {
    "int": _is_int,
    "float": lambda value: type(value) in (int, float),
    "bool": lambda value: type(value) is bool,
    "str": lambda value: isinstance(value, str),
    "int | None": lambda value: value is None or _is_int(value),
    "str | None": lambda value: value is None or isinstance(value, str),
    "tuple[int, ...]": _are_ints,
    "tuple[tuple[int, int], ...]": lambda value: (
        isinstance(value, tuple) and all(_are_ints(each) and len(each) == 2 for each in value)
    ),
}
"""What a value read from a line must be, by the type of its field as ``ir`` writes it."""


@dataclass(frozen=True)
class _Line:
    """One line of the details: ``number`` of its line in the text, its word, its index where it has one."""

    number: int
    word: str
    index: int | None
    fields: dict[str, Any]


@dataclass(frozen=True)
class _Pages:
    """What the lines of residents and of mapped pages have."""

    pages: tuple[int, ...]


class _Reader:
    """Reads the details, line by line, in the order in which they are written."""

    def __init__(self, lines: Sequence[str], start: int) -> None:
        self.lines = lines
        self.at = start

    def plan(self) -> Plan:
        plan = self._one("plan")
        machine = self._machine()
        sizes = self._pairs("size", "name", "value", "int")
        inputs = self._pairs("input", *_TERM)
        activations = [self._pairs("term", *_TERM) for _ in self._each("activations")]
        leftovers = [self._made(Weight, line) for line in self._each("leftover", indexed=False)]
        pages = [self._page(line) for line in self._each("page")]
        residents, mapped = (self._made(_Pages, self._one(word)).pages for word in ("residents", "mapped"))
        steps = [self._made(Step, line) for line in self._each("step")]
        slots = [self._made(Slot, line) for line in self._each("slot")]
        intervals = [self._made(Interval, line) for line in self._each("interval")]
        if self.at < len(self.lines):
            self._fail(self.at, "nothing more was expected here")
        lists: dict[str, Any] = {
            "machine": machine,
            "sizes": sizes,
            "inputs": inputs,
            "activations": tuple(activations),
            "leftovers": tuple(leftovers),
            "pages": tuple(pages),
            "residents": residents,
            "mapped": mapped,
            "steps": tuple(steps),
            "slots": tuple(slots),
            "intervals": tuple(intervals),
        }
        return self._made(Plan, plan, lists)

    def _machine(self) -> Machine | None:
        lines = list(self._each("machine", indexed=False))
        if not lines:
            return None
        rates = self._pairs("rate", "dtype", "flops_per_s", "float")
        return self._made(Machine, lines[0], {"flops_per_s": rates})

    def _page(self, line: _Line) -> Page:
        weights = tuple(self._made(Weight, each) for each in self._each("weight", indexed=False))
        return self._made(Page, line, {"weights": weights})

    def _pairs(self, word: str, one: str, other: str, kind: str) -> tuple[tuple[str, Any], ...]:
        """Pairs of a name and a number of that kind, from lines with these two fields."""
        pairs = []
        for line in self._each(word, indexed=False):
            if tuple(line.fields) != (one, other):
                self._fail(line.number, f"a line {word!r} has the fields {one} and {other}")
            self._check(line, {one: "str", other: kind})
            pairs.append((line.fields[one], line.fields[other]))
        return tuple(pairs)

    def _made(self, kind: type[_Made], line: _Line, others: Mapping[str, Any] = MappingProxyType({})) -> _Made:
        """What a line says, together with what other lines say of it."""
        types = {field.name: str(field.type) for field in dataclasses.fields(kind) if field.name not in others}
        self._check(line, types)
        try:
            return kind(**line.fields, **others)
        except TypeError as error:
            self._fail(line.number, f"something is missing: {error}")

    def _check(self, line: _Line, types: Mapping[str, str]) -> None:
        for name, value in line.fields.items():
            if name not in types:
                self._fail(line.number, f"unknown field {name!r}; this line may have {', '.join(types)}")
            if not CHECKS[types[name]](value):
                self._fail(line.number, f"{name} must be of type {types[name]}")

    def _one(self, word: str) -> _Line:
        line = next(self._each(word, indexed=False), None)
        if line is None:
            self._fail(self.at, f"a line {word!r} was expected here")
        return line

    def _each(self, word: str, *, indexed: bool = True) -> Iterator[_Line]:
        """The lines with this word that come next; their indices count up from 0."""
        expected = 0
        while self.at < len(self.lines) and self.lines[self.at].split()[:1] == [word]:
            line = self._parsed(self.at)
            if line.index != (expected if indexed else None):
                self._fail(self.at, f"expected {f'{word} {expected}' if indexed else f'{word} without a number'}")
            expected += 1
            self.at += 1
            yield line

    def _parsed(self, number: int) -> _Line:
        text = self.lines[number]
        word, _, rest = text.strip().partition(" ")
        index, _, behind = rest.partition(" ")
        if index.isdecimal():
            rest = behind
        fields: dict[str, Any] = {}
        decoder = json.JSONDecoder()
        while rest:
            match = re.match(r"(\w+)=", rest)
            if match is None or match[1] in fields:
                self._fail(number, f"expected a new field and its value, name=value, at {rest[:30]!r}")
            rest = rest[match.end() :]
            plain = PLAIN_NAME.match(rest)
            if plain is not None and plain[0] not in WORDS_OF_JSON:
                fields[match[1]], end = plain[0], plain.end()
            else:
                try:
                    value, end = decoder.raw_decode(rest)
                    fields[match[1]] = _tuple(value)
                except ValueError:
                    self._fail(number, f"expected a value behind {match[0]}, at {rest[:30]!r}")
            if rest[end : end + 1] not in ("", " "):
                self._fail(number, f"expected a space at {rest[end : end + 30]!r}")
            rest = rest[end + 1 :]
        return _Line(number, word, int(index) if index.isdecimal() else None, fields)

    def _fail(self, number: int, message: str) -> NoReturn:
        raise PlanFormatError(_shown(self.lines, number, message))


def _tuple(value: Any) -> Any:
    """Lists as tuples, and what is in them."""
    return tuple(map(_tuple, value)) if isinstance(value, (list, tuple)) else value


def _check_same(lines: Sequence[str], expected: Sequence[str]) -> None:
    """Raise for the first line that is not the one that the plan's own text has there."""
    differs = (index for index, pair in enumerate(zip(lines, expected, strict=False)) if pair[0] != pair[1])
    number = next(differs, min(len(lines), len(expected)))
    if number == len(lines) == len(expected):
        return
    own = f"{expected[number]!r}" if number < len(expected) else "nothing more"
    raise PlanFormatError(
        _shown(lines, number, f"a plan with these details has here {own}: change both, or plan.to_json() instead")
    )


def _shown(lines: Sequence[str], number: int, message: str) -> str:
    """The message below the line that it is about, with some lines around it."""
    guilty = lines[number] if number < len(lines) else ""
    indent = " " * (len(guilty) - len(guilty.lstrip()))
    before = lines[max(0, number - CONTEXT_LINES) : number]
    mark = f"{indent}{'^' * max(1, len(guilty.strip()))}"
    after = lines[number + 1 : number + 1 + CONTEXT_LINES]
    title = f"line {number + 1} of the plan's text:"
    return "\n".join([title, "", *before, guilty, mark, f"{indent}{message}", *after])
