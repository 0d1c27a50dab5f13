"""What the prefetch, load and evict nodes of one outer graph do.

A `Transfers` belongs to one graph: it knows the plan and how each placeholder looks at its weight. The weights
themselves, the arena and the streams belong to the page store, which all graphs of the model share and which lives as
long as the model's tensors do; this side only holds it weakly, so compiled code never keeps a dead model's memory.

An iteration:

* ``begin`` frees what a broken iteration left behind, picks the phase whose slots fit what is already there, and
  looks whether an argument is still the weight it was. A parameter that was given other memory is used as it is,
  without a slot. Where one graph serves several layers (a graph break in the loop over them), its pages are bound to
  the weights that it is called with.
* ``prefetch`` and ``load`` differ in one thing: a load waits. Both start the copy only if the slot does not hold, or
  is not receiving, the wanted page in its current version.
* ``evict`` marks the slot as free from here on.
* ``send`` copies gradients down, ``finish`` awaits the last of them.

In training forward and backward are two graphs with one plan. What forward leaves on the device for backward is found
there if nothing else ran in between; if something did, backward's own prefetches and loads bring it again.

At the end of an iteration the plan prefetches for the next one. That is often another graph of the model: the rest of
it behind a graph break, the next token after the prompt. Each graph remembers which one came after it last time, and
works for that one: its first page in place of this graph's first page, and so on.

See [Note: who waits for whom] in ``streams.py``.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spcompile.ir import Interval, Page, Plan
from spcompile.runtime.arena import Arena, Tenant
from spcompile.runtime.store import PageStore
from spcompile.runtime.weights import WeightView, tag_on

logger = logging.getLogger(__name__)

Binding = tuple[tuple[int, str], ...]
"""The pages of a plan that an iteration uses others for: index in the plan, and name of the other one."""


@dataclass(frozen=True)
class Layout:
    """What the runtime knows of one graph.

    Attributes:
        plan: that of the graph, or of the two graphs of training.
        steps: which of its steps the graph runs.
        page_inputs: per streamed page, how the graph looks at its weights, in the order of the tuple that load returns.
        segments: by name of each segment of the outer graph, the step that it is.
        gradients: per step that sends gradients, the parameters that they belong to, in the order of the send.
    """

    plan: Plan
    steps: range
    page_inputs: Mapping[int, tuple[WeightView, ...]]
    segments: Mapping[str, int] = field(default_factory=dict)
    gradients: Mapping[int, tuple[WeightView, ...]] = field(default_factory=dict)

    @property
    def is_backward(self) -> bool:
        return self.steps.start == self.plan.backward_step


class Transfers(torch.nn.Module):
    """The runtime attribute of an outer graph.

    Args:
        layout: what there is to know of this graph.
        store: where the weights live.
        compiled_with: the options of the graph; they tell those of two torch.compile calls for one model apart.
    """

    def __init__(self, layout: Layout, store: PageStore, compiled_with: Hashable = None) -> None:
        super().__init__()
        self.compiled_with = compiled_with
        self.layout = layout
        self.plan = plan = layout.plan
        self.page_inputs = layout.page_inputs
        self.phase = plan.period - 1  # so that the first iteration has phase 0
        self._phase_ahead = 0
        self.bytes_moved = 0
        self.bytes_sent = 0
        self._store = weakref.ref(store)
        store.add_runtime(self)
        self._pages = plan.pages  # or others, of the same sizes, that an iteration is bound to
        self._binding: Binding = ()
        self._is_shared = False
        self._moves_seen: int | None = None
        self._room_bytes = math.inf if plan.budget_bytes is None else plan.budget_bytes - plan.beside_bytes()
        self._n_read = sum(len(page.weights) for page in plan.pages) + len(plan.leftovers)
        self._staying = {weight.name for page in plan.residents for weight in plan.pages[page].weights}
        self._next: dict[Binding, tuple[weakref.ref[Transfers], tuple[Page, ...]]] = {}
        self._n_ahead = 0
        starts = () if layout.is_backward else enumerate(plan.intervals)
        self._heads = [index for index, interval in starts if interval.start_step <= 0]
        self._began: Any = None
        self._foreign: dict[int, dict[int, Tensor]] = {}
        self._versions: dict[int, Hashable] = {}
        self._held: dict[int, Tenant] = {}
        self._sent: tuple[int, Any, Sequence[Tensor]] | None = None

    @property
    def store(self) -> PageStore:
        """The page store, which lives while one of its iterations runs."""
        store = self._store()
        assert store is not None, "the model is gone"
        return store

    def live_store(self) -> PageStore | None:
        """The page store; None once the model is gone, or was restored."""
        return self._store()

    def place_again(self, weights: Mapping[int, WeightView], arguments: Sequence[Any]) -> None:
        """Before the arguments are looked at: have the weights where the plan wants them, if any have moved.

        Where the graph is called for another layer than its own, what stays of its own stays of that one, too: the
        planner has left room for all layers that are alike by name. Of others, as long as there is some.

        Args:
            weights: which arguments are weights, and how the graph sees its own ones.
            arguments: of the call.
        """
        store = self.store
        if self._moves_seen != store.moves:
            store.place_again(self.plan)
            self._moves_seen = store.moves
        if store.arena.memory.numel() > self.plan.arena_bytes and store.device_bytes() > self._room_bytes:
            store.arena.shrink(self.plan.arena_bytes)  # it is that of another graph
        if not self._staying or len(store.weights) <= self._n_read:
            return
        given = (tag_on(arguments[index]) for index, view in weights.items() if view.weight in self._staying)
        names = [tag.name for tag in given if tag is not None and tag.store is store and tag.name in store.weights]
        others = [name for name in names if name not in self._staying and store.weights[name].resident is None]
        if others:
            store.keep(others, self._room_bytes)
            self._moves_seen = store.moves

    def begin(self, weights: Sequence[Tensor]) -> None:
        """See `spcompile.ops.begin`. ``weights``: one per entry of ``page_inputs``, in its order."""
        store = self.store
        arena = store.arena
        arena.reserve(self.plan.arena_bytes)
        self._bind(store, weights)
        self._versions = {
            page: store.version([weight.name for weight in self._pages[page].weights]) for page in self.page_inputs
        }
        if not self._continues(store):
            arena.release_all()
        self._held.clear()
        self._sent = None
        self._began = arena.streams.compute_record()
        self.phase = self._fitting_phase(arena)
        self._remember_order(store)
        self.note("begin", self.phase)

    def _continues(self, store: PageStore) -> bool:
        """Whether the graph before this one was the forward of this backward: what it left held is for this one.

        Not if anything of it is stale by now: a step of an optimizer, or weights that have moved for another graph.
        """
        reference, binding = store.latest or (None, ())
        before = reference() if reference is not None else None
        if not self.layout.is_backward or before is None or not before.is_forward_of(self.plan):
            return False
        wanted = {(self._pages[page].name, version) for page, version in self._versions.items()}
        left = ((tenant.page, tenant.version) for tenant in store.arena.tenants if tenant.held)
        return binding == self._binding and wanted.issuperset(left)

    def is_forward_of(self, plan: Plan) -> bool:
        """Whether this is the forward graph of that plan for training."""
        return self.plan is plan and not self.layout.is_backward

    def prefetch(self, interval: int, ahead: int) -> None:
        """See `spcompile.ops.prefetch`."""
        reference, pages = self._next.get(self._binding, (None, self._pages)) if ahead else (None, self._pages)
        following = reference() if reference is not None else self
        if following is None or (following is self and pages is self._pages):
            if not self._is_foreign(interval):
                tenant = self._bring_own("prefetch", interval, (self.phase + ahead) % self.plan.period)
                tenant.awaited = not ahead
            return
        self._wait_for_compute()
        self._n_ahead += 1
        following.prefetch_heads(self._n_ahead, pages)

    def prefetch_heads(self, count: int, pages: tuple[Page, ...]) -> None:
        """For the graph before this one: start the copies of the first pages that an iteration starts with.

        Leaves out those whose place is still in use (they are asked for again when the next place falls free), and
        those that are on the device for another graph, which may be about to write them. Does nothing where the arena
        is too small for this graph: it will have a larger one when it runs.

        Args:
            count: how many places are free by now.
            pages: what the next iteration will be bound to.
        """
        store = self.store
        if store.arena.memory.numel() < self.plan.arena_bytes:
            return
        heads = [self.plan.intervals[index] for index in self._heads[:count]]
        if count == 1 and heads:
            self._phase_ahead = self._free_phase(store.arena, heads[0])
        for interval in heads:
            page, slot_index = pages[interval.page], interval.slots[self._phase_ahead]
            slot = self.plan.slots[slot_index]
            version = store.version([weight.name for weight in page.weights])
            if store.arena.find(slot.offset_bytes, page.name, version) is not None:
                continue
            if not store.arena.is_taken(slot.offset_bytes, slot.nbytes) and not store.any_resident(page):
                self._bring("prefetch", slot_index, page, version)

    def load(self, interval: int) -> tuple[Tensor, ...]:
        """See `spcompile.ops.load`. The tensors are views of the slot, in the order of ``page_inputs``."""
        foreign = self._foreign.get(self.plan.intervals[interval].page, {})
        if self._is_foreign(interval):
            return tuple(foreign.values())
        tenant = self._bring_own("load", interval, self.phase)
        store = self.store
        store.arena.streams.compute_wait(tenant.ready)
        if store.recorder is not None:
            store.recorder.loaded(interval, tenant)
        tenant.awaited, tenant.held = False, True
        self._held[interval] = tenant
        weights = self._slot_views(interval)
        return tuple(foreign.get(index, weight) for index, weight in enumerate(weights)) if foreign else weights

    def evict(self, interval: int) -> None:
        """See `spcompile.ops.evict`."""
        if self._is_foreign(interval):
            return
        arena = self.store.arena
        tenant = self._held.pop(interval)
        arena.streams.freed(arena.memory[tenant.offset_bytes : tenant.offset_bytes + tenant.nbytes])
        tenant.released = arena.streams.compute_record()
        tenant.held = False
        recorder = self.store.recorder
        if recorder is not None:
            recorder.evicted(tenant)
        self.note("evict", tenant.page, self.plan.intervals[interval].slots[self.phase])

    def send(self, step: int, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See `spcompile.ops.send`. At most the gradients of two sends are on the device: those before are awaited."""
        store = self.store
        streams = store.arena.streams
        self._await_sent()
        buffers = store.gradients.take(self.layout.gradients[step])
        for buffer in buffers:
            streams.freed(buffer.memory)
        streams.down_wait(streams.compute_record())
        recorder = store.recorder
        started = None if recorder is None else recorder.sending()
        for buffer, gradient in zip(buffers, gradients, strict=True):
            streams.down_copy(buffer.on_host(), gradient)
        sent_bytes = sum(buffer.memory.numel() for buffer in buffers)
        self.bytes_sent += sent_bytes
        self._sent = step, streams.down_record(), gradients
        if recorder is not None:
            recorder.sent(step, started, sent_bytes)
        self.note("send", step)
        return tuple(buffer.on_device() for buffer in buffers)

    def finish(self) -> None:
        """See `spcompile.ops.finish`."""
        self._await_sent()

    def _await_sent(self) -> None:
        """Make compute wait for the last send, and let go of its gradients: their memory is the allocator's again."""
        if self._sent is None:
            return
        step, event, gradients = self._sent
        store = self.store
        streams = store.arena.streams
        streams.compute_wait(event)
        if store.recorder is not None:
            store.recorder.settled(step)
        for gradient in gradients:
            streams.freed(gradient)
        self._sent = None

    def _is_foreign(self, index: int) -> bool:
        """Whether nothing of an interval's page is used in this iteration: all its arguments lie elsewhere."""
        page = self.plan.intervals[index].page
        return len(self._foreign.get(page, ())) == len(self.page_inputs[page])

    def _bring_own(self, why: str, index: int, phase: int) -> Tenant:
        """`_bring` the page of an interval as this iteration is bound."""
        interval = self.plan.intervals[index]
        return self._bring(why, interval.slots[phase], self._pages[interval.page], self._versions[interval.page])

    def _bring(self, why: str, slot_index: int, page: Page, version: Hashable) -> Tenant:
        """Make sure that the page is in the slot or on its way there; returns its tenant."""
        store, slot = self.store, self.plan.slots[slot_index]
        arena = store.arena
        tenant = arena.find(slot.offset_bytes, page.name, version)
        self.note(why, page.name, slot_index, "copy" if tenant is None else "hit")
        if tenant is not None:
            return tenant
        for event in arena.claim(slot.offset_bytes, slot.nbytes):
            arena.streams.side_wait(event)
        self._wait_for_compute()
        recorder = store.recorder
        copy = None if recorder is None else recorder.copying(page.name, page.nbytes, slot)
        for offset_bytes, source in store.pieces(page):
            start = slot.offset_bytes + offset_bytes
            arena.streams.side_copy(arena.memory[start : start + source.numel()], source)
        self.bytes_moved += page.nbytes
        tenant = Tenant(slot.offset_bytes, slot.nbytes, page.name, version, arena.streams.side_record())
        arena.add(tenant)
        if recorder is not None:
            recorder.copied(copy, tenant)
        return tenant

    def _wait_for_compute(self) -> None:
        """What ran on the compute stream before this iteration may have written the weights themselves."""
        if self._began is not None:
            self.store.arena.streams.side_wait(self._began)
            self._began = None

    def _remember_order(self, store: PageStore) -> None:
        reference, binding = store.latest or (None, ())
        before = reference() if reference is not None else None
        if before is not None:
            before._next[binding] = weakref.ref(self), self._pages
        store.latest = weakref.ref(self), self._binding
        self._n_ahead = 0

    def _free_phase(self, arena: Arena, interval: Interval) -> int:
        """The next phase in which the interval's slot is in nobody's use; just the next one where there is none."""
        phases = [(self.phase + shift) % self.plan.period for shift in range(1, self.plan.period + 1)]
        slots = {phase: self.plan.slots[interval.slots[phase]] for phase in phases}
        free = (phase for phase in phases if not arena.is_taken(slots[phase].offset_bytes, slots[phase].nbytes))
        return next(free, phases[0])

    def _fitting_phase(self, arena: Arena) -> int:
        """The phase whose slots hold most of the pages that the iteration starts with; normally just the next one."""
        period = self.plan.period
        following = (self.phase + 1) % period
        first = [self.plan.intervals[index] for index in self._heads]

        def found(phase: int) -> int:
            return sum(self._in_place(arena, interval, phase) for interval in first)

        if period == 1 or found(following) == len(first):
            return following
        return max(((following + shift) % period for shift in range(period)), key=found)

    def _in_place(self, arena: Arena, interval: Interval, phase: int) -> bool:
        offset_bytes = self.plan.slots[interval.slots[phase]].offset_bytes
        page = self._pages[interval.page].name
        return arena.find(offset_bytes, page, self._versions[interval.page]) is not None

    def _bind(self, store: PageStore, weights: Sequence[Tensor]) -> None:
        """Find arguments that are not the weights of the plan.

        A parameter that was replaced, or given other memory through ``.data``, keeps its dtype, shape and device, so
        nothing recompiles; its page holds an old value. It is used where it is. But where all of a page's arguments are
        weights of the store, the page is another one of the same make.
        """
        self._pages, self._binding, self._foreign = self.plan.pages, (), {}
        arguments = iter(weights)
        for page, views in self.page_inputs.items():
            given = [next(arguments) for _ in views]
            others = {
                index: argument
                for index, (view, argument) in enumerate(zip(views, given, strict=True))
                if argument.data_ptr() != self._address(store, view) and argument.numel()
            }
            if others and not self._bind_page(store, page, given):
                self._foreign[page] = others

    @staticmethod
    def _address(store: PageStore, view: WeightView) -> int:
        return store.data_ptr(view.weight) + view.storage_offset * view.dtype.itemsize

    def _bind_page(self, store: PageStore, index: int, arguments: Sequence[Tensor]) -> bool:
        """Bind a page to the weights that these arguments look at; False where they are not such weights."""
        page = self.plan.pages[index]
        names: dict[str, str] = {}
        for view, argument in zip(self.page_inputs[index], arguments, strict=True):
            name = store.name_at(argument)
            if name is None or argument.storage_offset() != view.storage_offset:
                return False
            names[view.weight] = name
            if not store.copies_follow:
                store.attach(argument, name)  # its edits count from now on
        bound = store.page_like(page, names)
        if bound is None:
            return False
        if not self._is_shared:
            self._is_shared = True
            logger.warning(
                "one compiled graph serves several layers (%r and %r are the first): Dynamo broke the graph between "
                "them (TORCH_LOGS=graph_breaks says why), or some of their weights were exchanged. They are streamed, "
                "but copies hardly overlap with compute",
                page.name,
                bound.name,
            )
        self._pages = (*self._pages[:index], bound, *self._pages[index + 1 :])
        self._binding = (*self._binding, (index, bound.name))
        return True

    def _slot_views(self, index: int) -> tuple[Tensor, ...]:
        views = self.store.arena.views.setdefault(self, {})
        key = (index, self.phase)
        if key not in views:
            views[key] = self._make_slot_views(self.plan.intervals[index])
        return views[key]

    def _make_slot_views(self, interval: Interval) -> tuple[Tensor, ...]:
        page, slot = self.plan.pages[interval.page], self.plan.slots[interval.slots[self.phase]]
        memory = self.store.arena.memory[slot.offset_bytes : slot.offset_bytes + slot.nbytes]
        place = {
            weight.name: memory[offset : offset + weight.nbytes]
            for weight, offset in zip(page.weights, page.offsets_bytes, strict=True)
        }
        return tuple(view.of(place[view.weight]) for view in self.page_inputs[interval.page])

    def note(self, *event: object) -> None:
        """Append to the store's event list, where somebody asked for one."""
        store = self._store()
        if store is not None and store.log is not None:
            store.log.append(event)


class InPlace(torch.nn.Module):
    """A runtime without a page store: a load returns the graph's own arguments, and nothing moves."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.page_inputs = layout.page_inputs
        self.plan = layout.plan
        self._weights: dict[int, tuple[Tensor, ...]] = {}

    def live_store(self) -> None:
        """There is none."""

    def place_again(self, weights: Mapping[int, WeightView], arguments: Sequence[Any]) -> None:
        """Nothing: the weights are where the caller has them."""

    def begin(self, weights: Sequence[Tensor]) -> None:
        """See `spcompile.ops.begin`."""
        arguments = iter(weights)
        self._weights = {page: tuple(next(arguments) for _ in views) for page, views in self.page_inputs.items()}

    def prefetch(self, interval: int, ahead: int) -> None:
        """Nothing."""

    def load(self, interval: int) -> tuple[Tensor, ...]:
        """See `spcompile.ops.load`."""
        return self._weights[self.plan.intervals[interval].page]

    def evict(self, interval: int) -> None:
        """Nothing."""

    def send(self, step: int, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:  # noqa: ARG002  # of the protocol
        """See `spcompile.ops.send`: they stay where they are."""
        return tuple(gradients)

    def finish(self) -> None:
        """Nothing."""
