"""The torch.compile backend: from Dynamo's graph to what runs.

``torch.compile(model, backend="superpipeline")`` calls `superpipeline` with a torch-level graph. Each ATen graph that
comes of it goes the same way: the passes of ``pipeline``, its distinct segments compiled once, its weights placed as
planned, and a runtime behind its transfer nodes. The outer graph that is printed is the one that runs.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.callback import CallbackArgs, callback_handler, on_compile_end, on_compile_start
from torch._dynamo.exc import ShortenTraceback

from spcompile.arrival import find_or_make_store, name_of_caller, take_in_caller
from spcompile.capture import Capture, Kind, input_index
from spcompile.collector import CollectorPause
from spcompile.environment import dump_folder
from spcompile.errors import SuperpipelineError
from spcompile.ir import Plan
from spcompile.options import Options, parse_options
from spcompile.passes.base import STEP, Program
from spcompile.pipeline import PLANNING, REWRITING, run_passes
from spcompile.rehome import RehomedCall, ambient_autocast, rehome_examples, rehome_graph
from spcompile.runtime.compiled_graph import CompiledGraph
from spcompile.runtime.store import PageStore
from spcompile.runtime.transfers import Layout
from spcompile.runtime.weights import WeightView
from spcompile.segments import compile_segments, warm_up_inductor
from spcompile.text import format_bytes

logger = logging.getLogger(__name__)

BoxedCallable = Callable[[list[Any]], Any]


class BackendError(ShortenTraceback, ValueError):
    """A `SuperpipelineError` on its way through Dynamo, which shows it with a short traceback and its own text."""


def superpipeline(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Backend of torch.compile; the README lists the options.

    Raises:
        BackendError: (a ValueError) an option is wrong, or the model cannot be run as it stands.
    """
    _listen()
    try:
        checked = parse_options(options, mode)
        if checked.compiler == "inductor":
            warm_up_inductor()
        with CollectorPause():
            return _Compiler(gm, example_inputs, checked).compile()
    except SuperpipelineError as error:
        raise BackendError(str(error), first_useful_frame=sys._getframe()) from error


_PAUSE = CollectorPause()
"""From the begin of Dynamo's tracing to its end, and during a backward that is compiled later.

A backward inside of a compiled function is compiled while Dynamo looks at every frame that runs: also at these two
functions, which it calls with a lock held that compiling them would take again. So it is told to leave them alone."""


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def _begin_compiling(_: CallbackArgs) -> None:
    """Start Inductor's workers when Dynamo starts to trace: without them it would compile the first kernels itself."""
    _PAUSE.begin()
    if torch.cuda.is_available():
        warm_up_inductor()


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def _end_compiling(_: CallbackArgs) -> None:
    _PAUSE.end()


def _listen() -> None:
    """Have Dynamo say when it begins and ends; it forgets that with ``torch._dynamo.reset()``."""
    if _begin_compiling not in callback_handler.start_callbacks:
        on_compile_start(_begin_compiling)
        on_compile_end(_end_compiling)


_listen()  # this module is imported when somebody asks torch.compile for this backend


