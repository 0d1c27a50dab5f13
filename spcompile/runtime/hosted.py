"""CPU parameters over the weights of a model on a GPU, for optimizers that run on the host.

A `HostParameters` belongs to a page store. Its parameters look at the homes of the weights, the very memory that the
device reads, so an optimizer's step is seen by the next copy, and nothing is written twice. From the first of them on
the homes are what counts: device copies of weights are only copies (`PageStore.master_on_host`).

Gradients come the same way. At the end of each backward, when they have arrived in host memory, the parameter on the
host gets a ``.grad`` that looks at the memory of the model's parameter's ``.grad``: it is one gradient with two faces,
added up, clipped and zeroed through either. Only setting one of the two to None leaves no trace on the other one; the
next backward, and the next optimizer step, look for that before they start. Of a backward not all need be compiled, or
nothing: it begins with its first compiled graph, or the first parameter that is about to be given a gradient. A
gradient that is not in such memory (of an eager backward, or in another precision) is copied, and copied back where it
was changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import unserializable_hook
from torch.utils.weak import TensorWeakRef

from spcompile.errors import OptionError
from spcompile.runtime.weights import real_tensors, tag_of, version_of

if TYPE_CHECKING:
    from spcompile.runtime.store import PageStore


@dataclass(eq=False)
class _Pair:
    """A parameter of the model and its parameter on the host.

    Attributes:
        name: of the weight.
        is_master: whether the one on the host has memory of its own, in another precision.
        shown: the gradients of the model's parameter and of the host's since they agree, and their versions then.
        versions: of a master: those of both parameters since they agree.
        is_watched: whether a backward is noticed that gives the model's parameter a gradient.
    """

    model: TensorWeakRef
    host: TensorWeakRef
    name: str
    is_master: bool
    shown: tuple[TensorWeakRef, int, TensorWeakRef, int] | None = None
    versions: tuple[int, int] | None = None
    is_watched: bool = False

    def follow_zeroing(self, store: PageStore) -> None:
        """If the gradient was set to None, changed or replaced on one side, have it so on the other one."""
        model, host = self.model(), self.host()
        if model is None or host is None:
            return
        if self.shown is None:
            if model.grad is None and host.grad is not None:  # set by hand, before anything was shown
                model.grad = host.grad.to(model.device, model.dtype, copy=True)
                self.agree(model.grad, host.grad)
            return
        gradient, _, shown, shown_version = self.shown
        if model.grad is None or host.grad is None:
            model.grad, host.grad, self.shown = None, None, None
        elif host.grad is not shown() or (model.grad is gradient() and host.grad._version != shown_version):
            if not self._is_one_memory(store, model.grad, host.grad):
                model.grad.copy_(host.grad)
            self.agree(model.grad, host.grad)

    @staticmethod
    def _is_one_memory(store: PageStore, gradient: Tensor, shown: Tensor) -> bool:
        buffer = store.gradients.find(gradient)
        return buffer is not None and shown.layout is torch.strided and shown.data_ptr() == buffer.memory.data_ptr()

    def agree(self, gradient: Tensor, shown: Tensor) -> None:
        """The gradient of the model's parameter and that of the host's are the same now."""
        self.shown = TensorWeakRef(gradient), gradient._version, TensorWeakRef(shown), shown._version

    def follow_edits(self, store: PageStore) -> None:
        """Of a master: if either parameter was edited since they agree, the other follows it, or else the master."""
        model, host = self.model(), self.host()
        if not self.is_master or model is None or host is None or self.name not in store.weights:
            return
        versions = version_of(model), version_of(host)
        if versions == self.versions:
            return
        home = _looking_at(store.weights[self.name].host, model)
        if self.versions is None or versions[1] != self.versions[1]:
            home.copy_(host)
            store.touch()  # the home has no version
        else:
            host.copy_(home)
        self.versions = version_of(model), version_of(host)

    def watch(self, store: PageStore, model: Tensor) -> None:
        """Have a backward noticed before it adds to the gradient of the model's parameter."""
        held = weakref.ref(store)

        @unserializable_hook  # type: ignore[untyped-decorator]
        @_disable_dynamo
        def before_adding(_: Tensor) -> None:
            store = held()
            if store is not None:
                with store.lock:
                    store.hosted.begin_backward(store)

        hook = model.register_hook(before_adding)  # type: ignore[no-untyped-call]
        weakref.finalize(store, hook.remove).atexit = False
        self.is_watched = True


