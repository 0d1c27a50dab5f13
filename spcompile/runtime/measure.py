"""What the machine that is here can do: measured once for each GPU, and remembered.

What: a `Machine` with the link each way and both ways at once, the fixed time of a copy, rates of matrix products, and
memory bandwidth. Why measured: the same GPU hangs on links of 6 to 60 GB/s, and data sheets promise what no kernel
reaches. Why so short: planning waits for it. A tenth of a second shows each rate to some percent, and predictions are
not better than that.

How: every rate is the best of a few rounds, timed by events on the stream: what disturbs can only slow down. The result
lies in a small file, by the GPU's own identifier, as the same model may sit behind another link in the next machine.

The odd cases: this runs while a compiler traces, whose modes would turn tensors into fakes; random numbers are drawn
from a generator of its own. A file that cannot be read or written costs a new measurement and nothing else. The time
that a kernel takes at least is that of the shipped profiles: from Python it would be the host that is measured.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from spcompile.ir import Machine
from spcompile.runtime.host import HostBlock, total_host_bytes

logger = logging.getLogger(__name__)

COPY_BYTES = 64 << 20
"""One copy whose rate is measured: 1 to 10 ms on usual links."""

PIECES = 32
"""Copies that move as much as the one large copy: what they take longer is what each takes beside its bytes. (Smaller
ones would measure the host.)"""

WIDTH = 4096
"""Matrices are ``[WIDTH, WIDTH]``: large enough for the rate of large ones, and 32 MiB in 16 bits."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

ROUNDS = 4

KERNEL_US = 1.5

WORKSPACE_BYTES = {9: 33 << 20, 10: 33 << 20, 12: 33 << 20}
"""What torch gives to cuBLAS, by the GPU's major number of compute capability: 32 MiB, and to its Lt part, which adds
biases, 1 MiB more (counted on an H100, torch 2.11)."""

OTHER_WORKSPACE_BYTES = (9 << 20) + (128 << 10)

FORMAT_VERSION = 2
"""Part of the files' names: raise it where what is measured changes its meaning."""


@functools.cache
def this_machine(device: torch.device) -> Machine:
    """What a CUDA device and its host can do: as remembered, else measured now.

    Args:
        device: with its index.
    """
    path = _remembered_at(device)
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        return Machine.from_fields(json.loads(path.read_text(encoding="utf-8")))
    begin_s = time.perf_counter()
    machine = measure_machine(device)
    logger.info("measured %s in %.1f s: %s", device, time.perf_counter() - begin_s, machine)
    _remember(path, machine)
    return machine


def measure_machine(device: torch.device) -> Machine:
    """Measure a CUDA device and its link, in well under 2 s. Takes some 260 MiB of its memory meanwhile.

    Raises:
        OffloadError: host memory cannot be pinned.
        torch.OutOfMemoryError: the device is full.
    """
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cuda", enabled=False), torch.cuda.device(device):
        return _Measurement(device).machine()


def cache_folder() -> Path:
    """Where measurements are remembered: ``$SPCOMPILE_CACHE_DIR``, or the user's own folder for caches."""
    chosen = os.environ.get("SPCOMPILE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spcompile"


def _remembered_at(device: torch.device) -> Path:
    return cache_folder() / f"machine-{FORMAT_VERSION}-{torch.cuda.get_device_properties(device).uuid}.json"


def _remember(path: Path, machine: Machine) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(asdict(machine), file, indent=1)
        Path(file.name).replace(path)  # another process never sees half of it
    except OSError as error:
        logger.info("what was measured is not remembered: %s", error)


class _Measurement:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.properties: Any = torch.cuda.get_device_properties(device)
        self.up, self.down = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

    def machine(self) -> Machine:
        h2d, d2h, both, copy_us = self._link()
        return Machine(
            name=self.properties.name,
            h2d_bytes_per_s=h2d,
            d2h_bytes_per_s=d2h,
            both_bytes_per_s=both,
            copy_us=copy_us,
            flops_per_s=tuple((str(dtype).removeprefix("torch."), self._flops(dtype)) for dtype in DTYPES),
            memory_bytes_per_s=self._memory(),
            kernel_us=KERNEL_US,
            workspace_bytes=WORKSPACE_BYTES.get(self.properties.major, OTHER_WORKSPACE_BYTES),
            device_bytes=self.properties.total_memory,
            host_bytes=total_host_bytes(),
        )

    def _link(self) -> tuple[float, float, float, float]:
        """Bytes per second up, down, each way while both are busy; and what a copy takes beside its bytes, in us."""
        block = HostBlock(2 * COPY_BYTES, self.device)
        source, target = block.host(0, COPY_BYTES), block.host(COPY_BYTES, COPY_BYTES)
        block.fill([(0, torch.zeros(2 * COPY_BYTES, dtype=torch.uint8, device="cpu"))])
        above = [torch.empty(COPY_BYTES, dtype=torch.uint8, device=self.device) for _ in range(2)]

        def upwards() -> None:
            _copy(self.up, above[0], source)

        def downwards() -> None:
            _copy(self.down, target, above[1])

        def in_pieces() -> None:
            for pair in zip(above[0].chunk(PIECES), source.chunk(PIECES), strict=True):
                _copy(self.up, *pair)

        up_s, down_s, both_s = (self._best_s(*copies) for copies in ((upwards,), (downwards,), (upwards, downwards)))
        copy_s = max(0.0, self._best_s(in_pieces) - up_s) / (PIECES - 1)
        both_s = max(both_s, up_s, down_s)
        return COPY_BYTES / up_s, COPY_BYTES / down_s, COPY_BYTES / both_s, copy_s * 1e6

    def _flops(self, dtype: torch.dtype) -> float:
        generator = torch.Generator(self.device).manual_seed(0)
        a, b = (torch.randn(WIDTH, WIDTH, device=self.device, generator=generator).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def multiply() -> None:
            torch.mm(a, b, out=out)

        return 2 * WIDTH**3 / self._best_s(multiply)

    def _memory(self) -> float:
        a, b = (torch.zeros(COPY_BYTES, dtype=torch.bfloat16, device=self.device) for _ in range(2))

        def add() -> None:
            torch.add(a, 1, out=b)

        return 2 * a.nbytes / self._best_s(add)

    def _best_s(self, *work: Callable[[], None]) -> float:
        """Shortest time from the begin of all works, each on a stream of its choice, to the end of all."""
        return min(self._time_s(work) for _ in range(ROUNDS))

    def _time_s(self, work: tuple[Callable[[], None], ...]) -> float:
        current = torch.cuda.current_stream(self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(current)
        for stream in (self.up, self.down):
            stream.wait_event(begin)
        for each in work:
            each()
        for stream in (self.up, self.down):
            current.wait_stream(stream)
        end.record(current)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def _copy(stream: torch.cuda.Stream, target: Tensor, source: Tensor) -> None:
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
