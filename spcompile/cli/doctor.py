"""``spcompile doctor``: what is here, what is wrong, and how to mend it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from spcompile.errors import CommandError

if TYPE_CHECKING:
    from spcompile.cli.checks import Finding


def run(*, as_json: bool) -> int:
    """Report, and say by the exit code whether models can be run: 0 if so, 1 if not."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: one of its libraries is missing
        raise CommandError(
            f"torch cannot be imported ({error}): pip install torch, or mend its installation"
        ) from error
    from spcompile.cli.checks import find_all

    findings = list(find_all())
    sys.stdout.write((_as_json(findings) if as_json else format_findings(findings)) + "\n")
    return int(any(each.prevents for each in findings))


def format_findings(findings: Sequence[Finding]) -> str:
    """A line for each finding, then what is wrong, the worst first, each with what to do."""
    columns = max((len(each.name) for each in findings), default=0)
    lines = [f"{'!' if each.problem else ' '} {each.name:<{columns}}  {each.value}" for each in findings]
    faults = sorted((each for each in findings if each.problem), key=lambda each: not each.prevents)
    lines.append("")
    for each in faults:
        weight = "wrong" if each.prevents else "note"
        lines.append(f"{weight}: {each.name}: {each.problem}. To mend it: {each.remedy}")
    if not faults:
        lines.append("Nothing is wrong.")
    return "\n".join(lines)


def _as_json(findings: Sequence[Finding]) -> str:
    report = {"ok": not any(each.prevents for each in findings), "findings": [asdict(each) for each in findings]}
    return json.dumps(report, indent=1)
