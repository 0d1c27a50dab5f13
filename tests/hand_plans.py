"""Small plans written by hand, which the tests of text, verifier and plan format share.

Each is right, and small enough to be checked on paper: the comments show which pages hold slots during each step.
"""

from __future__ import annotations

from spcompile.ir import Interval, Page, Plan, Slot, Step, Weight

MIB = 2**20


def page(name: str, *sizes_bytes: int) -> Page:
    return Page(name, tuple(Weight(f"{name}.w{index}", nbytes) for index, nbytes in enumerate(sizes_bytes)))


def layer_pages(count: int, nbytes: int = MIB) -> tuple[Page, ...]:
    return tuple(page(f"layers.{index}", nbytes) for index in range(count))


def layer_steps(count: int) -> tuple[Step, ...]:
    return tuple(Step(f"layers_{index}", f"layers.{index}", (index,)) for index in range(count))


def equal_slots(count: int, nbytes: int = MIB) -> tuple[Slot, ...]:
    return tuple(Slot(index * nbytes, nbytes) for index in range(count))


def chain_in_batches() -> Plan:
    """Five layers, k = 3, m = 2: 012 012 234 234 401. Pages 1 and 2 change places every iteration."""
    return Plan(
        device="cuda:0",
        k=3,
        m=2,
        wraps=True,
        pages=layer_pages(5),
        leftovers=(Weight("norm.weight", 512), Weight("norm.bias", 512)),
        residents=(),
        steps=layer_steps(5),
        slots=equal_slots(3),
        period=2,
        intervals=(
            Interval(0, -1, 2, (0, 0)),
            Interval(1, -1, 2, (1, 2)),
            Interval(2, 0, 4, (2, 1)),
            Interval(3, 2, 4, (0, 0)),
            Interval(4, 2, 5, (1, 2)),
        ),
    )


def chain_one_by_one() -> Plan:
    """Five layers, k = 2, m = 1: 01 12 23 34 40. Five layers on two slots come round after two iterations."""
    return Plan(
        device="cpu",
        k=2,
        m=1,
        wraps=True,
        pages=layer_pages(5, 1000),
        leftovers=(),
        residents=(),
        steps=layer_steps(5),
        slots=equal_slots(2, 1024),
        period=2,
        intervals=tuple(Interval(index, index - 1, index + 1, (index % 2, (index + 1) % 2)) for index in range(5)),
    )


def chain_without_wrap() -> Plan:
    """Four layers, k = 2, m = 1, as in training: 01 12 23 3. No copy for the next iteration."""
    return Plan(
        device="cuda:0",
        k=2,
        m=1,
        wraps=False,
        pages=layer_pages(4),
        leftovers=(),
        residents=(),
        steps=layer_steps(4),
        slots=equal_slots(2),
        period=1,
        intervals=tuple(Interval(index, max(index - 1, 0), index + 1, (index % 2,)) for index in range(4)),
    )


def all_resident() -> Plan:
    """k = all pages: nothing moves."""
    return Plan(
        device="cuda:0",
        k=3,
        m=1,
        wraps=True,
        pages=layer_pages(3),
        leftovers=(),
        residents=(0, 1, 2),
        steps=layer_steps(3),
        slots=(),
        period=1,
        intervals=(),
    )


def tied_ends() -> Plan:
    """An embedding tied to the head, k = 2, m = 1, loaded twice: 01 12 20 0.

    The second copy of the tied page leaves after the last step, and only then the first one of the next iteration may
    come: a page never sits in two slots.
    """
    return Plan(
        device="cuda:0",
        k=2,
        m=1,
        wraps=True,
        pages=(page("embed", 2 * MIB), page("layers.0", MIB), page("layers.1", MIB)),
        leftovers=(),
        residents=(),
        steps=(
            Step("embed", None, (0,)),
            Step("layers_0", "layers.0", (1,)),
            Step("layers_1", "layers.1", (2,)),
            Step("head", None, (0,)),
        ),
        slots=(Slot(0, 2 * MIB), Slot(2 * MIB, 2 * MIB)),
        period=1,
        intervals=(
            Interval(0, 0, 1, (0,)),
            Interval(1, 0, 2, (1,)),
            Interval(2, 1, 3, (0,)),
            Interval(0, 2, 4, (1,)),
        ),
    )


def two_pages_in_one_step() -> Plan:
    """Cross attention reads an encoder page and a decoder page at once; the head stays: 01 012 012 23 (3 resident)."""
    return Plan(
        device="cuda:0",
        k=3,
        m=1,
        wraps=True,
        pages=(page("encoder", MIB, 300), page("decoder.0", MIB), page("decoder.1", MIB), page("head", 7)),
        leftovers=(Weight("scale", 0),),
        residents=(3,),
        steps=(
            Step("encoder", "encoder", (0,)),
            Step("decoder_0", "decoder.0", (0, 1)),
            Step("decoder_1", "decoder.1", (0, 2)),
            Step("head", None, (2, 3)),
        ),
        slots=(Slot(0, MIB + 512), Slot(MIB + 512, MIB), Slot(2 * MIB + 512, MIB)),
        period=1,
        intervals=(
            Interval(0, -1, 3, (0,)),
            Interval(1, 0, 2, (1,)),
            Interval(2, 1, 4, (2,)),
        ),
    )


PLANS = {
    plan.__name__: plan()
    for plan in (
        chain_in_batches,
        chain_one_by_one,
        chain_without_wrap,
        all_resident,
        tied_ends,
        two_pages_in_one_step,
    )
}
