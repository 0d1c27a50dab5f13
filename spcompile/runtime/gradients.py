"""Host memory for the gradients that backward sends there.

A gradient that has left the device is returned to autograd as a tensor of the compute device over host memory, as the
weights of an offloaded model are. Autograd keeps it as ``.grad``, or adds it to the one that is there. From then on its
memory is not ours, until ``.grad`` is None again and whoever else looked at it has let go: `GradientMemory.take` finds
out by the number of references to the storage. Another gradient of the same weight, of the next micro-batch, say, gets
memory of its own in the meantime.

Every gradient has a storage of its own, so that one that is kept does not keep others. Autograd takes over a gradient
only if it is laid out as its parameter; otherwise it makes a copy, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spcompile.ir import align
from spcompile.runtime.host import HostBlock
from spcompile.runtime.weights import WeightView, real_tensors


@dataclass(eq=False)
class GradientBuffer:
    """Memory for one gradient.

    Attributes:
        dtype, size, stride: of the gradient.
        memory: uint8 ``[bytes of the gradient]`` in host memory.
        view: the same bytes as a tensor of the compute device.
    """

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    memory: Tensor
    view: Tensor

    def on_host(self) -> Tensor:
        """The gradient as a CPU tensor."""
        return self._typed(self.memory)

    def on_device(self) -> Tensor:
        """The gradient as a tensor of the compute device: a new one each time, as autograd wants to be the only one who
        holds it."""
        return self._typed(self.view)

    @property
    def is_free(self) -> bool:
        """Whether nobody but this object looks at the memory."""
        return _holders(self.memory) == _holders(self.view) == 0

    def _typed(self, memory: Tensor) -> Tensor:
        with torch.no_grad():
            return memory.view(self.dtype).as_strided(self.size, self.stride)


class GradientMemory:
    """The buffers of a model's gradients.

    Args:
        device: the compute device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[WeightView, list[GradientBuffer]] = {}
        self._by_address: dict[int, GradientBuffer] = {}

    def take(self, views: Sequence[WeightView]) -> list[GradientBuffer]:
        """A free buffer for the gradient of each of these parameters; made where there is none.

        Raises:
            OffloadError: there is not enough host memory.
        """
        taken: list[GradientBuffer | None] = []
        for view in views:
            free = (each for each in self._buffers.get(view, ()) if each not in taken and each.is_free)
            taken.append(next(free, None))
        missing = [index for index, buffer in enumerate(taken) if buffer is None]
        for index, buffer in zip(missing, self._make([views[index] for index in missing]), strict=True):
            taken[index] = buffer
            self._buffers.setdefault(views[index], []).append(buffer)
        return [buffer for buffer in taken if buffer is not None]

    def find(self, tensor: Tensor) -> GradientBuffer | None:
        """The buffer in whose memory a tensor of the compute device lies."""
        if tensor.layout is not torch.strided:  # a sparse one has no storage
            return None
        buffer = self._by_address.get(tensor.untyped_storage().data_ptr())
        return buffer if buffer is not None and tensor.numel() else None

    def nbytes(self) -> int:
        """Host memory of all buffers."""
        return sum(each.memory.numel() for buffers in self._buffers.values() for each in buffers)

    def _make(self, views: Sequence[WeightView]) -> list[GradientBuffer]:
        """New buffers, in one block."""
        if not views:
            return []
        sizes_bytes = [_numel(view.size) * view.dtype.itemsize for view in views]
        with real_tensors():
            block = HostBlock(sum(map(align, sizes_bytes)), self.device)
            block.touch()
            block.register()
            made, end_bytes = [], 0
            for view, nbytes in zip(views, sizes_bytes, strict=True):
                memory, on_device = block.host(end_bytes, nbytes), block.view(end_bytes, nbytes)
                made.append(GradientBuffer(view.dtype, view.size, _dense_stride(view), memory, on_device))
                end_bytes += align(nbytes)
        self._by_address.update((buffer.view.data_ptr(), buffer) for buffer in made if buffer.view.numel())
        return made


def _dense_stride(view: WeightView) -> tuple[int, ...]:
    """The strides that autograd wants of a gradient: the parameter's, or a contiguous tensor's if those leave holes."""
    expected = 1
    for stride, size in sorted(zip(view.stride, view.size, strict=True)):
        if size != 1 and stride != expected:
            return _contiguous_stride(view.size)
        expected *= size
    return view.stride


def _contiguous_stride(size: Sequence[int]) -> tuple[int, ...]:
    stride = [1]
    for each in reversed(size[1:]):
        stride.append(stride[-1] * max(1, each))
    return tuple(reversed(stride)) if size else ()


def _numel(size: Sequence[int]) -> int:
    count = 1
    for each in size:
        count *= each
    return count


def _holders(memory: Tensor) -> int:
    """How many others hold the storage of a tensor."""
    storage: Any = memory.untyped_storage()
    # The tensor and the variable above. Private, but there is no other way to ask.
    return int(torch._C._storage_Use_Count(storage._cdata)) - 2
