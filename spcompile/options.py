"""What a user may ask for, checked before anything is captured.

The options arrive as a plain dict from ``torch.compile(..., options={...})`` or as keywords of `spcompile.plan`. They
become one frozen `Options`, or one `OptionError` that names the option and lists what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spcompile.errors import OptionError

COMPILERS = ("inductor", "aot_eager", "eager")
"""How segments are compiled: by Inductor; uncompiled with Inductor's decompositions; uncompiled without them."""

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
"""What a budget given as text may end in, in capitals."""

DEVICES = r"cpu|cuda(:\d+)?"
"""The compute devices there are, as a pattern. ``cpu`` is the emulated one."""

MODES = (None, "default")
"""The values of torch.compile's ``mode=`` that mean nothing but "the usual"."""


@dataclass(frozen=True)
class Options:
    """Checked options.

    Attributes:
        k: most pages of the streamed window that hold slots at any step; None lets memory decide.
        m: pages evicted and loaded together; None means 1.
        budget: most bytes of device memory at any moment, as ``torch.cuda.max_memory_allocated`` counts them; None
            means what is free, less a margin.
        max_slowdown: the least memory with which an iteration is predicted to take at most this many times as long as
            with all weights in place.
        machine: name of the profile that iterations are timed on; None means the machine that is here.
        device: compute device as text; None means the device that the model was offloaded for.
        compiler: one of `COMPILERS`.
        verify: whether plan and graph are checked once per compile.
    """

    k: int | None = None
    m: int | None = None
    budget: int | None = None
    max_slowdown: float | None = None
    machine: str | None = None
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
        self._check_ways()
        if self.device is not None and not re.fullmatch(DEVICES, self.device):
            raise OptionError(f"option 'device' must be 'cuda', 'cuda:<index>' or 'cpu', not {self.device!r}")
        if self.compiler not in COMPILERS:
            raise OptionError(f"option 'compiler' must be one of {', '.join(COMPILERS)}, not {self.compiler!r}")
        if not isinstance(self.verify, bool):
            raise OptionError(f"option 'verify' must be True or False, not {self.verify!r}")

    def _check_ways(self) -> None:
        """There are three ways to ask for a plan, one at a time."""
        ways = [name for name in ("k", "budget", "max_slowdown") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise OptionError(f"options {' and '.join(map(repr, ways))} contradict each other: give one of them")
        slowdown = self.max_slowdown
        if slowdown is not None and (isinstance(slowdown, bool) or not isinstance(slowdown, (int, float))):
            raise OptionError(f"option 'max_slowdown' must be a number, 1 or more, not {slowdown!r}")
        if slowdown is not None and not 1 <= slowdown < math.inf:
            raise OptionError(f"option 'max_slowdown' must be a number, 1 or more, not {slowdown!r}")


def parse_bytes(value: object) -> int:
    """A budget: bytes, or text such as ``"8GiB"``, ``"7.5 GB"``, ``"800MB"``.

    Raises:
        OptionError: anything else, or not more than nothing.
    """
    problem = f"option 'budget' must be a number of bytes or text such as '8GiB' or '7.5GB', not {value!r}"
    nbytes = 0
    if isinstance(value, int) and not isinstance(value, bool):
        nbytes = value
    elif isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        unit = UNITS.get(match[2].upper() or "B") if match else None
        if match is None or unit is None:
            raise OptionError(problem)
        nbytes = int(float(match[1]) * unit)
    if nbytes <= 0:
        raise OptionError(problem)
    return nbytes


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
        if name not in allowed:
            raise OptionError(f"unknown option '{name}'; allowed are {', '.join(allowed)}")
    if given.get("budget") is not None:
        given["budget"] = parse_bytes(given["budget"])
    if given.get("device") is not None:
        given["device"] = str(given["device"])  # also of a torch.device
    return Options(**given)


def _check_count(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"option '{name}' must be a whole number of pages, 1 or more, not {value!r}")
