"""Move a model's weights to host memory and back: `offload`, `restore`, `refresh`.

An offloaded model is still an ordinary model. Its parameters are the same objects and are tensors of the compute
device, whose memory happens to be on the host; eager code, optimizers, hooks and checkpoints work, over the link and
therefore slowly, until torch.compile streams the weights.

Weights are moved by *storage*, so tied parameters stay tied and views of one flat storage stay views of one. They are
packed one behind the other, in the order of ``named_parameters``, so that the weights of a layer are one stretch of
memory and can be copied in one go. Blocks are filled one at a time and the originals go as soon as their block is
ready, so a model that is on the host already needs room for about one block more, not for a second model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from spcompile.errors import OffloadError
from spcompile.progress import Advance, progress
from spcompile.runtime.host import HostBlock, check_host_memory, compute_device, lay_out_blocks
from spcompile.runtime.optimizers import watch_optimizers
from spcompile.runtime.store import PageStore
from spcompile.runtime.weights import (
    StoredWeight,
    Tag,
    bytes_of,
    look_at,
    real_tensors,
    storage_key,
    tag_of,
    untag,
    what_is_special,
)

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class _Storage:
    """One storage of the model and all that looks at it. The storage itself is not held, so that it can go."""

    name: str
    nbytes: int
    tensors: list[Tensor]

    @property
    def tag(self) -> Tag | None:
        """The tag of a storage that is offloaded already."""
        return next((tag for tag in map(tag_of, self.tensors) if tag is not None), None)


def offload(model: Model, device: str | torch.device | None = None) -> Model:
    """Move the parameters of a model to pinned host memory, in place, as tensors that the compute device reads there.

    Parameters keep identity, shape, stride, dtype, ``requires_grad`` and aliasing; ``.grad`` stays what and where it
    is. Buffers move to the compute device as ordinary tensors, except those that alias a parameter's storage. Weights
    that are offloaded for this device already stay where they are, so a second call changes nothing.

    Afterwards ``.to()``, ``.half()`` and the like make ordinary tensors of the weights they change, on the compute
    device unless they name another, and so does ``copy.deepcopy``: `restore` first where the device has no room for
    them.

    Args:
        model: on the CPU, on GPUs, or partly on each.
        device: compute device; None takes CUDA where there is any. ``"cpu"``, or no CUDA, is the emulated device.

    Returns:
        The model.

    Raises:
        OffloadError: a weight is not a plain dense tensor, or host memory does not suffice. The model works as before.
            Or it is no module.
    """
    _check_module("offload", model)
    target = compute_device(device)
    _check_tensors(model)
    watch_optimizers()
    storages = _storages(model)
    tags = [storage.tag for storage in storages]
    kept = [tag for tag in tags if tag is not None and _is_for(tag.store, target)]
    store = kept[0].store if kept else PageStore(target)
    fresh = []
    for storage, tag in zip(storages, tags, strict=True):
        if tag is not None and tag in kept:
            _keep(store, storage, tag)
        else:
            fresh.append(storage)
    store.make_offloaded(name for name, weight in store.weights.items() if not weight.has_home)
    check_host_memory(sum(storage.nbytes for storage in fresh if storage.tensors[0].device.type != "cpu"))
    sizes_bytes = [storage.nbytes for storage in fresh]
    with ExitStack() as undo:
        with progress("offloading weights", sum(sizes_bytes), "B") as advance:
            for places in lay_out_blocks(sizes_bytes):
                _fill_block(store, [(fresh[index], offset_bytes) for index, offset_bytes in places], undo, advance)
        _move_others(model, target, undo)
        undo.pop_all()
    return model


def restore(model: Model, device: str | torch.device = "cpu") -> Model:
    """Make ordinary tensors of an offloaded model's weights again, in place, and of a model that is not offloaded too.

    Each original storage becomes a storage of its own again; tied weights stay tied. The pinned memory is given back
    once nothing looks at it any more. A model compiled while it was offloaded has to be compiled again.

    Args:
        model: any module; weights that others share with it are restored for those too.
        device: where all its weights and buffers go.

    Returns:
        The model.

    Raises:
        OffloadError: there is no such device, or the model is no module.
    """
    _check_module("restore", model)
    target = compute_device(device)
    tags = {(tag.store, tag.name) for tag in map(tag_of, _tensors(model)) if tag is not None}
    with progress("restoring weights", sum(store.weights[name].nbytes for store, name in tags), "B") as advance:
        for tensor in _tensors(model):
            tag = tag_of(tensor)
            if tag is not None:
                nbytes = tag.store.weights[tag.name].nbytes
                tag.store.release(tag.name, target)
                advance(nbytes)
            untag(tensor)  # ``.half()`` and the like leave tags on tensors that look elsewhere
    with ExitStack() as undo:
        _move_others(model, target, undo)
        undo.pop_all()
    return model


def refresh(model: nn.Module) -> None:
    """Say that weights may have been edited in a way that leaves no trace, as ``param.data.mul_(2)`` does.

    Copies on the device count as stale from now on. Edits in place, optimizers and ``load_state_dict`` need no such
    call.

    Raises:
        OffloadError: the model is no module.
    """
    _check_module("refresh", model)
    stores = {tag.store for tag in map(tag_of, _tensors(model)) if tag is not None}
    for store in stores:
        store.touch()


def _check_module(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise OffloadError(f"{name} needs a torch.nn.Module, not a value of type {type(model).__name__}")


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _check_tensors(model: nn.Module) -> None:
    """Raise for what cannot be moved, before anything is."""
    for name, parameter in model.named_parameters():
        problem = what_is_special(parameter)
        if problem is not None:
            raise OffloadError(f"cannot offload the weight {name!r}: {problem}")
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise OffloadError(f"cannot offload the model: the buffer {name!r} is on the meta device, it has no values")


def _storages(model: nn.Module) -> list[_Storage]:
    """The storages of the parameters in order, each with the parameters and buffers that look at it."""
    found: dict[int, _Storage] = {}
    for name, parameter in model.named_parameters():
        nbytes = parameter.untyped_storage().nbytes()
        found.setdefault(storage_key(parameter), _Storage(name, nbytes, [])).tensors.append(parameter)
    for buffer in model.buffers():
        if what_is_special(buffer) is None and storage_key(buffer) in found:
            found[storage_key(buffer)].tensors.append(buffer)
    return list(found.values())


def _is_for(store: PageStore, device: torch.device) -> bool:
    """Whether the store's weights look like offloaded ones for this device (a model that was compiled as it was, on the
    CPU, has tensors that do not)."""
    return store.device == device and not store.rehomed


def _keep(store: PageStore, storage: _Storage, tag: Tag) -> None:
    """A storage that is offloaded already: take it over if it is another store's (a part was offloaded by itself)."""
    name = tag.name
    if tag.store is not store:
        name = store.free_name(storage.name)
        store.adopt(tag.store, tag.name, name)
    for tensor in storage.tensors:
        store.attach(tensor, name)


