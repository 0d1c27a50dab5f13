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
from typing import TYPE_CHECKING, Any

import sympy

from spcompile.errors import OptionError, PlanFormatError
from spcompile.sizes import Polynomial, expression_of, value_of

if TYPE_CHECKING:
    from pathlib import Path

    from spcompile.lanes import Recording
    from spcompile.planner.choose import TradeoffPoint
    from spcompile.viz.picture import Picture

ALIGNMENT_BYTES = 256
"""Every weight starts at a multiple of this in its page, and every slot in the arena: kernels that Inductor compiled
for an aligned example input would otherwise clone the weight first (design.md, decision 2)."""

GATHERED = 0.55
"""Part of the link's rate that a kernel reaches which gathers rows over it. Measured on an H100 with rows of 8 KiB and
54 GB/s: 30 GB/s where Inductor fuses the gather, 47 where it does not."""

FORMAT_VERSION = 5
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
    """One segment in the schedule.

    Attributes:
        segment: its name.
        layer: the layer it belongs to, or None outside the layers.
        reads: indices into ``Plan.pages``, each once, in the order in which the segment first reads them. Resident
            pages are listed too.
        compute_us: predicted time on the device with all weights in place; 0 where nothing is known.
        activations_bytes: most that inputs, outputs, intermediates and what later steps still need take at once while
            the segment runs; 0 where nothing is known.
        gathers: pages of which it reads only some rows (embedding tables), each with the bytes of those rows.
        gradients_bytes: what it makes of weights' gradients that leave for host memory behind it.
    """

    segment: str
    layer: str | None
    reads: tuple[int, ...]
    compute_us: float = 0.0
    activations_bytes: int = 0
    gathers: tuple[tuple[int, int], ...] = ()
    gradients_bytes: int = 0


@dataclass(frozen=True)
class Machine:
    """What plans are timed on: rates as they are reached, not those of data sheets.

    Attributes:
        name: as shown.
        h2d_bytes_per_s, d2h_bytes_per_s: the link in one direction, the other one idle.
        both_bytes_per_s: the link in each direction while both are busy.
        copy_us: fixed time of one copy.
        flops_per_s: pairs of a dtype's name and the rate of large matrix products in it.
        memory_bytes_per_s: reads and writes of the device's own memory.
        kernel_us: what a kernel takes at least.
        workspace_bytes: what libraries take of the device's memory once they are used.
        device_bytes, host_bytes: memory.
    """

    name: str
    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    both_bytes_per_s: float
    copy_us: float
    flops_per_s: tuple[tuple[str, float], ...]
    memory_bytes_per_s: float
    kernel_us: float
    workspace_bytes: int
    device_bytes: int
    host_bytes: int

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Machine:
        """A machine from what `dataclasses.asdict` made of one, read from JSON.

        Raises:
            KeyError, TypeError, ValueError: fields are missing, unknown or not what they should be.
        """
        rates = tuple((str(dtype), float(rate)) for dtype, rate in fields["flops_per_s"])
        return cls(**{**fields, "flops_per_s": rates})

    def gather_time_us(self, nbytes: int) -> float:
        """Time in which a kernel reads so many bytes of rows in place, over the link."""
        return self.copy_us + nbytes / (GATHERED * self.h2d_bytes_per_s) * 1e6

    def copy_time_us(self, nbytes: int, *, both: bool = False) -> float:
        """Time of one copy to the device of ``nbytes``; ``both``: while the link is busy the other way, too, and then
        also of one from the device."""
        rate = self.both_bytes_per_s if both else self.h2d_bytes_per_s
        return self.copy_us + nbytes / rate * 1e6


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
    SEND = "send"
    EVICT = "evict"


