"""What spcompile raises. Every message says what was wrong, where, and what to do about it."""

from __future__ import annotations


class SuperpipelineError(Exception):
    """Base of everything that spcompile raises on purpose."""


class OptionError(SuperpipelineError, ValueError):
    """An option is unknown, out of range, or contradicts another one."""


class PlanFormatError(SuperpipelineError, ValueError):
    """A text is not a plan, or one of another format version."""


class VerificationError(SuperpipelineError):
    """A plan or graph breaks a rule. The message is the printed plan or graph with a mark under each guilty line."""


class OffloadError(SuperpipelineError, RuntimeError):
    """A model cannot be offloaded, restored or run as it stands (the message says which weight, and why)."""


class CommandError(SuperpipelineError):
    """The command line was asked for something that cannot be done."""
