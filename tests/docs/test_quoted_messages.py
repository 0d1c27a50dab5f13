"""What a page quotes as a message of the package is in its source."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.markdown_pages import ROOT, blocks_of, page_name, page_paths

TELLING = 14
"""Characters of the longest piece of a quoted message, at least: shorter ones are found anywhere."""


def quoted() -> list[tuple[str, str]]:
    return [
        (f"{page_name(path)}:{block.line}", " ".join(block.text.split()))
        for path in page_paths()
        for block in blocks_of(path)
        if block.note == "message"
    ]


@cache
def strings_by_module() -> dict[str, tuple[str, ...]]:
    """The texts of each module, cut where values come in."""
    found = {}
    for folder in ("spcompile", "passes"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
            found[str(path)] = tuple(" ".join(text.split()) for text in texts if isinstance(text, str))
    return found


def is_in_one_module(message: str) -> bool:
    pieces = [piece.strip() for piece in re.split(r"\.\.\.", message) if piece.strip()]
    assert max(map(len, pieces)) >= TELLING, f"too little to be found: {message}"
    return any(
        all(any(piece in text for text in texts) or is_joined(piece, texts) for piece in pieces)
        for texts in strings_by_module().values()
    )


def is_joined(piece: str, texts: tuple[str, ...]) -> bool:
    """Whether the end of one text and the start of another one make the piece: messages are put together."""
    words = piece.split()
    cuts = [(" ".join(words[:index]), " ".join(words[index:])) for index in range(1, len(words))]
    return any(
        any(text.endswith(left) for text in texts) and any(text.startswith(right) for text in texts)
        for left, right in cuts
    )


@pytest.mark.parametrize(("where", "message"), quoted(), ids=[where for where, _ in quoted()])
def test_quoted_message_is_in_the_source(where: str, message: str) -> None:
    assert is_in_one_module(message), f"{where}: no module says {message!r}"


def test_other_messages_are_not_found() -> None:
    assert not is_in_one_module("option 'budget' must be a number of bananas")


def test_messages_are_quoted() -> None:
    assert len(quoted()) >= 10
    assert {Path(where).name.partition(":")[0] for where, _ in quoted()} >= {"troubleshooting.md"}
