"""Host memory that the compute device reads in place, and how much of it there is.

A `HostBlock` is one anonymous mapping. On a GPU it is registered (pinned) with CUDA, so that copies out of it run at
link speed and kernels can read it over the link; on the emulated device it is ordinary memory. Tensors over a block
keep it alive and registered, each by a reference to the mapping, so the last one to die takes the block with it: first
waits for copies that may be in flight, then unregisters, then unmaps (registering a recycled address would fail
otherwise).

Each block is registered by one call. Several registrations side by side would look like one stretch of memory, but a
copy that spans two of them fails with "invalid argument".

The mapping is private, in huge pages where the system has them: filling it took a fifth of the time that a shared one
did (512 MiB on two cores: 12.9 GB/s against 2.7). A registered one is kept out of forked children, such as a data
loader's workers: a fork would copy every pinned page at once.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spcompile.errors import OffloadError
from spcompile.ir import align
from spcompile.progress import Advance

logger = logging.getLogger("spcompile")

TOUCH_BYTES = 16 << 20
"""What one thread fills at a time. Large enough that handing it out costs nothing (16 MiB take 3 ms or more)."""

TOUCH_THREADS = 16
"""Most threads that fill fresh memory: one thread first touched 1.3 GB/s, sixteen 5 (an H100's host)."""

BLOCK_BYTES = 256 << 20
"""A block is closed when the next weight would take it past this: large enough that most layers cross at most once from
one block into the next, small enough as the extra memory that moving a model needs on its way."""

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def compute_device(device: str | torch.device | None) -> torch.device:
    """The device that computes: the one asked for, with its index; the emulated one (``cpu``) where there is no CUDA.

    Args:
        device: None takes CUDA if there is any.

    Raises:
        OffloadError: the device is neither a CUDA device of this machine nor the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise OffloadError(f"device {device!r} is not a device: choose 'cuda', 'cuda:<index>' or 'cpu'") from error
    if wanted.type == "cpu":
        return torch.device("cpu")
    if wanted.type != "cuda":
        raise OffloadError(f"device {str(device)!r} is not supported: choose 'cuda', or 'cpu' for the emulated device")
    if not torch.cuda.is_available():
        logger.warning("no CUDA device: the CPU stands in for %s (emulated device)", wanted)
        return torch.device("cpu")
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    if index >= torch.cuda.device_count():
        raise OffloadError(f"there is no device cuda:{index}: this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def free_device_bytes(device: torch.device) -> int:
    """Bytes that could still be allocated on the device, what torch caches included. Emulated: free host memory."""
    if device.type != "cuda":
        return available_host_bytes()
    cached_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached_bytes


def available_host_bytes() -> int:
    """Host memory that this process may still take: what the machine has free, or less where a cgroup sets a limit."""
    return max(0, min([_machine_available_bytes(), *(left_bytes for _, left_bytes in _cgroup_limits())]))


def host_limit_bytes() -> int | None:
    """The tightest memory limit of a cgroup above this process; None where there is none."""
    return min((limit_bytes for limit_bytes, _ in _cgroup_limits()), default=None)


def total_host_bytes() -> int:
    """Host memory of the machine, whoever uses it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_host_memory(nbytes: int) -> None:
    """Refuse before an allocation rather than be killed after it.

    Raises:
        OffloadError: there are not this many bytes of host memory.
    """
    available_bytes = available_host_bytes()
    if nbytes > available_bytes:
        raise OffloadError(
            f"not enough host memory: the weights need {nbytes:,} bytes of it, and {available_bytes:,} bytes are "
            "available (the machine's free memory, or what the cgroup of this process leaves)"
        )


def _machine_available_bytes() -> int:
    for line in _lines(PROC / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize  # not Linux: nothing to go by


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """Each memory limit above this process, and what it leaves. File cache counts as free: the kernel drops it."""
    for line in _lines(PROC / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _limits(CGROUP, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            yield from _limits(CGROUP / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _limits(root: Path, path: str, limit_file: str, usage_file: str, prefix: str) -> Iterator[tuple[int, int]]:
    """The group itself and every group above it: the tightest limit counts, wherever it is set."""
    own = root / path.lstrip("/")
    for folder in (own, *own.parents):
        limit, usage = _number(folder / limit_file), _number(folder / usage_file)
        if limit is not None and usage is not None:
            stat = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat"))
            cache_bytes = sum(int(stat.get(f"{prefix}{name}", 0)) for name in ("active_file", "inactive_file"))
            yield limit, limit - (usage - cache_bytes)
        if folder == root:
            return


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file, or it says "max"."""
    text = "".join(_lines(path))
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def lay_out_blocks(sizes_bytes: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Pack things of these sizes into blocks, in their order; each block as (index, offset in bytes) of its things."""
    places: list[tuple[int, int]] = []
    end_bytes = 0
    for index, nbytes in enumerate(sizes_bytes):
        if places and end_bytes + nbytes > BLOCK_BYTES:
            yield places
            places, end_bytes = [], 0
        places.append((index, end_bytes))
        end_bytes = align(end_bytes + nbytes)
    if places:
        yield places


class _Mapping(mmap.mmap):
    """The memory of a block. What looks at it holds a reference; it unregisters itself before it is unmapped."""

    device: torch.device | None = None  # where it is registered
    pointer: int
    process: int

    def __del__(self) -> None:
        if self.device is None or sys.is_finalizing():  # at exit CUDA may be gone, and the driver cleans up by itself
            return
        if self.process != os.getpid():
            _inherited.append(self)
            return
        with suppress(RuntimeError):  # a copy may be in flight; where CUDA is broken nothing is
            torch.cuda.synchronize(self.device)
        with suppress(RuntimeError):
            _cudart().cudaHostUnregister(self.pointer)


_inherited: list[_Mapping] = []
"""Registered mappings that a forked child has dropped. The child has the object but not the memory, so unmapping it
would take away whatever lies there now: it is kept for good."""


class _DevicePointer:
    """Memory as CUDA libraries hand it to each other. torch keeps this object, and so the mapping, with the tensor."""

    def __init__(self, mapping: _Mapping, pointer: int, nbytes: int) -> None:
        self.mapping = mapping
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (pointer, False), "version": 3}


class HostBlock:
    """A block of host memory. It is not touched, so takes no memory, until something is written to it.

    Args:
        nbytes: size; rounded up to whole pages of the machine.
        device: the compute device; on CUDA `register` must come before `view`.

    Raises:
        OffloadError: there is not enough host memory.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        check_host_memory(nbytes)
        self.nbytes = nbytes
        self.device = device
        try:
            size_bytes = max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
            self.mapping = _Mapping(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise OffloadError(f"the system gives no host memory: {nbytes:,} bytes were asked for ({error})") from error
        with suppress(AttributeError, OSError):  # not Linux, or a kernel without huge pages
            self.mapping.madvise(mmap.MADV_HUGEPAGE)
        self.mapping.process = os.getpid()
        self.mapping.pointer = torch.frombuffer(self.mapping, dtype=torch.uint8).data_ptr()

    @classmethod
    def filled(
        cls, pieces: Sequence[tuple[int, Tensor]], device: torch.device, advance: Advance | None = None
    ) -> HostBlock:
        """A block of just the size of its pieces, filled and registered; see `fill`."""
        offset_bytes, last = pieces[-1]
        block = cls(offset_bytes + last.numel(), device)
        block.fill(pieces, advance)
        return block

    @property
    def registered(self) -> bool:
        """Whether CUDA knows the block; never on the emulated device."""
        return self.mapping.device is not None

    def host(self, offset_bytes: int, nbytes: int) -> Tensor:
        """CPU tensor, uint8 ``[nbytes]``, with a storage of its own over that part of the block."""
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.frombuffer(self.mapping, dtype=torch.uint8, count=nbytes, offset=offset_bytes)

    def view(self, offset_bytes: int, nbytes: int) -> Tensor:
        """The same bytes as a tensor of the compute device, with a storage of its own that starts there."""
        if self.device.type != "cuda":
            return self.host(offset_bytes, nbytes)
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        assert self.registered, "CUDA reads only registered memory"
        pointer = _DevicePointer(self.mapping, self.mapping.pointer + offset_bytes, nbytes)
        with torch.cuda.device(self.device):
            return torch.as_tensor(pointer, device=self.device)

    def fill(self, pieces: Sequence[tuple[int, Tensor]], advance: Advance | None = None) -> None:
        """Copy tensors into the fresh block, and register it.

        Args:
            pieces: where each goes, and uint8 ``[n]`` tensors of any device.
            advance: is told of bytes that are done (those from a device as soon as there is memory for them).

        Raises:
            OffloadError: CUDA refused to register the block.
        """
        _in_threads([job for offset_bytes, source in pieces for job in self._touches(offset_bytes, source)], advance)
        self.register()
        for offset_bytes, source in pieces:  # only now at link speed
            if source.device.type != "cpu":
                self.host(offset_bytes, source.numel()).copy_(source)

    def touch(self) -> None:
        """Write zeros to the whole block, which gives it its memory."""
        starts = range(0, self.nbytes, TOUCH_BYTES)
        _in_threads([(self.mapping.pointer + start, None, min(TOUCH_BYTES, self.nbytes - start)) for start in starts])

    def register(self) -> None:
        """Pin the block, which should have been touched before: that is faster. Nothing on the emulated device.

        Raises:
            OffloadError: CUDA refused.
        """
        if self.device.type != "cuda" or self.registered:
            return
        with torch.cuda.device(self.device):  # the device that tensors over the block are then said to be on
            result = _cudart().cudaHostRegister(self.mapping.pointer, len(self.mapping), 0)
            if int(result) != 0:
                _forget_cuda_error(self.device)
                raise OffloadError(
                    f"CUDA cannot pin {len(self.mapping):,} bytes of host memory (error {int(result)}: {result}). "
                    "Raise the limit on locked memory (ulimit -l), give the container or cgroup more memory, or free "
                    "host memory"
                )
        self.mapping.madvise(mmap.MADV_DONTFORK)
        self.mapping.device = self.device

    def _touches(self, offset_bytes: int, source: Tensor) -> Iterator[tuple[int, int | None, int]]:
        """Jobs of `_in_threads` that write a piece for the first time: its bytes, or zeros where a device has them."""
        read = source.data_ptr() if source.device.type == "cpu" else None
        for start in range(0, source.numel(), TOUCH_BYTES):
            nbytes = min(TOUCH_BYTES, source.numel() - start)
            yield self.mapping.pointer + offset_bytes + start, None if read is None else read + start, nbytes


def _in_threads(jobs: Sequence[tuple[int, int | None, int]], advance: Advance | None = None) -> None:
    """Write fresh memory: (target pointer, source pointer or None for zeros, bytes).

    Not with ``Tensor.copy_``: its own threads multiply with these, or are set to one.
    """

    def write(job: tuple[int, int | None, int]) -> None:
        target, source, nbytes = job
        if source is None:
            ctypes.memset(target, 0, nbytes)
        else:
            ctypes.memmove(target, source, nbytes)  # like memset, without the interpreter's lock

    with ThreadPoolExecutor(min(TOUCH_THREADS, os.cpu_count() or 1)) as pool:
        for job, _ in zip(jobs, pool.map(write, jobs), strict=True):
            if advance is not None:
                advance(job[2])


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _forget_cuda_error(device: torch.device) -> None:
    """CUDA repeats the error of a failed call at the next check, which would blame an innocent kernel: check now."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device)
