"""``spcompile show``, and what the command line answers without a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spcompile.cli import main
from spcompile.ir import FORMAT_VERSION, Plan, Plans
from tests.hand_plans import PLANS, all_resident, chain_in_batches


@pytest.mark.parametrize("name", PLANS)
def test_the_printed_plan(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    path.write_text(PLANS[name].to_json(), encoding="utf-8")
    assert main(["show", str(path)]) == 0
    assert capsys.readouterr() == (f"{PLANS[name]}\n", "")


def test_several_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, copy = tmp_path / "plans.json", tmp_path / "copy.json"
    path.write_text(f"[{chain_in_batches().to_json()},\n{all_resident().to_json()}]", encoding="utf-8")
    assert main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert out == f"{Plans([chain_in_batches(), all_resident()])}\n"
    assert main(["show", str(path), "-o", str(copy)]) == 0
    texts = [json.dumps(each) for each in json.loads(copy.read_text(encoding="utf-8"))]
    assert [Plan.from_json(text) for text in texts] == [chain_in_batches(), all_resident()]


def test_a_copy_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    path.write_text(chain_in_batches().to_json(), encoding="utf-8")
    assert main(["show", str(path), "--format", "json"]) == 0
    assert Plan.from_json(capsys.readouterr().out) == chain_in_batches()


def test_a_plan_as_text_is_read_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text = tmp_path / "plan.json", tmp_path / "plan.txt"
    path.write_text(chain_in_batches().to_json(), encoding="utf-8")
    assert main(["show", str(path), "-o", str(text)]) == 0
    assert main(["show", str(text)]) == 0
    assert capsys.readouterr() == (f"{chain_in_batches()}\n", "")
    text.write_text(text.read_text(encoding="utf-8").replace("step 1 ", "step 7 "), encoding="utf-8")
    assert main(["show", str(text)]) == 2


def test_a_picture(tmp_path: Path) -> None:
    path, page = tmp_path / "plan.json", tmp_path / "plan.html"
    path.write_text(chain_in_batches().to_json(), encoding="utf-8")
    assert main(["show", str(path), "-o", str(page)]) == 0
    assert page.read_text(encoding="utf-8").lower().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read plan.json: No such file or directory ('spcompile plan MODEL -o plan.json' writes one)"),
        (b"{", "plan.json: not the JSON text of a plan: JSONDecodeError("),
        (b"[{", "plan.json: Expecting property name"),
        (b"{}", "plan.json: not the JSON text of a plan: KeyError('format')"),
        (b"3", "plan.json: not the JSON text of a plan: "),
        (b"[]", "plan.json: there is no plan in it"),
        (b'{"format": 1}', f"plan.json: this plan has format 1; this version reads format {FORMAT_VERSION}"),
        (b"\xff\xfe\x00", "plan.json is no plan, but binary"),
    ],
    ids=str,
)
def test_what_is_no_plan(
    content: bytes | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "plan.json").write_bytes(content)
    assert main(["show", "plan.json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"spcompile: error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "argv", [["--help"], ["doctor", "--help"], ["plan", "--help"], ["show", "--help"]], ids=" ".join
)
def test_help_has_examples(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out, err = capsys.readouterr()
    command = " ".join(["spcompile", *argv[:-1]])
    assert err == ""
    assert f"\nexamples:\n  {command}" in out
    assert max(map(len, out.splitlines())) <= 120


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("spcompile ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND ('spcompile --help' shows what is allowed)"),
        (["plans"], "argument COMMAND: invalid choice: 'plans'"),
        (["show"], "the following arguments are required: plan.json ('spcompile show --help' shows what is allowed)"),
        (["doctor", "--js"], "unrecognized arguments: --js"),
    ],
    ids=str,
)
def test_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"spcompile: error: {message}")
    assert err.count("\n") == 1
