"""Plans without a run: `spcompile.plan`.

Dynamo captures the model on its example inputs exactly as torch.compile would, the passes go as far as the plan, and
nothing is compiled, moved or executed. With graph breaks the pieces before the last one have to run (eagerly) for
Dynamo to get further, and each piece has a plan of its own.

Neither the model's values nor the GPU have to be here; see ``absent``. Nor have the inputs: without any, the plan in
force is given, or else inputs are guessed (``example_inputs``) and tried one after the other, or else the plan is one
of the weights alone (``weights_only``). Where a plan's inputs come from is in its note.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, fx, nn

from spcompile.absent import ABSENT_GPU_BYTES, is_absent, rehome_for_absent_gpu, stand_in_inputs, stand_ins
from spcompile.capture import Capture, Kind, find_machine_for, storage_weights
from spcompile.errors import OptionError
from spcompile.example_inputs import guess_inputs
from spcompile.ir import Plan, Plans
from spcompile.options import Options, parse_options
from spcompile.passes.base import Program
from spcompile.pipeline import PLANNING, run_passes
from spcompile.planner.machine import find_machine
from spcompile.rehome import ambient_autocast, rehome_examples, rehome_graph
from spcompile.runtime.host import compute_device, free_device_bytes
from spcompile.runtime.store import PageStore, find_store
from spcompile.runtime.weights import storage_key
from spcompile.text import format_bytes
from spcompile.transformers_inputs import capturing_hooks
from spcompile.weights_only import plan_weights_only

logger = logging.getLogger(__name__)


class _Stop(BaseException):
    """Leaves Dynamo once the whole model is captured. Not an Exception, so that Dynamo does not report it as one."""


def plan(
    model: torch.nn.Module | Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    k: int | None = None,
    m: int | None = None,
    budget: int | str | None = None,
    max_slowdown: float | None = None,
    machine: str | None = None,
    device: str | None = None,
    compiler: str = "inductor",
) -> Plan | Any:
    """The plan of a model.

    Plans what a call at this place would compile: inside ``torch.no_grad()`` the inference graph, outside it, where
    parameters require gradients, forward and backward of training, in one plan.

    The model may be on the meta device, and its inputs too: then it must be one graph. With ``device="cuda"`` on a
    machine without CUDA the plan is for one GPU of 80 GB, and autocast around the call must be that of the CPU
    (``torch.autocast("cpu")``), as torch then switches CUDA's off; ``absent`` lists what else may differ. With
    ``machine`` as well, that GPU has the memory of the machine.

    Args:
        model: a module, offloaded or not; or what torch.compile returned for one: without further arguments the plan
            in force is returned.
        args, kwargs: example inputs, as for calling the model. Without any, and where no plan is in force or options
            ask for another one, inputs are guessed, and where that fails the plan is one of the weights alone;
            ``Plan.note`` says which.
        k, m, budget, max_slowdown, machine, device, compiler: as in torch.compile's ``options``.

    Returns:
        The plan of the captured graph; `Plans`, a tuple in order of capture, where there are several graphs. (The
        annotation says Any for the latter, so that nobody has to tell a type checker that the model is one graph.)

    Raises:
        OptionError: an option is wrong or impossible, or inputs were given for a model without values that has graph
            breaks.
    """
    options = parse_options(
        {
            "k": k,
            "m": m,
            "budget": budget,
            "max_slowdown": max_slowdown,
            "machine": machine,
            "device": device,
            "compiler": compiler,
        }
    )
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, torch.nn.Module):
        raise OptionError(f"plan needs a torch.nn.Module or what torch.compile made of one, not {type(model).__name__}")
    if args or kwargs:
        programs = capture_programs(inner, tuple(args), dict(kwargs or {}), options)
        return _one_or_all([program.planned() for program in programs])
    if options == Options():
        plans = _find_plans_in_force(model)
        if plans:
            return _one_or_all(plans)
        if inner is not model:
            options = _options_of(model) or options
            logger.warning(
                "no plan is in force: the compiled model has not run yet, or nothing of it was compiled "
                "(TORCH_LOGS=graph_breaks shows why). Planning for example inputs instead"
            )
    return plan_guessed(inner, options)


def plan_guessed(model: nn.Module, options: Options, shape: Sequence[int] | None = None) -> Plan | Plans:
    """The plan of a model for the first example inputs that can be traced, or for its weights alone.

    Args:
        model: with or without values. Where it has values and graph breaks, the pieces before the last one run.
        options: what is asked for.
        shape: of the main input, where it is known; then there is no plan for anything else.

    Raises:
        OptionError: the plan that was asked for is impossible, or inputs of that shape cannot be traced.
    """
    failures: list[str] = []
    for guess in guess_inputs(model, shape):
        planner = _Planner(model, options, is_guess=True)
        try:
            with _quiet_about_fakes():
                programs = planner.programs_of(guess.args, dict(guess.kwargs))
        except Exception as error:
            if planner.error is not None:  # what was asked for is impossible, whatever the inputs
                raise
            failures.append(f"{guess}: {_reason(error)}")
            logger.info("example inputs that cannot be traced, from %s", failures[-1])
            continue
        logger.info("example inputs from %s", guess)
        return _one_or_all([replace(program.planned(), note=f"example inputs from {guess}") for program in programs])
    if shape is not None:
        tried = "; ".join(failures) or "what kind of input it takes is not known: give example inputs to spcompile.plan"
        raise OptionError(f"the model cannot be traced with an input of shape {list(shape)} ({tried})")
    return _plan_weights_only(model, options, failures)


def _plan_weights_only(model: nn.Module, options: Options, failures: Sequence[str]) -> Plan:
    reason = "no example inputs could be found"
    if failures:
        reason += f" ({len(failures)} guessed, none could be traced)"
    logger.warning(
        "weights only: %s, so activations and compute are left out. Give the model's inputs as args and kwargs%s",
        reason,
        f" (first guess, {failures[0]})" if failures else "",
    )
    store = find_store(model.parameters())
    device = _device(options, store, list(model.parameters()))
    if is_absent(device):
        free_bytes = _absent_bytes(device, options)
    else:
        free_bytes = free_device_bytes(device) + (store.device_bytes() if store is not None else 0)
    return plan_weights_only(model, options, device, find_machine_for(device, options), free_bytes, reason)


@contextlib.contextmanager
def _quiet_about_fakes() -> Iterator[None]:
    """torch logs each operator that refuses its inputs as an error; of a guess that is no news."""
    noisy = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, noisy.disabled = noisy.disabled, True
    try:
        yield
    finally:
        noisy.disabled = was_disabled


def capture_programs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> list[Program]:
    """The ATen graphs of one call, each with its plan, not yet cut into segments.

    Raises:
        OptionError: see `plan`.
    """
    return _Planner(model, options).programs_of(args, kwargs)


def _reason(error: Exception) -> str:
    """Why a call cannot be traced: of an error that Dynamo wraps, what the model or torch said."""
    inner = re.search(r"\bgot (\w+\(.*\))", str(error))
    return inner[1] if inner else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _options_of(compiled: Any) -> Options | None:
    """The options that torch.compile was given; None where it does not tell."""
    backend = getattr(getattr(compiled, "dynamo_ctx", None), "callback", None)
    while backend is not None and not hasattr(backend, "kwargs"):
        backend = getattr(backend, "_torchdynamo_orig_backend", None)  # torch's own way to the backend inside
    return None if backend is None else parse_options(backend.kwargs.get("options"))


def plans_in_force(model: nn.Module | Callable[..., Any]) -> list[Plan]:
    """The plans of the graphs that are compiled for a model, in order of capture.

    Args:
        model: a module, or what torch.compile returned for one: then only the plans of that call.

    Raises:
        OptionError: there are none yet.
    """
    plans = _find_plans_in_force(model)
    if not plans:
        raise OptionError("no plan is in force: run the compiled model once")
    return plans


def _find_plans_in_force(model: nn.Module | Callable[..., Any]) -> list[Plan]:
    """See `plans_in_force`; none where there are none."""
    inner: Any = getattr(model, "_orig_mod", model)
    options = None if inner is model else _options_of(model)
    store = find_store(inner.parameters())
    if store is not None and len(store.runtimes()) > 1:
        gc.collect()  # what Dynamo has dropped may still be held by cycles
    runtimes = store.runtimes() if store is not None else []
    runtimes = [each for each in runtimes if options is None or each.compiled_with == options]
    return list({id(runtime.plan): runtime.plan for runtime in runtimes}.values())  # forward and backward share one


def _one_or_all(plans: Sequence[Plan]) -> Plan | Plans:
    return plans[0] if len(plans) == 1 else Plans(plans)


class _Planner:
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
        except torch._dynamo.exc.Unsupported as error:
            if not may_run:
                reason = _first_line(error)
                raise OptionError(
                    "a model on the meta device can be planned only if it is one graph, and this one breaks "
                    f"({reason}): its pieces would have to run, and it has no values. TORCH_LOGS=graph_breaks shows "
                    "where: remove the break, or plan a model with values"
                ) from error
            self.programs.clear()
            self.whole = False
            self._call(args, kwargs, fullgraph=False)
        return self.programs

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, fullgraph: bool) -> None:
        # Where torch can, without counting against the model's own recompile limit.
        isolated = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
        compiled = torch.compile(  # type: ignore[call-overload]
            self.model,
            backend=self._backend,
            fullgraph=fullgraph,
            dynamic=False if self.is_guess else None,
            **isolated,
        )
        with contextlib.suppress(_Stop):
            compiled(*args, **kwargs)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        tensors = [value for value in example_inputs if isinstance(value, Tensor)]
        store = find_store(tensors)
        device = _device(self.options, store, tensors)
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
            free_bytes = _absent_bytes(device, self.options) if is_absent(device) else None
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


def _device(options: Options, store: PageStore | None, tensors: Sequence[Tensor]) -> torch.device:
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


def _absent_bytes(device: torch.device, options: Options) -> int:
    """Memory of a GPU that is not here: that of the machine that was asked for, or of the usual one."""
    free_bytes = ABSENT_GPU_BYTES if options.machine is None else find_machine(options.machine).device_bytes
    logger.warning("no CUDA device here: planning for a %s with %s", device, format_bytes(free_bytes))
    return free_bytes


def _not_run(_args: list[Any]) -> Any:
    raise AssertionError("a planned graph is never run")
