"""Environment variables: read in one place only, listed for users as they are, and what each value means."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from spcompile import environment
from spcompile.environment import VARIABLES, cache_folder, dump_folder, wants_progress
from spcompile.errors import OptionError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "spcompile").rglob("*.py"), *(ROOT / "passes").glob("*.py")])
OWN = Path(environment.__file__).resolve()


def test_no_other_module_reads_our_variables() -> None:
    """Names of ours appear in docstrings and comments only; who asks the environment asks for somebody else's."""
    for path in SOURCES:
        if path.resolve() == OWN:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(each.value) for each in ast.walk(tree) if isinstance(each, ast.Expr)}
        constants = [each for each in ast.walk(tree) if isinstance(each, ast.Constant) and id(each) not in docstrings]
        names = [each.value for each in constants if isinstance(each.value, str) and "SPCOMPILE_" in each.value]
        assert names == [], f"{path} names {names[0]}: add a function to spcompile/environment.py"


def test_every_variable_is_in_the_list() -> None:
    source = OWN.read_text(encoding="utf-8")
    assert re.findall(r'^    "(SPCOMPILE_\w+)",$', source, re.MULTILINE) == [each.name for each in VARIABLES]
    assert [each.name for each in VARIABLES] == sorted({each.name for each in VARIABLES})


def test_docs_list_exactly_these() -> None:
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `SPCOMPILE_")]
    assert rows == [f"| `{each.name}` | {each.values} | {each.meaning} |" for each in VARIABLES]


def test_docs_name_no_other_variable() -> None:
    known = {each.name for each in VARIABLES}
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        named = set(re.findall(r"SPCOMPILE_[A-Z_]+", path.read_text(encoding="utf-8")))
        assert named <= known, path


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPCOMPILE_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("SPCOMPILE_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/spcompile")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "spcompile"


@pytest.mark.parametrize(("value", "folder"), [(None, None), ("", None), ("/somewhere", Path("/somewhere"))])
def test_dump_folder(monkeypatch: pytest.MonkeyPatch, value: str | None, folder: Path | None) -> None:
    monkeypatch.delenv("SPCOMPILE_DUMP_DIR", raising=False)
    if value is not None:
        monkeypatch.setenv("SPCOMPILE_DUMP_DIR", value)
    assert dump_folder() == folder


@pytest.mark.parametrize(("value", "wanted"), [(None, None), ("", None), ("0", False), ("1", True)])
def test_progress(monkeypatch: pytest.MonkeyPatch, value: str | None, wanted: bool | None) -> None:
    monkeypatch.delenv("SPCOMPILE_PROGRESS", raising=False)
    if value is not None:
        monkeypatch.setenv("SPCOMPILE_PROGRESS", value)
    assert wants_progress() is wanted


def test_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPCOMPILE_PROGRESS", "yes")
    with pytest.raises(OptionError, match="SPCOMPILE_PROGRESS must be 0 or 1, not 'yes'"):
        wants_progress()
