"""``spcompile plan MODEL``"""

from __future__ import annotations

import argparse

from spcompile.cli.output import TEXTS, check_output, emit_plans, emit_tradeoff, suffix_of
from spcompile.errors import CommandError
from spcompile.options import parse_options

OPTIONS = ("k", "m", "budget", "max_slowdown", "machine", "device")

ADVICE = "Give the shape of the model's main input as --shape, or the model an attribute example_input_array"
"""What to do where no inputs can be guessed."""


def run(arguments: argparse.Namespace) -> int:
    """Plan a model, and print, write or draw the plan. What can be refused is refused before torch is imported."""
    options = parse_options({name: getattr(arguments, name) for name in OPTIONS})
    output = arguments.output
    check_output(output)
    if arguments.tradeoff and output is not None and suffix_of(output) not in TEXTS:
        raise CommandError(f"--tradeoff is a table: write {' or '.join(TEXTS)} (the page shows the curve without it)")

    from spcompile.planner.machine import find_machine

    if options.machine is not None:
        find_machine(options.machine)

    import torch

    from spcompile.cli.models import find_dtype, make_model
    from spcompile.ir import Plan
    from spcompile.planning import plan_guessed

    dtype = None if arguments.dtype is None else find_dtype(arguments.dtype)
    model = make_model(arguments.model, dtype=dtype, real=arguments.real).train(arguments.train)
    with torch.set_grad_enabled(arguments.train):
        planned = plan_guessed(model, options, arguments.shape, ADVICE)
    plans = [planned] if isinstance(planned, Plan) else list(planned)
    if not arguments.tradeoff:
        emit_plans(plans, output, arguments.format)
    elif len(plans) > 1:
        raise CommandError(f"--tradeoff is of one graph, and this model has {len(plans)} (TORCH_LOGS=graph_breaks)")
    else:
        emit_tradeoff(plans[0], plans[0].tradeoff(), output, arguments.format)
    return 0