class _Compiler:
    """Compiles what one graph of Dynamo becomes: an inference graph, or a forward graph and later its backward.

    AOTAutograd keeps it for that backward, as long as there is compiled code. So once the first graph is there it holds
    neither the model nor its inputs any more.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> None:
        store = find_or_make_store(gm, example_inputs, options)
        self._store: Callable[[], PageStore | None] = lambda: store
        self._like_store = functools.partial(PageStore, store.device, rehomed=store.rehomed, takes_in=store.takes_in)
        traced_inputs = None
        if store.rehomed:
            rehome_graph(gm, store.device)
            traced_inputs = rehome_examples(gm, example_inputs, store.device)
        self.capture = Capture(
            gm,
            example_inputs,
            options,
            store.weight_of,
            store.model_weights(),
            traced_inputs,
            name="graph" if dump_folder() is None else name_of_caller(example_inputs),
        )
        self.looks = {
            index: _view_of(each.weight.name, example_inputs[index]) for index, each in self.capture.weights.items()
        }
        self.find_store = functools.partial(take_in_caller, options=options)
        self.graphs: list[CompiledGraph] = []
        self.training: Program | None = None
        self.placements: list[Plan] = []
        self.segments: dict[str, torch.nn.Module] = {}
        self.traced = False

    def compile(self) -> Callable[..., Any]:
        if not self.store.rehomed:
            compiled = self.capture.trace(self._compile_graph, self._plan_training)
        else:
            with ambient_autocast(self.store.device):
                compiled = self._rehomed(self.capture.trace(self._compile_graph, self._plan_training))
        self.traced = True
        self._place()
        self.capture.forget_inputs()
        self._store = weakref.ref(self.store)
        return compiled

    @property
    def store(self) -> PageStore:
        """That of the model, or an empty one like it, where a backward is compiled and the model is gone."""
        return self._store() or self._like_store()

    def _rehomed(self, compiled: Callable[..., Any]) -> RehomedCall:
        capture = self.capture
        return RehomedCall(
            compiled, self.store, self.looks, capture.owned_by_model(), capture.written, self.graphs, self.find_store
        )

    def _plan_training(self, forward: fx.GraphModule, backward: fx.GraphModule) -> None:
        self.training = self.capture.program(forward, device=self.store.device, store=self.store, backward=backward)
        run_passes(self.training, PLANNING)
        self.placements.append(self.training.planned())
        _report(self.training.planned(), self.training.options)

    def _program(self, module: fx.GraphModule, kind: Kind) -> Program:
        """The program of a graph that is to be compiled, with its plan."""
        if kind is Kind.INFERENCE:
            program = self.capture.program(module, device=self.store.device, store=self.store)
            run_passes(program, PLANNING)
            self.placements.append(program.planned())
            _report(program.planned(), program.options)
            return program
        assert self.training is not None
        planned = self.training if kind is Kind.FORWARD else self.training.backward
        assert planned is not None
        planned.module = module  # AOTAutograd may hand over a copy
        return planned

    def _compile_graph(self, module: fx.GraphModule, kind: Kind) -> BoxedCallable:
        store = self.store
        program = self._program(module, kind)
        views = self._weight_views(program)
        run_passes(program, REWRITING)
        compile_segments(program.module, program.options.compiler, shared=store.segments, own=self.segments)
        page_inputs = {page: tuple(views[name] for name in names) for page, names in program.page_inputs.items()}
        calls = program.graph.find_nodes(op="call_module")
        segments = {str(node.target): node.meta[STEP] for node in calls}
        layout = Layout(program.planned(), program.steps(), page_inputs, segments, self._gradients(program))
        places = {
            index: node.name
            for index, node in enumerate(program.graph.find_nodes(op="placeholder"))
            if node.name in program.weights
        }
        written = [index for index, name in places.items() if program.weights[name].weight in program.written]
        looks = {index: views[name] for index, name in places.items()}
        graph = CompiledGraph(program.module, layout, looks, written, store, self.find_store, program.options)
        self.graphs.append(graph)
        if self._store() is None:
            graph.run_in_place()
        elif self.traced:  # a backward, compiled at the first .backward()
            self._place()
        return graph

    def _weight_views(self, program: Program) -> dict[str, WeightView]:
        indices = {node.name: input_index(node) for node in program.weight_nodes()}
        return {name: self.looks[index] for name, index in indices.items() if index is not None}

    def _gradients(self, program: Program) -> dict[int, tuple[WeightView, ...]]:
        """Per step that sends gradients, the parameters that they belong to."""
        return {step: tuple(self.looks[each] for each in inputs) for step, inputs in program.sends.items()}

    def _place(self) -> None:
        """Move weights to where the plans want them. Only after tracing: it swaps the parameters' memory."""
        with self.store.lock:
            for plan in self.placements:
                self.store.place(plan)
            self.store.trim_arena(self.capture.options)
        self.placements.clear()


def _view_of(weight: str, tensor: Tensor) -> WeightView:
    return WeightView(weight, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _report(plan: Plan, options: Options) -> None:
    if options.k is not None and len(plan.pages) == 1 and not plan.intervals:
        logger.warning(
            "nothing is streamed: all weights of this graph are one page (%r, %s), as neither layers nor narrow cuts "
            "were found in it",
            plan.pages[0].name,
            format_bytes(plan.pages[0].nbytes),
        )
    streamed = len(plan.pages) - len(plan.residents)
    logger.info(
        "%d steps; %d pages: %d resident, %d streamed (k=%d, m=%d); %s of %s weights on %s, %s moved per iteration",
        len(plan.steps),
        len(plan.pages),
        len(plan.residents),
        streamed,
        plan.k,
        plan.m,
        format_bytes(plan.peak_weight_bytes),
        format_bytes(plan.weights_bytes),
        plan.device,
        format_bytes(plan.bytes_moved),
    )
    logger.debug("the plan:\n%s", plan)
