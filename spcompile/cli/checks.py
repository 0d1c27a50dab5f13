"""What the doctor looks at: one function for each thing, none of which may fail.

A `Finding` says what is here. Where that is a fault it also says what is wrong and how to mend it, and whether it
prevents use. That there is no GPU is not a fault: the CPU then stands in for it.
"""

from __future__ import annotations

import os
import platform
import re
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from spcompile.environment import CACHE_DIR, cache_folder
from spcompile.errors import OffloadError
from spcompile.ir import Machine
from spcompile.runtime.host import PROC, available_host_bytes, host_limit_bytes, total_host_bytes
from spcompile.runtime.measure import this_machine
from spcompile.text import format_bytes

OLDEST_TORCH = (2, 11)

OPTIONAL_PACKAGES = ("transformers", "timm", "accelerate", "matplotlib")
"""What works together with spcompile where it is installed, or is needed for a part of it."""

BACKEND = "superpipeline"

LITTLE_HOST_BYTES = 2 * 2**30
"""With less host memory than this even small models are likely not to fit it."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        value: what is here.
        problem: what is wrong with it; "" where nothing is.
        remedy: how to mend it.
        prevents: whether models cannot be run before it is mended.
    """

    name: str
    value: str
    problem: str = ""
    remedy: str = ""
    prevents: bool = False


def find_all() -> Iterator[Finding]:
    """All findings, in the order in which one thing needs the other."""
    yield from check_versions()
    yield from check_devices()
    yield from check_host()
    yield check_backend()
    yield from check_compilers()
    yield from check_caches()


