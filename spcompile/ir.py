"""The plan as plain data: what moves, when it is on the device, and where.

Everything that decides (``planner``), checks (``verify``), prints (``text``) or carries out (``passes``, ``runtime``) a
plan meets in this file, so it holds no torch and no policy. All dataclasses are frozen, compare by value and hold their
sequences as tuples in the order of steps, never of sets or ids.

Time is counted in steps. Step ``s`` runs segment ``steps[s]``; one iteration runs all of them in order. Positive and
negative numbers meet at the wrap-around: with ``n`` steps, position ``-j`` of this iteration is position ``n - j`` of
the one before it, and position 0 is both "before the first step" and "after the last step of the iteration before".
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from spcompile.errors import PlanFormatError

ALIGNMENT_BYTES = 256
"""Every weight starts at a multiple of this in its page, and every slot in the arena: kernels that Inductor compiled
for an aligned example input would otherwise clone the weight first (design.md, decision 2)."""

FORMAT_VERSION = 1
"""Written into every JSON text; ``Plan.from_json`` refuses any other."""


def align(nbytes: int) -> int:
    """Round ``nbytes`` up to a multiple of `ALIGNMENT_BYTES`."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class Weight:
    """One storage of the model. Tied parameters and views of one flat storage are one weight.

    ``name`` is the first fully qualified parameter name that uses the storage.
    """

    name: str
    nbytes: int


