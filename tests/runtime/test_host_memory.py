"""Blocks of host memory: what they hand out, how long they live, and when they are refused.

CUDA is played by `FakeCuda` here; tests/gpu has the real one.
"""

from __future__ import annotations

import contextlib
import mmap
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from spcompile.errors import OffloadError
from spcompile.runtime import host
from spcompile.runtime.host import HostBlock, available_host_bytes, compute_device, free_device_bytes, host_limit_bytes

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


class FakeCuda:
    """Records what is asked of CUDA, and refuses to register if told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.result = 0

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:  # noqa: N802  # CUDA's name
        assert pointer % mmap.PAGESIZE == nbytes % mmap.PAGESIZE == flags == 0
        self.calls.append("register")
        return self.result

    def cudaHostUnregister(self, pointer: int) -> int:  # noqa: N802
        assert pointer % mmap.PAGESIZE == 0
        self.calls.append("unregister")
        return 0

    def synchronize(self, device: torch.device) -> None:
        assert device == CUDA
        self.calls.append("synchronize")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(host, "_cudart", lambda: fake)
    monkeypatch.setattr(host, "_forget_cuda_error", lambda device: fake.calls.append(f"forget the error on {device}"))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
    return fake


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 1000 KiB of free memory and no cgroup."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 1000 kB\n")
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host, "CGROUP", tmp_path / "cgroup")
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_host_and_view_are_the_same_bytes_in_storages_of_their_own() -> None:
    block = HostBlock(1000, CPU)
    one, other = block.host(256, 100), block.view(256, 100)
    one.copy_(torch.arange(100, dtype=torch.uint8))
    assert torch.equal(one, other)
    for each in (one, other):
        assert each.storage_offset() == 0
        assert each.untyped_storage().nbytes() == 100
        assert each.data_ptr() == block.mapping.pointer + 256
    assert not block.registered


@pytest.mark.parametrize(("nbytes", "pages"), [(0, 1), (1, 1), (mmap.PAGESIZE, 1), (mmap.PAGESIZE + 1, 2)])
def test_size_is_rounded_to_pages_only(nbytes: int, pages: int) -> None:
    assert len(HostBlock(nbytes, CPU).mapping) == pages * mmap.PAGESIZE


def test_no_bytes_at_all() -> None:
    block = HostBlock(0, CPU)
    block.fill([(0, torch.empty(0, dtype=torch.uint8))])
    assert block.host(0, 0).shape == block.view(0, 0).shape == (0,)


@pytest.mark.parametrize("last", ["host", "view"])
def test_the_last_tensor_takes_the_block_along(last: str) -> None:
    block = HostBlock(1000, CPU)
    alive = weakref.ref(block.mapping)
    host_tensor, view = block.host(0, 500), block.view(256, 100)
    kept = (host_tensor if last == "host" else view)[10:20]
    del block, host_tensor, view
    assert alive() is not None
    kept.fill_(7)
    del kept
    assert alive() is None


def test_fill_in_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "TOUCH_BYTES", 1000)
    sources = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in (1, 999, 1000, 1001, 0, 12345)]
    offsets = [0, 256, 1280, 2304, 3328, 3328]
    block = HostBlock(3328 + 12345, CPU)
    block.fill(list(zip(offsets, sources, strict=True)))
    for offset, source in zip(offsets, sources, strict=True):
        assert torch.equal(block.host(offset, source.numel()), source)


def test_registered_until_the_last_tensor_dies(cuda: FakeCuda) -> None:
    block = HostBlock(5000, CUDA)
    block.fill([(0, torch.ones(5000, dtype=torch.uint8))])
    block.register()  # again changes nothing
    assert block.registered
    tensor = block.host(0, 10)
    del block
    assert cuda.calls == ["register"]
    del tensor
    assert cuda.calls == ["register", "synchronize", "unregister"]


def test_refused_registration(cuda: FakeCuda) -> None:
    cuda.result = 2
    block = HostBlock(5000, CUDA)
    with pytest.raises(OffloadError, match=r"pin 8,192 bytes of host memory.*ulimit -l.*cgroup"):
        block.register()
    assert not block.registered
    del block
    assert cuda.calls == ["register", "forget the error on cuda:0"]


def test_a_forked_child_neither_unregisters_nor_unmaps(cuda: FakeCuda) -> None:
    block = HostBlock(5000, CUDA)
    block.register()
    block.mapping.process -= 1  # as it looks from a child
    del block
    assert cuda.calls == ["register"]
    assert len(host._inherited) == 1
    host._inherited.clear()


def test_interpreter_exit_is_quiet() -> None:
    """Blocks may be alive at exit, in cycles and in module globals."""
    script = (
        "import torch, spcompile\n"
        "model = spcompile.offload(torch.nn.Linear(8, 8), 'cpu')\n"
        "cycle = [spcompile.offload(torch.nn.Linear(8, 8), 'cpu')]\n"
        "cycle.append(cycle)\n"
        "torch.nn.kept = spcompile.offload(torch.nn.Linear(8, 8), 'cpu')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("machine")
def test_available_without_a_cgroup() -> None:
    assert available_host_bytes() == 1000 * 1024
    assert host_limit_bytes() is None


def test_available_under_cgroup_v2(machine: Path) -> None:
    """The tightest limit of the group and those above it; file cache is as good as free."""
    write(machine / "proc/self", cgroup="0::/pod/box")
    write(machine / "cgroup/pod/box", memory__max="max", memory__current=10)
    stat = "anon 100\ninactive_file 700\nactive_file 50"
    write(machine / "cgroup/pod", memory__max=5000, memory__current=3000, memory__stat=stat)
    assert available_host_bytes() == 5000 - 3000 + 750
    assert host_limit_bytes() == 5000


def test_available_under_cgroup_v1(machine: Path) -> None:
    write(machine / "proc/self", cgroup="9:name=systemd:/\n4:cpu,memory:/box\n0::/")
    write(
        machine / "cgroup/memory/box",
        memory__limit_in_bytes=5000,
        memory__usage_in_bytes=3000,
        memory__stat="inactive_file 1\ntotal_inactive_file 400\ntotal_active_file 5",
    )
    assert available_host_bytes() == 5000 - 3000 + 405
    assert host_limit_bytes() == 5000


def test_available_is_never_negative(machine: Path) -> None:
    write(machine / "proc/self", cgroup="0::/")
    write(machine / "cgroup", memory__max=5000, memory__current=6000)
    assert available_host_bytes() == 0


def test_unknown_systems_are_not_refused(machine: Path) -> None:
    (machine / "proc/meminfo").unlink()
    assert available_host_bytes() == sys.maxsize


@pytest.mark.usefixtures("machine")
def test_too_large_a_block_is_refused() -> None:
    with pytest.raises(OffloadError, match=r"not enough host memory.*1,024,001 bytes.*1,024,000 bytes are available"):
        HostBlock(1000 * 1024 + 1, CPU)


def test_without_cuda_the_cpu_stands_in(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute_device(None) == compute_device("cpu") == CPU
    assert not caplog.records
    assert compute_device("cuda:1") == CPU
    assert "the CPU stands in for cuda:1" in caplog.text


@pytest.mark.parametrize(("device", "message"), [("mps", "not supported"), ("gpu", "is not a device")])
def test_other_devices_are_refused(device: str, message: str) -> None:
    with pytest.raises(OffloadError, match=message):
        compute_device(device)


@pytest.mark.usefixtures("machine")
def test_the_emulated_device_has_the_free_memory_of_the_host() -> None:
    assert free_device_bytes(CPU) == 1000 * 1024
