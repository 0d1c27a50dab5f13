"""What the GPU tests count of the device's memory."""

from __future__ import annotations

import torch


def held_bytes() -> int:
    """What tensors take of the current device, without the workspaces of libraries: compiling gives those back, and the
    next product takes them again."""
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()
