"""Run PyTorch models that do not fit the GPU, by moving layers while the GPU computes.

    model = spcompile.offload(model)
    fast = torch.compile(model, backend="superpipeline", options={"k": 2, "m": 1})

See README.md for the options and docs/design.md for how it works.
"""

from __future__ import annotations

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
