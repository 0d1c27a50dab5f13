"""CPU parameters over the weights of a model on a GPU, for optimizers that run on the host.

A `HostParameters` belongs to a page store. Its parameters look at the homes of the weights, the very memory that the
device reads, so an optimizer's step is seen by the next copy, and nothing is written twice. From the first of them on
the homes are what counts: device copies of weights are only copies (`PageStore.master_on_host`).

Gradients come the same way. At the end of each backward, when they have arrived in host memory, the parameter on the
host gets a ``.grad`` that looks at the memory of the model's parameter's ``.grad``: it is one gradient with two faces,
added up, clipped and zeroed through either. Only setting one of the two to None leaves no trace on the other one; the
next backward, and the next optimizer step, look for that before they start. Of a backward not all may be compiled: so
each parameter looks once more just before a gradient is added to its own. A gradient that is not in such memory (of
an eager backward, or in another precision) is copied, and copied back where it was changed.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from spcompile.errors import OptionError
from spcompile.runtime.weights import real_tensors, tag_of

if TYPE_CHECKING:
    from spcompile.runtime.store import PageStore


@dataclass(eq=False)
class _Pair:
    """A parameter of the model and its parameter on the host.

    Attributes:
        name: of the weight.
        is_master: whether the one on the host has memory of its own, in another precision.
        shown: the gradient of the model's parameter that the host's shows, and the versions of both since they agree.
        is_watched: whether the model's parameter looks, before its gradient is added to, what became of the host's.
    """

    model: TensorWeakRef
    host: TensorWeakRef
    name: str
    is_master: bool
    shown: tuple[TensorWeakRef, int, int] | None = None
    is_watched: bool = False

    def follow_zeroing(self, store: PageStore) -> None:
        """If the gradient was set to None, or changed, on one side, have it so on the other one."""
        model, host = self.model(), self.host()
        if self.shown is None or model is None or host is None:
            return
        gradient, _, host_version = self.shown
        if model.grad is None:
            host.grad, self.shown = None, None
        elif model.grad is not gradient():
            return
        elif host.grad is None:
            model.grad, self.shown = None, None
        elif store.gradients.find(model.grad) is None and host.grad._version != host_version:
            model.grad.copy_(host.grad)
            self.agree(model.grad, host.grad)

    def agree(self, gradient: Tensor, shown: Tensor) -> None:
        """The gradient of the model's parameter and that of the host's are the same now."""
        self.shown = TensorWeakRef(gradient), gradient._version, shown._version

    def watch(self, store: PageStore, model: Tensor) -> None:
        """Have the model's parameter call `follow_zeroing` before its gradient is added to."""
        held = weakref.ref(store)

        def before_adding(_: Tensor) -> None:
            store = held()
            if store is not None and self.shown is not None:
                with real_tensors():
                    self.follow_zeroing(store)

        model.register_hook(before_adding)  # type: ignore[no-untyped-call]
        self.is_watched = True


class HostParameters:
    """The parameters on the host of one store."""

    def __init__(self) -> None:
        self._pairs: list[_Pair] = []
        self._running: int | None = None

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def parameter_for(self, store: PageStore, parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
        """The parameter on the host; the same one each time.

        Args:
            store: the one that these parameters belong to; the parameter's weight has its home there.
            parameter: of the model.
            dtype: None: the parameter looks at the weight's home. Otherwise it is a copy in that precision, which is
                written to the home after each optimizer step.

        Raises:
            OptionError: there is one in another precision already.
        """
        for pair in self._pairs:
            host: nn.Parameter | None = pair.host()
            if pair.model() is not parameter or host is None:
                continue
            if host.dtype != (dtype or parameter.dtype):
                raise OptionError(
                    f"the host parameter of {pair.name!r} is of {host.dtype}, not of {dtype or parameter.dtype}"
                )
            return host
        host = self._make(store, parameter, dtype)
        self._pairs = [pair for pair in self._pairs if pair.model() is not None and pair.host() is not None]
        return host

    def _make(self, store: PageStore, parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
        tag = tag_of(parameter)
        assert tag is not None
        is_master = dtype not in (None, parameter.dtype)
        with real_tensors():
            home = _looking_at(store.weights[tag.name].host, parameter)
            host = nn.Parameter(home.to(dtype) if is_master else home, requires_grad=parameter.requires_grad)
        store.attach(host, tag.name)  # its edits count, and the hooks of optimizers find the store
        tag.hosted.append(host)
        pair = _Pair(TensorWeakRef(parameter), TensorWeakRef(host), tag.name, is_master)
        self._pairs.append(pair)
        return host

    def _living(self) -> list[tuple[_Pair, Tensor, Tensor]]:
        """The pairs of which both parameters live."""
        both = ((pair, pair.model(), pair.host()) for pair in self._pairs)
        return [(pair, model, host) for pair, model, host in both if model is not None and host is not None]

    def show_gradients(self, store: PageStore) -> None:
        """Give every parameter on the host the gradient of the model's; once all gradients have arrived."""
        with real_tensors():
            for pair, model, host in self._living():
                if model.grad is None or not self._is_news(pair, model.grad):
                    continue
                buffer = store.gradients.find(model.grad)
                if buffer is not None and host.dtype == model.dtype:
                    if host.grad is None or host.grad.data_ptr() != buffer.memory.data_ptr():
                        host.grad = buffer.on_host()
                elif host.grad is None:
                    host.grad = model.grad.to("cpu", host.dtype, copy=True)
                else:
                    host.grad.copy_(model.grad)
                pair.agree(model.grad, host.grad)
                if not pair.is_watched and model.requires_grad:
                    pair.watch(store, model)

    @staticmethod
    def _is_news(pair: _Pair, gradient: Tensor) -> bool:
        return pair.shown is None or pair.shown[0]() is not gradient or pair.shown[1] != gradient._version

    def begin_backward(self, store: PageStore, backward: int) -> bool:
        """Called by each graph of a backward.

        Args:
            backward: its number.

        Returns:
            Whether it has just begun, and `end_backward` is to be called when it has ended.
        """
        if self._running == backward:
            return False
        if self._running is not None:  # it was cut short by an exception; what has landed of it was never shown
            for pair, model, host in self._living():
                if host.grad is None and model.grad is not None and self._is_news(pair, model.grad):
                    model.grad = None
        self._running = backward
        self.follow_zeroing(store)
        return True

    def end_backward(self, store: PageStore) -> None:
        """All gradients have arrived."""
        self._running = None
        self.show_gradients(store)

    def follow_zeroing(self, store: PageStore) -> None:
        """A gradient that was set to None, or changed, on one side is so on the other one."""
        with real_tensors():
            for pair in self._pairs:
                pair.follow_zeroing(store)

    def write_masters(self, store: PageStore) -> None:
        """After an optimizer step: copies in another precision go to the weights' homes."""
        with real_tensors():
            for pair, model, host in self._living():
                if pair.is_master and pair.name in store.weights:
                    _looking_at(store.weights[pair.name].host, model).copy_(host)


def _looking_at(memory: Tensor, parameter: Tensor) -> Tensor:
    """A tensor over ``memory``, uint8 ``[bytes of the storage]``, that looks at it as the parameter at its own."""
    typed = torch.empty(0, dtype=parameter.dtype)
    return typed.set_(memory.untyped_storage(), parameter.storage_offset(), parameter.shape, parameter.stride())
