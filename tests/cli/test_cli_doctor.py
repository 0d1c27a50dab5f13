"""``spcompile doctor``: what it finds, what it calls wrong, and its exit code."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from spcompile.cli import checks, main
from spcompile.cli.checks import Finding
from spcompile.cli.doctor import format_findings
from spcompile.errors import OffloadError
from spcompile.planner.machine import PROFILES

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="what is reported where there is no GPU")


def named(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {each.name: each for each in findings}


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    found = {each["name"]: each for each in report["findings"]}
    assert code == int(not report["ok"])
    assert found["torch"]["value"] == torch.__version__
    names = ("spcompile", "python", "CUDA", "driver", "host memory", "memory limit", "locked memory", "backend")
    assert [name for name in (*names, "C++ compiler", "Inductor cache", "own cache") if name not in found] == []
    assert ("device" in found) != torch.cuda.is_available()
    assert ("link" in found) == torch.cuda.is_available()


def test_the_text_and_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fine = Finding("python", "3.12.1")
    note = Finding("own cache", "/cache", "not writable", "set SPCOMPILE_CACHE_DIR")
    wrong = Finding("C++ compiler", "none", "Inductor needs one", "install g++", prevents=True)
    for findings, code in (([fine], 0), ([fine, note], 0), ([fine, note, wrong], 1)):
        monkeypatch.setattr(checks, "find_all", lambda found=findings: iter(found))
        assert main(["doctor"]) == code
        assert capsys.readouterr().out == format_findings(findings) + "\n"
    assert format_findings([fine]).splitlines() == ["  python  3.12.1", "", "Nothing is wrong."]
    assert format_findings([fine, note, wrong]).splitlines() == [
        "  python        3.12.1",
        "! own cache     /cache",
        "! C++ compiler  none",
        "",
        "wrong: C++ compiler: Inductor needs one. To mend it: install g++",
        "note: own cache: not writable. To mend it: set SPCOMPILE_CACHE_DIR",
    ]


@pytest.mark.parametrize(("version", "is_old"), [("2.10.1", True), ("2.11.0+cu130", False), ("3.0.0a0+git1", False)])
def test_torch(version: str, is_old: bool) -> None:
    finding = checks.check_torch(version)
    assert (finding.value, finding.prevents) == (version, is_old)
    assert bool(finding.remedy) == is_old


@no_cuda
@pytest.mark.parametrize(
    ("driver", "cuda", "problem"),
    [
        (None, None, ""),
        (None, "13.0", ""),
        ("580.95.05", None, "a GPU's driver is here, but this torch is built without CUDA"),
        ("580.95.05", "13.0", "a GPU's driver is here, but torch for CUDA 13.0 cannot use it"),
    ],
)
def test_no_gpu_is_no_fault_unless_there_is_one(
    driver: str | None, cuda: str | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "driver_version", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = named(checks.check_devices())
    assert found["device"].value.startswith("emulated: the CPU stands in for a GPU")
    assert (found["device"].problem, found["device"].prevents) == (problem, bool(problem))
    assert found["driver"].value == (driver or "none")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70 * 2**30, 80 * 2**30))


@pytest.mark.usefixtures("gpu")
def test_a_gpu_and_its_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "this_machine", lambda _: PROFILES["h100"])
    found = named(checks.check_devices())
    assert found["cuda:0"].value == "NVIDIA H100, 80.00 GiB, 70.00 GiB free"
    expected = "H2D 54.0 GB/s, D2H 54.0 GB/s, 42.0 GB/s each way when both are busy, 15 us a copy"
    assert found["link"] == Finding("link", expected)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("error", "prevents"), [(OffloadError("CUDA cannot pin"), True), (torch.OutOfMemoryError("full"), False)]
)
def test_a_link_that_cannot_be_measured(error: Exception, prevents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: torch.device) -> None:
        raise error

    monkeypatch.setattr(checks, "this_machine", fail)
    finding = named(checks.check_devices())["link"]
    assert (finding.value, finding.prevents) == ("not measured", prevents)
    assert finding.problem
    assert finding.remedy


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5 22:23:56 UTC 2024", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65  Release Build", "580.65"),
        ("something else", "unknown version"),
        (None, None),
    ],
)
def test_the_driver(text: str | None, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PROC", tmp_path)
    if text is not None:
        (tmp_path / "driver" / "nvidia").mkdir(parents=True)
        (tmp_path / "driver" / "nvidia" / "version").write_text(text, encoding="ascii")
    assert checks.driver_version() == version


def test_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "total_host_bytes", lambda: 64 * 2**30)
    monkeypatch.setattr(checks, "available_host_bytes", lambda: 2**30)
    monkeypatch.setattr(checks, "host_limit_bytes", lambda: 16 * 2**30)
    found = named(checks.check_host())
    assert found["host memory"].value == "64.00 GiB, 1.00 GiB available"
    assert (found["host memory"].problem, found["host memory"].prevents) == ("little is available", False)
    assert found["memory limit"].value == "16.00 GiB (cgroup)"
    for limit_bytes in (None, 2**63 - 4096):  # how the older kind of cgroup spells it
        monkeypatch.setattr(checks, "host_limit_bytes", lambda nbytes=limit_bytes: nbytes)
        assert named(checks.check_host())["memory limit"].value == "none"


def test_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    for limit, text in ((resource.RLIM_INFINITY, "unlimited"), (65536, "64.00 KiB (ulimit -l)")):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=limit: (soft, soft))
        assert checks.locked_memory() == text


def test_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for backends, is_there in ((["eager", "superpipeline"], True), (["eager"], False)):
        monkeypatch.setattr(torch._dynamo, "list_backends", lambda found=backends: found)
        finding = checks.check_backend()
        assert finding.prevents is not is_there
        assert bool(finding.problem) is not is_there


def test_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "cpp_compiler", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    found = named(checks.check_compilers())
    assert [name for name, each in found.items() if each.prevents] == ["C++ compiler", "Python headers", "triton"]
    assert all('options={"compiler": "aot_eager"}' in each.remedy for each in found.values())
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(checks, "cpp_compiler", lambda: "g++")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(checks.check_compilers()) == [Finding("C++ compiler", "g++")]


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", fail)
    assert checks.cpp_compiler() is None


def test_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor" / "deep"))
    monkeypatch.setenv("SPCOMPILE_CACHE_DIR", str(tmp_path / "own"))
    assert [each.problem for each in checks.check_caches()] == ["", ""]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "own").touch()  # a file where the folder is to be
    assert [(each.problem, each.prevents) for each in checks.check_caches()] == [("", False), ("not writable", False)]

    def refuse(**_: object) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert [each.prevents for each in checks.check_caches()] == [True, False]
