"""One device block, reserved up front, and the account of what each place in it holds.

All graphs of a model share the arena, each with slots of its own choosing, so the account is kept by byte range and
not by slot: a `Tenant` is a page (and version) in a range, and whoever wants a range turns out every tenant that it
touches. This is what makes a prefetch a hint (design.md, decision 4): `Arena.find` tells whether the wanted page is
in place or on its way, whatever happened in between - another graph, an exception, a recompile.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from spcompile.errors import OffloadError
from spcompile.ir import ALIGNMENT_BYTES
from spcompile.runtime.streams import Streams


@dataclass(eq=False)
class Tenant:
    """A page in a range of the arena.

    Attributes:
        offset_bytes, nbytes: the range.
        page: name of the page.
        version: of the page's weights when the copy was issued.
        ready: event behind the copy.
        released: event behind the last reader, once evicted.
        awaited: the running iteration will load it.
        held: loaded and not yet evicted.
    """

    offset_bytes: int
    nbytes: int
    page: str
    version: Hashable
    ready: Any
    released: Any = None
    awaited: bool = False
    held: bool = False

    def overlaps(self, offset_bytes: int, nbytes: int) -> bool:
        """Whether the ranges share a byte."""
        return self.offset_bytes < offset_bytes + nbytes and offset_bytes < self.offset_bytes + self.nbytes


class Arena:
    """The device block. It grows when a graph needs more, and never while a copy into it may be under way."""

    def __init__(self, device: torch.device, streams: Streams) -> None:
        self.device = device
        self.streams = streams
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self.tenants: list[Tenant] = []
        # Views of the slots, by runtime. Kept here and not there: a runtime belongs to compiled code, which may outlive
        # the model, and must not keep the block.
        self.views: WeakKeyDictionary[Any, dict[Hashable, tuple[Tensor, ...]]] = WeakKeyDictionary()
        weakref.finalize(self, _finish, streams, os.getpid()).atexit = False

    def reserve(self, nbytes: int) -> None:
        """Make the block at least this large. Growing moves it: what it held is forgotten.

        Raises:
            OffloadError: the device has not this much memory.
        """
        if nbytes <= self.memory.numel():
            return
        self._give_back()
        try:
            with torch.inference_mode(False):  # the first caller may be in it, a later one not
                memory = torch.empty(nbytes + ALIGNMENT_BYTES, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise OffloadError(
                f"no room on {self.device} for an arena of {nbytes:,} bytes: choose a smaller k, or free device memory"
            ) from error
        shift = -memory.data_ptr() % ALIGNMENT_BYTES
        self.memory = memory[shift : shift + nbytes]
        self.streams.freed(self.memory)
        self.streams.side_wait(self.streams.compute_record())  # whoever had this memory before may still be at it

    def shrink(self, nbytes: int) -> None:
        """Give the block back if it is larger than this; the next iteration reserves what it needs."""
        if self.memory.numel() > nbytes:
            self._give_back()

    def _give_back(self) -> None:
        """Forget what the block holds, and let go of it."""
        self.streams.synchronize()
        self.tenants.clear()
        self.views.clear()
        self.memory = torch.empty(0, dtype=torch.uint8, device=self.device)

    def find(self, offset_bytes: int, page: str, version: Hashable) -> Tenant | None:
        """The tenant at this offset, if it is this page in this version and has not been evicted."""
        for tenant in self.tenants:
            is_there = tenant.released is None and tenant.offset_bytes == offset_bytes
            if is_there and tenant.page == page and tenant.version == version:
                return tenant
        return None

    def claim(self, offset_bytes: int, nbytes: int) -> list[Any]:
        """Turn out every tenant of the range; returns the events of their last readers, for the copy to wait for."""
        leaving = [tenant for tenant in self.tenants if tenant.overlaps(offset_bytes, nbytes)]
        # A page of empty weights takes no bytes, so nobody's claim would ever turn it out.
        gone = [tenant for tenant in self.tenants if tenant.released is not None and not tenant.nbytes]
        self.tenants = [tenant for tenant in self.tenants if tenant not in leaving and tenant not in gone]
        for tenant in leaving:
            assert not tenant.held, f"{tenant.page} is still in use at {offset_bytes}"
        return [tenant.released for tenant in leaving if tenant.released is not None]

    def is_taken(self, offset_bytes: int, nbytes: int) -> bool:
        """Whether the running iteration still needs a page in this range."""
        return any((tenant.held or tenant.awaited) and tenant.overlaps(offset_bytes, nbytes) for tenant in self.tenants)

    def add(self, tenant: Tenant) -> None:
        """Enter a tenant whose range was claimed."""
        self.tenants.append(tenant)

    def release_all(self) -> None:
        """Take back every slot that an iteration left held (it was cut short by an exception)."""
        for tenant in self.tenants:
            tenant.awaited = False
        held = [tenant for tenant in self.tenants if tenant.held]
        if not held:
            return
        event = self.streams.compute_record()
        for tenant in held:
            tenant.held, tenant.released = False, event


def _finish(streams: Streams, process: int) -> None:
    """Before the block dies: a copy may be on its way into it. (A forked child has the arena, but not CUDA.)"""
    if process == os.getpid():
        streams.close()
