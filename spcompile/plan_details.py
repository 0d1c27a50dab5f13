"""The text of a plan with all that is in it, so that ``plan_parser`` reads it back to an equal plan.

It is what ``text.format_plan`` shows, and below it a section "Details" with all that the part above shortens or leaves
out, one fact a line:

    Details, format 5
      plan device=cuda:0 k=2 m=1 wraps=true period=2 ...
      size name=s0 value=128
      page 0 name=model.layers.0
        weight name=model.layers.0.mlp.weight nbytes=8192
      step 0 segment=layers_0 layer=model.layers.0 reads=[0] compute_us=4.5
      interval 0 page=0 start_step=-1 end_step=1 slots=[0,1]

A line is a word, for lists the index, and fields with the names that the dataclasses of ``ir`` have. A value is JSON,
or a name without quotes where nothing else could be meant. Fields that are at their defaults are left out.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from spcompile.ir import FORMAT_VERSION, Machine, Plan
from spcompile.text import format_plan

TITLE = f"Details, format {FORMAT_VERSION}"

PLAIN_NAME = re.compile(r"[A-Za-z_][\w.:#/-]*", re.ASCII)
"""Names that need no quotes."""

WORDS_OF_JSON = ("true", "false", "null", "NaN", "Infinity")
"""These need them, although they look like names."""

PLAN_FIELDS = (
    *("device", "k", "m", "wraps", "period", "workspace_bytes", "other_bytes", "backward_step", "budget_bytes"),
    "note",
)
"""The fields of a plan that are one value each. The others are lists, with lines of their own."""


def write_plan(plan: Plan) -> str:
    """The text of a plan that ``read_plan`` reads back. Equal plans have equal texts, also those that are wrong."""
    return "\n".join([format_plan(plan), "", TITLE, *(f"  {line}" for line in _details(plan))])


def _details(plan: Plan) -> Iterator[str]:
    yield _line("plan", *_fields(plan, PLAN_FIELDS))
    if plan.machine is not None:
        yield _line("machine", *_fields(plan.machine, _names(Machine, leave_out=("flops_per_s",))))
        for dtype, rate in plan.machine.flops_per_s:
            yield _line("rate", ("dtype", dtype), ("flops_per_s", float(rate)))
    yield from (_line("size", ("name", name), ("value", value)) for name, value in plan.sizes)
    yield from (_line("input", ("monomial", each), ("coefficient", number)) for each, number in plan.inputs)
    for index, polynomial in enumerate(plan.activations):
        yield f"activations {index}"
        yield from ("  " + _line("term", ("monomial", each), ("coefficient", number)) for each, number in polynomial)
    yield from (_line("leftover", *_fields(weight)) for weight in plan.leftovers)
    for index, page in enumerate(plan.pages):
        yield _line(f"page {index}", ("name", page.name))
        yield from ("  " + _line("weight", *_fields(weight)) for weight in page.weights)
    yield _line("residents", ("pages", plan.residents))
    yield _line("mapped", ("pages", plan.mapped))
    for word, items in (("step", plan.steps), ("slot", plan.slots), ("interval", plan.intervals)):
        yield from (_line(f"{word} {index}", *_fields(item)) for index, item in enumerate(items))


def _names(kind: type, leave_out: Sequence[str] = ()) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.name not in leave_out]


def _fields(item: Any, names: Sequence[str] | None = None) -> Iterator[tuple[str, object]]:
    """Names and values of a dataclass's fields, without those that are at their defaults."""
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        if (names is None or field.name in names) and (field.default is dataclasses.MISSING or value != field.default):
            yield field.name, float(value) if str(field.type) == "float" else value


def _line(word: str, *fields: tuple[str, object]) -> str:
    return " ".join([word, *(f"{name}={_value(value)}" for name, value in fields)])


def _value(value: object) -> str:
    if isinstance(value, str) and PLAIN_NAME.fullmatch(value) and value not in WORDS_OF_JSON:
        return value
    return json.dumps(value, separators=(",", ":"))
