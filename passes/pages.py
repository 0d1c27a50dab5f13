"""Pages: which weights move together.

Weights are grouped by the set of labels of the runs that read them: a layer's own weights are one page, however often
the layer runs; a weight tied between two places is a page of its own, so that neither place drags in the other's
weights. Tables outside the layers of which only rows are read are apart from what is read whole: they may be read in
place. Small weights outside the layers are leftovers: a copy takes its time whatever its size.

A weight keeps the page that an earlier graph of the model gave it, and a leftover stays one: graphs that disagreed
would move it to and fro, and the later one would count a page more.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

from spcompile.ir import Page, Weight
from spcompile.module_tree import readable_path
from spcompile.passes.base import Program
from spcompile.passes.runs import Run

LEFTOVER_FRACTION = 64
"""Weights outside the layers that together are smaller than this part of the largest page stay on the device."""


def make_pages(
    program: Program, runs: Sequence[Run], gathered: Sequence[Mapping[Weight, int]]
) -> tuple[tuple[Page, ...], tuple[Weight, ...]]:
    readers: dict[Weight, dict[str, None]] = {}
    for run in runs:
        for weight in run.reads:
            readers.setdefault(weight, {})[run.label] = None
    known = {weight.name: page for page in program.known_pages for weight in page.weights}
    left_before = _known_leftovers(program)
    layer_labels = {run.label for run in runs if run.layer is not None}
    # Tables outside the layers, of which only rows are read, are pages of their own: they may be read in place.
    tables = {weight for run, rows in zip(runs, gathered, strict=True) if run.layer is None for weight in rows}
    used: dict[Page, None] = {}
    groups: dict[tuple[tuple[str, ...], bool], list[Weight]] = {}
    for weight, labels in readers.items():
        if weight in program.written:
            continue
        if weight.name in known:
            used[known[weight.name]] = None
        elif weight not in left_before:
            groups.setdefault((tuple(labels), weight in tables), []).append(weight)
    taken = {page.name for page in program.known_pages}
    fresh = []
    for (group, _), members in groups.items():
        in_layer = any(label in layer_labels for label in group)
        fresh.append((Page(_page_name(group, members, taken), tuple(_in_model_order(program, members))), in_layer))
    largest = max((page.nbytes for page in (*used, *(page for page, _ in fresh))), default=0)
    for page, in_layer in fresh:
        if in_layer or page.nbytes * LEFTOVER_FRACTION >= largest:
            used[page] = None
    paged = {weight for page in used for weight in page.weights}
    order = {weight: index for index, weight in enumerate(readers)}
    pages = sorted(used, key=lambda page: min(order.get(weight, len(order)) for weight in page.weights))
    return tuple(pages), tuple(weight for weight in readers if weight not in paged)


def _known_leftovers(program: Program) -> frozenset[Weight]:
    """Leftovers of earlier graphs that are small: large ones are those that a graph has updated in place."""
    largest = max((page.nbytes for page in program.known_pages), default=0)
    return frozenset(each for each in program.known_leftovers if each.nbytes * LEFTOVER_FRACTION < largest)


def gathers_of(
    pages: Sequence[Page], indices: Iterable[int], read: Container[Weight], rows_bytes: Mapping[Weight, int]
) -> Iterator[tuple[int, int]]:
    """Those of the pages of which a run reads nothing but rows, each with the bytes of those rows."""
    for index in indices:
        mine = [weight for weight in pages[index].weights if weight in read]
        if all(weight in rows_bytes for weight in mine):
            yield index, sum(rows_bytes[weight] for weight in mine)


def merge_pages(program: Program, runs: Sequence[Run], pages: Sequence[Page], merge_bytes: int) -> tuple[Page, ...]:
    """The pages, small ones that are read one behind the other in one place, and by nobody else, in one."""
    places: dict[Weight, list[int]] = {}
    for place, run in enumerate(runs):
        for weight in run.reads if run.layer is not None else ():
            places.setdefault(weight, []).append(place)
    merged: list[list[Page]] = []
    before: int | None = None  # where the last page of the open group is read
    for page in pages:
        read_at = {place for weight in page.weights for place in places.get(weight, (-1, -2))}
        here = read_at.pop() if len(read_at) == 1 and page not in program.known_pages else None
        taken_bytes = sum(each.nbytes for each in merged[-1]) if merged else 0
        if here is not None and before == here - 1 and taken_bytes + page.nbytes <= merge_bytes:
            merged[-1].append(page)
        else:
            merged.append([page])
        before = here
    return tuple(_one_page(program, group) for group in merged)


def _one_page(program: Program, group: Sequence[Page]) -> Page:
    if len(group) == 1:
        return group[0]
    weights = [weight for page in group for weight in page.weights]
    return Page(f"{group[0].name}..{group[-1].name}", tuple(_in_model_order(program, weights)))


def _page_name(labels: tuple[str, ...], members: Sequence[Weight], taken: set[str]) -> str:
    """The label, or the weight's own name where several places share it; made unique among all pages of the model."""
    name = labels[0] if len(labels) == 1 else readable_path(members[0].name)
    unique, suffix = name, 1
    while unique in taken:
        suffix += 1
        unique = f"{name}~{suffix}"
    taken.add(unique)
    return unique


def _in_model_order(program: Program, members: Sequence[Weight]) -> list[Weight]:
    """Host memory holds weights in the order of the model's parameters: neighbours there are neighbours in the page, so
    that one copy moves them all. (The graph's own order is that of use: 4 to 5 copies for each Llama layer.)"""
    return sorted(members, key=lambda weight: program.model_order.get(weight.name, len(program.model_order)))
