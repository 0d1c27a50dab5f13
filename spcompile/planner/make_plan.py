"""From pages and steps to a plan: what stays, what is streamed, when, and through which slots.

What: the one entry of the planner. Explicit k and m give the window of the Superpipeline paper (arXiv 2410.08791):
nothing is resident, and every page moves once per use. With a capacity in bytes, or a slowdown that may be, the
placement that is predicted to be fastest, or smallest, is chosen (``choose.py``).

The odd cases: with k of at least all pages of the model, or memory for all, nothing moves. A page that no step reads
stays on the host, unless all pages are resident.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from spcompile.errors import OptionError
from spcompile.ir import Page, Plan, Step, Weight
from spcompile.planner.choose import choose_fastest, choose_leanest
from spcompile.planner.streaming import stream


def make_plan(
    *,
    device: str,
    pages: tuple[Page, ...],
    leftovers: tuple[Weight, ...],
    steps: tuple[Step, ...],
    wraps: bool,
    **wanted: Any,
) -> Plan:
    """Plan a graph of which nothing but its weights is known; arguments as in `Plan` and `place_graph`."""
    return place_graph(Plan(device, 1, 1, wraps, pages, leftovers, (), steps, (), 1, ()), **wanted)


def place_graph(
    graph: Plan,
    *,
    k: int | None = None,
    m: int | None = None,
    capacity_bytes: int | None = None,
    max_slowdown: float | None = None,
    residents: Collection[int] = (),
    elsewhere_pages: int = 0,
    alike_bytes: int = 0,
    kept_bytes: int = 0,
) -> Plan:
    """Plan one graph.

    Args:
        graph: pages, leftovers, steps and what is known of costs; where it is placed so far does not matter.
        k: most pages that hold slots at any step; all pages or more: everything is resident. Otherwise nothing is.
        m: pages evicted and then loaded together, 1 by default. Needs k.
        capacity_bytes: device memory for weights, leftovers included. Only used without k; None: room for all.
        max_slowdown: the smallest plan whose iteration takes at most this many times as long as with all weights in
            place. Only used without k; needs a machine.
        residents: indices of pages that another graph of the model already keeps on the device. Without k they are
            kept before all others, as far as they fit.
        elsewhere_pages: pages that only other graphs of the model read. k counts them, too: only where it covers them
            all is everything resident.
        alike_bytes: of the weights that only other graphs read, those of layers like this graph's. They have their
            share of ``capacity_bytes``: pieces between graph breaks would take all of it one after the other, and a
            graph that is called for many layers has no loads for what stays.
        kept_bytes: what other graphs keep on the device; it goes only where this graph needs it for its smallest plan.

    Raises:
        OptionError: k or m is out of range, k is less than the most pages that one step reads, or ``capacity_bytes``
            has no room for the smallest plan.
    """
    _check_options(k, m)
    n_pages = len(graph.pages)
    if k is not None and k < n_pages + elsewhere_pages:
        return stream(graph, (), k, m or 1)
    if k is not None or (capacity_bytes is None and max_slowdown is None):
        return stream(graph, range(n_pages), n_pages, max(1, min(m or 1, n_pages)))
    if max_slowdown is not None:
        return choose_leanest(graph, max_slowdown, capacity_bytes, residents)
    assert capacity_bytes is not None
    left_bytes = max(0, capacity_bytes - kept_bytes)
    share_bytes = left_bytes * graph.weights_bytes // max(1, graph.weights_bytes + alike_bytes)
    return choose_fastest(graph, capacity_bytes, residents, share_bytes=share_bytes)


def _check_options(k: int | None, m: int | None) -> None:
    if k is not None and k < 1:
        raise OptionError(f"option 'k' must be a number of pages, 1 or more, not {k}")
    if m is None:
        return
    if k is None:
        raise OptionError(f"option 'm' needs option 'k', and must be between 1 and k; m = {m} was given alone")
    if not 1 <= m <= k:
        raise OptionError(f"option 'm' must be between 1 and k = {k}, not {m}")
