"""Every block of code in README.md and docs/ runs, and prints what the page says that it prints.

The blocks of a page run one after the other in a module of their own and in an empty folder, on the emulated device.
A picture beside a page has to be one that the page itself writes.

``pytest --update-golden`` writes what was printed into the pages, where the text there has no ``...``, and pictures.
"""

from __future__ import annotations

import doctest
import io
import linecache
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest
import torch

from spcompile.options import Options
from tests.docs.markdown_pages import ROOT, SETUP, Block, blocks_of, links_of, page_name, page_paths

LANGUAGES = {SETUP, "python", "sh", "text", "js", "json"}

MOST_NOT_RUN = 3

NOTES = r"|output|message|file: [\w.]+|not run: .+"

WITH_INDUCTOR = ("README.md", "docs/tutorial.md")
"""Pages whose models are compiled as they would be. Elsewhere segments run as they are, which takes seconds less."""

DOCTOR_CODES = (0, 1)
"""What the doctor finds is up to the machine."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pages show what the emulated device prints")


def pages_with_code() -> list[Path]:
    return [path for path in page_paths() if any(block.language != "text" for block in blocks_of(path))]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Where the names of a page live; the current folder is an empty one."""
    made = ModuleType("page_of_the_docs")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setenv("SPCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    torch._dynamo.reset()
    torch.manual_seed(0)
    before = set(sys.modules)
    yield made
    for name in set(sys.modules) - before:  # files that the page wrote: the next one may have another of that name
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    torch._dynamo.reset()


@pytest.mark.parametrize("path", pages_with_code(), ids=page_name)
def test_blocks_run(
    path: Path, module: ModuleType, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page_name(path) not in WITH_INDUCTOR:
        usual = Options.__init__.__defaults__
        assert usual is not None
        defaults = tuple("eager" if value == Options().compiler else value for value in usual)
        monkeypatch.setattr(Options.__init__, "__defaults__", defaults)
    printed = ""
    texts: list[tuple[Block, str]] = []
    for block in blocks_of(path):
        if block.note == "output":
            texts.append((block, printed))
        elif block.note.startswith("file: "):
            Path(block.note.removeprefix("file: ")).write_text(block.text, encoding="utf-8")
        elif block.reason_not_to_run is None and block.language in ("python", SETUP):
            printed = run_python(block, path, module)
        elif block.reason_not_to_run is None and block.language == "sh":
            printed = "".join(run_command(words, path, block) for words in commands_of(block))
    if request.config.getoption("--update-golden"):
        write_outputs(path, texts)
        for name in pictures_of(path):
            shutil.copy(name, path.parent)
        return
    for name in pictures_of(path):
        assert Path(name).is_file(), f"{page_name(path)} shows {name} and does not write it"
    for block, got in texts:
        assert_printed(block, got, f"{page_name(path)}:{block.line}")


def pictures_of(path: Path) -> list[str]:
    return [target for _, target in links_of(path) if re.fullmatch(r"[\w-]+\.(svg|png)", target)]


def run_python(block: Block, path: Path, module: ModuleType) -> str:
    """Run a block; tracebacks show the lines of the page."""
    text, name = "\n" * (block.line - 1) + block.text, f"<{page_name(path)}, block at line {block.line}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)  # Dynamo reads sources, too
    code = compile(text, name, "exec")
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(code, vars(module))
    return printed.getvalue()


def commands_of(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words: list[str], path: Path, block: Block) -> str:
    """Run a command of ours; of any other see that it names what is there."""
    where = f"{page_name(path)}:{block.line}: {shlex.join(words)}"
    if words[0] == "spcompile":
        from spcompile.cli import main

        printed = io.StringIO()
        with redirect_stdout(printed):
            code = main(words[1:])
        assert code in (DOCTOR_CODES if words[1] == "doctor" else (0,)), f"{where} ended with exit code {code}"
        return printed.getvalue()
    assert is_known(words), f"{where}: neither run nor known: mark it as not run, with the reason"
    return ""


def is_known(words: list[str]) -> bool:
    """Whether a command that is not run names what the repository has."""
    match words:
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            return all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in targets)
        case ["python", "-m", name, *_]:
            return (ROOT / f"{name.replace('.', '/')}.py").is_file()
        case ["python", script, *_]:
            return (ROOT / script).is_file() or Path(script).is_file()
        case ["pip", "install", *_]:
            return True
        case [first, *rest]:
            return "=" in first and is_known(rest)
    return False


def assert_printed(block: Block, got: str, where: str) -> None:
    want, got = trimmed(block.text), trimmed(got)
    is_equal = doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS)
    assert is_equal, f"{where} shows\n{want}\nbut what was printed is\n{got}"


def trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"


def write_outputs(path: Path, texts: list[tuple[Block, str]]) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for block, got in reversed(texts):
        if "..." not in block.text:
            first = block.line - 1
            lines[first : first + len(block.text.splitlines())] = trimmed(got).splitlines()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("path", page_paths(), ids=page_name)
def test_notes_and_languages_are_known(path: Path) -> None:
    """A comment with a spelling mistake would silently turn a check off."""
    for block in blocks_of(path):
        assert block.language in LANGUAGES, f"{page_name(path)}:{block.line}: say the language, or text"
        assert re.fullmatch(NOTES, block.note), f"{page_name(path)}:{block.line}: unknown note {block.note!r}"


def test_few_blocks_are_not_run() -> None:
    reasons = [
        f"{page_name(path)}:{block.line}: {block.reason_not_to_run}"
        for path in page_paths()
        for block in blocks_of(path)
        if block.reason_not_to_run is not None
    ]
    assert len(reasons) <= MOST_NOT_RUN, "\n".join(reasons)
    assert all("GPU" in reason or "network" in reason or "minutes" in reason for reason in reasons), reasons