class HostParameters:
    """The parameters on the host of one store."""

    def __init__(self) -> None:
        self._pairs: dict[int, _Pair] = {}  # by the model's parameter, which may be gone
        self._running: dict[int, weakref.ref[Callable[[], None]]] = {}
        """The backwards that have begun, by number, with what each calls at its end."""
        self._last = -1
        self._has_masters = False

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
        pair = self._pairs.get(id(parameter))
        host: nn.Parameter | None = None if pair is None or pair.model() is not parameter else pair.host()
        if pair is not None and host is not None:
            if host.dtype != (dtype or parameter.dtype):
                raise OptionError(
                    f"the host parameter of {pair.name!r} is of {host.dtype}, not of {dtype or parameter.dtype}"
                )
            host.requires_grad_(parameter.requires_grad)
            return host
        return self._make(store, parameter, dtype)

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
        if parameter.requires_grad:
            pair.watch(store, parameter)
        if is_master:
            self._has_masters = True
            pair.versions = version_of(parameter), version_of(host)
        self._pairs[id(parameter)] = pair
        return host

    def _living(self) -> list[tuple[_Pair, Tensor, Tensor]]:
        """The pairs of which both parameters live."""
        both = ((pair, pair.model(), pair.host()) for pair in self._pairs.values())
        return [(pair, model, host) for pair, model, host in both if model is not None and host is not None]

    def show_gradients(self, store: PageStore) -> None:
        """Give every parameter on the host the gradient of the model's; once all gradients have arrived."""
        self._pairs = {id(model): pair for pair, model, _ in self._living()}
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
                if not pair.is_watched and model.requires_grad:  # it was frozen, and none of backward is compiled
                    pair.watch(store, model)

    @staticmethod
    def _is_news(pair: _Pair, gradient: Tensor) -> bool:
        return pair.shown is None or pair.shown[0]() is not gradient or pair.shown[1] != gradient._version

    def begin_backward(self, store: PageStore) -> None:
        """Called, with the store locked, before each compiled graph of a backward and before each gradient that lands.

        The first call of a backward looks what became of gradients since the one before, and has all shown at its end.
        """
        # Private, but there is no other way to tell one backward from the next, nor to know when it has ended.
        backward = torch._C._current_graph_task_id()
        if backward == self._last or backward in self._running:
            return
        self._last = backward
        self._forget_what_was_cut_short()
        self.follow_zeroing(store)
        for pair, model, _ in self._living():
            if not pair.is_watched and model.requires_grad:  # it was frozen
                pair.watch(store, model)
        if torch._dynamo.compiled_autograd.in_compiled_autograd_region:
            return  # which calls nobody at its end: gradients are shown when the optimizer steps

        @torch._dynamo.disable  # type: ignore[untyped-decorator]
        def end() -> None:
            with store.lock:
                del self._running[backward]
                store.settle()
                self.show_gradients(store)

        self._running[backward] = weakref.ref(end)
        torch.autograd.Variable._execution_engine.queue_callback(end)

    def _forget_what_was_cut_short(self) -> None:
        """What has landed of a backward that ended with an exception was never shown, so nobody could zero it.

        Such a one has dropped its callback. Others may be under way: a checkpoint's backward runs inside of one.
        """
        cut_short = [backward for backward, end in self._running.items() if end() is None]
        for backward in cut_short:
            del self._running[backward]
        if cut_short and not self._running:
            for pair, model, host in self._living():
                if host.grad is None and model.grad is not None and self._is_news(pair, model.grad):
                    model.grad = None

    def follow_zeroing(self, store: PageStore) -> None:
        """A gradient that was set to None, or changed, on one side is so on the other one."""
        with real_tensors():
            for pair in self._pairs.values():
                pair.follow_zeroing(store)

    def follow_edits(self, store: PageStore) -> None:
        """Edits of copies in another precision, or of the weights that they are copies of, reach the other side."""
        if not self._has_masters:
            return
        with real_tensors(), torch.no_grad():
            for pair in self._pairs.values():
                pair.follow_edits(store)

    def stepped(self, store: PageStore, parameters: Iterable[Tensor]) -> None:
        """After an optimizer step: copies in another precision go to the weights' homes, and autograd learns that the
        model's parameters have changed, so that a backward that needs them as they were says so."""
        given = {id(each) for each in parameters}
        with real_tensors(), torch.no_grad():
            for pair, model, host in self._living():
                if id(host) not in given or host.grad is None:
                    continue
                pair.versions = None  # fused optimizers count none
                pair.follow_edits(store)
                if not model.is_inference():
                    torch.autograd.graph.increment_version(model)
                pair.versions = version_of(model), version_of(host)


def _looking_at(memory: Tensor, parameter: Tensor) -> Tensor:
    """A tensor over ``memory``, uint8 ``[bytes of the storage]``, that looks at it as the parameter at its own."""
    typed = torch.empty(0, dtype=parameter.dtype)
    return typed.set_(memory.untyped_storage(), parameter.storage_offset(), parameter.shape, parameter.stride())
