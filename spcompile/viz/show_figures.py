"""The figures at the head of a picture, and the sentence that says what they come to.

Each figure is exact (``value``) beside its text. The floor is `Simulation.bound_us`, of what was measured
`Recording.floor_us`: the longest of compute, copies to the device and copies from it, which no schedule with these
copies can beat.
"""

from __future__ import annotations

from collections.abc import Iterator

from spcompile.ir import Machine, Plan
from spcompile.lanes import Recording
from spcompile.planner.simulate import Simulation
from spcompile.text import format_bytes
from spcompile.viz.view import Figure
from spcompile.viz.words import format_rate, weights_sentence
from spcompile.wording import count, format_us

CLOSE = 1.02
"""An iteration that takes no more than this many times its floor is limited by what the floor is made of."""


def summary(plan: Plan, simulation: Simulation | None) -> str:
    """The head in words."""
    sentences = [weights_sentence(plan)]
    if plan.budget_bytes is not None and plan.peak_bytes() > plan.budget_bytes:
        sentences.append(f"That is more than the budget of {format_bytes(plan.budget_bytes)}.")
    if simulation is not None:
        predicted = f"An iteration is predicted to take {format_us(simulation.iteration_us)}"
        sentences.append(f"{predicted}, {limit(simulation)}")
    if not plan.has_transfers:
        sentences.append("Nothing is streamed.")
    return " ".join(sentences)


def limit(simulation: Simulation) -> str:
    """What an iteration is limited by, with the figures that say so."""
    parts = {
        "compute": simulation.compute_us,
        "the link": simulation.link_us,
        "the way of gradients to host memory": simulation.down_us,
    }
    name = max(parts, key=lambda part: parts[part])
    floor_us = format_us(parts[name])
    if simulation.iteration_us > CLOSE * simulation.bound_us:
        return f"of which {name} alone takes {floor_us}; the rest is waiting."
    rest = [f"{part} takes {format_us(us)}" for part, us in parts.items() if part != name and us]
    return f"limited by {name}" + (f" ({', '.join(rest)})." if rest else ".")


def figures(
    plan: Plan,
    machine: Machine | None,
    simulation: Simulation | None,
    recording: Recording | None,
) -> Iterator[Figure]:
    """All figures, those that matter most first."""
    yield _bytes("peak memory", plan.peak_bytes(), "most device memory at any moment")
    if plan.budget_bytes is not None:
        left_bytes = plan.budget_bytes - plan.peak_bytes()
        left = f"{format_bytes(abs(left_bytes))} {'left' if left_bytes >= 0 else 'over'}"
        yield _bytes("budget", plan.budget_bytes, left)
    yield _bytes("weights", plan.weights_bytes, "all that the graph reads")
    if simulation is not None and machine is not None:
        yield from _predicted(simulation, machine)
    n_copies = count(len(plan.intervals), "copy", "copies")
    yield _bytes("moved", plan.bytes_moved, f"to the device per iteration, {n_copies}")
    if plan.gradients_bytes:
        yield _bytes("gradients", plan.gradients_bytes, "to host memory per iteration")
    streamed = {interval.page for interval in plan.intervals}
    in_place = set(plan.mapped) - streamed
    pages = [f"{len(plan.residents)} resident", f"{len(streamed)} streamed"] + [f"{len(in_place)} mapped"] * bool(
        in_place
    )
    yield Figure("pages", len(plan.pages), str(len(plan.pages)), ", ".join(pages))
    if plan.intervals:
        yield Figure("k, m", plan.k, f"{plan.k}, {plan.m}", "most pages in slots; how many leave together")
    if recording is not None:
        yield from _measured(machine, simulation, recording)


def _predicted(simulation: Simulation, machine: Machine) -> Iterator[Figure]:
    bound = f"{simulation.iteration_us / simulation.bound_us:.3f} x the floor" if simulation.bound_us else "no work"
    yield _time("iteration", simulation.iteration_us, f"predicted for {machine.name}; {bound}")
    yield _time("compute", simulation.compute_us, "sum of all steps")
    if simulation.link_us:
        yield _time(
            "copies", simulation.link_us, f"sum of all copies to the device, {_part(simulation.link_us, simulation)}"
        )
    if simulation.down_us:
        yield _time(
            "sends", simulation.down_us, f"sum of all copies from the device, {_part(simulation.down_us, simulation)}"
        )
    stall_us = sum(stall.us for stall in simulation.stalls)
    yield _time(
        "stalls", stall_us, f"{count(len(simulation.stalls), 'wait')} of compute, {_part(stall_us, simulation)}"
    )


def _measured(machine: Machine | None, simulation: Simulation | None, recording: Recording) -> Iterator[Figure]:
    us, floor_us = recording.iteration_us, recording.floor_us
    beside = f", {us / simulation.iteration_us:.2f} x predicted" if simulation and simulation.iteration_us else ""
    yield _time("measured iteration", us, f"median of {len(recording.counted)}{beside}")
    if floor_us:
        times = us / floor_us
        yield Figure("measured / floor", times, f"{times:.3f} x", f"the floor is {format_us(floor_us)}, as measured")
    rate = recording.link_bytes_per_s
    if rate is not None:
        part = f"{rate / machine.h2d_bytes_per_s:.0%} of {format_rate(machine.h2d_bytes_per_s)}" if machine else ""
        yield Figure("link rate", rate, format_rate(rate), f"reached while copies ran; {part}" if part else "")
    yield _bytes("measured moved", recording.moved_bytes[recording.typical], "to the device per iteration")
    if recording.peak_bytes is not None:
        yield _bytes("measured peak", recording.peak_bytes, "as torch counts it")


def _part(us: float, simulation: Simulation) -> str:
    return f"{us / simulation.iteration_us:.0%} of the iteration" if simulation.iteration_us else "nothing"


def _bytes(name: str, nbytes: int, note: str) -> Figure:
    return Figure(name, nbytes, format_bytes(nbytes), note)


def _time(name: str, us: float, note: str) -> Figure:
    return Figure(name, us, format_us(us), note)
