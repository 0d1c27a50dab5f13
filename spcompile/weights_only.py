"""A plan of a model that nobody can call: made of its weights alone.

What: pages and layers by the names and sizes of the weights (``module_tree``), one step for each page, in the order in
which the model holds them. Why: where no example inputs are known the bytes are, and with them what must move, how long
that takes, and what fits. How wrong: of compute nothing is known but that it reads the weights once, which is near the
truth for the next token of a language model and for little else; there are no activations, and there is no backward.
The plan says so in its note. The verifier accepts it like any other.

The odd cases: a tensor subclass counts with the bytes that its shape and dtype name; a lazy parameter has none yet.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx, nn

from spcompile.capture import storage_weights
from spcompile.ir import Machine, Page, Plan, Step, Weight
from spcompile.module_tree import find_layer_paths, layer_of
from spcompile.options import Options
from spcompile.passes.base import Program
from spcompile.passes.make_schedule import place_uncut
from spcompile.passes.pages import LEFTOVER_FRACTION
from spcompile.planner.machine import kernel_time_us
from spcompile.text import format_plan
from spcompile.verify.plans import verify_plan
from spcompile.verify.violations import raise_if_any

NOTE = "weights only: {reason}. One forward pass; times are those of reading the weights, nothing else is counted"
"""What a plan of this kind says of itself."""


def plan_weights_only(
    model: nn.Module, options: Options, device: torch.device, machine: Machine, free_bytes: int, reason: str
) -> Plan:
    """Plan one pass over a model's weights.

    Args:
        model: with or without values.
        options: what was asked for.
        device: the compute device.
        machine: what the steps are timed on.
        free_bytes: device memory for weights where neither k nor a budget is given.
        reason: why there is nothing better, for the plan's note.

    Raises:
        OptionError: the plan that was asked for is impossible.
    """
    program = Program(
        fx.GraphModule(nn.Module(), fx.Graph()),  # no graph was captured
        weights={},
        options=options,
        device=str(device),
        wraps=True,
        machine=machine,
        free_bytes=free_bytes,
    )
    graph = _unplaced(list(storage_weights(model).values()), str(device), machine)
    plan = replace(place_uncut(program, graph), note=NOTE.format(reason=reason))
    violations = verify_plan(plan, options.budget) if options.verify else []
    if violations:
        raise_if_any("the plan", format_plan(plan).splitlines(), violations)
    return plan


def _unplaced(weights: list[Weight], device: str, machine: Machine) -> Plan:
    """Pages and steps: one for each layer, and for each module outside the layers unless it is small."""
    layer_paths = find_layer_paths((weight.name, weight.nbytes) for weight in weights)
    groups: dict[tuple[str, str | None], list[Weight]] = {}
    for weight in weights:
        layer = layer_of(weight.name, layer_paths)
        groups.setdefault((layer or _owner(weight), layer), []).append(weight)
    largest_bytes = max((sum(weight.nbytes for weight in group) for group in groups.values()), default=0)
    pages: list[Page] = []
    steps: list[Step] = []
    leftovers: list[Weight] = []
    for (name, layer), group in groups.items():
        page = Page(name, tuple(group))
        if layer is None and page.nbytes * LEFTOVER_FRACTION < largest_bytes:
            leftovers.extend(group)
            continue
        steps.append(Step(name, layer, (len(pages),), kernel_time_us(machine, "", 0, page.nbytes)))
        pages.append(page)
    return Plan(device, 1, 1, True, tuple(pages), tuple(leftovers), (), tuple(steps), (), 1, (), machine=machine)


def _owner(weight: Weight) -> str:
    """The module that holds a weight; the weight's own name where that is the model."""
    return weight.name.rpartition(".")[0] or weight.name
