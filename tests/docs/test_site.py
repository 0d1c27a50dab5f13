"""The site builds strictly, needs no network to be read, and links lead somewhere, in README.md too."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.markdown_pages import ROOT, anchors_of, links_of, page_name, page_paths

EXTERNAL = r"[a-z]+:"


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """As ``make docs`` does. (Not ``--quiet``: with it mkdocs counts no warnings, and ``--strict`` lets all pass.)"""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    return subprocess.run(command, cwd=source, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    sources = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in page_paths()[1:]}
    assert sources <= {path.relative_to(site) for path in site.rglob("*.html")}


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Links to other places are followed by people; scripts, styles, fonts and images would be by their browsers."""
    loaded = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc="(?:https?:)?//|<link[^>]*\shref="(?:https?:)?//""")
    imported = re.compile(r"""(?:@import|url\()\s*["']?(?:https?:)?//""")
    for path in site.rglob("*"):
        pattern = {".html": loaded, ".css": imported}.get(path.suffix)
        if pattern is not None:
            assert pattern.findall(path.read_text(encoding="utf-8")) == [], path.relative_to(site)


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("index.md", "[a page that is not there](not-there.md)"),
        ("index.md", "[a heading that is not there](design.md#not-there)"),
        ("index.md", "[a place on the disk](/etc/hosts)"),
        ("not-in-the-contents.md", "# A page that nobody finds"),
    ],
    ids=["link", "anchor", "absolute", "contents"],
)
def test_what_is_wrong_fails_the_build(page: str, text: str, tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / page).open("a", encoding="utf-8") as file:
        file.write(f"\n{text}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert done.stderr.count("WARNING -") == 1, done.stderr


@pytest.mark.parametrize("path", page_paths(), ids=page_name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for line, target in links_of(path):
        if re.match(EXTERNAL, target):
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        assert other.exists(), f"{page_name(path)}:{line}: there is no {target}"
        if anchor:
            assert anchor in anchors_of(other), f"{page_name(path)}:{line}: {name or 'this page'} has no #{anchor}"
