"""The machine that is here, measured."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from spcompile.planner.machine import PROFILES
from spcompile.runtime.measure import measure_machine, this_machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_measurement_is_quick_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPCOMPILE_CACHE_DIR", str(tmp_path))
    this_machine.cache_clear()
    device = torch.device("cuda", torch.cuda.current_device())
    torch.ones(1024, 1024, device=device) @ torch.ones(1024, 1024, device=device)  # cuBLAS has its workspace
    state, before_bytes = torch.cuda.get_rng_state(device), torch.cuda.memory_allocated(device)
    begin_s = time.perf_counter()
    machine = this_machine(device)
    took_s = time.perf_counter() - begin_s
    this_machine.cache_clear()
    assert this_machine(device) == machine
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    assert torch.cuda.memory_allocated(device) == before_bytes
    assert took_s < 2


def test_an_h100_is_what_its_profile_says() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if "H100" not in torch.cuda.get_device_name(device):
        pytest.skip("needs an H100")
    here, profile = measure_machine(device), PROFILES["h100"]
    for name in ("h2d_bytes_per_s", "d2h_bytes_per_s", "both_bytes_per_s", "memory_bytes_per_s"):
        assert getattr(here, name) == pytest.approx(getattr(profile, name), rel=0.35), name
    for dtype, rate in here.flops_per_s:
        assert rate == pytest.approx(dict(profile.flops_per_s)[dtype], rel=0.5), dtype
    assert here.workspace_bytes == profile.workspace_bytes
