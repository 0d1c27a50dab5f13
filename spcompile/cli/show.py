"""``spcompile show plan.json``, or ``plan.txt``."""

from __future__ import annotations

import json
from pathlib import Path

from spcompile.cli.output import check_output, emit_plans
from spcompile.errors import CommandError, PlanFormatError
from spcompile.ir import Plan


def run(source: Path, output: Path | None, form: str) -> int:
    """Print or draw what ``spcompile plan -o plan.json`` wrote."""
    check_output(output)
    emit_plans(_read(source), output, form)
    return 0


def _read(path: Path) -> list[Plan]:
    """The plan, or the plans, of a file.

    Raises:
        CommandError: it cannot be read, or is no plan.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(
            f"cannot read {path}: {error.strerror} ('spcompile plan MODEL -o {path.name}' writes one)"
        ) from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is no plan, but binary") from error
    try:
        if text.startswith("Plan for "):
            return [Plan.from_text(text)]
        if not text.lstrip().startswith("["):
            return [Plan.from_json(text)]
        plans = [Plan.from_json(json.dumps(each)) for each in json.loads(text)]
    except (PlanFormatError, ValueError) as error:
        raise CommandError(f"{path}: {error} ('spcompile plan MODEL -o {path.name}' writes a plan)") from error
    if not plans:
        raise CommandError(f"{path}: there is no plan in it ('spcompile plan MODEL -o {path.name}' writes one)")
    return plans
