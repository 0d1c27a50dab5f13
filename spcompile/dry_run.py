"""A call of a model as torch.compile would see it, up to the plan, and not a step further.

What: Dynamo captures the model on its inputs exactly as it would for the backend, the passes go as far as the plan, and
nothing is compiled, moved or executed. Why so: what is planned is what would run. With graph breaks the pieces have to
run (eagerly) for Dynamo to get further, and each has a plan of its own; buffers and random numbers are put back then.

The odd cases: neither the model's values nor the GPU have to be here (``absent``); a model on the CPU is planned for
the compute device, and its pieces run on the CPU (``rehome``).
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from inspect import signature
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from spcompile.absent import ABSENT_GPU_BYTES, is_absent, rehome_for_absent_gpu, stand_in_inputs, stand_ins
from spcompile.capture import Capture, Kind, storage_weights
from spcompile.collector import CollectorPause
from spcompile.errors import OptionError
from spcompile.options import Options
from spcompile.passes.base import Program
from spcompile.pipeline import PLANNING, run_passes
from spcompile.planner.machine import find_machine
from spcompile.rehome import ambient_autocast, rehome_examples, rehome_graph
from spcompile.runtime.host import compute_device
from spcompile.runtime.store import PageStore, find_store
from spcompile.runtime.weights import storage_key
from spcompile.text import format_bytes
from spcompile.transformers_inputs import capturing_hooks

logger = logging.getLogger(__name__)


NO_WHOLE_GRAPH = (
    torch._dynamo.exc.Unsupported,
    torch._dynamo.exc.UserError,  # a branch on a value, and the like; a kind of Unsupported until torch 2.11
    GuardOnDataDependentSymNode,  # the same, in places where Dynamo does not wrap it
)
"""What Dynamo raises for a model that is more than one graph, where a whole graph is demanded."""


class _DependsOnValues(BaseException):
    """Leaves Dynamo where a whole graph has sizes or numbers that depend on values. It has them only because a whole
    graph was demanded: torch.compile as people call it breaks there."""


class _Stop(BaseException):
    """Leaves Dynamo once the whole model is captured. Not an Exception, so that Dynamo does not report it as one."""


def capture_programs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> list[Program]:
    """The ATen graphs of one call, each with its plan, not yet cut into segments.

    Raises:
        OptionError: see `spcompile.plan`.
    """
    return DryRun(model, options).programs_of(args, kwargs)


class DryRun:
    """A backend of torch.compile that plans and compiles nothing.

    Args:
        model: what is called.
        options: what is asked for.
        is_guess: whether the inputs are guessed, so that nothing follows from sizes that differ from one to the next.

    Attributes:
        error: what went wrong in planning a graph that had been captured.
    """

    def __init__(self, model: nn.Module, options: Options, *, is_guess: bool = False) -> None:
        self.model = model
        self.options = options
        self.is_guess = is_guess
        self.programs: list[Program] = []
        self.whole = True
        self.error: Exception | None = None

    def programs_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Program]:
        """See `capture_programs`."""
        with ExitStack() as stack:
            made = stack.enter_context(stand_ins(self.model))
            args, kwargs = stand_in_inputs(made, (args, kwargs))
            if self.is_guess or made.tensors:  # nobody has called it as yet, which would have put them there
                stack.enter_context(capturing_hooks(self.model))
            try:
                programs = self.capture(args, kwargs, may_run=not made.tensors)
            except torch._dynamo.exc.BackendCompilerFailed:
                if not isinstance(self.error, OptionError):
                    raise
                raise self.error from None  # Dynamo buries its message
            finally:  # torch keeps a backend that has raised for good, and this one leaves so
                self.model, self.programs = nn.Module(), []
        if not programs:
            raise OptionError(
                "nothing of the model was captured: Dynamo broke the graph everywhere (see TORCH_LOGS=graph_breaks)"
            )
        return programs

    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, may_run: bool) -> list[Program]:
        """Plan every graph that Dynamo makes of one call.

        Args:
            args, kwargs: the call.
            may_run: whether the model has values, so that pieces of it can run to find the next ones.
        """
        try:
            self._call(args, kwargs, fullgraph=True)
        except (*NO_WHOLE_GRAPH, _DependsOnValues) as error:
            if not may_run:
                reason = first_line(error)
                raise OptionError(
                    "a model on the meta device can be planned only if it is one graph, and this one breaks "
                    f"({reason}): its pieces would have to run, and it has no values. TORCH_LOGS=graph_breaks shows "
                    "where: remove the break, or plan a model with values"
                ) from error
            self.programs.clear()
            self.whole = False
            with _left_as_it_was(self.model):
                self._call(args, kwargs, fullgraph=False)
        return self.programs

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, fullgraph: bool) -> None:
        # Where torch can, without counting against the model's own recompile limit.
        isolated = {"isolate_recompiles": True} if _keeps_calls_apart() else {}
        compiled = torch.compile(  # type: ignore[call-overload]
            self.model,
            backend=self._backend,
            fullgraph=fullgraph,
            dynamic=False if self.is_guess else None,
            **isolated,
        )
        with contextlib.suppress(_Stop), CollectorPause():
            compiled(*args, **kwargs)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.whole and _depends_on_values(gm):
            raise _DependsOnValues("a number or a size depends on values, as with Tensor.item()")
        tensors = [value for value in example_inputs if isinstance(value, Tensor)]
        store = find_store(tensors)
        device = device_for(self.options, store, tensors)
        if is_absent(device):
            store = None  # it knows of another device
        piece: fx.GraphModule = gm
        traced_inputs: Sequence[Any] = example_inputs
        context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if device.type == "cuda" and all(tensor.device.type == "cpu" for tensor in tensors):
            if not self.whole:
                piece = copy.deepcopy(gm)  # this runs, on the CPU; the other is re-homed and planned
            traced_inputs, context = _rehome(gm, example_inputs, device)
        if store is None:
            weights = storage_weights(self.model)
            capture = Capture(
                gm,
                example_inputs,
                self.options,
                lambda tensor, _: weights.get(storage_key(tensor)),
                list(weights.values()),
                traced_inputs,
                for_cuda=is_absent(device),
                name=type(self.model).__name__,
            )
        else:
            capture = Capture(
                gm,
                example_inputs,
                self.options,
                store.weight_of,
                store.model_weights(),
                traced_inputs,
                name=type(self.model).__name__,
            )

        def plan_graph(module: fx.GraphModule, backward: fx.GraphModule | None = None) -> None:
            free_bytes = absent_bytes(device, self.options) if is_absent(device) else None
            try:
                program = capture.program(module, device=device, store=store, backward=backward, free_bytes=free_bytes)
                run_passes(program, PLANNING)
            except Exception as error:
                self.error = error
                raise
            self.programs.append(program)
            if self.whole:
                raise _Stop

        def compile_graph(module: fx.GraphModule, kind: Kind) -> Callable[..., Any]:
            if kind is Kind.INFERENCE:
                plan_graph(module)
            return _not_run

        with context:
            capture.trace(compile_graph, plan_graph)
        return piece.forward


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Whatever runs meanwhile, the model's buffers (statistics, caches) and the random numbers are as before."""
    tables = [(module, dict(module._buffers)) for module in model.modules()]
    buffers = [each for _, table in tables for each in table.values() if each is not None and not is_lazy(each)]
    values = [buffer.detach().clone() for buffer in buffers]
    devices = {each.device.index for each in (*buffers, *model.parameters()) if each.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            for module, table in tables:
                module._buffers.clear()
                module._buffers.update(table)
            for buffer, value in zip(buffers, values, strict=True):
                _put_back(buffer, value)


def _put_back(buffer: Tensor, value: Tensor) -> None:
    is_plain = buffer.layout is torch.strided and buffer.shape == value.shape
    if not is_plain:
        buffer.data = value
    elif not torch.equal(buffer, value):  # batch norm's statistics change without another version
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():
            buffer.copy_(value)


def forget_failed_call(model: nn.Module) -> None:
    """Have Dynamo look at a model anew after a call that failed: until torch could keep the frames of different
    torch.compile calls apart, it marked those that raised as not worth compiling, for everybody."""
    if _keeps_calls_apart():
        return
    forwards = {type(module).forward for module in model.modules()}
    for code in {code for each in forwards if (code := getattr(each, "__code__", None)) is not None}:
        torch._dynamo.reset_code(code)  # type: ignore[attr-defined]


def _depends_on_values(gm: fx.GraphModule) -> bool:
    """Whether a graph has numbers or sizes that torch.compile would only capture if it were told to."""
    config = torch._dynamo.config
    if config.capture_scalar_outputs and config.capture_dynamic_output_shape_ops:
        return False
    values = tree_leaves([node.meta.get("example_value") for node in gm.graph.nodes])
    kinds = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    return any(free_unbacked_symbols(value) for value in values if isinstance(value, kinds))


def _keeps_calls_apart() -> bool:
    return "isolate_recompiles" in signature(torch.compile).parameters


def device_for(options: Options, store: PageStore | None, tensors: Sequence[Tensor]) -> torch.device:
    """Where a graph with these inputs would compute."""
    asked = torch.device(options.device or "cpu")
    if is_absent(asked):
        return torch.device("cuda", asked.index or 0)
    if store is not None:
        return store.device
    present = next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)
    return present or compute_device(options.device)


def _rehome(
    gm: fx.GraphModule, example_inputs: Sequence[Any], device: torch.device
) -> tuple[Sequence[Any], contextlib.AbstractContextManager[Any]]:
    """Rewrite a graph that was captured on the CPU for the compute device; see ``rehome`` and ``absent``.

    Returns:
        What to trace it with instead of ``example_inputs``, and the context to trace it in.
    """
    if is_absent(device):
        rehome_for_absent_gpu(gm)
        return example_inputs, contextlib.nullcontext()
    rehome_graph(gm, device)
    return rehome_examples(gm, example_inputs, device), ambient_autocast(device)


def absent_bytes(device: torch.device, options: Options) -> int:
    """Memory of a GPU that is not here: that of the machine that was asked for, or of the usual one."""
    free_bytes = ABSENT_GPU_BYTES if options.machine is None else find_machine(options.machine).device_bytes
    logger.warning("no CUDA device here: planning for a %s with %s", device, format_bytes(free_bytes))
    return free_bytes


def _not_run(_args: list[Any]) -> Any:
    raise AssertionError("a planned graph is never run")


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that Dynamo adds."""
    return str(error).strip().partition("\n")[0]
