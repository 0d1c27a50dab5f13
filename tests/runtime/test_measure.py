"""What is remembered of a machine, without one: the measurement itself is seen on a GPU (`tests/gpu`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.environment import cache_folder
from spcompile.errors import OffloadError
from spcompile.ir import Machine
from spcompile.options import Options
from spcompile.planner.machine import PROFILES
from spcompile.runtime import measure
from spcompile.runtime.measure import this_machine

CUDA = torch.device("cuda", 0)


class Gpu:
    """One that is not here, and how often it has been measured."""

    def __init__(self) -> None:
        self.count = 0
        self.uuid = "GPU-1"

    def measure(self, _device: torch.device) -> Machine:
        self.count += 1
        return dataclasses.replace(PROFILES["rtx4090"], name="imagined", h2d_bytes_per_s=1e9 * self.count)

    def properties(self, _device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(uuid=self.uuid)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    imagined = Gpu()
    monkeypatch.setenv("SPCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "measure_machine", imagined.measure)
    monkeypatch.setattr(torch.cuda, "get_device_properties", imagined.properties)
    this_machine.cache_clear()
    yield imagined
    this_machine.cache_clear()


def test_a_machine_is_measured_once(gpu: Gpu) -> None:
    first = this_machine(CUDA)
    assert this_machine(CUDA) is first
    this_machine.cache_clear()  # another process
    assert this_machine(CUDA) == first
    assert gpu.count == 1


def test_another_gpu_is_measured_for_itself(gpu: Gpu) -> None:
    first = this_machine(CUDA)
    this_machine.cache_clear()
    gpu.uuid = "GPU-2"
    assert this_machine(CUDA) != first


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"name": "half"}', "\N{SNOWMAN}"])
def test_what_cannot_be_read_is_measured_again(gpu: Gpu, text: str) -> None:
    this_machine(CUDA)
    (path,) = cache_folder().iterdir()
    path.write_text(text, encoding="utf-8")
    this_machine.cache_clear()
    again = this_machine(CUDA)
    assert gpu.count == 2
    this_machine.cache_clear()
    assert this_machine(CUDA) == again
    assert gpu.count == 2


def test_where_nothing_can_be_written_it_is_measured_each_time(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPCOMPILE_CACHE_DIR", "/proc/nowhere")
    this_machine(CUDA)
    this_machine.cache_clear()
    this_machine(CUDA)
    assert gpu.count == 2


def test_nothing_is_left_beside_the_file(gpu: Gpu) -> None:
    this_machine(CUDA)
    assert gpu.count == len(list(cache_folder().iterdir())) == 1


def test_caches_have_their_usual_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPCOMPILE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/spcompile")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "spcompile"


class TestPlans:
    """Which machine a plan is timed on."""

    @staticmethod
    def machine(monkeypatch: pytest.MonkeyPatch, *, measured: object, **options: str) -> Machine:
        def this(_device: torch.device) -> Machine:
            if isinstance(measured, Exception):
                raise measured
            assert isinstance(measured, Machine)
            return measured

        monkeypatch.setattr("spcompile.capture.this_machine", this)
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.zeros(2, 8)
        machine = planned_on_cuda(model, x, monkeypatch, **options)
        assert machine is not None
        return machine

    def test_the_one_that_is_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        here = dataclasses.replace(PROFILES["h100"], name="here")
        assert self.machine(monkeypatch, measured=here) == here

    def test_the_one_that_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        error = AssertionError("measured although another one was asked for")
        assert self.machine(monkeypatch, measured=error, machine="rtx4090") == PROFILES["rtx4090"]

    @pytest.mark.parametrize("error", [OffloadError("cannot pin"), torch.OutOfMemoryError("full")])
    def test_a_profile_where_nothing_can_be_measured(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
    ) -> None:
        assert self.machine(monkeypatch, measured=error) == PROFILES["h100"]
        assert f"cannot be measured ({error})" in caplog.text


def planned_on_cuda(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, **options: str) -> Machine | None:
    """The machine of a plan that was made while CUDA seemed to be here."""
    from spcompile import capture

    ask = capture.find_machine_for

    def ask_as_on_cuda(_device: torch.device, options: Options) -> Machine:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return ask(CUDA, options)

    monkeypatch.setattr(capture, "find_machine_for", ask_as_on_cuda)
    with torch.no_grad():
        plan: spcompile.Plan = spcompile.plan(model, (x,), k=1, **options)  # type: ignore[arg-type]
    return plan.machine
