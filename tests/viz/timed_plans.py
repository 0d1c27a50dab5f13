"""Plans with round times, which can be checked on paper: a page of n bytes takes n us to copy, in either direction."""

from __future__ import annotations

from dataclasses import replace

from spcompile.ir import Machine, Plan, Step, Weight
from spcompile.planner.machine import PROFILES
from spcompile.planner.make_plan import place_graph
from tests.hand_plans import page

MACHINE: Machine = replace(
    PROFILES["h100"],
    name="one byte per us",
    copy_us=0.0,
    h2d_bytes_per_s=1e6,
    d2h_bytes_per_s=1e6,
    both_bytes_per_s=1e6,
)


def inference(n_layers: int = 3, *, k: int | None = None, capacity_bytes: int | None = None) -> Plan:
    """Layers of 512 bytes that compute for 100 us with 30 bytes of values; an input of 8 bytes, a leftover of 7."""
    graph = Plan(
        device="cuda:0",
        k=1,
        m=1,
        wraps=True,
        pages=tuple(page(f"model.layers.{index}", 512) for index in range(n_layers)),
        leftovers=(Weight("norm", 7),),
        residents=(),
        steps=tuple(
            Step(f"model.layers.{index}", f"model.layers.{index}", (index,), 100.0, 30) for index in range(n_layers)
        ),
        slots=(),
        period=1,
        intervals=(),
        machine=MACHINE,
        sizes=(("s0", 2),),
        inputs=(("s0", 4),),
        activations=((("1", 30),),),
        workspace_bytes=50,
    )
    return place_graph(graph, k=k, capacity_bytes=capacity_bytes)


def training(n_layers: int = 3, *, k: int | None = None, capacity_bytes: int | None = None) -> Plan:
    """An embedding, layers of 512 bytes and a head; values pile up in forward, and gradients leave in backward."""
    layers = [f"model.layers.{index}" for index in range(n_layers)]
    names = ["model.embed", *layers, "model.head"]
    forward = [
        Step(name, name if name in layers else None, (index,), 100.0, 40 * (index + 1))
        for index, name in enumerate(names)
    ]
    backward = [
        Step(f"{step.segment}.backward", step.layer, step.reads, 200.0, step.activations_bytes + 1024, (), 512)
        for step in reversed(forward)
    ]
    steps = (*forward, *backward)
    graph = Plan(
        device="cuda:0",
        k=1,
        m=1,
        wraps=False,
        pages=tuple(page(name, 512) for name in names),
        leftovers=(),
        residents=(),
        steps=steps,
        slots=(),
        period=1,
        intervals=(),
        machine=MACHINE,
        activations=((("1", max(step.activations_bytes for step in steps)),),),
        backward_step=len(names),
    )
    return place_graph(graph, k=k, capacity_bytes=capacity_bytes)
