"""Plans without a run: `spcompile.plan`.

What a call would compile is found by making it, up to the plan (``dry_run``). The inputs need not be given: without
any, the plan in force is returned, or else inputs are guessed (``example_inputs``) and tried one after the other, or
else the plan is one of the weights alone (``weights_only``). Where a plan's inputs come from is in its note.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spcompile.absent import is_absent
from spcompile.capture import find_machine_for
from spcompile.dry_run import DryRun, absent_bytes, capture_programs, device_for, first_line, forget_failed_call
from spcompile.errors import OptionError
from spcompile.example_inputs import guess_inputs
from spcompile.ir import Plan, Plans
from spcompile.options import Options, parse_options
from spcompile.runtime.host import free_device_bytes
from spcompile.runtime.store import find_store
from spcompile.runtime.weights import why_nothing_streams
from spcompile.weights_only import plan_weights_only

logger = logging.getLogger(__name__)


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
        OptionError: an option is wrong or impossible, ``args`` or ``kwargs`` are no collection of arguments, or inputs
            were given for a model without values that has graph breaks.
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
    _check_arguments(args, kwargs)
    if args or kwargs:
        programs = capture_programs(inner, tuple(args), dict(kwargs or {}), options)
        return _one_or_all([program.planned() for program in programs])
    if options == Options():
        plans = _find_plans_in_force(model)
        if plans:
            return _one_or_all(plans)
        if inner is not model:
            options = _options_of(model) or options
            reason = why_nothing_streams(inner)
            logger.warning(
                "%s. Planning for example inputs instead",
                "no plan is in force: the compiled model has not run yet, or nothing of it was compiled "
                "(TORCH_LOGS=graph_breaks shows why)"
                if reason is None
                else f"no plan is in force: nothing of this model is streamed ({reason})",
            )
    return plan_guessed(inner, options)


def _check_arguments(args: Any, kwargs: Any) -> None:
    """One tensor in place of a tuple is not taken as the only argument: torch.export does not either, and a list of
    tensors could mean both."""
    if not isinstance(args, (tuple, list)):
        raise OptionError(
            f"args must be a tuple of the model's positional arguments, not one {type(args).__name__}: write "
            "spcompile.plan(model, (x,))"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise OptionError(
            f"kwargs must be a dict of the model's keyword arguments, not one {type(kwargs).__name__}: write "
            "spcompile.plan(model, (x, y)) for two positional ones"
        )


def plan_guessed(
    model: nn.Module,
    options: Options,
    shape: Sequence[int] | None = None,
    advice: str = "Give the model's inputs as args and kwargs",
) -> Plan | Plans:
    """The plan of a model for the first example inputs that can be traced, or for its weights alone.

    Args:
        model: with or without values. Where it has values and graph breaks, the pieces run.
        options: what is asked for.
        shape: of the main input, where it is known; then there is no plan for anything else.
        advice: what to do where no inputs can be guessed.

    Raises:
        OptionError: the plan that was asked for is impossible, or inputs of that shape cannot be traced.
    """
    failures: list[str] = []
    for guess in guess_inputs(model, shape):
        planner = DryRun(model, options, is_guess=True)
        try:
            with _quiet_about_fakes():
                programs = planner.programs_of(guess.args, dict(guess.kwargs))
        except Exception as error:
            if planner.error is not None:  # what was asked for is impossible, whatever the inputs
                raise
            forget_failed_call(model)
            failures.append(f"{guess}: {_reason(error)}")
            logger.info("example inputs that cannot be traced, from %s", failures[-1])
            continue
        logger.info("example inputs from %s", guess)
        return _one_or_all([replace(program.planned(), note=f"example inputs from {guess}") for program in programs])
    if shape is not None:
        tried = "; ".join(failures) or "what kind of input it takes is not known: give example inputs to spcompile.plan"
        raise OptionError(f"the model cannot be traced with an input of shape {list(shape)} ({tried})")
    return _plan_weights_only(model, options, failures, advice)


def _plan_weights_only(model: nn.Module, options: Options, failures: Sequence[str], advice: str) -> Plan:
    reason = "no example inputs could be found"
    if failures:
        reason += f" ({len(failures)} guessed, none could be traced)"
    logger.warning(
        "weights only: %s, so activations and compute are left out. %s%s",
        reason,
        advice,
        f" (first guess, {failures[0]})" if failures else "",
    )
    store = find_store(model.parameters())
    device = device_for(options, store, list(model.parameters()))
    if is_absent(device):
        free_bytes = absent_bytes(device, options)
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


def _reason(error: Exception) -> str:
    """Why a call cannot be traced: of an error that Dynamo wraps, what the model or torch said."""
    inner = re.search(r"\bgot (\w+\(.*\))", str(error))
    return inner[1] if inner else f"{type(error).__name__}: {first_line(error)}"


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
