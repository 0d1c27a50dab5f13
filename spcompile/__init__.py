"""Run PyTorch models that do not fit the GPU, by moving layers while the GPU computes.

    model = spcompile.offload(model)
    fast = torch.compile(model, backend="superpipeline", options={"k": 2, "m": 1})

See README.md for the options and docs/design.md for how it works.

The interface is imported when it is first used: importing torch takes seconds, and the command line answers ``--help``
without it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spcompile.errors import (
        OffloadError,
        OptionError,
        PlanFormatError,
        SuperpipelineError,
        VerificationError,
    )
    from spcompile.explain import explain, record
    from spcompile.ir import Plan
    from spcompile.offload import offload, refresh, restore
    from spcompile.planning import plan
    from spcompile.training import host_parameters

__all__ = [
    "OffloadError",
    "OptionError",
    "Plan",
    "PlanFormatError",
    "SuperpipelineError",
    "VerificationError",
    "explain",
    "host_parameters",
    "offload",
    "plan",
    "record",
    "refresh",
    "restore",
]

_MODULES = {
    "OffloadError": "errors",
    "OptionError": "errors",
    "Plan": "ir",
    "PlanFormatError": "errors",
    "SuperpipelineError": "errors",
    "VerificationError": "errors",
    "explain": "explain",
    "host_parameters": "training",
    "offload": "offload",
    "plan": "planning",
    "record": "explain",
    "refresh": "offload",
    "restore": "offload",
}
"""Where each name of the interface is defined."""


class _Package(ModuleType):
    """The package, with its interface imported on demand."""

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{self.__name__}.{_MODULES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Importing a submodule also makes it an attribute: ``offload`` stays the function of that name."""
        if isinstance(value, ModuleType) and _MODULES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
