"""Recordings made by hand: a simulation of the same schedule with other times, cut to its warm iterations."""

from __future__ import annotations

from dataclasses import replace

from spcompile.ir import Machine, Plan
from spcompile.lanes import Recording
from spcompile.planner.simulate import simulate


def recording_of(
    plan: Plan, machine: Machine, *, slower: float = 1.25, peak_bytes: int | None = None, is_emulated: bool = False
) -> Recording:
    """As if the device had taken ``slower`` times as long for the steps, and the link for copies."""
    rate = machine.h2d_bytes_per_s / slower
    slow_machine = replace(machine, h2d_bytes_per_s=rate, both_bytes_per_s=machine.both_bytes_per_s / slower)
    slow_steps = tuple(replace(step, compute_us=slower * step.compute_us) for step in plan.steps)
    simulation = simulate(replace(plan, steps=slow_steps), slow_machine, iterations=6)
    n_recorded = len(simulation.stalls_by_iteration) - 1  # without the cold one
    zero_us = simulation.iteration_starts_us[1]
    starts_us = tuple(time - zero_us for time in simulation.iteration_starts_us[1:])
    return Recording(
        plan=plan,
        spans=tuple(
            replace(span, iteration=span.iteration - 1, start_us=span.start_us - zero_us, end_us=span.end_us - zero_us)
            for span in simulation.spans
            if span.iteration > 0
        ),
        stalls=tuple(
            replace(stall, start_us=stall.start_us - zero_us)
            for stalls in simulation.stalls_by_iteration[1:]
            for stall in stalls
        ),
        iteration_starts_us=starts_us[:-1],
        iteration_ends_us=starts_us[1:],
        lags_us=(1e9,) * n_recorded,
        moved_bytes=(plan.bytes_moved,) * n_recorded,
        sent_bytes=(plan.gradients_bytes,) * n_recorded,
        peak_bytes=peak_bytes,
        is_emulated=is_emulated,
    )
