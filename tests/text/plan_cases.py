"""Plans whose texts are looked at: those written by hand, and larger ones of the kinds that models have."""

from __future__ import annotations

from dataclasses import replace

from spcompile.ir import Interval, Plan, Slot, Step
from spcompile.planner.machine import PROFILES
from tests.hand_plans import MIB, PLANS, equal_slots, page

EMPTY = Plan("cpu", 0, 0, False, (), (), (), (), (), 1, ())


def language_model(n_layers: int, k: int) -> Plan:
    """An embedding that stays, layers and a head that are streamed through k equal slots, m = 1."""
    layers = [page(f"model.layers.{index}", 32 * MIB, 32 * MIB, 4096) for index in range(n_layers)]
    pages = (page("model.embed_tokens", 250 * MIB), *layers, page("lm_head", 250 * MIB))
    embed = Step("model_embed_tokens", None, (0,))
    steps = [Step(f"model_layers_{index}", f"model.layers.{index}", (index + 1,)) for index in range(n_layers)]
    streamed = n_layers + 1
    return Plan(
        device="cuda:0",
        k=k,
        m=1,
        wraps=True,
        pages=pages,
        leftovers=(),
        residents=(0,),
        steps=(embed, *steps, Step("lm_head", None, (len(pages) - 1,))),
        slots=equal_slots(k, 250 * MIB),
        period=k,
        intervals=tuple(
            Interval(index, index - k + 1, index + 1, tuple((index + phase * streamed) % k for phase in range(k)))
            for index in range(1, streamed + 1)
        ),
    )


def mapped_table() -> Plan:
    """A table of which rows are read in place, and which is the head, too, and streamed for it."""
    table = page("embed_tokens", 250 * MIB)
    steps = (
        Step("embed_tokens", None, (0,), gathers=((0, 8192),)),
        Step("layers_0", "layers.0", (1,)),
        Step("layers_1", "layers.1", (2,)),
        Step("embed_tokens#1", None, (0,)),
    )
    return Plan(
        device="cuda:0",
        k=2,
        m=1,
        wraps=True,
        pages=(table, page("layers.0", 64 * MIB), page("layers.1", 64 * MIB)),
        leftovers=(),
        residents=(),
        steps=steps,
        slots=(Slot(0, 64 * MIB), Slot(64 * MIB, 64 * MIB), Slot(128 * MIB, 250 * MIB)),
        period=1,
        intervals=(Interval(1, 0, 2, (0,)), Interval(2, 0, 3, (1,)), Interval(0, 2, 4, (2,))),
        mapped=(0,),
    )


def training(n_layers: int) -> Plan:
    """Layers there and back through two slots, each of them sending its gradients; h100."""
    last = n_layers - 1
    forward = [Step(f"layers_{index}", f"layers.{index}", (index,), 30.5, 5 * MIB) for index in range(n_layers)]
    backward = [
        Step(f"layers_{index}.backward", f"layers.{index}", (index,), 61.0, 6 * MIB, gradients_bytes=MIB)
        for index in reversed(range(n_layers))
    ]
    there = [Interval(index, max(index - 1, 0), index + 1, (index % 2,)) for index in range(last)]
    turn = [Interval(last, last - 1, last + 2, (last % 2,)), Interval(last - 1, last, last + 3, ((last - 1) % 2,))]
    back = [
        Interval(index, 2 * n_layers - 2 - index, 2 * n_layers - index, (index % 2,))
        for index in reversed(range(last - 1))
    ]
    return Plan(
        device="cuda:0",
        k=2,
        m=1,
        wraps=False,
        pages=tuple(page(f"layers.{index}", MIB) for index in range(n_layers)),
        leftovers=(),
        residents=(),
        steps=(*forward, *backward),
        slots=equal_slots(2),
        period=1,
        intervals=(*there, *turn, *back),
        machine=PROFILES["h100"],
        inputs=(("1", 4096),),
        activations=((("1", 6 * MIB),),),
        workspace_bytes=32 * MIB,
        backward_step=n_layers,
    )


def timed(plan: Plan, compute_us: float) -> Plan:
    steps = tuple(replace(step, compute_us=compute_us, activations_bytes=MIB) for step in plan.steps)
    return replace(plan, steps=steps, machine=PROFILES["h100"])


def symbolic_sizes() -> Plan:
    """Inputs and values of a batch of s1 sequences of s0 tokens."""
    return replace(
        timed(PLANS["tied_ends"], 12.25),
        sizes=(("s0", 128), ("s1", 2)),
        inputs=(("s0*s1", 8),),
        activations=((("s0*s1", 4096),), (("1", 100), ("s0**2*s1", 16))),
        other_bytes=77,
    )


TIMED = {
    "inference": timed(PLANS["chain_in_batches"], 40.0),
    "training": training(3),
    "training_of_40_layers": training(40),
    "mapped": timed(mapped_table(), 300.0),
    "symbolic_sizes": symbolic_sizes(),
    "language_model_32_layers": timed(language_model(32, 4), 1000.0),
    "language_model_80_layers": timed(language_model(80, 4), 2000.0),
}
"""Plans of which times are predicted."""

CASES = {
    "training": training(3),
    "symbolic_sizes": symbolic_sizes(),
    "mapped_table": mapped_table(),
    **PLANS,
    "language_model_32_layers": language_model(32, 4),
    "language_model_80_layers_long_period": language_model(80, 11),
    "no_pages": EMPTY,
}
