"""A GPU whose link or compute is slow, so that races show that a fast machine hides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spcompile.runtime.streams import CudaStreams
from spcompile.runtime.transfers import Transfers

SPIN_CYCLES = 30_000_000
"""About 15 ms: longer than any copy or segment of these models, and than the host takes to issue one."""


class Slow:
    """Slows the link or compute of a store, and may take a wait away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, link: bool, compute: bool) -> None:
        copy_now, load_now = CudaStreams.side_copy, Transfers.load

        def side_copy(streams: CudaStreams, target: Tensor, source: Tensor) -> None:
            if link:
                with torch.cuda.stream(streams.side):
                    torch.cuda._sleep(SPIN_CYCLES)  # type: ignore[no-untyped-call]
            copy_now(streams, target, source)

        def load(runtime: Transfers, interval: int) -> tuple[Tensor, ...]:
            weights = load_now(runtime, interval)
            if compute:
                torch.cuda._sleep(SPIN_CYCLES)  # type: ignore[no-untyped-call]
            return weights

        monkeypatch.setattr(CudaStreams, "side_copy", side_copy)
        monkeypatch.setattr(Transfers, "load", load)
