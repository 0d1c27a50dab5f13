"""The pages that people read, taken apart: README.md and everything below docs/.

What a fenced block is for is told by its language and by an invisible comment just before it:

    ```python                   run, in the order of the page; all blocks of a page share their names
    ```sh                       ``spcompile`` commands are run; other commands have to be known ones (`KNOWN` elsewhere)
    ```text                     shown only
    <!-- output -->             the ``text`` block is what the block before it printed; ``...`` stands for any text
    <!-- message -->            the ``text`` block is a message of the package; ``...`` stands for what differs
    <!-- file: NAME -->         the block is written to a file of that name
    <!-- not run: REASON -->    the block is not run
    <!-- setup (newline) CODE (newline) -->   run like a block, but not shown
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]

SETUP = "setup"


@dataclass(frozen=True)
class Block:
    """A fenced block, or the code of a setup comment.

    Attributes:
        language: the first word behind the fence; ``setup`` for a comment.
        note: the comment before it, without its marks.
        text: what is inside.
        line: of its first line, counted from 1.
    """

    language: str
    note: str
    text: str
    line: int

    @property
    def reason_not_to_run(self) -> str | None:
        return self.note.partition(":")[2].strip() if self.note.startswith("not run:") else None


def page_paths() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tokens_of(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def blocks_of(path: Path) -> list[Block]:
    return list(_blocks(path))


def _blocks(path: Path) -> Iterator[Block]:
    note = ""
    for token in tokens_of(path):
        line = token.map[0] + 1 if token.map else 0
        comment = re.fullmatch(r"<!--(.*)-->\s*", token.content, re.DOTALL) if token.type == "html_block" else None
        if token.type == "fence":
            yield Block(token.info.split(" ")[0], note, token.content, line + 1)
        elif comment and comment[1].startswith(f" {SETUP}\n"):
            yield Block(SETUP, "", comment[1].partition("\n")[2], line + 1)
        is_note = comment is not None and not comment[1].startswith(f" {SETUP}\n")
        note = comment[1].strip() if comment and is_note else ""


def links_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and target of every link and image of a page."""
    for token in tokens_of(path):
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if target is not None:
                yield (token.map[0] + 1 if token.map else 0), str(target)


def anchors_of(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them of plain words."""
    tokens = tokens_of(path)
    headings = [tokens[index + 1].content for index, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
