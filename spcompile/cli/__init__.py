"""The command line, ``spcompile`` and ``python -m spcompile``: ``doctor``, ``plan`` and ``show``.

Nothing in this package imports torch, or what does, before a command needs it: ``--help`` and mistakes are answered at
once.
"""

from __future__ import annotations

from spcompile.cli.main import main

__all__ = ["main"]
