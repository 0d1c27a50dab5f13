"""The dump folder: what every graph leaves there, and that nothing about it makes a compilation fail."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import spcompile
from spcompile import dump
from spcompile.ir import Plan
from spcompile.pipeline import PASSES

FILES_OF_PASSES = [f"{number}-{each.name}.txt" for number, each in enumerate(PASSES, start=1)]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            values = torch.tanh(layer(values))
        return values


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SPCOMPILE_DUMP_DIR", str(tmp_path / "dumps" / "here"))
    torch._dynamo.reset()
    dump._warn.cache_clear()
    yield tmp_path / "dumps" / "here"
    dump._warn.cache_clear()


def compiled(model: nn.Module) -> nn.Module:
    fast = torch.compile(model, backend="superpipeline", options={"compiler": "eager", "k": 2, "device": "cpu"})
    assert isinstance(fast, nn.Module)
    return fast


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_what_a_compiled_graph_leaves(folder: Path) -> None:
    model = Stack()
    fast = compiled(model)
    with torch.no_grad():
        fast(torch.ones(2, 8))
    assert names(folder) == ["000-Stack-inference"]
    own = folder / "000-Stack-inference"
    assert names(own) == sorted(["0-captured.txt", *FILES_OF_PASSES, "outer.py", "plan.json", "plan.txt"])
    plan = spcompile.plan(fast)
    assert isinstance(plan, Plan)
    assert Plan.from_text((own / "plan.txt").read_text()) == plan == Plan.from_json((own / "plan.json").read_text())
    captured, outer = (own / "0-captured.txt").read_text(), (own / "outer.py").read_text()
    assert captured.count("aten.addmm.default") == 4
    assert "prefetch" not in captured
    assert outer.count("load(runtime") == 4
    assert outer.startswith("\n\n\ndef forward(self")
    split = (own / "5-split_segments.txt").read_text()
    assert split.count("aten.addmm.default") == 1  # equal segments are shown once
    assert split.count(": as ") == 3


def test_forward_and_backward_have_folders_of_their_own(folder: Path) -> None:
    compiled(Stack())(torch.ones(2, 8)).sum().backward()
    assert names(folder) == ["000-Stack-forward", "001-Stack-backward"]
    texts = [(folder / name / "plan.txt").read_text() for name in names(folder)]
    assert texts[0] == texts[1]
    assert all((folder / name / "outer.py").is_file() for name in names(folder))


def test_a_plan_without_compilation_ends_with_the_plan(folder: Path) -> None:
    with torch.no_grad():
        spcompile.plan(Stack(), (torch.ones(2, 8),), device="cpu")
        spcompile.plan(Stack(), (torch.ones(2, 8),), device="cpu")
    assert names(folder) == ["000-Stack-inference", "001-Stack-inference"]
    planning = [name for name in FILES_OF_PASSES if name < "5"]
    assert names(folder / "001-Stack-inference") == sorted(["0-captured.txt", *planning, "plan.json", "plan.txt"])


def test_a_number_is_never_taken_twice(folder: Path) -> None:
    (folder / "041-other").mkdir(parents=True)
    (folder / "notes").mkdir()
    made = [dump.new_dump(name).folder for name in ("a", "b/../c", "a")]
    assert made == [folder / "042-a", folder / "043-b_.._c", folder / "044-a"]


def test_nothing_is_written_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPCOMPILE_DUMP_DIR", raising=False)
    assert dump.new_dump("a") is dump.NOWHERE
    dump.NOWHERE.write("file", lambda: pytest.fail("the text was made"))


def test_a_folder_that_cannot_be_made_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPCOMPILE_DUMP_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "spcompile"), torch.no_grad():
        compiled(Stack())(torch.ones(2, 8))
        torch._dynamo.reset()
        compiled(Stack())(torch.ones(2, 8))
    (message,) = [each.getMessage() for each in caplog.records if "SPCOMPILE_DUMP_DIR" in each.getMessage()]
    assert message.startswith(f"SPCOMPILE_DUMP_DIR: what is compiled is not written to {tmp_path / 'file'}: ")
    assert not folder.exists()


def test_a_full_disk_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, folder: Path
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with caplog.at_level(logging.WARNING, "spcompile"), torch.no_grad():
        output = compiled(Stack())(torch.ones(2, 8))
    assert output.shape == (2, 8)
    messages = [each.getMessage() for each in caplog.records if "SPCOMPILE_DUMP_DIR" in each.getMessage()]
    assert messages == [
        f"SPCOMPILE_DUMP_DIR: what is compiled is not written to {folder}: [Errno 28] No space left on device"
    ]
