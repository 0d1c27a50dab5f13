"""What ``print(plan)`` shows: the overview of a plan, and what an iteration of it will take.

The text of a plan says what the plan says (``text``); how long that takes, and where compute waits, is what a
simulation says of it. The two meet here, above the planner, so that the plan's own text, which is written to files and
read back, depends on no prediction.
"""

from __future__ import annotations

from collections.abc import Iterator

from spcompile.ir import Plan, Plans
from spcompile.lanes import CAUSES, Stall
from spcompile.planner.simulate import Simulation, simulate
from spcompile.text import format_bytes, format_overview
from spcompile.verify.plans import verify_plan
from spcompile.wording import count, fit, format_us, wrap


def summarize(plan: Plan) -> str:
    """The overview of a plan with its predicted times, where it says what machine they are for."""
    return format_overview(plan, tuple(_predictions(plan)))


def summarize_all(plans: Plans) -> str:
    """The overviews of the plans of one model, below a line for each."""
    heads = [_head(plan, index) for index, plan in enumerate(plans, start=1)]
    total = f"{count(len(plans), 'graph')} of one model; peak bytes {format_bytes(plans.peak_bytes())} in all"
    overviews = (f"Graph {index} of {len(plans)}\n{summarize(plan)}" for index, plan in enumerate(plans, start=1))
    return "\n\n".join(["\n".join([total, *heads]), *overviews])


def _head(plan: Plan, index: int) -> str:
    kind = "inference" if plan.backward_step is None else "training"
    sizes = f"{count(len(plan.pages), 'page')}, {count(len(plan.steps), 'step')}"
    totals = f"peak {format_bytes(plan.peak_bytes())}, moves {format_bytes(plan.bytes_moved)}"
    return f"  {index:>3}  {kind:<9}  {sizes}, {totals}"


def _predictions(plan: Plan) -> Iterator[str]:
    """A table of times; nothing where the plan knows no machine, or would wait forever as it breaks a rule."""
    if plan.machine is None or not plan.steps:
        return
    violations = verify_plan(plan)
    if violations:
        yield f"No times are predicted: this plan breaks {count(len(violations), 'rule')} of the verifier"
        return
    simulation = simulate(plan, plan.machine)
    yield f"Predicted on {fit(plan.machine.name, 60)}"
    for name, us, note in _rows(plan, simulation):
        head = f"  {name:<17}  {format_us(us):>10}  "
        first, *others = wrap(note, " " * len(head))
        yield head + first.lstrip()
        yield from others


def _rows(plan: Plan, simulation: Simulation) -> Iterator[tuple[str, float, str]]:
    per_s = f"{1e6 / simulation.iteration_us:.1f} a second; " if simulation.iteration_us else ""
    yield "iteration", simulation.iteration_us, f"{per_s}the first one {format_us(simulation.cold_us)}"
    copies = count(len(plan.intervals), "copy", "copies") + _rate(plan.bytes_moved, simulation.link_us)
    works = [
        ("compute", simulation.compute_us, count(len(plan.steps), "step")),
        ("copies", simulation.link_us, copies),
    ]
    if plan.gradients_bytes:
        sends = count(sum(step.gradients_bytes > 0 for step in plan.steps), "send")
        works.append(("gradients", simulation.down_us, sends + _rate(plan.gradients_bytes, simulation.down_us)))
    for name, us, note in works:
        yield name, us, f"{note}; the bound" if us == simulation.bound_us > 0 else note
    stalled_us = sum(stall.us for stall in simulation.stalls)
    share = f", {stalled_us / simulation.iteration_us:.1%} of the time" if stalled_us else ""
    yield "stalls", stalled_us, f"{len(simulation.stalls)}{share}"
    if simulation.stalls:
        longest = max(simulation.stalls, key=lambda stall: stall.us)
        yield "longest stall", longest.us, _why(plan, longest)


def _rate(nbytes: int, us: float) -> str:
    return f", {nbytes / us / 1e3:.1f} GB/s" if us else ""


def _why(plan: Plan, stall: Stall) -> str:
    where = "at the end" if stall.step == len(plan.steps) else f"before step {stall.step}"
    name = fit(stall.page, 30)
    if stall.cause == "gradients":
        return f"{where}: gradients of {name} have not left yet"
    return f"{where}: {name} is not there, as {CAUSES[stall.cause]}"
