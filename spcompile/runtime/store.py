"""The weights of an offloaded model: where each one is, and which tensors look at it.

A `StoredWeight` is one storage of the model. Its home is a place in a `HostBlock`, which the device reads in place
(``view``); while it is resident, a device copy is the truth instead and the place in the block is stale. Either way the
model's tensors are views of the one that is ``current``, so no code can read a stale or freed weight. Moving a weight
swaps the ``.data`` of its tensors: device, dtype, shape and stride stay, so nothing recompiles.

Who holds whom: tensor -> `Tag` -> `PageStore` -> `StoredWeight` -> block. The store holds the model's tensors and the
runtimes of its graphs only weakly, so there is no cycle and no registry: the last tensor to die takes everything along.

Copies of a weight on the device are known by `PageStore.version`. Edits in place move the version counters of the
tensors; fused optimizers do not, so a hook behind every optimizer step bumps the ``generation`` of the stores that it
touched. Edits through ``.data`` leave no trace at all: ``spcompile.refresh`` is for those.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import TensorWeakRef

from spcompile.errors import OffloadError
from spcompile.ir import Page, Plan, Weight
from spcompile.runtime.arena import Arena
from spcompile.runtime.host import HostBlock
from spcompile.runtime.streams import CudaStreams, EmulatedStreams, Streams

TAG = "_spcompile_tag"
"""Attribute of every parameter, and every buffer that aliases one, of an offloaded model."""


@dataclass(frozen=True, eq=False)
class Tag:
    """On a tensor: the store and the name of the weight that the tensor looks at. Find it with `tag_of`."""

    store: PageStore
    name: str

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied tensor is an ordinary one."""

    def __reduce__(self) -> tuple[type[OrderedDict[str, Any]], tuple[()]]:
        """A saved tensor is an ordinary one. Loading it must not need this package, nor anything that torch's
        ``weights_only`` loading forbids; of what that allows, an empty dict comes nearest to nothing."""
        return OrderedDict, ()


class StoredWeight:
    """One storage of the model.

    Attributes:
        name: the first fully qualified parameter name that uses the storage, unique in its store.
        nbytes: size of the storage.
        block, offset_bytes: its home.
        host: the home as a CPU tensor, uint8 ``[nbytes]``.
        view: the home as a tensor of the compute device, uint8 ``[nbytes]``, a storage of its own.
        resident: the device copy, uint8 ``[nbytes]``, while there is one.
    """

    def __init__(self, name: str, nbytes: int, block: HostBlock, offset_bytes: int) -> None:
        self.name = name
        self.nbytes = nbytes
        self.block = block
        self.offset_bytes = offset_bytes
        self.host = block.host(offset_bytes, nbytes)
        self.view = block.view(offset_bytes, nbytes)
        self.resident: Tensor | None = None

    @property
    def current(self) -> Tensor:
        """The memory that the model's tensors look at."""
        return self.view if self.resident is None else self.resident


