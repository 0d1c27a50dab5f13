"""What a capture does around AOTAutograd."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile import backend, dry_run
from spcompile.collector import FROZEN_BY_PYTHON, CollectorPause
from spcompile.passes.base import Program
from spcompile.pipeline import run_passes


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
    monkeypatch.setattr(dry_run, "run_passes", lambda *_: seen.append(gc.isenabled()))
    if not enabled:
        gc.disable()
    with pytest.raises(AssertionError):  # nothing was planned
        plan()
    assert seen == [False]
    assert gc.isenabled() == enabled


def test_the_collector_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Program) -> None:
        raise KeyError("a pass failed")

    monkeypatch.setattr(dry_run, "run_passes", fail)
    with pytest.raises(Exception, match="a pass failed"):
        plan()
    assert gc.isenabled()


def compiled(options: dict[str, Any]) -> Tensor:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    y: Tensor = torch.compile(model, backend="superpipeline", options=options)(torch.randn(2, 4))
    return y


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_pauses_from_dynamo_on(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a backward, which is compiled later."""
    compiled({"compiler": "eager"})  # the backend is imported, which is when the callbacks are set
    torch._dynamo.reset()
    seen: list[bool] = []

    def seeing(*args: Any) -> None:
        seen.append(gc.isenabled())
        run_passes(*args)

    monkeypatch.setattr(backend, "run_passes", seeing)
    if not enabled:
        gc.disable()
    y = compiled({"compiler": "eager", "k": 1})
    assert gc.isenabled() == enabled
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert gc.isenabled() == enabled
    assert seen == [False] * 3  # the plan of both graphs, and the rewriting of each


def test_the_collector_goes_on_after_a_compilation_that_failed() -> None:
    with pytest.raises(ValueError, match="unknown option"):
        compiled({"kk": 1})
    assert gc.isenabled()


def test_what_was_made_while_the_collector_paused_is_gone_through_once() -> None:
    """Garbage is freed; what stays counts as old, and what the user has frozen stays frozen."""

    class Cycle:
        def __init__(self) -> None:
            self.me = self

    gc.collect()
    with CollectorPause():
        lost = weakref.ref(Cycle())
        kept = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    assert lost() is None
    old = {id(each) for each in gc.get_objects(generation=2)}
    assert all(id(each) in old for each in kept)
    assert gc.get_freeze_count() <= FROZEN_BY_PYTHON
    gc.freeze()
    try:
        with CollectorPause():
            pass
        assert gc.get_freeze_count() > FROZEN_BY_PYTHON
        thawed = {id(each) for each in gc.get_objects()}  # these leave out what is frozen
        assert not any(id(each) in thawed for each in kept)
    finally:
        gc.unfreeze()
