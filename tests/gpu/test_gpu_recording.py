"""Recordings on a real GPU: what is measured is what happened, and its causes are told right."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.explain import Explanation
from spcompile.lanes import Recording, Span
from tests.slow_device import Slow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH = 1024
N_LAYERS = 8
N_ITERATIONS = 4


class Stack(nn.Module):
    """Eight layers of 4 MiB in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(N_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).view(*x.shape, 2).sum(-1)
        return x


def record(
    *, grad: bool = False, rows: int = 16, **options: Any
) -> tuple[Recording, Explanation, list[Tensor], Tensor]:
    """Record some iterations; also what they returned, and what one that is not recorded returns."""
    model = spcompile.offload(Stack().to(torch.bfloat16).requires_grad_(grad))
    fast = torch.compile(model, backend="superpipeline", options={"compiler": "eager", **options})
    x = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16)

    def call() -> Tensor:
        y: Tensor = fast(x)
        if grad:
            y.sum().backward()  # type: ignore[no-untyped-call]
        return y.detach()

    expected = call().cpu()
    with spcompile.record(fast) as recordings:
        outputs = [call().cpu() for _ in range(N_ITERATIONS)]
    (recording,) = recordings
    return recording, spcompile.explain(fast), outputs, expected


def lane(recording: Recording, name: str) -> Sequence[Span]:
    return [span for span in recording.spans if span.lane == name]


@pytest.mark.parametrize("grad", [False, True])
def test_lanes_are_complete_and_in_order(grad: bool) -> None:
    recording, explanation, outputs, expected = record(grad=grad, k=2, m=1)
    assert all(torch.equal(output, expected) for output in outputs)
    plan = recording.plan
    steps = [span.step for span in lane(recording, "compute")]
    assert steps == [*range(len(plan.steps))] * N_ITERATIONS
    for name in ("compute", "H2D", "D2H"):
        spans = lane(recording, name)
        assert all(span.start_us < span.end_us for span in spans)
        assert all(one.end_us <= two.start_us + 1 for one, two in pairwise(spans)), name  # 1 us: events round
    assert recording.moved_bytes[1:] == (plan.bytes_moved,) * (N_ITERATIONS - 1)
    assert recording.sent_bytes == (plan.gradients_bytes,) * N_ITERATIONS
    assert recording.peak_bytes is not None
    assert 0 < recording.peak_bytes <= plan.peak_bytes()
    for span in lane(recording, "H2D"):
        readers = [
            each for each in lane(recording, "compute") if (each.iteration, each.step) == (span.iteration, span.step)
        ]
        assert all(span.end_us <= reader.start_us + 1 for reader in readers)
    assert str(explanation).startswith("Measured on cuda:0, 3 iterations")


def test_a_slow_link_is_told_from_slow_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Slow(patch, link=True, compute=False)
        _, slow_link, outputs, expected = record(k=3, m=1)
    assert torch.equal(outputs[-1], expected)
    assert slow_link.limited_by == "link"
    assert {stall.cause for stall in slow_link.stalls} == {"link"}
    with monkeypatch.context() as patch:
        Slow(patch, link=False, compute=True)
        _, slow_compute, outputs, expected = record(k=3, m=1)
    assert torch.equal(outputs[-1], expected)
    assert slow_compute.limited_by == "compute"


def test_without_room_copies_wait_for_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    Slow(monkeypatch, link=True, compute=True)
    _, explanation, _, _ = record(k=1, m=1)
    assert explanation.limited_by == "room"
    assert "room" in {stall.cause for stall in explanation.stalls}


def test_everything_resident_has_nothing_but_compute() -> None:
    recording, explanation, outputs, expected = record(k=1000)
    assert torch.equal(outputs[-1], expected)
    assert {span.lane for span in recording.spans} == {"compute"}
    assert recording.stalls == ()
    assert explanation.limited_by == "host"  # whose kernels take microseconds


def test_a_busy_gpu_is_told_from_one_that_waits_for_the_host() -> None:
    _, explanation, _, _ = record(k=1000, rows=65536)
    assert explanation.limited_by == "compute"


def test_the_page_shows_measured_lanes_beside_predicted_ones(tmp_path: Path) -> None:
    recording, explanation, _, _ = record(k=2, m=1)
    (view,) = explanation.visualize(tmp_path / "page.html").views
    assert [lanes.title for lanes in view.lanes] == ["predicted", "measured"]
    measured = view.lanes[1]
    assert [bar.step for bar in measured.bars if bar.lane == "compute"] == [*range(len(recording.plan.steps))]
    assert all(bar.end >= bar.start >= 0 for bar in measured.bars if bar.lane == "compute")
    assert view.figure("measured iteration").value == recording.iteration_us
    assert (tmp_path / "page.html").stat().st_size > 10_000
