"""Device memory over time, as a stack of shares.

How: what the process holds beside, workspaces, inputs, and weights that stay take the same at all times. So does the
arena, which is reserved up front; of it, what the slots hold from the start of a copy to the eviction of its page is
shown apart from what is free. On top comes what the running step needs beside weights. Of that only the most is known,
so the step counts with its most until the next one begins, also while compute waits: then what is left of the step is
less, never more. Gradients are those that the step makes and those of the sender before it, whose memory is awaited
when the step is done (``costs.py`` counts them in the same way).

So the highest point is what `Plan.peak_bytes` says, and the stack is never above it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from spcompile.ir import Plan
from spcompile.lanes import Stay
from spcompile.sizes import value_of
from spcompile.viz.view import Bar, Lanes, Memory, Share

SHARES = {
    "other tensors": ("#5f6368", "what the process held on the device when the plan was made"),
    "workspace": ("#9aa0a6", "what libraries take"),
    "inputs": ("#009e73", "inputs of the graph that are no weights, caches included"),
    "weights that stay": ("#0072b2", "residents and leftovers"),
    "arena, in use": ("#56b4e9", "slots, from the start of a copy until its page is evicted"),
    "arena, free": ("#cfe8f7", "reserved for slots that hold nothing now"),
    "activations": ("#e69f00", "values that the running step makes or reads, or keeps for later steps: its most"),
    "gradients": ("#cc79a7", "of weights: made, and not yet in host memory"),
}
"""The shares from the lowest to the highest, each with its colour and meaning. The colours are those of Okabe and Ito
("Color Universal Design", 2008), which do not depend on telling red from green."""


def show_memory(
    plan: Plan,
    lanes: Lanes,
    stays: Iterable[tuple[float, float, int]],
    measured_peak_bytes: int | None,
) -> Memory:
    """Memory while the shown iterations run.

    Args:
        plan: whose memory it is.
        lanes: what is shown.
        stays: start, end and bytes of each stay of a page in a slot.
        measured_peak_bytes: see `Memory`.
    """
    held = _clipped(stays, lanes.end)
    levels = sorted(_levels(plan, lanes))
    times = sorted({0.0, *(time for time, _ in held), *(time for time, _, _ in levels)})
    in_use = list(_staircase(times, held))
    activations, gradients = zip(*_latest(times, levels), strict=True)
    fixed = {
        "other tensors": plan.other_bytes,
        "workspace": plan.workspace_bytes,
        "inputs": value_of(plan.inputs, dict(plan.sizes)),
        "weights that stay": plan.residents_bytes + plan.leftovers_bytes,
    }
    taken: dict[str, tuple[int, ...]] = {name: (nbytes,) * len(times) for name, nbytes in fixed.items()}
    taken["arena, in use"] = tuple(in_use)
    taken["arena, free"] = tuple(plan.arena_bytes - nbytes for nbytes in in_use)
    taken["activations"], taken["gradients"] = activations, gradients
    shares = tuple(Share(name, *SHARES[name], nbytes) for name, nbytes in taken.items() if any(nbytes))
    return Memory(tuple(times), shares, plan.peak_bytes(), plan.budget_bytes, measured_peak_bytes)


def simulated_stays(plan: Plan, stays: Iterable[Stay], zero_us: float) -> Iterator[tuple[float, float, int]]:
    """The stays of a simulation, from ``zero_us`` on."""
    for stay in stays:
        end = float("inf") if stay.end_us is None else stay.end_us - zero_us
        yield stay.start_us - zero_us, end, plan.pages[plan.intervals[stay.interval].page].nbytes


def planned_stays(bars: Iterable[Bar]) -> Iterator[tuple[float, float, int]]:
    """Those of a plan of which no times are known."""
    return ((bar.start, bar.end, bar.nbytes) for bar in bars if bar.lane == "slots")


def step_levels(plan: Plan) -> list[tuple[int, int]]:
    """For each step the most of activations and of gradients; together, what it needs beside weights and inputs."""
    levels: list[tuple[int, int]] = []
    on_their_way = 0  # gradients of the sender before
    for step in plan.steps:
        gradients = min(step.activations_bytes, on_their_way + step.gradients_bytes)
        levels.append((step.activations_bytes - gradients, gradients))
        on_their_way = step.gradients_bytes or on_their_way
    return levels


def _levels(plan: Plan, lanes: Lanes) -> Iterator[tuple[float, int, tuple[int, int]]]:
    """From when on what is needed beside weights and inputs: time, a rank among equal times, and how much."""
    levels = step_levels(plan)
    for part in lanes.parts:
        if not part.name.startswith("backward"):
            yield part.start, -1, (0, 0)
    for bar in lanes.bars:
        if bar.lane == "compute" and 0 <= bar.start < lanes.end:
            yield bar.start, bar.step, levels[bar.step]


def _clipped(stays: Iterable[tuple[float, float, int]], end: float) -> list[tuple[float, int]]:
    """Changes of what the slots hold, between 0 and ``end``, in order."""
    changes: dict[float, int] = {}
    for start, stop, nbytes in stays:
        if stop <= 0 or start >= end:
            continue
        changes[max(0.0, start)] = changes.get(max(0.0, start), 0) + nbytes
        if stop < end:
            changes[stop] = changes.get(stop, 0) - nbytes
    return sorted(changes.items())


def _staircase(times: Iterable[float], changes: Iterable[tuple[float, int]]) -> Iterator[int]:
    at, taken = dict(changes), 0
    for time in times:
        taken += at.get(time, 0)
        yield taken


def _latest(times: list[float], levels: list[tuple[float, int, tuple[int, int]]]) -> Iterator[tuple[int, int]]:
    index, level = 0, (0, 0)
    for time in times:
        while index < len(levels) and levels[index][0] <= time:
            level = levels[index][2]
            index += 1
        yield level
