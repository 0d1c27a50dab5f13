"""What the pictures say: times, causes of stalls, the head, and the glossary (docs/design.md, words)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from spcompile.ir import Plan
from spcompile.text import format_bytes

CAUSES = {
    "link": "the link is the limit: earlier copies and this one have kept it busy ever since this one could start",
    "room": "no room: the link stood idle until a slot fell free, for this copy or one before it in the queue",
    "late": "started late: the link stood idle, as nothing prefetches this page before the iteration begins",
    "gradients": "the gradients of an earlier step have not left the device yet",
}
"""The causes of `lanes.Stall` in words."""

WORDS = {
    "layer": "a repeated unit of the model (transformer block, conv stage, ...)",
    "segment": "a run of graph nodes compiled as one unit; a layer is one or more segments",
    "page": "the weights that move together: those of one layer, or of one piece outside the layers",
    "leftovers": "small weights outside the pages, which stay on the device",
    "step": "index of a segment in the schedule (never a time)",
    "iteration": "one run of the schedule: a forward, or a forward and its backward",
    "resident": "stays on the device",
    "streamed": "loaded for each use",
    "mapped": "read in place over the link, never copied (embedding tables of which rows are gathered)",
    "prefetch": "start a host-to-device copy on the side stream",
    "load": "wait for the copy, and get the weights",
    "evict": "give the slot back once its last reader is done",
    "send": "start the device-to-host copies of gradients",
    "finish": "wait for all gradients that were sent",
    "arena, slot": "one device block reserved up front; an offset and size in it, assigned offline",
    "k, m": "at most k pages hold slots at any step; after m of them have been used they are evicted together",
    "budget": "most device memory at any moment, as torch.cuda.max_memory_allocated counts it",
    "H2D, D2H, link": "host to device, device to host, the bus between them",
    "stall": "compute waits for a copy",
    "floor": "no schedule with these copies takes less: the longest of compute, copies to and from the device",
    "emulated device": "the CPU standing in for the GPU; its times mean nothing but an order",
}
"""The words of docs/design.md, in its order; ``floor`` is that of `Simulation.bound_us`."""


def used_words(plan: Plan, *, has_times: bool, is_emulated: bool) -> Iterator[tuple[str, str]]:
    """The words that a picture of this plan uses, with their meanings."""
    sends, streams = plan.gradients_bytes > 0, bool(plan.intervals)
    unused = {
        "leftovers": not plan.leftovers,
        "resident": not plan.residents,
        "mapped": not plan.mapped,
        "budget": plan.budget_bytes is None,
        "H2D, D2H, link": not has_times,
        "stall": not has_times,
        "floor": not has_times,
        "emulated device": not is_emulated,
        **dict.fromkeys(("send", "finish"), not sends),
        **dict.fromkeys(("streamed", "prefetch", "load", "evict", "arena, slot", "k, m"), not streams),
    }
    return ((word, meaning) for word, meaning in WORDS.items() if not unused.get(word))


def used_causes(causes: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """The causes that occur, in the order of `CAUSES`."""
    found = set(causes)
    return tuple((cause, meaning) for cause, meaning in CAUSES.items() if cause in found)


def format_rate(bytes_per_s: float) -> str:
    """A rate for people, in units of ten as links are sold: ``"54.0 GB/s"``."""
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.3g} MB/s"


def weights_sentence(plan: Plan) -> str:
    """What the plan is for: so many bytes of weights in so many bytes of device memory."""
    weights, peak = format_bytes(plan.weights_bytes), format_bytes(plan.peak_bytes())
    beside_bytes = plan.beside_bytes()
    beside = f", {format_bytes(beside_bytes)} of it for what is not weights" if beside_bytes else ""
    return f"{weights} of weights run in {peak} of device memory{beside}."