@dataclass(frozen=True)
class Page:
    """Weights that move together: those of one layer, or of one piece outside the layers."""

    name: str
    weights: tuple[Weight, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that one load of the page moves (payload, without alignment padding)."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def offsets_bytes(self) -> tuple[int, ...]:
        """Where each weight starts inside the page, in the order of ``weights``."""
        offsets, end = [], 0
        for weight in self.weights:
            offsets.append(end)
            end += align(weight.nbytes)
        return tuple(offsets)

    @property
    def slot_bytes(self) -> int:
        """Bytes that the page takes in the arena, alignment padding included."""
        return sum(align(weight.nbytes) for weight in self.weights)


@dataclass(frozen=True)
class Step:
    """One segment in the schedule: its name, the layer it belongs to (None outside the layers), the pages it reads.

    ``reads`` holds indices into ``Plan.pages``, each once, in the order in which the segment first reads them. Resident
    pages are listed too.
    """

    segment: str
    layer: str | None
    reads: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A repeated unit of the model: the steps that run it and the pages those steps read."""

    name: str
    steps: tuple[int, ...]
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """A place in the arena."""

    offset_bytes: int
    nbytes: int


@dataclass(frozen=True)
class Interval:
    """One stay of a page on the device: half-open ``[start_step, end_step)``.

    The copy is issued just before step ``start_step`` (after the evictions that follow step ``start_step - 1``). The
    slot is given back just after step ``end_step - 1``: the page's last use, or that of a page that leaves in one
    batch with it. ``start_step <= 0`` in a plan that wraps means: issued in the iteration before, just before its
    step ``n + start_step`` (0: after its last step). A plan that does not wrap has no negative start.

    ``slots[phase]`` is the index of the slot in iterations of that phase (``Plan.period`` phases, taken in turn).
    """

    page: int
    start_step: int
    end_step: int
    slots: tuple[int, ...]


class ActionKind(enum.Enum):
    """What the schedule does, one word per node of the rewritten graph."""

    PREFETCH = "prefetch"
    LOAD = "load"
    RUN = "run"
    EVICT = "evict"


@dataclass(frozen=True)
class Action:
    """One line of the schedule. ``interval`` indexes ``Plan.intervals`` (None for `RUN`).

    ``step`` is the step before which a prefetch or load happens, that runs, or after which an eviction happens; the
    number of steps for what follows the last one. ``ahead`` is 1 for a prefetch on behalf of the next iteration, else
    0.
    """

    kind: ActionKind
    step: int
    interval: int | None = None
    ahead: int = 0


@dataclass(frozen=True)
class Plan:
    """Placement and schedule of one captured graph. See the module docstring for how time is counted.

    Attributes:
        device: the compute device, as text (``"cuda:0"``, ``"cpu"`` for the emulated device).
        k: most pages of the streamed window that hold slots at any step.
        m: pages that are evicted, and then loaded, together.
        wraps: whether the end of an iteration prefetches for the next one (inference does, training does not).
        pages: all pages, in order of first use.
        leftovers: small weights outside the pages, which stay on the device.
        residents: indices of the pages that stay on the device.
        steps: the segments in order.
        slots: the places of the arena.
        period: after how many iterations the slots of all intervals repeat.
        intervals: the stays of the streamed pages, in the order in which their copies are issued.
        activations_bytes: upper bound of what the graph's intermediate tensors take at once, counted before fusion.
    """

    device: str
    k: int
    m: int
    wraps: bool
    pages: tuple[Page, ...]
    leftovers: tuple[Weight, ...]
    residents: tuple[int, ...]
    steps: tuple[Step, ...]
    slots: tuple[Slot, ...]
    period: int
    intervals: tuple[Interval, ...]
    activations_bytes: int = 0

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers in order of first use."""
        steps_of: dict[str, list[int]] = {}
        for index, step in enumerate(self.steps):
            if step.layer is not None:
                steps_of.setdefault(step.layer, []).append(index)
        return tuple(
            Layer(name, tuple(steps), tuple(dict.fromkeys(page for step in steps for page in self.steps[step].reads)))
            for name, steps in steps_of.items()
        )

    @property
    def bytes_moved(self) -> int:
        """Host-to-device bytes of weights per iteration, once the schedule has warmed up."""
        return sum(self.pages[interval.page].nbytes for interval in self.intervals)

    @property
    def weights_bytes(self) -> int:
        """All weights that the graph reads, wherever they are placed."""
        return sum(page.nbytes for page in self.pages) + self.leftovers_bytes

    @property
    def leftovers_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.leftovers)

    @property
    def residents_bytes(self) -> int:
        return sum(self.pages[page].nbytes for page in self.residents)

    @property
    def arena_bytes(self) -> int:
        """Size of the device block that holds the slots."""
        return max((slot.offset_bytes + slot.nbytes for slot in self.slots), default=0)

    @property
    def peak_weight_bytes(self) -> int:
        """Most bytes that weights take on the device at once: arena, residents and leftovers."""
        return self.arena_bytes + self.residents_bytes + self.leftovers_bytes

    def peak_bytes(self) -> int:
        """Upper bound of the device memory of one iteration: weights and intermediate tensors. Inputs, outputs and the
        workspaces of libraries come on top."""
        return self.peak_weight_bytes + self.activations_bytes

    def load_step(self, interval: Interval) -> int:
        """First step that reads the interval's page, or -1 where none does."""
        first, last = max(interval.start_step, 0), min(interval.end_step, len(self.steps))
        return next((step for step in range(first, last) if interval.page in self.steps[step].reads), -1)

    def actions(self) -> Iterator[Action]:
        """One iteration, line by line.

        At each position the order is: evict what the step before used last, prefetch, load, run. Copies that the
        iteration before should have started are asked for again at the start: a prefetch is a hint, and costs
        nothing where the copy is already there (design.md, decision 6).
        """
        n_steps = len(self.steps)
        evictions, prefetches, ahead, loads = (defaultdict[int, list[int]](list) for _ in range(4))
        for index, interval in enumerate(self.intervals):
            evictions[interval.end_step].append(index)
            prefetches[max(interval.start_step, 0)].append(index)
            loads[self.load_step(interval)].append(index)
            if self.wraps and interval.start_step <= 0:
                ahead[n_steps + interval.start_step].append(index)
        for step in range(n_steps):
            yield from (Action(ActionKind.EVICT, step - 1, index) for index in evictions[step])
            yield from (Action(ActionKind.PREFETCH, step, index) for index in prefetches[step])
            yield from (Action(ActionKind.PREFETCH, step, index, ahead=1) for index in ahead[step])
            yield from (Action(ActionKind.LOAD, step, index) for index in loads[step])
            yield Action(ActionKind.RUN, step)
        yield from (Action(ActionKind.EVICT, n_steps - 1, index) for index in evictions[n_steps])
        yield from (Action(ActionKind.PREFETCH, n_steps, index, ahead=1) for index in ahead[n_steps])

    def to_json(self) -> str:
        """The plan as JSON text that `from_json` reads back to an equal plan."""
        return json.dumps({"format": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read `to_json`'s text.

        Raises:
            PlanFormatError: the text is not JSON, not a plan, or of another format version.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            version = fields.pop("format")
            if version != FORMAT_VERSION:
                raise PlanFormatError(f"this plan has format {version}; this version reads format {FORMAT_VERSION}")
            return cls(
                device=fields.pop("device"),
                k=fields.pop("k"),
                m=fields.pop("m"),
                wraps=fields.pop("wraps"),
                pages=tuple(Page(page["name"], _weights(page["weights"])) for page in fields.pop("pages")),
                leftovers=_weights(fields.pop("leftovers")),
                residents=tuple(fields.pop("residents")),
                steps=tuple(Step(**{**step, "reads": tuple(step["reads"])}) for step in fields.pop("steps")),
                slots=tuple(Slot(**slot) for slot in fields.pop("slots")),
                period=fields.pop("period"),
                intervals=tuple(
                    Interval(**{**each, "slots": tuple(each["slots"])}) for each in fields.pop("intervals")
                ),
                activations_bytes=fields.pop("activations_bytes"),
                **fields,
            )
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise PlanFormatError(f"not the JSON text of a plan: {error!r}") from error

    def __str__(self) -> str:
        from spcompile.text import format_plan  # text is above ir; only the convenience of print(plan) reaches up

        return format_plan(self)


class Plans(tuple[Plan, ...]):
    """The plans of the graphs of one model, in the order of their capture: prompt and next token, the pieces between
    graph breaks, forward and backward.

    They share pages, residents and the arena, so sums over them mean little; maxima and unions are given.
    """

    __slots__ = ()

    @property
    def pages(self) -> tuple[Page, ...]:
        """The pages of all graphs, each once, in order of first use."""
        return tuple(dict.fromkeys(page for plan in self for page in plan.pages))

    @property
    def arena_bytes(self) -> int:
        """Size of the device block that holds the slots of all graphs."""
        return max((plan.arena_bytes for plan in self), default=0)

    def peak_bytes(self) -> int:
        """See `Plan.peak_bytes`: that of the graph that needs most."""
        return max((plan.peak_bytes() for plan in self), default=0)

    def __str__(self) -> str:
        return "\n\n".join(f"Graph {index} of {len(self)}\n{plan}" for index, plan in enumerate(self, start=1))


def _weights(fields: list[dict[str, Any]]) -> tuple[Weight, ...]:
    return tuple(Weight(**weight) for weight in fields)
