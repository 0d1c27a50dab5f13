"""Plans without a run: `spcompile.plan`.

Dynamo captures the model on its example inputs exactly as torch.compile would, the passes go as far as the plan, and
nothing is compiled, moved or executed. With graph breaks the pieces before the last one have to run (eagerly) for
Dynamo to get further; the plan returned is then that of the piece with most weights.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, fx

from spcompile.capture import Capture, storage_weights
from spcompile.errors import OptionError
from spcompile.ir import Plan
from spcompile.options import Options, parse_options
from spcompile.passes.make_schedule import make_schedule
from spcompile.pipeline import PASSES, run_passes
from spcompile.runtime.host import compute_device
from spcompile.runtime.store import PageStore, find_store

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
    device: str | None = None,
    compiler: str = "inductor",
) -> Plan:
    """The plan of a model.

    Plans what a call at this place would compile: inside ``torch.no_grad()`` the inference graph, outside it, where
    parameters require gradients, the forward graph of training.

    Args:
        model: a module, offloaded or not; or what torch.compile returned for one: without further arguments the plan
            in force after its last compilation is returned.
        args, kwargs: example inputs, as for calling the model.
        k, m, device, compiler: as in torch.compile's ``options``.

    Returns:
        The plan of the captured graph; of the one with most weights where graph breaks make several.

    Raises:
        OptionError: an option is wrong, or inputs are missing and no plan is in force.
    """
    options = parse_options({"k": k, "m": m, "device": device, "compiler": compiler})
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, torch.nn.Module):
        raise OptionError(f"plan needs a torch.nn.Module or what torch.compile made of one, not {type(model).__name__}")
    if not args and not kwargs:
        return _plan_in_force(inner)
    planner = _Planner(inner, options)
    plans = planner.capture(tuple(args), dict(kwargs or {}))
    if not plans:
        raise OptionError(
            "nothing of the model was captured: Dynamo broke the graph everywhere (see TORCH_LOGS=graph_breaks)"
        )
    if len(plans) > 1:
        logger.warning("the model has %d graphs; this is the plan of the one with most weights", len(plans))
    return max(plans, key=lambda each: each.weights_bytes)


def _plan_in_force(model: torch.nn.Module) -> Plan:
    store = find_store(model.parameters())
    runtimes = store.runtimes() if store is not None else []
    if not runtimes:
        raise OptionError("no plan is in force: run the compiled model once, or give example inputs as args and kwargs")
    plan_in_force: Plan = runtimes[-1].plan
    return plan_in_force


class _Planner:
    """A backend of torch.compile that plans and compiles nothing."""

    def __init__(self, model: torch.nn.Module, options: Options) -> None:
        self.model = model
        self.options = options
        self.plans: list[Plan] = []
        self.whole = True

    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Plan]:
        """Plan every graph that Dynamo makes of one call."""
        try:
            self._call(args, kwargs, fullgraph=True)
        except torch._dynamo.exc.Unsupported:
            self.plans.clear()
            self.whole = False
            self._call(args, kwargs, fullgraph=False)
        return self.plans

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, fullgraph: bool) -> None:
        # Where torch can, without counting against the model's own recompile limit.
        isolated = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
        compiled = torch.compile(self.model, backend=self._backend, fullgraph=fullgraph, **isolated)  # type: ignore[call-overload]
        with contextlib.suppress(_Stop):
            compiled(*args, **kwargs)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        store = find_store(value for value in example_inputs if isinstance(value, Tensor))
        if store is None:
            weights = storage_weights(self.model)
            order = {weight.name: index for index, weight in enumerate(weights.values())}
            capture = Capture(
                gm, example_inputs, self.options, lambda tensor, _: weights.get(tensor.untyped_storage()._cdata), order
            )
        else:
            capture = Capture(gm, example_inputs, self.options, store.weight_of, store.model_order())

        def compile_graph(module: fx.GraphModule, wraps: bool) -> Callable[..., Any]:
            program = capture.program(module, device=self._device(store), wraps=wraps, store=store)
            run_passes(program, PASSES[: 1 + [each.run for each in PASSES].index(make_schedule)])
            self.plans.append(program.planned())
            if self.whole:
                raise _Stop
            return _not_run

        capture.trace(compile_graph)
        return gm.forward

    def _device(self, store: PageStore | None) -> torch.device:
        if store is not None:
            return store.device
        return compute_device(self.options.device)


def _not_run(_args: list[Any]) -> Any:
    raise AssertionError("a planned graph is never run")
