"""The reference has a line for everything that there is."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re

import pytest

import spcompile
from spcompile.errors import SuperpipelineError
from spcompile.explain import Explanation
from spcompile.ir import Plan
from spcompile.options import COMPILERS, UNITS, Options
from spcompile.planner.machine import PROFILES
from tests.docs.markdown_pages import ROOT

COMMANDS = ("doctor", "plan", "show")


def page(name: str) -> str:
    return (ROOT / "docs" / "reference" / f"{name}.md").read_text(encoding="utf-8")


def missing(names: set[str], text: str) -> set[str]:
    """The names that no code span or heading of a page mentions."""
    told = " ".join(re.findall(r"`([^`\n]+)`", text) + re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", told)}


def public(kind: type) -> set[str]:
    names = {*dir(kind), *(field.name for field in dataclasses.fields(kind))}
    return {name for name in names if not name.startswith("_")}


def test_options() -> None:
    names = {field.name for field in dataclasses.fields(Options)} | {*COMPILERS, *PROFILES}
    assert missing(names, page("options")) == set()
    units = {unit.replace("IB", "iB") for unit in UNITS}
    assert missing(units, page("options")) == set()


def test_functions_and_errors() -> None:
    errors = {name for name in spcompile.__all__ if name.endswith("Error")}
    functions = {name for name in spcompile.__all__ if name.islower()}
    assert {*errors, *functions, "Plan"} == set(spcompile.__all__)
    assert SuperpipelineError.__name__ in errors
    assert missing(errors | functions, page("api")) == set()


def test_explanation() -> None:
    shown = public(Explanation) - {"is_timed", "iterations"}  # what other figures are made of
    assert missing(shown, page("api")) == set()


def test_plan() -> None:
    assert missing(public(Plan), page("plan")) == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_command_line(command: str) -> None:
    from spcompile.cli import main

    helped = io.StringIO()
    with contextlib.redirect_stdout(helped):
        assert main([command, "--help"]) == 0
    options = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", helped.getvalue().partition("examples:")[0])) - {"-h"}
    assert missing(options, page("command-line")) == set()
