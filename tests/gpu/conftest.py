"""What the GPU tests share: each starts with nothing compiled and, once torch has given back what others left, an empty
device."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    _give_back()
    yield
    torch._dynamo.reset()
    _give_back()


def _give_back() -> None:
    gc.collect()
    torch.cuda.empty_cache()
