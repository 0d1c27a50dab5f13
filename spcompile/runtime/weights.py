"""One weight, where it is, and which tensors look at it.

A `StoredWeight` is one storage of the model. Its home is a place in a `HostBlock`, which the device reads in place
(``view``); while it is resident, a device copy takes its place for the device. A weight that came on the device
already, or that may stay in ordinary host memory, has no home until it has to be streamed.

A tensor finds its weight through a `Tag`. What it looks at is swapped by giving it other ``.data``: identity, dtype,
shape and stride stay, so nothing recompiles.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes

from spcompile.runtime.host import HostBlock

if TYPE_CHECKING:
    from spcompile.runtime.store import PageStore

TAG = "_spcompile_tag"
"""Attribute of every parameter, and every buffer that aliases one, whose weight is in a page store."""


@dataclass(frozen=True, eq=False)
class Tag:
    """On a tensor: the store and the name of the weight that the tensor looks at. Find it with `tag_of`.

    ``hosted`` keeps a parameter's parameter on the host alive (``hosted.py``).
    """

    store: PageStore
    name: str
    hosted: list[Tensor] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied tensor is an ordinary one."""

    def __reduce__(self) -> tuple[type[OrderedDict[str, Any]], tuple[()]]:
        """A saved tensor is an ordinary one. Loading it must not need this package, nor anything that torch's
        ``weights_only`` loading forbids; of what that allows, an empty dict comes nearest to nothing."""
        return OrderedDict, ()


@dataclass(frozen=True)
class WeightView:
    """How a placeholder looks at its weight: the storage's name, and size, stride and offset in elements."""

    weight: str
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int

    def of(self, memory: Tensor) -> Tensor:
        """The view on another copy of the storage. ``memory``: uint8 ``[bytes of the storage]``."""
        whole = memory.numel() - memory.numel() % self.dtype.itemsize
        typed = memory[:whole].view(self.dtype)
        return typed.as_strided(self.size, self.stride, typed.storage_offset() + self.storage_offset)


class StoredWeight:
    """One storage of the model.

    Attributes:
        name: the first fully qualified parameter name that uses the storage, unique in its store.
        nbytes: size of the storage.
        resident: the device copy, uint8 ``[nbytes]``, while there is one.
    """

    def __init__(self, name: str, nbytes: int, *, origin: Tensor | None = None, resident: Tensor | None = None) -> None:
        self.name = name
        self.nbytes = nbytes
        self.resident = resident
        self._host = origin  # the storage with which a CPU model came, until there is a home
        self._view: Tensor | None = None
        self._block: HostBlock | None = None
        self.offset_bytes = 0

    def move_in(self, block: HostBlock, offset_bytes: int) -> None:
        """Make that place, which holds the weight's bytes, its home."""
        self._block, self.offset_bytes = block, offset_bytes
        self._host = block.host(offset_bytes, self.nbytes)
        self._view = block.view(offset_bytes, self.nbytes)

    @property
    def has_home(self) -> bool:
        return self._block is not None

    @property
    def block(self) -> HostBlock:
        """Where the home is; it starts at ``offset_bytes``."""
        assert self._block is not None, f"{self.name} has no home"
        return self._block

    @property
    def host(self) -> Tensor:
        """The bytes in host memory, uint8 ``[nbytes]``: the home, or the storage with which a CPU model came."""
        assert self._host is not None, f"{self.name} is not in host memory"
        return self._host

    @property
    def view(self) -> Tensor:
        """The home as a tensor of the compute device, uint8 ``[nbytes]``, with a storage of its own."""
        assert self._view is not None, f"{self.name} has no home"
        return self._view

    @property
    def current(self) -> Tensor:
        """The memory that the compute device uses: the device copy, or else the home."""
        return self.view if self.resident is None else self.resident


def tag_of(tensor: Tensor) -> Tag | None:
    """The tag of a tensor that looks at a stored weight; None for every other tensor."""
    tag = tag_on(tensor)
    return tag if tag is not None and tag.store.holds(tensor) else None


def tag_on(tensor: Tensor) -> Tag | None:
    """The tag of a tensor, wherever that looks by now. (What is left of one on a pickled tensor is none.)"""
    tag = getattr(tensor, TAG, None)
    return tag if isinstance(tag, Tag) else None


def version_of(tensor: Tensor) -> int:
    """The version counter; 0 of a tensor that has none, being made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def untag(tensor: Tensor) -> None:
    """Make a tensor an untagged one, wherever it looks."""
    if hasattr(tensor, TAG):
        delattr(tensor, TAG)


def what_is_special(tensor: Tensor) -> str | None:
    """Why the bytes of a tensor's storage are not all there is to it; None for a plain dense tensor."""
    if is_lazy(tensor):
        return "it is not initialised yet; run the model once on an example"
    if type(tensor.data) is not Tensor:
        return f"it is a {type(tensor.data).__name__}, a tensor subclass; only plain tensors can be offloaded so far"
    if tensor.is_meta:
        return "it is on the meta device, it has no values"
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}; only dense tensors can be offloaded"
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return "it is quantized by torch, or a lazy conjugate or negative; make a plain tensor of it"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"it is on {tensor.device}; move the model to the CPU or to a CUDA device first"
    return None


def why_nothing_streams(model: nn.Module) -> str | None:
    """Why a model has no weight that can be streamed; None where it has one."""
    problems = [(name, what_is_special(parameter)) for name, parameter in model.named_parameters()]
    if not problems:
        return "it has no parameters, and its buffers stay where they are"
    name, problem = problems[0]
    return None if any(each is None for _, each in problems) else f"of its parameters, such as {name!r}: {problem}"


def bytes_of(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor, uint8 ``[nbytes]``; shares its memory."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def storage_key(tensor: Tensor) -> int:
    """Identity of a tensor's storage, as long as that lives."""
    key: int = tensor.untyped_storage()._cdata
    return key


@contextmanager
def real_tensors() -> Iterator[None]:
    """Whoever calls, tensors made here are real and ordinary: no fake mode, no inference mode, no gradients."""
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


def look_at(tensor: Tensor, memory: Tensor) -> None:
    """Let ``tensor`` look at ``memory`` (uint8 ``[bytes of its storage]``) as it looks at its storage now.

    Call it under `real_tensors`. An inference tensor stays one: it has no version counter, and ordinary data needs one.
    """
    with torch.inference_mode(tensor.is_inference()):
        data = torch.empty(0, dtype=tensor.dtype, device=memory.device)
        data.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
        tensor.data = data
