"""Where a plan goes: to stdout, or into a file whose suffix says what it is to be.

    .txt           the plan as text, with its whole schedule and all details; `Plan.from_text` reads it
    .json          the plan as JSON, which `Plan.from_json` reads; ``spcompile show`` reads both
    .trace.json    its lanes as a Chrome trace, which Perfetto opens
    .html          the page
    .svg, .png     the picture

Several graphs (a model with graph breaks) are one text, one list in JSON, and one picture.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spcompile.errors import CommandError

if TYPE_CHECKING:
    from spcompile.ir import Plan, Plans
    from spcompile.planner.choose import TradeoffPoint

SUFFIXES = (".trace.json", ".json", ".txt", ".html", ".svg", ".png")

TEXTS = (".json", ".txt")
"""What is written here; the others are drawn by `Plan.visualize`."""


def check_output(path: Path | None) -> None:
    """Refuse a file that cannot be written before the work is done.

    Raises:
        CommandError: its suffix says nothing, or its folder is missing or read-only.
    """
    if path is None:
        return
    suffix_of(path)
    folder = path.parent
    if not folder.is_dir():
        raise CommandError(f"cannot write {path}: there is no folder {folder} (make it first)")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise CommandError(f"cannot write {path}: it is a folder, or not writable for you (choose another place)")


def suffix_of(path: Path) -> str:
    """The one of `SUFFIXES` that a file name ends in.

    Raises:
        CommandError: none of them.
    """
    suffix = next((each for each in SUFFIXES if path.name.endswith(each)), None)
    if suffix is None:
        raise CommandError(f"cannot tell from {path.name!r} what to write: end it in one of {', '.join(SUFFIXES)}")
    return suffix


def emit_plans(plans: Sequence[Plan], path: Path | None, form: str) -> None:
    """Print plans, or write them.

    Raises:
        CommandError: the file cannot be written, or not drawn.
    """
    if path is not None and suffix_of(path) not in TEXTS:
        _draw(plans, path)
        return
    if _wants_json(path, form):
        emit_text(_json(plans), path)
    elif path is None:
        emit_text(str(_one_or_all(plans)), path)
    else:
        emit_text("\n\n".join(plan.to_text() for plan in plans), path)


def emit_tradeoff(plan: Plan, points: Sequence[TradeoffPoint], path: Path | None, form: str) -> None:
    """Print the curve of memory against time, or write it."""
    emit_text(_curve_json(points) if _wants_json(path, form) else _curve_text(plan, points), path)


def emit_text(text: str, path: Path | None) -> None:
    if path is None:
        sys.stdout.write(text + "\n")
        return
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror} (choose another place)") from error


def _wants_json(path: Path | None, form: str) -> bool:
    return form == "json" if path is None else suffix_of(path) == ".json"


def _json(plans: Sequence[Plan]) -> str:
    texts = [plan.to_json() for plan in plans]
    return texts[0] if len(texts) == 1 else "[\n" + ",\n".join(texts) + "\n]"


def _one_or_all(plans: Sequence[Plan]) -> Plan | Plans:
    from spcompile.ir import Plans

    return plans[0] if len(plans) == 1 else Plans(plans)


def _draw(plans: Sequence[Plan], path: Path) -> None:
    try:
        _one_or_all(plans).visualize(path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror} (choose another place)") from error


def _curve_json(points: Sequence[TradeoffPoint]) -> str:
    rows = [
        {
            "peak_bytes": point.peak_bytes,
            "iteration_us": point.iteration_us,
            "resident_pages": len(point.plan.residents),
            "bytes_moved": point.plan.bytes_moved,
        }
        for point in points
    ]
    return json.dumps(rows, indent=1)


def _curve_text(plan: Plan, points: Sequence[TradeoffPoint]) -> str:
    """One line for each plan on the curve, and one for the plan itself, which may lie off it."""
    from spcompile.planner.simulate import predict_iteration_us

    assert plan.machine is not None, "its trade-off was found"
    lines = [f"note: {plan.note}"] if plan.note else []
    lines.append(f"{'device memory':>15}  {'iteration':>12}  {'slowdown':>8}  {'resident':>10}  {'moved':>11}")
    lines += (_curve_row(point.plan, point.peak_bytes, point.iteration_us) for point in points)
    asked_for = _curve_row(plan, plan.peak_bytes(), predict_iteration_us(plan, plan.machine))
    return "\n".join([*lines, f"{asked_for}  <- as asked for"])


def _curve_row(plan: Plan, peak_bytes: int, iteration_us: float) -> str:
    from spcompile.text import format_bytes

    compute_us = sum(step.compute_us for step in plan.steps)
    slowdown = f"{iteration_us / compute_us:.2f}x" if compute_us else "-"
    residents = f"{len(plan.residents)} of {len(plan.pages)}"
    row = f"{format_bytes(peak_bytes):>15}  {iteration_us / 1e3:>9,.2f} ms  {slowdown:>8}"
    return f"{row}  {residents:>10}  {format_bytes(plan.bytes_moved):>11}"
