"""TORCH_LOGS speaks to spcompile as to torch's own parts, whoever is imported first.

Each case is a process of its own: torch reads the variable once, while it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

COMPILE = """
import torch
layers = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(4)])
fast = torch.compile(layers, backend="superpipeline", options={"compiler": "eager", "k": 2, "device": "cpu"})
with torch.no_grad():
    fast(torch.ones(2, 8))
"""

SPEAK = """
import logging
for name in ("spcompile", "spcompile.runtime.store", "spcompile.passes.make_schedule", "spcompile.planning"):
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logging.getLogger(name).log(level, "said by %s", name)
"""

ORDERS = [
    "import torch",
    "import spcompile, torch",
    "from spcompile.ir import Plan; import torch",  # neither of these two imports torch by itself
    "import spcompile.backend",
]


def log_of(source: str, setting: str) -> list[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TORCH_LOGS": setting,
        "TORCH_LOGS_FORMAT": "%(levelname)s:%(name)s:%(message)s",
    }
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("order", "setting", "levels"),
    [
        *((order, "+spcompile", ["DEBUG", "INFO", "WARNING", "ERROR"]) for order in ORDERS),
        (ORDERS[0], "spcompile", ["INFO", "WARNING", "ERROR"]),
        (ORDERS[1], "-spcompile", ["ERROR"]),
    ],
)
def test_levels(order: str, setting: str, levels: list[str]) -> None:
    """Each message comes once, of every module."""
    names = ("spcompile", "spcompile.runtime.store", "spcompile.passes.make_schedule", "spcompile.planning")
    expected = [f"{level}:{name}:said by {name}" for name in names for level in levels]
    assert log_of(order + SPEAK, setting) == expected


def test_one_module_alone() -> None:
    lines = log_of(COMPILE, "+spcompile.backend")
    assert {line.split(":")[1] for line in lines if line.startswith(("DEBUG", "INFO"))} == {"spcompile.backend"}
    assert "DEBUG:spcompile.backend:the plan:" in lines


def test_info_is_one_line_for_each_plan() -> None:
    (line,) = log_of(COMPILE, "spcompile")
    assert line.startswith("INFO:spcompile.backend:4 steps; 4 pages: 0 resident, 4 streamed (k=2, m=1); ")


def test_debug_has_the_graph_after_each_pass_and_the_plan() -> None:
    lines = log_of(COMPILE, "+spcompile")
    passes = [line.rpartition("after ")[2] for line in lines if line.startswith("DEBUG:spcompile.pipeline:after ")]
    assert passes == [
        "sink_weight_views:",
        "sink_mutations:",
        "find_layers:",
        "make_schedule:",
        "split_segments:",
        "insert_transfers:",
    ]
    assert "Plan for cpu: 4 pages, 4 layers, 4 steps" in lines