def version_of(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def check_versions() -> Iterator[Finding]:
    yield Finding("spcompile", version_of("spcompile") or "not installed (runs from its checkout)")
    yield Finding("python", platform.python_version())
    yield check_torch(torch.__version__)
    for package in OPTIONAL_PACKAGES:
        version = version_of(package)
        if version is not None:
            yield Finding(package, version)


def check_torch(version: str) -> Finding:
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers >= OLDEST_TORCH:
        return Finding("torch", version)
    oldest = ".".join(map(str, OLDEST_TORCH))
    return Finding("torch", version, f"older than {oldest}", f"pip install 'torch>={oldest}'", prevents=True)


# Devices.


def check_devices() -> Iterator[Finding]:
    driver = driver_version()
    yield Finding("CUDA", torch.version.cuda or "this torch is built without it")
    yield Finding("driver", driver or "none")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield from _check_device(torch.device("cuda", index))
        return
    problem = remedy = ""
    if driver is not None and torch.version.cuda is None:
        problem = "a GPU's driver is here, but this torch is built without CUDA"
        remedy = "install a build of torch with CUDA (see pytorch.org), or go on with the emulated device"
    elif driver is not None:
        problem = f"a GPU's driver is here, but torch for CUDA {torch.version.cuda} cannot use it"
        remedy = (
            "see that nvidia-smi works, that CUDA_VISIBLE_DEVICES is not empty, and that the driver is recent enough"
        )
    emulated = "emulated: the CPU stands in for a GPU (right results, meaningless times)"
    yield Finding("device", emulated, problem, remedy, prevents=bool(problem))


def _check_device(device: torch.device) -> Iterator[Finding]:
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    memory = f"{format_bytes(total_bytes)}, {format_bytes(free_bytes)} free"
    yield Finding(str(device), f"{torch.cuda.get_device_name(device)}, {memory}")
    try:
        machine = this_machine(device)
    except OffloadError as error:
        remedy = "raise the limit on locked memory (ulimit -l), or give the container more memory"
        yield Finding("link", "not measured", str(error), remedy, prevents=True)
    except torch.OutOfMemoryError:
        yield Finding("link", "not measured", "the GPU is full", "end what else runs on it (nvidia-smi lists it)")
    else:
        yield Finding("link", describe_link(machine))


def describe_link(machine: Machine) -> str:
    up, down, both = (
        f"{rate / 1e9:.1f} GB/s"
        for rate in (machine.h2d_bytes_per_s, machine.d2h_bytes_per_s, machine.both_bytes_per_s)
    )
    return f"H2D {up}, D2H {down}, {both} each way when both are busy, {machine.copy_us:.0f} us a copy"


def driver_version() -> str | None:
    """The version of the NVIDIA driver of this machine; None where there is none."""
    with suppress(OSError):
        text = (PROC / "driver" / "nvidia" / "version").read_text(encoding="ascii", errors="replace")
        match = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
        return match[1] if match else "unknown version"
    return None


# Host memory.


def check_host() -> Iterator[Finding]:
    total_bytes, available_bytes, limit_bytes = total_host_bytes(), available_host_bytes(), host_limit_bytes()
    total = f"{format_bytes(total_bytes)}, {format_bytes(available_bytes)} available"
    if available_bytes < LITTLE_HOST_BYTES:
        remedy = "weights are kept in host memory: end what else takes it, or raise the container's limit"
        yield Finding("host memory", total, "little is available", remedy)
    else:
        yield Finding("host memory", total)
    is_limited = limit_bytes is not None and limit_bytes < total_bytes  # the older kind of cgroup says "none" by 2**63
    yield Finding("memory limit", f"{format_bytes(limit_bytes)} (cgroup)" if limit_bytes and is_limited else "none")
    yield Finding("locked memory", locked_memory())


def locked_memory() -> str:
    """The limit that ``ulimit -l`` shows. Whether pinning works is seen when the link is measured."""
    try:
        import resource
    except ImportError:  # not a Unix
        return "no such limit here"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else f"{format_bytes(soft)} (ulimit -l)"


# Software.


def check_backend() -> Finding:
    if BACKEND in torch._dynamo.list_backends():
        return Finding("backend", f"{BACKEND} is registered with torch.compile")
    return Finding(
        "backend",
        "not registered",
        f'torch.compile(backend="{BACKEND}") does not find it',
        "install spcompile into this Python (pip install spcompile, or pip install -e . in its checkout)",
        prevents=True,
    )


def check_compilers() -> Iterator[Finding]:
    instead = 'or use options={"compiler": "aot_eager"}'
    compiler = cpp_compiler()
    if compiler is None:
        yield Finding(
            "C++ compiler", "none", "Inductor needs one", f"install g++, or set CXX; {instead}", prevents=True
        )
    else:
        yield Finding("C++ compiler", compiler)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        remedy = f"install them (python3-dev, python3-devel); {instead}"
        yield Finding("Python headers", "none", f"Inductor needs {header}", remedy, prevents=True)
    if not torch.cuda.is_available():
        return
    if find_spec("triton") is None:
        yield Finding("triton", "none", "Inductor needs it on a GPU", f"pip install triton; {instead}", prevents=True)
    else:
        yield Finding("triton", version_of("triton") or "installed")


def cpp_compiler() -> str | None:
    """The compiler that Inductor would call; None where it finds none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    with suppress(Exception):  # an exception of Inductor's own, or that of a compiler that cannot be started
        return get_cpp_compiler()
    return None


def check_caches() -> Iterator[Finding]:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    inductor = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())
    yield _check_cache("Inductor cache", inductor, "TORCHINDUCTOR_CACHE_DIR", prevents=True)
    yield _check_cache("own cache", cache_folder(), CACHE_DIR.name, prevents=False)


def _check_cache(name: str, folder: Path, variable: str, *, prevents: bool) -> Finding:
    if is_writable(folder):
        return Finding(name, str(folder))
    return Finding(name, str(folder), "not writable", f"set {variable} to a folder that you may write to", prevents)


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or in the folder in which it would be made."""
    existing = next((each for each in (folder, *folder.parents) if each.exists()), None)
    if existing is None or not existing.is_dir():
        return False
    try:
        with tempfile.TemporaryFile(dir=existing):
            return True
    except OSError:
        return False
