"""The rewritten graph as lines: what ``print(graph.code)`` shows of it, and what each line means.

    prefetch_2 = prefetch(runtime, 2, model.layers.1)     start the copy on the side stream
    load_1 = load(runtime, 1, model.layers.0)             compute waits for it
    model_layers_0 = self.model_layers_0(..., load_1)     one compiled segment
    evict_1 = evict(runtime, 1, model.layers.0)           the slot is free once compute gets here

How: one line per action of the plan, which is what ``insert_transfers`` writes into the graph. The odd case: what only
passes values on (``pack``, ``getitem``) is not in the plan, and stands as dots.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from spcompile.ir import Action, ActionKind, Plan
from spcompile.text import format_bytes
from spcompile.viz.find_rows import RowIndex
from spcompile.viz.view import Line


def show_graph(plan: Plan, rows: RowIndex) -> Iterator[Line]:
    """All lines, those of forward before those of backward."""
    for index, steps in enumerate(plan.graphs):
        if plan.backward_step is not None:
            yield Line(f"# {('forward', 'backward')[index]}", "", "graph", -1, -1, None)
        loaded: dict[int, int] = {}  # by page: the interval whose load is in force
        for action in plan.actions(steps):
            yield _line(plan, rows, action, loaded)
        if any(plan.steps[step].gradients_bytes for step in steps):
            yield Line("finish = finish(runtime)", "wait for all gradients that were sent", "finish", -1, -1, None)


def _line(plan: Plan, rows: RowIndex, action: Action, loaded: dict[int, int]) -> Line:
    kind, interval = action.kind, action.interval
    step = min(action.step, len(plan.steps) - 1)
    if interval is None:
        text = _send(plan, step) if kind is ActionKind.SEND else _run(plan, step, loaded)
        return Line(*text, kind.value, rows.of_step[step], step, None)
    page = plan.intervals[interval].page
    if kind is ActionKind.LOAD:
        loaded[page] = interval
    ahead = ", ahead=1" if action.ahead else ""
    code = f"{kind.value}_{interval} = {kind.value}(runtime, {interval}, {plan.pages[page].name}{ahead})"
    return Line(code, _meaning(plan, action, interval), kind.value, rows.of_page[page], step, interval)


def _run(plan: Plan, step: int, loaded: dict[int, int]) -> tuple[str, str]:
    each = plan.steps[step]
    needed = plan.needs(step)
    loads = [f"load_{loaded[page]}" for page in needed if page in loaded]
    name = re.sub(r"\W", "_", each.segment)
    in_place = [plan.pages[page].name for page in each.reads if page not in needed]
    meaning = f"reads rows of {', '.join(in_place)} in place" if in_place else "one compiled segment"
    return f"{name} = self.{name}({', '.join(['...', *loads])})", meaning


def _send(plan: Plan, step: int) -> tuple[str, str]:
    each = plan.steps[step]
    meaning = f"its gradients, {format_bytes(each.gradients_bytes)}, leave for host memory"
    return f"send_{step} = send(runtime, {step}, {each.segment}, ...)", meaning


def _meaning(plan: Plan, action: Action, index: int) -> str:
    interval = plan.intervals[index]
    nbytes = format_bytes(plan.pages[interval.page].nbytes)
    is_kept = plan.backward_step is not None and interval.start_step < plan.backward_step <= action.step
    match action.kind:
        case ActionKind.PREFETCH if action.ahead:
            return f"start the copy of {nbytes} for the next iteration"
        case ActionKind.PREFETCH if interval.start_step <= 0 and plan.wraps:
            return "a hint: the iteration before has started this copy"
        case ActionKind.PREFETCH if is_kept:
            return "a hint: kept since forward, or on its way"
        case ActionKind.PREFETCH:
            return f"start the copy of {nbytes} on the side stream"
        case ActionKind.LOAD if is_kept:
            return "compute waits for it; kept since forward, or on its way"
        case ActionKind.LOAD:
            n_steps = action.step - interval.start_step
            overlap = f"{n_steps} {'step' if n_steps == 1 else 'steps'} of overlap" if n_steps else "no overlap"
            return f"compute waits for it; {overlap}"
        case _:
            return "the slot is free once compute gets here"
