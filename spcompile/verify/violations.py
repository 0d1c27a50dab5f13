"""What a verifier found, and the printed plan or graph with a mark under each guilty line.

Verifiers return all violations of what they check, as the number of a line and a sentence. This file knows neither
plans nor graphs: it puts marks into any text that comes as lines.

    >  2  run       layers_2    reads #2
       ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
       layers.2 is read at step 2 but sits in no slot then: it has no interval
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spcompile.errors import VerificationError

MESSAGE_COLUMNS = 100
"""Messages are wrapped at this column. The lines of the text are shown as they are."""


@dataclass(frozen=True, order=True)
class Violation:
    """One broken rule.

    Attributes:
        line: index of the guilty line in the printed text, from 0.
        message: one sentence that says what breaks.
    """

    line: int
    message: str


def render(lines: Sequence[str], violations: Iterable[Violation]) -> str:
    """The whole text, with a mark and the messages under each guilty line.

    Violations of one line share its mark and keep their order. One that points outside the text is shown at its end.
    """
    messages: dict[int, list[str]] = {}
    for violation in violations:
        index = violation.line if 0 <= violation.line < len(lines) else len(lines)
        messages.setdefault(index, []).append(violation.message)
    shown: list[str] = []
    for index, line in enumerate(lines):
        shown.append(line)
        if index in messages:
            indent = " " * (len(line) - len(line.lstrip("> ")))
            shown.append(indent + "^" * len(line.strip("> ")))
            shown.extend(each for message in messages[index] for each in _wrap(message, indent))
    shown.extend(each for message in messages.get(len(lines), ()) for each in _wrap(message, ""))
    return "\n".join(shown)


def raise_if_any(subject: str, lines: Sequence[str], violations: Sequence[Violation]) -> None:
    """Do nothing where nothing was found.

    Args:
        subject: what was checked, as it should be named in the message: ``"the plan"``.
        lines: its printed text.
        violations: what was found in it.

    Raises:
        VerificationError: with the count, the rendered text, and the first message once more at the end, where a
            terminal shows it.
    """
    if not violations:
        return
    rules = "1 violation" if len(violations) == 1 else f"{len(violations)} violations"
    first = violations[0].message
    raise VerificationError(f"{subject} has {rules}:\n\n{render(lines, violations)}\n\nThe first of {rules}: {first}")


def _wrap(message: str, indent: str) -> list[str]:
    return textwrap.wrap(message, MESSAGE_COLUMNS, initial_indent=indent, subsequent_indent=indent)