@dataclass(frozen=True)
class Action:
    """One line of the schedule. ``interval`` indexes ``Plan.intervals`` (None for `RUN` and `SEND`).

    ``step`` is the step before which a prefetch or load happens, that runs, or after which gradients are sent or a page
    is evicted; the number of steps for what follows the last one. ``ahead`` is 1 for a prefetch on behalf of the next
    iteration, else 0.
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
        machine: what the steps are timed on; None where nothing is known of it.
        sizes: the graph's symbolic sizes, by name, as they were at capture.
        inputs: bytes of the graph's inputs that are no weights, buffers and caches included.
        activations: candidates for the most bytes that other values take at once; the largest counts.
        workspace_bytes: what libraries take of the device, and torch's allocator beyond what it is asked for.
        other_bytes: what the process held on the device beside all these when the plan was made.
        mapped: indices of the pages that are read in place, over the link, by the steps that gather rows of them; for
            other steps that read them they are streamed.
        backward_step: first step of the backward graph in a plan for training; None where there is only one graph.
        budget_bytes: most device memory at any moment, where that was asked for.
        note: what is to be known of how the plan came about, for people: where its example inputs come from if nobody
            gave any. "" for a plan of inputs that were given, or of a run.
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
    machine: Machine | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    inputs: Polynomial = ()
    activations: tuple[Polynomial, ...] = ()
    workspace_bytes: int = 0
    other_bytes: int = 0
    mapped: tuple[int, ...] = ()
    backward_step: int | None = None
    budget_bytes: int | None = None
    note: str = ""

    def tradeoff(self) -> tuple[TradeoffPoint, ...]:
        """The whole curve of memory against time for this graph, each point with its plan; from the smallest up.

        Raises:
            OptionError: nothing is known of the machine.
        """
        from spcompile.planner.choose import find_tradeoff  # the planner is above ir; a convenience reaches up

        if self.machine is None:
            raise OptionError("a trade-off needs a machine to time plans on: plan with machine='h100', say")
        return find_tradeoff(dataclasses.replace(self, budget_bytes=None), self.residents)

    def visualize(
        self,
        path: str | Path | None = None,
        *,
        machine: str | Machine | None = None,
        recording: Recording | None = None,
    ) -> Picture:
        """A picture of what happens when: lanes, device memory, layers, trade-off and the rewritten graph.

        Args:
            path: also written there: ``.html`` (one file, no network), ``.svg`` or ``.png`` (needs matplotlib), or
                ``.json`` (a trace that Perfetto and chrome://tracing open).
            machine: what copies are timed on: a profile's name or a machine; None: the plan's own. Without any, steps
                stand in the place of times.
            recording: of a run of this plan, shown beside what is predicted.

        Raises:
            OptionError: the machine or the suffix is unknown, or matplotlib is missing for an image.
        """
        from spcompile.viz import visualize  # above ir, like the planner

        return visualize([self], path, machine=machine, recording=recording)

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

    def needs(self, step: int) -> tuple[int, ...]:
        """The pages that a step needs on the device: what it reads, except for what it gathers in place."""
        each = self.steps[step]
        if not self.mapped or not each.gathers:
            return each.reads
        in_place = {page for page, _ in each.gathers if page in self.mapped}
        return tuple(page for page in each.reads if page not in in_place)

    def gathered_bytes(self, step: int) -> int:
        """What a step reads in place, over the link."""
        return sum(nbytes for page, nbytes in self.steps[step].gathers if page in self.mapped)

    @property
    def bytes_moved(self) -> int:
        """Host-to-device bytes of weights per iteration, once the schedule has warmed up."""
        return sum(self.pages[interval.page].nbytes for interval in self.intervals)

    @property
    def gradients_bytes(self) -> int:
        """Device-to-host bytes of weights' gradients per iteration."""
        return sum(step.gradients_bytes for step in self.steps)

    @property
    def has_transfers(self) -> bool:
        """Whether anything moves at all."""
        return bool(self.intervals) or self.gradients_bytes > 0

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

    @property
    def activations_bytes(self) -> int:
        """Most bytes that values other than weights and inputs take at once, with the sizes at capture."""
        return max((step.activations_bytes for step in self.steps), default=0)

    def peak_bytes(self, **sizes: int) -> int:
        """Most device memory at any moment of an iteration: what ``torch.cuda.max_memory_allocated`` would say.

        Weights, inputs, other values, workspaces of libraries, and what else the process holds. CUDA's context and
        fragmentation come on top.

        Args:
            sizes: symbolic sizes by their names in ``sizes``; those at capture where they are left out.

        Raises:
            OptionError: a size has another name than those of the graph.
        """
        return self.peak_weight_bytes + self.beside_bytes(**sizes)

    def beside_bytes(self, **sizes: int) -> int:
        """The part of `peak_bytes` that is not weights."""
        known = dict(self.sizes)
        unknown = [name for name in sizes if name not in known]
        if unknown:
            raise OptionError(f"unknown size {unknown[0]!r}; this plan has {', '.join(known) or 'none'}")
        given = known | sizes
        values_bytes = value_of(self.inputs, given) + max(
            (value_of(each, given) for each in self.activations), default=0
        )
        return self.workspace_bytes + self.other_bytes + values_bytes

    @property
    def peak_expr(self) -> sympy.Expr:
        """`peak_bytes` as an expression.

        Its symbols are the graph's sizes, and what one more costs: ``k`` where the k slots are all alike (m has no part
        in it: it says how many leave together, not how many are held), and ``residents``, their number, where they are
        all of one size. Evaluate it with ``peak_expr.subs({symbol: value})`` over its ``free_symbols``.
        """
        symbols = {name: _symbol(name) for name, _ in self.sizes}
        activations = [expression_of(each, symbols) for each in self.activations]
        beside_bytes = self.leftovers_bytes + self.workspace_bytes + self.other_bytes
        weights_bytes = self._arena_expr() + self._residents_expr() + beside_bytes
        return weights_bytes + expression_of(self.inputs, symbols) + sympy.Max(0, *activations)

    def _arena_expr(self) -> sympy.Expr:
        sizes_bytes = {slot.nbytes for slot in self.slots}
        if len(sizes_bytes) == 1 and self.arena_bytes == self.k * self.slots[0].nbytes:
            return _symbol("k") * self.slots[0].nbytes
        return sympy.Integer(self.arena_bytes)

    def _residents_expr(self) -> sympy.Expr:
        sizes_bytes = {self.pages[page].nbytes for page in self.residents}
        if len(sizes_bytes) == 1:
            return _symbol("residents") * sizes_bytes.pop()
        return sympy.Integer(self.residents_bytes)

    @property
    def graphs(self) -> tuple[range, ...]:
        """The steps of each graph: one of all steps, or in training those of forward and those of backward."""
        if self.backward_step is None:
            return (range(len(self.steps)),)
        turn = min(max(self.backward_step, 0), len(self.steps))  # a wrong plan has a text, too
        return range(turn), range(turn, len(self.steps))

    def load_step(self, interval: Interval, steps: range | None = None) -> int:
        """First of the steps (by default of all) that needs the interval's page during its stay; -1 where none does."""
        within = range(len(self.steps)) if steps is None else steps
        first, last = max(interval.start_step, within.start), min(interval.end_step, within.stop)
        return next((step for step in range(first, last) if interval.page in self.needs(step)), -1)

    def actions(self, steps: range | None = None) -> Iterator[Action]:
        """One iteration, line by line.

        At each position the order is: send the gradients that the step before made, evict what it used last, prefetch,
        load, run. Copies that should have been started before are asked for again at the start of each graph, by the
        iteration before or in training by the forward graph: a prefetch is a hint, and costs nothing where the copy is
        already there (design.md, decision 4).

        Args:
            steps: of one of the `graphs`; None: all of them, one behind the other.
        """
        for each in self.graphs if steps is None else (steps,):
            yield from self._actions_of(each)

    def _actions_of(self, steps: range) -> Iterator[Action]:
        n_steps = len(self.steps)
        is_first, is_last = steps.start == 0, steps.stop == n_steps
        evictions, prefetches, ahead, loads = (defaultdict[int, list[int]](list) for _ in range(4))
        for index, interval in enumerate(self.intervals):
            if not (is_first or interval.end_step > steps.start) or not (is_last or interval.start_step < steps.stop):
                continue
            load_step, end_step = self.load_step(interval, steps), interval.end_step
            if not is_last and end_step > steps.stop and self.load_step(interval, range(steps.stop, n_steps)) < 0:
                end_step = steps.stop  # only its batch would have kept it
            elif load_step < 0 and not is_first:
                continue
            evictions[end_step].append(index)
            prefetches[max(interval.start_step, steps.start)].append(index)
            loads[load_step].append(index)
            if self.wraps and interval.start_step <= 0:
                ahead[n_steps + interval.start_step].append(index)
        for step in range(steps.start, steps.stop + 1):
            if step > steps.start and self.steps[step - 1].gradients_bytes:
                yield Action(ActionKind.SEND, step - 1)
            yield from (Action(ActionKind.EVICT, step - 1, index) for index in evictions[step])
            if step < steps.stop:
                yield from (Action(ActionKind.PREFETCH, step, index) for index in prefetches[step])
            yield from (Action(ActionKind.PREFETCH, step, index, ahead=1) for index in ahead[step])
            if step < steps.stop:
                yield from (Action(ActionKind.LOAD, step, index) for index in loads[step])
                yield Action(ActionKind.RUN, step)

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
                mapped=tuple(fields.pop("mapped")),
                steps=tuple(map(_step, fields.pop("steps"))),
                slots=tuple(Slot(**slot) for slot in fields.pop("slots")),
                period=fields.pop("period"),
                intervals=tuple(
                    Interval(**{**each, "slots": tuple(each["slots"])}) for each in fields.pop("intervals")
                ),
                machine=None if (machine := fields.pop("machine")) is None else Machine.from_fields(machine),
                sizes=_pairs(fields.pop("sizes")),
                inputs=_pairs(fields.pop("inputs")),
                activations=tuple(map(_pairs, fields.pop("activations"))),
                workspace_bytes=fields.pop("workspace_bytes"),
                other_bytes=fields.pop("other_bytes"),
                backward_step=fields.pop("backward_step"),
                budget_bytes=fields.pop("budget_bytes"),
                note=fields.pop("note"),
                **fields,
            )
        except PlanFormatError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanFormatError(f"not the JSON text of a plan: {error!r}") from error

    def to_text(self) -> str:
        """The plan as text for people that `from_text` reads back to an equal plan: what ``print(plan)`` shows in
        short, the whole schedule, and every detail below. Equal plans have equal texts."""
        from spcompile.plan_details import write_plan  # conveniences reach up, as tests/test_import_layers.py lists

        return write_plan(self)

    @classmethod
    def from_text(cls, text: str) -> Plan:
        """Read `to_text`'s text.

        Raises:
            PlanFormatError: the text is not one of a plan, of another format version, or was changed in one place and
                not in the others; the line is shown.
        """
        from spcompile.plan_parser import read_plan

        return read_plan(text)

    def __str__(self) -> str:
        """What people need to see first: totals, pages, slots, a timeline, and what a simulation predicts."""
        from spcompile.plan_summary import summarize

        return summarize(self)


class Plans(tuple[Plan, ...]):
    """The plans of the graphs of one model, in the order of their capture: prompt and next token, the pieces between
    graph breaks, training and evaluation.

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

    def visualize(
        self,
        path: str | Path | None = None,
        *,
        machine: str | Machine | None = None,
        recording: Recording | None = None,
    ) -> Picture:
        """See `Plan.visualize`: one picture of all graphs. A recording is shown with the graph whose plan it is of."""
        from spcompile.viz import visualize

        return visualize(self, path, machine=machine, recording=recording)

    def __str__(self) -> str:
        from spcompile.plan_summary import summarize_all

        return summarize_all(self)


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


def _weights(fields: list[dict[str, Any]]) -> tuple[Weight, ...]:
    return tuple(Weight(**weight) for weight in fields)


def _step(fields: dict[str, Any]) -> Step:
    gathers = tuple((page, nbytes) for page, nbytes in fields["gathers"])
    return Step(**{**fields, "reads": tuple(fields["reads"]), "gathers": gathers})


def _pairs(fields: list[list[Any]]) -> tuple[tuple[str, int], ...]:
    return tuple((name, number) for name, number in fields)
