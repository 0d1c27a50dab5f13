"""What a user may ask for, checked before anything is captured.

The options arrive as a plain dict from ``torch.compile(..., options={...})`` or as keywords of `spcompile.plan`. They
become one frozen `Options`, or one `OptionError` that names the option and lists what is allowed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spcompile.errors import OptionError

COMPILERS = ("inductor", "aot_eager", "eager")
"""How segments are compiled: by Inductor; uncompiled with Inductor's decompositions; uncompiled without them."""

PLANNED = ("budget", "max_slowdown")
"""Options of the interface that do not exist yet. They are refused by name instead of being called unknown."""

DEVICES = r"cpu|cuda(:\d+)?"
"""The compute devices there are, as a pattern. ``cpu`` is the emulated one."""

MODES = (None, "default")
"""The values of torch.compile's ``mode=`` that mean nothing but "the usual"."""


@dataclass(frozen=True)
class Options:
    """Checked options.

    Attributes:
        k: most pages of the streamed window that hold slots at any step; None lets free memory decide.
        m: pages evicted and loaded together; None means 1.
        device: compute device as text; None means the device that the model was offloaded for.
        compiler: one of `COMPILERS`.
        verify: whether plan and graph are checked once per compile.
    """

    k: int | None = None
    m: int | None = None
    device: str | None = None
    compiler: str = "inductor"
    verify: bool = True

    def __post_init__(self) -> None:
        _check_count("k", self.k)
        _check_count("m", self.m)
        if self.m is not None and self.k is None:
            raise OptionError("option 'm' needs option 'k': m pages of a window of k move together")
        if self.m is not None and self.k is not None and self.m > self.k:
            raise OptionError(f"option 'm' must be between 1 and k = {self.k}, not {self.m}")
        if self.device is not None and not re.fullmatch(DEVICES, str(self.device)):
            raise OptionError(f"option 'device' must be 'cuda', 'cuda:<index>' or 'cpu', not {self.device!r}")
        if self.compiler not in COMPILERS:
            raise OptionError(f"option 'compiler' must be one of {', '.join(COMPILERS)}, not {self.compiler!r}")
        if not isinstance(self.verify, bool):
            raise OptionError(f"option 'verify' must be True or False, not {self.verify!r}")


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Check what torch.compile handed over.

    Raises:
        OptionError: unknown, not yet available, of the wrong type, out of range or contradictory; also any ``mode``
            other than the default one.
    """
    if mode not in MODES:
        raise OptionError(f"mode={mode!r} is not available with the superpipeline backend; leave it out")
    given = dict(options or {})
    allowed = [field.name for field in dataclasses.fields(Options)]
    for name in given:
        if name in PLANNED:
            raise OptionError(f"option '{name}' is not available yet; give 'k' and 'm', or nothing at all")
        if name not in allowed:
            raise OptionError(f"unknown option '{name}'; allowed are {', '.join(allowed)}")
    return Options(**given)


def _check_count(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"option '{name}' must be a whole number of pages, 1 or more, not {value!r}")
