"""What a capture does around AOTAutograd."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import spcompile
from spcompile import planning
from spcompile.passes.base import Program


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    gc.enable()


def plan() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        spcompile.plan(model, (torch.randn(2, 4),), k=1, m=1, device="cpu")


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_pauses_while_a_graph_is_traced(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(planning, "run_passes", lambda *_: seen.append(gc.isenabled()))
    if not enabled:
        gc.disable()
    with pytest.raises(AssertionError):  # nothing was planned
        plan()
    assert seen == [False]
    assert gc.isenabled() == enabled


def test_the_collector_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Program) -> None:
        raise KeyError("a pass failed")

    monkeypatch.setattr(planning, "run_passes", fail)
    with pytest.raises(Exception, match="a pass failed"):
        plan()
    assert gc.isenabled()
