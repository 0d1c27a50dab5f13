"""What `Plan.visualize` returns: files by suffix, the notebook, and messages where something is wrong."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from spcompile.errors import OptionError
from spcompile.ir import Plan, Plans, Step, Weight
from spcompile.viz.picture import WRITERS
from tests.hand_plans import PLANS
from tests.viz.recordings import recording_of
from tests.viz.timed_plans import MACHINE, inference, training


def data_of(page: str) -> list[dict[str, Any]]:
    """The views in a page."""
    found = re.findall(r'<script type="application/json" id="plan-data">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1
    graphs: list[dict[str, Any]] = json.loads(found[0])["graphs"]
    return graphs


@pytest.mark.parametrize("suffix", [*WRITERS, ".HTML"])
def test_a_file_is_written_for_each_suffix(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"plan{suffix}"
    picture = replace(inference(k=2), budget_bytes=2000).visualize(path)
    assert picture.save(str(path)) == path
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "found"), [("plan.pdf", "the suffix '.pdf'"), ("plan", "no suffix"), ("plan.html.gz", "the suffix '.gz'")]
)
def test_other_suffixes_are_refused(name: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=re.escape(f"written as .html, .svg, .png, .json, and {name!r} has {found}")):
        inference(k=2).visualize(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_page_has_all_that_is_shown_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    plan = replace(training(2, k=2), budget_bytes=5000)
    picture = plan.visualize(tmp_path / "plan.html", recording=recording_of(plan, MACHINE))
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert data_of(page) == json.loads(json.dumps([asdict(view) for view in picture.views]))
    assert re.findall(r"(?:src|href)\s*=|url\((?!#)|@import|\bfetch\(|XMLHttpRequest", page) == []
    assert re.findall(r"https?://[^\"' ]+", page) == ["http://www.w3.org/2000/svg"]  # a name, not an address


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script><!-- ${title} $$ & \u2028 'ö\""
    plan = Plan("cpu", 1, 1, False, (), (Weight(name, 1),), (), (), (), 1, ())
    hostile = plan.visualize(tmp_path / "a.html")
    steps = (Step(name, name, ()),)
    page = Plan(name, 1, 1, False, (), (), (), steps, (), 1, ()).visualize().to_html()
    assert data_of(page)[0]["rows"][0]["name"] == name
    assert "<script>alert" not in page
    assert f"<title>{html.escape(f'Plan for {name}: 0 pages, 1 layer, 1 step')}</title>" in page
    assert hostile.views[0].rows == ()


def test_notebook_shows_the_page_in_a_frame() -> None:
    picture = inference(k=2).visualize()
    match = re.fullmatch(r'<iframe title="[^"]*" style="[^"]*" srcdoc="([^"]*)"></iframe>', picture._repr_html_())
    assert match is not None
    assert html.unescape(match[1]) == picture.to_html()
    assert repr(picture) == (
        "Picture(Plan for cuda:0: 3 pages, 3 layers, 3 steps): save it as .html, .svg, .png, .json"
    )


def test_svg_is_xml_with_the_names_of_lanes_and_is_the_same_each_time(tmp_path: Path) -> None:
    plan = training(2, k=2)
    plan.visualize(tmp_path / "one.svg")
    plan.visualize(tmp_path / "two.svg")
    text = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "two.svg").read_text(encoding="utf-8")
    words = {element.text for element in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")}
    assert {"compute", "H2D", "D2H", "activations", "gradients", "this plan"} <= words


def test_png_is_one(tmp_path: Path) -> None:
    PLANS["chain_in_batches"].visualize(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_plan_of_nothing_can_be_drawn(tmp_path: Path) -> None:
    for machine in (None, "h100"):
        for suffix in WRITERS:
            Plan("cpu", 1, 1, True, (), (), (), (), (), 1, ()).visualize(
                tmp_path / f"{machine}{suffix}", machine=machine
            )


def test_images_without_matplotlib_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = inference(k=2).visualize(tmp_path / "plan.html")
    with pytest.raises(OptionError, match=re.escape("pip install 'spcompile[viz]'")):
        picture.save(tmp_path / "plan.png")
    assert not (tmp_path / "plan.png").exists()


def test_several_graphs_are_in_one_file(tmp_path: Path) -> None:
    plans = Plans([inference(k=2), PLANS["tied_ends"]])
    picture = plans.visualize(tmp_path / "plans.html", recording=recording_of(plans[0], MACHINE))
    assert [graph["title"] for graph in data_of((tmp_path / "plans.html").read_text(encoding="utf-8"))] == [
        "Plan for cuda:0: 3 pages, 3 layers, 3 steps",
        "Plan for cuda:0: 3 pages, 2 layers, 4 steps",
    ]
    assert [len(view.lanes) for view in picture.views] == [2, 1]  # measured beside predicted, where it was recorded
    for suffix in (".png", ".json"):
        picture.save(tmp_path / f"plans{suffix}")


def test_several_graphs_and_a_recording_of_none() -> None:
    with pytest.raises(OptionError, match="the recording is of none of these plans"):
        Plans([inference(k=2), inference(k=1)]).visualize(recording=recording_of(training(1, k=2), MACHINE))


def test_no_graphs() -> None:
    with pytest.raises(OptionError, match="there is no plan to show"):
        Plans([]).visualize()


def test_drawing_needs_neither_torch_nor_matplotlib() -> None:
    """In a process of its own, in which both cannot be imported: the page and the trace of a plan from JSON."""
    code = """
import sys, types
sys.modules["torch"] = sys.modules["matplotlib"] = None
package = types.ModuleType("spcompile"); package.__path__ = ["spcompile"]  # its __init__ imports torch
sys.modules["spcompile"] = package
from spcompile.ir import Plan
picture = Plan.from_json(sys.stdin.read()).visualize(machine="h100")
from spcompile.viz.chrome_trace import make_trace
print(len(picture.to_html()) > 10_000, len(make_trace(picture.views)) > 1000)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, input=inference(k=2).to_json(), capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("True True\n", 0), done.stderr


def test_files_of_eighty_layers_with_training_are_small(tmp_path: Path) -> None:
    plan = training(80, capacity_bytes=40 * 512)
    picture = plan.visualize(recording=recording_of(plan, MACHINE))
    sizes = {suffix: picture.save(tmp_path / f"plan{suffix}").stat().st_size for suffix in (".html", ".json")}
    assert max(sizes.values()) < 8_000_000 / 8