class PageStore:
    """The weights of one model, and what the graphs compiled for it share: pages, arena, compiled segments.

    Attributes:
        device: the compute device; ``cpu`` is the emulated one.
        weights: by name, in the order of the model's parameters.
        generation: goes up when copies may be stale although no tensor's version says so.
        pages: pages of all graphs so far; a weight never changes its page.
        arena: where streamed pages have their slots.
        segments: compiled segments by key.
        log: events of the runtimes, where a test has put a list.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.weights: dict[str, StoredWeight] = {}
        self.generation = 0
        self.pages: list[Page] = []
        streams: Streams = CudaStreams(device) if device.type == "cuda" else EmulatedStreams()
        self.arena = Arena(device, streams)
        self.segments: dict[str, torch.nn.Module] = {}
        self.log: list[tuple[object, ...]] | None = None
        self._tensors: dict[str, list[TensorWeakRef]] = {}
        self._runtimes: list[weakref.ref[Any]] = []
        self._pieces: dict[str, tuple[tuple[int, Tensor], ...]] = {}

    @classmethod
    def empty(cls, device: torch.device) -> PageStore:
        """The store of a graph that reads no weights."""
        return cls(device)

    # What looks at a weight.

    def add(self, weight: StoredWeight, tensors: Iterable[Tensor]) -> None:
        """Take a weight in and let these tensors look at it, whatever they looked at before.

        Args:
            tensors: all that viewed the original storage; each keeps its dtype, shape, stride and storage offset.
        """
        assert weight.name not in self.weights, weight.name
        self.weights[weight.name] = weight
        self._tensors[weight.name] = []
        with real_tensors():
            for tensor in tensors:
                look_at(tensor, weight.current)
                self.attach(tensor, weight.name)

    def attach(self, tensor: Tensor, name: str) -> None:
        """Tag a tensor that already looks at the weight's memory, so that it follows the weight from now on."""
        if any(tensor is each for each in self.tensors_of(name)):
            return
        setattr(tensor, TAG, Tag(self, name))
        self._tensors[name].append(TensorWeakRef(tensor))

    def adopt(self, other: PageStore, name: str, new_name: str) -> None:
        """Take over a weight of another store of the same device, under a name that is free here. Nothing is copied."""
        assert other.device == self.device, (other.device, self.device)
        weight, tensors = other.weights[name], other.tensors_of(name)
        other._forget(name)
        weight.name = new_name
        self.add(weight, tensors)

    def release(self, name: str, device: torch.device) -> None:
        """Make the weight an ordinary storage on ``device`` for all its tensors, and forget it."""
        weight = self.weights[name]
        self._settle()
        with real_tensors():
            memory = weight.resident
            if memory is None or memory.device != device:
                source = weight.host if memory is None else memory
                memory = torch.empty(weight.nbytes, dtype=torch.uint8, device=device).copy_(source)
            for tensor in self.tensors_of(name):
                if self._views(tensor, weight):
                    look_at(tensor, memory)
        self._forget(name)

    def free_name(self, name: str) -> str:
        """The name, or one made of it, that no weight has yet."""
        numbered = (f"{name}#{number}" for number in itertools.count(2))
        return next(each for each in itertools.chain([name], numbered) if each not in self.weights)

    def _forget(self, name: str) -> None:
        for tensor in self.tensors_of(name):
            untag(tensor)
        del self.weights[name], self._tensors[name]
        self._pieces.clear()

    def tensors_of(self, name: str) -> list[Tensor]:
        """The live tensors that were given to this weight (some may look elsewhere by now: see `holds`)."""
        return [tensor for each in self._tensors.get(name, ()) if (tensor := each()) is not None]

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is tagged for this store and its data really lies in the store's memory.

        ``model.half()`` and ``param.data = other`` leave the tag on tensors that look elsewhere.
        """
        tag = getattr(tensor, TAG, None)
        if not isinstance(tag, Tag) or tag.store is not self or tag.name not in self.weights:
            return False
        return self._views(tensor, self.weights[tag.name])

    def weight_of(self, tensor: Tensor, path: str = "") -> Weight | None:  # noqa: ARG002  # signature of its callers
        """The weight that a tensor looks at, or None."""
        tag = tag_of(tensor)
        if tag is None or tag.store is not self:
            return None
        return Weight(tag.name, self.weights[tag.name].nbytes)

    def model_order(self) -> dict[str, int]:
        """Place of each weight in the order of the model's parameters, which is their order in host memory."""
        return {name: index for index, name in enumerate(self.weights)}

    @staticmethod
    def _views(tensor: Tensor, weight: StoredWeight) -> bool:
        # By storage, not by address: those of empty tensors are all null.
        return bool(tensor.untyped_storage()._cdata == weight.current.untyped_storage()._cdata)

    # Where a weight is.

    def data_ptr(self, name: str) -> int:
        """Address of the weight's current memory; 0 once it was released."""
        return self.weights[name].current.data_ptr() if name in self.weights else 0

    def make_resident(self, names: Iterable[str]) -> None:
        """Give these weights device copies, which their tensors look at from now on.

        Raises:
            OffloadError: the device has not this much memory; nothing has changed then.
        """
        moving = [self.weights[name] for name in dict.fromkeys(names) if self.weights[name].resident is None]
        if not moving:
            return
        self._settle()
        with real_tensors():
            copies = [self._device_copy(weight, moving) for weight in moving]
            for weight, copy in zip(moving, copies, strict=True):
                self._point(weight, copy)
        self._settle()

    def make_offloaded(self, names: Iterable[str]) -> None:
        """Write the device copies of these weights back to the host, which their tensors look at from now on."""
        moving = [self.weights[name] for name in dict.fromkeys(names)]
        moving = [weight for weight in moving if weight.resident is not None]
        if not moving:
            return
        self._settle()
        with real_tensors():
            for weight in moving:
                assert weight.resident is not None
                weight.host.copy_(weight.resident)
            self._settle()
            for weight in moving:
                self._point(weight, None)
        self.touch()  # a slot may hold the weight as it was before it was resident

    def _device_copy(self, weight: StoredWeight, moving: Sequence[StoredWeight]) -> Tensor:
        try:
            copy = torch.empty(weight.nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            total_bytes = sum(each.nbytes for each in moving)
            raise OffloadError(
                f"no room on {self.device} for {total_bytes:,} bytes of resident weights ({weight.name!r} is the first "
                "that does not fit): give k, or free device memory"
            ) from error
        return copy.copy_(weight.host, non_blocking=True)

    def _point(self, weight: StoredWeight, resident: Tensor | None) -> None:
        """Change where the weight is, and let the tensors that look at it follow."""
        following = [tensor for tensor in self.tensors_of(weight.name) if self._views(tensor, weight)]
        weight.resident = resident
        for tensor in following:
            look_at(tensor, weight.current)
        self._pieces.clear()

    def _settle(self) -> None:
        """Wait for every copy and kernel that may still read or write a weight."""
        self.arena.streams.synchronize()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def place(self, plan: Plan) -> None:
        """Put the weights where the plan wants them: residents and leftovers on the device, streamed pages on the host.

        Raises:
            OffloadError: the device has no room for the residents.
        """
        streamed = dict.fromkeys(interval.page for interval in plan.intervals)
        staying = [weight for page in plan.residents for weight in plan.pages[page].weights]
        self.make_offloaded(self._own(weight for page in streamed for weight in plan.pages[page].weights))
        self.make_resident(self._own([*staying, *plan.leftovers]))

    def _own(self, weights: Iterable[Weight]) -> list[str]:
        return [weight.name for weight in weights if weight.name in self.weights]

    def add_pages(self, pages: Iterable[Page]) -> None:
        """Remember the pages of one more graph."""
        known = {page.name for page in self.pages}
        self.pages.extend(page for page in pages if page.name not in known)

    def resident_pages(self) -> list[str]:
        """Names of the pages that are wholly on the device."""
        return [page.name for page in self.pages if page.weights and all(map(self._is_resident, page.weights))]

    def _is_resident(self, weight: Weight) -> bool:
        return weight.name in self.weights and self.weights[weight.name].resident is not None

    def device_bytes(self) -> int:
        """Device memory that the arena and the resident weights take."""
        residents = (weight.nbytes for weight in self.weights.values() if weight.resident is not None)
        return self.arena.memory.numel() + sum(residents)

    # What copies are made of, and whether they are still good.

    def pieces(self, page: Page) -> tuple[tuple[int, Tensor], ...]:
        """What a copy of the page into a slot consists of: offset in the slot, and the source, uint8.

        Weights that lie one behind the other in a block, as those of a layer do, are one piece.
        """
        if page.name not in self._pieces:
            self._pieces[page.name] = tuple(self._find_pieces(page))
        return self._pieces[page.name]

    def _find_pieces(self, page: Page) -> Iterator[tuple[int, Tensor]]:
        run: _Run | None = None
        for weight, offset_bytes in zip(page.weights, page.offsets_bytes, strict=True):
            stored = self.weights.get(weight.name)
            if stored is None or not stored.nbytes:  # released: its tensors are passed to the graph as they are
                continue
            if stored.resident is not None:  # another graph keeps it on the device
                yield offset_bytes, stored.resident
                continue
            if run is not None and run.continues(stored, offset_bytes):
                run = _Run(run.offset_bytes, run.first, offset_bytes + stored.nbytes - run.offset_bytes)
                continue
            if run is not None:
                yield run.piece()
            run = _Run(offset_bytes, stored, stored.nbytes)
        if run is not None:
            yield run.piece()

    def version(self, names: Iterable[str]) -> Hashable:
        """Changes whenever a copy of one of these weights may have become stale."""
        return self.generation, tuple(_version(tensor) for name in names for tensor in self.tensors_of(name))

    def touch(self) -> None:
        """Say that any weight may have changed: all copies are stale."""
        self.generation += 1

    # The graphs compiled for the model.

    def add_runtime(self, runtime: object) -> None:
        """Remember the runtime of a graph, as long as the graph lives."""
        self._runtimes.append(weakref.ref(runtime))

    def runtimes(self) -> list[Any]:
        """The runtimes of the graphs that live, in the order in which they were compiled."""
        return [runtime for each in self._runtimes if (runtime := each()) is not None]


@dataclass(frozen=True)
class _Run:
    """Weights that follow each other in a page and, at the same distances, in a block."""

    offset_bytes: int
    first: StoredWeight
    nbytes: int

    def continues(self, stored: StoredWeight, offset_bytes: int) -> bool:
        distance_bytes = stored.offset_bytes - self.first.offset_bytes
        return stored.block is self.first.block and distance_bytes == offset_bytes - self.offset_bytes

    def piece(self) -> tuple[int, Tensor]:
        return self.offset_bytes, self.first.block.host(self.first.offset_bytes, self.nbytes)


def tag_of(tensor: Tensor) -> Tag | None:
    """The tag of a tensor that looks at a stored weight; None for every other tensor."""
    tag = getattr(tensor, TAG, None)
    return tag if isinstance(tag, Tag) and tag.store.holds(tensor) else None


def untag(tensor: Tensor) -> None:
    """Make a tensor an untagged one, wherever it looks."""
    if hasattr(tensor, TAG):
        delattr(tensor, TAG)


def find_store(tensors: Iterable[Tensor]) -> PageStore | None:
    """The store of the first of these tensors that looks at a stored weight."""
    return next((tag.store for tensor in tensors if (tag := tag_of(tensor)) is not None), None)


@functools.cache
def watch_optimizers() -> None:
    """From now on, for good, count a step of any optimizer as a change of the weights that it owns."""
    register_optimizer_step_post_hook(_after_optimizer_step)


def _after_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001  # the hook's
    tensors = (tensor for group in optimizer.param_groups for tensor in group["params"])
    for store in {tag.store for tensor in tensors if (tag := tag_of(tensor)) is not None}:
        store.touch()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


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
