"""The page as people meet it: in a headless browser, without a network, by pointer, keyboard and finger."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'spcompile[test]'")

from playwright.sync_api import Browser

from spcompile.ir import Plan, Plans, Step
from spcompile.planner.simulate import simulate
from spcompile.text import format_bytes
from spcompile.viz.show_figures import summary
from spcompile.wording import format_us
from tests.hand_plans import PLANS
from tests.viz.browsing import NARROW, WIDE, Opened, installed_browser, opened
from tests.viz.recordings import recording_of
from tests.viz.timed_plans import MACHINE, inference, training

WITHIN_BUDGET = training(80, capacity_bytes=40 * 512)
LARGE = replace(WITHIN_BUDGET, budget_bytes=WITHIN_BUDGET.peak_bytes() + 100)
"""80 layers in training, of which some stay."""

SELECTED = ".bar.on, .wait.on, .line.on, .layers tr.on"

OPEN_MS = 2000
"""Time in which a page must be there: from navigation until it can be used."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with installed_browser() as found:
        yield found


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "large plan.html"
    LARGE.visualize(path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "plan.html"
    replace(inference(4, k=2), budget_bytes=2000).visualize(path)
    return path


def view_in(page: Opened, graph: int = 0) -> dict[str, Any]:
    view: dict[str, Any] = json.loads(page.page.locator("#plan-data").text_content() or "")["graphs"][graph]
    return view


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_opens_fast_without_network_and_errors(
    browser: Browser, large: Path, viewport: dict[str, int], scheme: str
) -> None:
    with opened(browser, large, viewport=viewport, color_scheme=scheme) as page:
        timing = "performance.getEntriesByType('navigation')[0]"
        assert 0 < page.ask(f"{timing}.domInteractive") < OPEN_MS
        assert 0 < page.ask(f"{timing}.loadEventEnd") < OPEN_MS
        assert page.ask("document.documentElement.scrollWidth") == viewport["width"]  # no scrolling sideways
        outside = """() => [...document.querySelectorAll("h1, h2, p, dd, dt, button, section")].filter((element) => {
            const box = element.getBoundingClientRect();
            return !element.closest(".scroll") && (box.left < 0 || box.right > innerWidth + 0.5);
        }).map((element) => element.textContent)"""
        assert page.ask(outside) == []
        background, ink, muted = page.ask("""() => [getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.body).color, getComputedStyle(document.querySelector(".hint")).color]""")
        assert (luminance(background) < 0.1) == (scheme == "dark")
        assert contrast(background, ink) >= 7
        assert contrast(background, muted) >= 4.5


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_lane_layer_and_line_is_there(browser: Browser, large: Path) -> None:
    with opened(browser, large) as page:
        lanes = page.ask("[...document.querySelectorAll('.bar')].map(bar => bar.dataset.lane)")
        assert Counter(lanes) == {
            "compute": len(LARGE.steps),
            "H2D": len(LARGE.intervals),
            "D2H": sum(step.gradients_bytes > 0 for step in LARGE.steps),
        }
        drawn = set(page.select(".bar[data-lane=compute]"))
        assert drawn == {str(row) for row in range(82)}
        names = page.ask("[...document.querySelectorAll('.layers tbody tr')].map(row => row.cells[0].textContent)")
        assert names == ["model.embed", *(layer.name for layer in LARGE.layers), "model.head"]
        codes = page.ask("[...document.querySelectorAll('.line .code')].map(code => code.textContent)")
        assert codes == [line["code"] for line in view_in(page)["lines"]]
        assert len(codes) == len(list(LARGE.actions())) + 3  # forward, backward, finish
        shares = page.ask("[...document.querySelectorAll('.memory path')].map(path => path.dataset.share)")
        assert shares == [share["name"] for share in view_in(page)["memory"]["shares"]]
        assert len(page.select("[data-level=budget]")) == 1
        waits = page.ask("[...document.querySelectorAll('.wait')].map(wait => wait.dataset.cause)")
        assert Counter(waits) == Counter(stall.cause for stall in simulate(LARGE, MACHINE).stalls)


def test_figures_are_those_of_the_plan(browser: Browser, large: Path) -> None:
    simulation = simulate(LARGE, MACHINE)
    expected = {
        "peak memory": (LARGE.peak_bytes(), format_bytes(LARGE.peak_bytes())),
        "budget": (LARGE.peak_bytes() + 100, format_bytes(LARGE.peak_bytes() + 100)),
        "weights": (LARGE.weights_bytes, format_bytes(LARGE.weights_bytes)),
        "iteration": (simulation.iteration_us, format_us(simulation.iteration_us)),
        "compute": (simulation.compute_us, format_us(simulation.compute_us)),
        "copies": (simulation.link_us, format_us(simulation.link_us)),
        "sends": (simulation.down_us, format_us(simulation.down_us)),
        "moved": (LARGE.bytes_moved, format_bytes(LARGE.bytes_moved)),
        "gradients": (LARGE.gradients_bytes, format_bytes(LARGE.gradients_bytes)),
    }
    with opened(browser, large) as page:
        values = {figure["name"]: figure["value"] for figure in view_in(page)["figures"]}
        texts = page.ask("""Object.fromEntries([...document.querySelectorAll("#figures div")].map(
            (tile) => [tile.dataset.figure, tile.querySelector("dd").textContent]))""")
        assert {name: (values[name], texts[name]) for name in expected} == expected
        foot = page.ask("[...document.querySelectorAll('.layers tfoot td')].map(cell => cell.textContent)")
        assert foot[1] == format_bytes(LARGE.weights_bytes)
        assert foot[3:5] == [format_us(simulation.compute_us), format_us(simulation.link_us)]
        assert page.page.locator("#summary").text_content() == summary(LARGE, simulation)
        starts = [bar["start"] for bar in view_in(page)["lanes"][0]["bars"] if bar["lane"] == "compute"]
        first_us = simulation.iteration_starts_us[simulation.typical]
        spans = [span for span in simulation.spans if span.lane == "compute" and span.iteration == simulation.typical]
        assert starts == [span.start_us - first_us for span in spans]


def test_numbers_are_written_as_in_python(browser: Browser, small: Path) -> None:
    """The page's own functions for bytes and times, which the tips use, against those of the plan's text."""
    times, nbytes = [0, 0.5, 35.2, 999.6, 1e3, 245e3, 1.2e6, 4.5e9], [0, 1023, 1024, 5 * 2**20, 2**30 - 1, 3 * 2**40]
    with opened(browser, small) as page:
        code = (Path(__file__).resolve().parents[2] / "spcompile" / "viz" / "base.js").read_text(encoding="utf-8")
        found = page.ask(
            f"""([times, nbytes]) => {{
                {code};
                return [times.map((us) => formatTime(us, "us")), nbytes.map(formatBytes)];
            }}""",
            [times, nbytes],
        )
        assert found == [[format_us(us) for us in times], [format_bytes(each) for each in nbytes]]


def test_pointing_at_a_bar_shows_it_everywhere(browser: Browser, small: Path) -> None:
    with opened(browser, small) as page:
        page.point(".bar[data-lane=H2D][data-row='2']")
        assert set(page.select(".bar.on")) == {"2"}
        assert page.select(".layers tr.on") == ["2"]
        exact = page.ask("[...document.querySelectorAll('.line.exact .code')].map(code => code.textContent)")
        assert exact == [
            "prefetch_2 = prefetch(runtime, 2, model.layers.2)",
            "load_2 = load(runtime, 2, model.layers.2)",
            "evict_2 = evict(runtime, 2, model.layers.2)",
        ]
        tip = page.page.locator("#tip").inner_text()
        assert tip.startswith("model.layers.2")
        assert "512 us" in tip
        assert "512 B" in tip
        page.page.mouse.move(5, 5)
        assert page.select(SELECTED) == []
        assert page.page.locator("#tip").is_hidden()


def test_pointing_at_a_stall_says_why(browser: Browser, small: Path) -> None:
    with opened(browser, small) as page:
        page.point(".wait[data-row='1']")
        tip = page.page.locator("#tip").inner_text()
        assert tip.startswith("waits for model.layers.1")
        assert "the link is the limit" in tip


def test_pointing_at_a_row_or_line_shows_its_bars(browser: Browser, small: Path) -> None:
    with opened(browser, small) as page:
        page.page.locator(".layers tbody tr").nth(3).hover()
        assert set(page.select(".bar.on")) == {"3"}
        page.page.locator(".line", has_text="load_1 =").hover()
        assert set(page.select(".bar.on")) == {"1"}
        exact = page.ask("[...document.querySelectorAll('.bar.exact')].map(bar => bar.dataset.lane)")
        assert set(exact) == {"H2D"}


def test_pointing_at_memory_says_what_it_holds(browser: Browser, small: Path) -> None:
    with opened(browser, small) as page:
        view = view_in(page)
        page.point("svg.memory")
        lines = page.page.locator("#tip").inner_text().splitlines()
        low, high = page.domain()
        index = max(at for at, time in enumerate(view["memory"]["times"]) if time <= (low + high) / 2)
        total = sum(share["nbytes"][index] for share in view["memory"]["shares"])
        assert lines[0].startswith("device memory at")
        assert lines[-1].split("\t") == ["together", format_bytes(total)]


def test_a_click_keeps_and_escape_lets_go(browser: Browser, small: Path) -> None:
    with opened(browser, small) as page:
        page.page.mouse.click(*page.middle(".layers tbody tr", 1))
        page.page.mouse.move(5, 5)
        assert page.select(".layers tr.on") == ["1"]
        page.page.keyboard.press("Escape")
        assert page.select(SELECTED) == []


def test_zooming_moves_lanes_and_memory_together(browser: Browser, small: Path) -> None:
    with opened(browser, small) as page:
        whole = page.domain()
        x, y = page.middle("svg.memory")
        page.page.mouse.move(x - 300, y)
        page.page.mouse.down()
        page.page.mouse.move(x + 100, y, steps=3)
        page.page.mouse.up()
        low, high = page.domain()
        assert whole[0] < low < high < whole[1]
        assert_linked(page)
        page.page.mouse.dblclick(x, y)
        assert page.domain() == whole
        assert_linked(page)


def assert_linked(page: Opened) -> None:
    """Bars stand where the axis has their times, and memory shows the same stretch."""
    low, high = page.domain()
    box = page.ask("document.querySelector('svg.memory').getAttribute('viewBox')").split()
    assert (float(box[0]), float(box[2])) == pytest.approx((low, high - low))
    found = page.ask("""[...document.querySelectorAll(".bar")].filter((bar) => bar.style.display !== "none").map(
        (bar) => [bar.item.start, bar.item.end, Number(bar.item.rect.getAttribute("x"))])""")
    assert found
    left, width = page.ask("""["x", "width"].map((name) =>
        Number(document.querySelector("svg.memory").getAttribute(name)))""")
    for start, end, x in found:
        assert end >= low
        assert start <= high
        assert x == pytest.approx(max(left + (start - low) / (high - low) * width, left - 4), abs=0.01)


def test_zoom_by_wheel_and_buttons(browser: Browser, large: Path) -> None:
    with opened(browser, large) as page:
        whole = page.domain()
        page.point(".bar[data-row='40']")
        page.page.keyboard.down("Control")
        page.page.mouse.wheel(0, -400)
        page.page.keyboard.up("Control")
        page.page.wait_for_function("low => Number(timeline.dataset.low) > low", arg=whole[0])
        low, high = page.domain()
        page.page.locator("#zoom-in").click()
        assert page.domain()[1] - page.domain()[0] == pytest.approx((high - low) / 2)
        page.page.locator("#zoom-left").click()
        assert page.domain()[0] < low + (high - low) / 4
        page.page.locator("#zoom-right").click()
        page.page.locator("#zoom-out").click()
        assert page.domain() == pytest.approx((low, high))
        assert_linked(page)
        page.page.locator("#zoom-reset").click()
        assert page.domain() == whole


def test_a_resized_window_keeps_the_zoom(browser: Browser, large: Path) -> None:
    with opened(browser, large) as page:
        page.page.locator("#zoom-in").click()
        zoomed = page.domain()
        page.page.set_viewport_size({"width": 700, "height": 900})
        page.page.wait_for_function(
            "document.querySelector('#timeline svg').getAttribute('viewBox').split(' ')[2] < 700"
        )
        assert page.domain() == zoomed
        assert_linked(page)


def test_keyboard_reaches_everything(browser: Browser, large: Path) -> None:
    with opened(browser, large) as page:
        press = page.page.keyboard.press
        stops = []
        for _ in range(30):
            press("Tab")
            stops.append(page.ask("document.activeElement.id || document.activeElement.closest('section')?.id || ''"))
            if stops[-1] == "trade":
                break
        assert [stop for stop, following in pairwise([*stops, ""]) if stop != following] == [
            *("zoom-left", "zoom-right", "zoom-in", "zoom-out", "zoom-reset"),
            *("timeline", "table", "code", "trade"),
        ]
        page.ask("timeline.focus()")
        whole = page.domain()
        press("+")
        assert page.domain()[1] - page.domain()[0] < whole[1] - whole[0]
        for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
            press(key)
        assert page.page.locator("#tip").inner_text().startswith("model.")
        assert len(page.select(".layers tr.on")) == 1
        press("0")
        assert page.domain() == whole
        press("Escape")
        assert page.select(SELECTED) == []


def test_arrows_move_in_table_graph_and_curve(browser: Browser, small: Path) -> None:
    with opened(browser, small) as page:
        press = page.page.keyboard.press
        page.page.locator(".layers tbody tr").first.focus()
        press("ArrowDown")
        assert page.select(".layers tr.on") == ["1"]
        page.page.locator(".line").first.focus()
        press("End")
        assert page.ask("document.activeElement.textContent").startswith("prefetch_1")
        assert set(page.select(".bar.exact")) == {"1"}
        said = page.page.locator("#point").inner_text()
        assert said.startswith("This plan: ")
        page.page.locator(".point.chosen").focus()
        press("ArrowRight")
        other = page.page.locator("#point").inner_text()
        assert other.startswith("Another plan: ")
        assert "Against this plan: +" in other


def test_sorting_the_table(browser: Browser, large: Path) -> None:
    with opened(browser, large) as page:
        column = page.page.locator(".layers th", has_text="stall")
        column.locator("button").click()
        assert column.get_attribute("aria-sort") == "descending"
        view = view_in(page)
        stalls = [view["rows"][int(row)]["predicted"]["stall"] for row in page.select(".layers tbody tr")]
        assert stalls == sorted(stalls, reverse=True)
        assert len(stalls) == 82
        page.page.locator(".layers th", has_text="layer").first.locator("button").click()
        assert page.select(".layers tbody tr") == [str(row) for row in range(82)]


def test_a_finger_chooses_and_moves(browser: Browser, large: Path) -> None:
    with opened(browser, large, viewport=NARROW, has_touch=True, is_mobile=True) as page:
        page.page.locator("#timeline").scroll_into_view_if_needed()
        for _ in range(4):
            page.page.locator("#zoom-in").click()
        page.page.touchscreen.tap(*page.middle(".bar[data-lane=D2H]:not([hidden])", 2))
        assert len(page.select(".layers tr.on")) == 1
        assert page.page.locator("#tip").is_visible()


def test_several_graphs_are_chosen_from(browser: Browser, tmp_path: Path) -> None:
    Plans([inference(4, k=2), PLANS["tied_ends"]]).visualize(tmp_path / "plans.html")
    with opened(browser, tmp_path / "plans.html") as page:
        assert page.page.locator("#graph-choice").is_visible()
        page.page.locator("#graph-select").select_option("1")
        assert page.page.locator("h1").text_content() == view_in(page, 1)["title"]
        assert set(page.ask("[...document.querySelectorAll('.bar')].map(bar => bar.dataset.lane)")) == {
            "compute",
            "slots",
        }
        assert page.page.locator("#trade").is_hidden()
        assert "Nothing is known of the machine" in page.page.locator("#notes").inner_text()
        page.point(".bar[data-lane=slots][data-row='2']")
        assert "read from" in page.page.locator("#tip").inner_text()
        page.page.locator("#graph-select").select_option("0")
        page.point(".bar[data-lane=H2D][data-row='2']")
        assert page.select(".layers tr.on") == ["2"]


def test_measured_lanes_stand_beside_predicted_ones(browser: Browser, tmp_path: Path) -> None:
    plan = inference(4, k=2)
    plan.visualize(tmp_path / "run.html", recording=recording_of(plan, MACHINE, peak_bytes=1200))
    with opened(browser, tmp_path / "run.html") as page:
        names = page.ask("[...document.querySelectorAll('.group-name')].map(name => name.textContent)")
        assert names == ["predicted", "measured"]
        assert len(page.select(".bar[data-lane=compute]")) == 2 * len(plan.steps)
        heads = page.ask("[...document.querySelectorAll('.layers th')].map(head => head.textContent)")
        assert "stall\nmeasured" in heads
        assert len(page.select("[data-level='measured peak']")) == 1


def test_a_notebook_shows_the_page(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "notebook.html").write_text(
        f"<!DOCTYPE html><html data-ready><body>{inference(4, k=2).visualize()._repr_html_()}</body></html>",
        encoding="utf-8",
    )
    with opened(browser, tmp_path / "notebook.html") as page:
        frame = page.page.frame_locator("iframe")
        frame.locator(".bar").first.wait_for()
        assert frame.locator("tr[data-row]").count() == 4
        assert page.ask("getComputedStyle(document.body).fontFamily") != "system-ui"  # its styles stay inside


def test_names_from_the_model_are_only_text(browser: Browser, tmp_path: Path) -> None:
    name = "</script><img src=x onerror=alert(1)><!--<script>'\"&amp;"
    steps = (Step(name, name, ()), Step("b", None, ()))
    Plan("cpu", 1, 1, False, (), (), (), steps, (), 1, ()).visualize(tmp_path / "plan.html")
    with opened(browser, tmp_path / "plan.html") as page:
        cells = page.ask("[...document.querySelectorAll('.layers tbody tr')].map(row => row.cells[0].textContent)")
        assert cells == [name, "b"]


def test_a_plan_of_nothing(browser: Browser, tmp_path: Path) -> None:
    Plan("cpu", 1, 1, False, (), (), (), (), (), 1, ()).visualize(tmp_path / "plan.html")
    with opened(browser, tmp_path / "plan.html") as page:
        assert page.page.locator("h1").text_content() == "Plan for cpu: 0 pages, 0 layers, 0 steps"
