"""The environment variables that spcompile reads: all of them, here and nowhere else.

Each has an entry in `VARIABLES` and a function that returns what it says, read anew with every call. Options of
torch.compile decide what is compiled; these decide only what is written beside it, so a program runs alike whatever
they are. docs/environment.md lists them for users, and a test compares.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from spcompile.errors import OptionError


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, what it may be, and what it does."""

    name: str
    values: str
    meaning: str


CACHE_DIR = Variable(
    "SPCOMPILE_CACHE_DIR",
    "a folder; default `$XDG_CACHE_HOME/spcompile` or `~/.cache/spcompile`",
    "where measurements of this machine's GPUs are remembered",
)
DUMP_DIR = Variable(
    "SPCOMPILE_DUMP_DIR",
    "a folder; default none",
    "where every graph that is planned or compiled leaves its graph after each pass, its plan and the rewritten graph",
)
PROGRESS = Variable(
    "SPCOMPILE_PROGRESS",
    "`0` or `1`; default `1` where stderr is a terminal",
    "whether work of more than a second shows how far it has come",
)

VARIABLES: tuple[Variable, ...] = (CACHE_DIR, DUMP_DIR, PROGRESS)


def cache_folder() -> Path:
    """Where measurements are remembered: ``$SPCOMPILE_CACHE_DIR``, or the user's own folder for caches."""
    chosen = os.environ.get(CACHE_DIR.name)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spcompile"


def dump_folder() -> Path | None:
    """Where compiled graphs leave their texts: ``$SPCOMPILE_DUMP_DIR``; None: nowhere."""
    chosen = os.environ.get(DUMP_DIR.name)
    return Path(chosen) if chosen else None


def wants_progress() -> bool | None:
    """Whether ``$SPCOMPILE_PROGRESS`` asks for progress to be shown; None where it does not say.

    Raises:
        OptionError: it is neither 0 nor 1.
    """
    chosen = os.environ.get(PROGRESS.name)
    if not chosen:
        return None
    if chosen not in ("0", "1"):
        raise OptionError(f"{PROGRESS.name} must be 0 or 1, not {chosen!r}")
    return chosen == "1"
