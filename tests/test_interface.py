"""``import spcompile`` is light, and its names are what they say, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import spcompile

ROOT = Path(__file__).resolve().parent.parent


def test_every_name_is_there_and_documented() -> None:
    assert sorted(spcompile._MODULES) == spcompile.__all__
    assert [name for name in spcompile.__all__ if not getattr(spcompile, name).__doc__] == []
    assert set(spcompile.__all__) <= set(dir(spcompile))


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'spcompile' has no attribute 'plans'"):
        _ = spcompile.plans  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "code",
    [
        "import sys, spcompile; assert 'torch' not in sys.modules",
        "import spcompile; assert callable(spcompile.offload)",
        "import spcompile.offload; assert callable(spcompile.offload)",
        "import spcompile.backend, spcompile; assert callable(spcompile.offload) and callable(spcompile.plan)",
        "from spcompile import offload, plan; import spcompile.offload as module; assert callable(offload)",
        "from spcompile import *; assert callable(host_parameters)",
    ],
)
def test_in_any_order(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