def _fill_block(store: PageStore, places: Sequence[tuple[_Storage, int]], undo: ExitStack, advance: Advance) -> None:
    """Copy storages into a block of their own and let everything that looks at them look there."""
    with real_tensors():
        pieces = [(offset_bytes, bytes_of(storage.tensors[0])) for storage, offset_bytes in places]
        block = HostBlock.filled(pieces, store.device, advance)
    del pieces  # they hold the originals
    for storage, offset_bytes in places:
        origin = storage.tensors[0].device
        weight = StoredWeight(store.free_name(storage.name), storage.nbytes)
        weight.move_in(block, offset_bytes)
        store.add(weight, storage.tensors)
        undo.callback(store.release, weight.name, origin)


def _move_others(model: nn.Module, device: torch.device, undo: ExitStack) -> None:
    """Move what is not offloaded, as ordinary tensors; those that share a storage go on sharing one."""
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is None or buffer.device == device:
                continue
            if what_is_special(buffer) is not None:  # sparse, a subclass
                undo.callback(module._buffers.__setitem__, key, buffer)
                module._buffers[key] = buffer.to(device)
    for tensor in _tensors(model):
        if tensor.device == device or tag_of(tensor) is not None or what_is_special(tensor) is not None:
            continue
        undo.callback(setattr, tensor, "data", tensor.data)
        storage = storage_key(tensor)  # of a storage that the line above keeps alive
        with real_tensors():
            if storage not in copies:
                copies[storage] = bytes_of(tensor).to(device)
            look_at(tensor, copies[storage])
