"""A compiled outer graph, and which model's weights it works on.

Dynamo caches what it compiled by the code of the model and not by the model: a second model of the same class and
shapes, or one that was restored and offloaded again, comes to the graph that was compiled for the first. So each call
looks whose weights it was given. The graph and its segments are shared; every page store gets a `Transfers` of its own,
and its weights are placed when it first comes. A model that nobody offloaded gets a store when it comes, as the first
one did, whether that one still lives or not. Where there is no store otherwise, or one with other weights, the graph
runs on its arguments as they are.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.fx.graph import _BoxedCodeGen

from spcompile.runtime.emulated import run_emulated
from spcompile.runtime.recording import Recorder, watch
from spcompile.runtime.store import PageStore
from spcompile.runtime.streams import EmulatedStreams
from spcompile.runtime.transfers import InPlace, Layout, Transfers
from spcompile.runtime.weights import WeightView, tag_of, tag_on

logger = logging.getLogger(__name__)

FindStore = Callable[[Sequence[Tensor]], PageStore | None]
"""Makes a page store for weights that have none, where the model is one that the backend takes in by itself."""


class CompiledGraph:
    """A function that takes, and empties, one list of arguments: AOTAutograd's calling convention.

    Args:
        module: the outer graph; its attribute ``runtime`` is set to whatever the call works with.
        layout: see `Transfers`.
        weight_places: which arguments are weights, and how they look at them.
        written: which of those the graph updates.
        store: the page store that it was compiled for.
        find_store: see `FindStore`.
        compiled_with: see `Transfers`.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        layout: Layout,
        weight_places: Mapping[int, WeightView],
        written: Sequence[int],
        store: PageStore,
        find_store: FindStore,
        compiled_with: Hashable,
    ) -> None:
        self._boxed_call = True  # of the instance: torch copies its attributes to a wrapper, and not those of the class
        self.module = module
        self.layout = layout
        self.plan = layout.plan
        self.weight_places = dict(weight_places)
        self.written = tuple(written)
        self.find_store = find_store
        self.compiled_with = compiled_with
        self.device, self.is_rehomed = store.device, store.rehomed
        self.takes_in = store.takes_in  # of the last store, which may be gone
        self.lock = threading.RLock()
        self.runtimes: WeakKeyDictionary[PageStore, Transfers] = WeakKeyDictionary()
        self._is_warned = False
        self._recorder: Recorder | None = None
        places = {node: index for index, node in enumerate(module.graph.find_nodes(op="placeholder"))}
        returned = module.graph.output_node().args[0]
        assert isinstance(returned, (tuple, list))
        self._returned = {
            index: places[node]
            for index, node in enumerate(returned)
            if isinstance(node, fx.Node) and places.get(node) in self.weight_places
        }
        self.runtime: Transfers | InPlace = self._add(store)
        module.runtime = self.runtime
        module.graph.lint()
        module.graph.set_codegen(_BoxedCodeGen())
        module.recompile()

    def __call__(self, args: list[Any]) -> Any:
        with self.lock:
            if self.weight_places and not self.is_rehomed:
                self._follow(args)
            runtime, store = self.runtime, self.runtime.live_store()
            if store is None:
                return self.module.forward(args)
            with store.lock:
                if store.hosted and self.layout.is_backward:
                    store.hosted.begin_backward(store)
                elif store.hosted:
                    store.hosted.follow_edits(store)
                if not self.is_rehomed:
                    runtime.place_again(self.weight_places, args)
                    if store.copies_follow:
                        return self._run_on_copies(runtime, store, args)
                return self._run(runtime, store, args)

    def _run(self, runtime: Transfers | InPlace, store: PageStore, args: list[Any]) -> Any:
        recorder = store.recorder if isinstance(runtime, Transfers) else None
        if recorder is not None and recorder.is_full:
            recorder = None
        if recorder is not self._recorder:
            self._recorder = recorder
            if store.device.type == "cuda":
                watch(self.module, self.layout.segments, self.plan, recorder)
        if recorder is None:
            return self._issue(runtime, store, args)
        recorder.begin(self.plan, is_backward=self.layout.is_backward)
        try:
            return self._issue(runtime, store, args)
        finally:
            recorder.end()

    def _issue(self, runtime: Transfers | InPlace, store: PageStore, args: list[Any]) -> Any:
        streams = store.arena.streams
        is_queued = self.plan.has_transfers or store.recorder is not None
        if is_queued and isinstance(runtime, Transfers) and isinstance(streams, EmulatedStreams):
            return run_emulated(self.module, runtime, streams, args, self.layout.segments)
        return self.module.forward(args)

    def _run_on_copies(self, runtime: Transfers | InPlace, store: PageStore, args: list[Any]) -> Any:
        """Hand over device copies in place of arguments that look at weights in host memory; return the arguments."""
        given = {place: args[place] for place in self.weight_places}
        for place, view in self.weight_places.items():
            copy = store.as_device_sees(self, place, view, given[place])
            args[place] = given[place] if copy is None else copy
        outputs = list(self._run(runtime, store, args))
        for place in self.written:
            tag = tag_of(given[place])
            if tag is not None and tag.store is store:
                store.write_back(tag.name)
        for index, place in self._returned.items():
            outputs[index] = given[place]
        return tuple(outputs)

    def select(self, store: PageStore) -> None:
        """Work on the weights of this store from now on. (A re-homed model's caller says so; its arguments cannot.)"""
        with self.lock:
            if self.runtime.live_store() is not store:
                self.takes_in = store.takes_in
                self._use(self._runtime_of(store))

    def run_in_place(self) -> None:
        """Run on the arguments from now on, until some come that are in a page store."""
        self._use(InPlace(self.layout))

    def _follow(self, args: Sequence[Any]) -> None:
        """Change to the store of the arguments, if it is another than last time."""
        first = args[next(iter(self.weight_places))]
        tag = tag_on(first)
        current = self.runtime.live_store()
        if current is not None and (tag is None or tag.store is current):
            if tag is None:
                self._take_in(args)
            return
        held = next((tag for place in self.weight_places if (tag := tag_of(args[place])) is not None), None)
        if held is not None:
            self.select(held.store)
        elif not self._take_in(args) and current is None:
            self.run_in_place()

    def _take_in(self, args: Sequence[Any]) -> bool:
        """If nobody offloaded the model that came, nor the last one, make a store for it; returns whether it did.

        The last one may be gone, or this one look elsewhere than when a graph of its own was compiled.
        """
        if not self.takes_in or type(args[next(iter(self.weight_places))]) is not torch.nn.Parameter:
            return False
        store = self.find_store([args[place] for place in self.weight_places])
        if store is not None:
            self.select(store)
        return store is not None

    def _runtime_of(self, store: PageStore) -> Transfers | InPlace:
        if store in self.runtimes:
            return self.runtimes[store]
        if (store.device, store.rehomed) != (self.device, self.is_rehomed) or not store.fits(self.plan):
            return InPlace(self.layout)
        runtime = self._add(store)
        with store.lock:
            store.place(self.plan)
        return runtime

    def _add(self, store: PageStore) -> Transfers:
        store.add_pages(self.plan.pages)
        runtime = self.runtimes[store] = Transfers(self.layout, store, self.compiled_with)
        return runtime

    def _use(self, runtime: Transfers | InPlace) -> None:
        if isinstance(runtime, InPlace) and not self._is_warned:
            self._is_warned = True
            logger.warning(
                "the compiled model is called with weights that are not (or no longer) offloaded as they were when it "
                "was compiled: it runs on them as they are and streams nothing. Call spcompile.offload(model), or "
                "torch._dynamo.reset() to have it compiled again"
            )
        self.runtime = self.module.runtime = runtime
