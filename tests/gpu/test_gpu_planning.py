"""Plans made without the GPU and without values are those that the GPU makes with both.

Each model is planned twice: on the GPU as it is, and in a process that sees no GPU, from the meta device. Both print
their ATen nodes and their plan.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend

import spcompile
from spcompile.cuda_attention import choose_operator
from spcompile.dry_run import capture_programs
from spcompile.options import parse_options
from tests.backend.test_architectures import ARCHITECTURES
from tests.test_planning_absent import CHOICES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROOT = Path(__file__).resolve().parent.parent.parent

OPTIONS: dict[str, Any] = {"device": "cuda", "k": 4, "m": 1, "machine": "h100"}

CASES = [
    (name, dtype, grad)
    for name in ("llama", "vit", "t5", "resnet")
    for dtype in ("float32", "bfloat16")
    for grad in (False, True)
]

SCRIPT = """
import sys
from tests.gpu.test_gpu_planning import print_absent
print_absent(sys.argv[1:])
"""


def described(name: str, dtype: str, grad: bool, device: str) -> dict[str, Any]:
    """The ATen nodes, with shapes, and the plan of one architecture on a device (``meta``: without values)."""
    torch._dynamo.reset()
    architecture = ARCHITECTURES[name]
    element = getattr(torch, dtype)
    with torch.device(device):
        model: nn.Module = architecture.build().to(element).train(grad)
    inputs = {key: _on(value, element, device) for key, value in architecture.inputs().items()}
    with torch.set_grad_enabled(grad):
        (program,) = capture_programs(model, (), inputs, parse_options(OPTIONS))
    plan = replace(program.planned(), other_bytes=0)  # what this process holds besides is not the plan's affair
    nodes = [
        [str(node.target), *(list(each.shape) for each in _tensors(node.meta.get("val")))]
        for graph in program.graphs
        for node in graph.graph.nodes
        if node.op == "call_function"
    ]
    return {"nodes": nodes, "plan": plan.to_json(), "peak_bytes": plan.peak_bytes()}


def _on(value: Any, dtype: torch.dtype, device: str) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [each for each in values if isinstance(each, torch.Tensor)]


def print_absent(cases: list[str]) -> None:
    """What the process without a GPU does: one line of JSON for each case, given as JSON."""
    assert not torch.cuda.is_available()
    for case in cases:
        name, dtype, grad = json.loads(case)
        sys.stdout.write(json.dumps(described(name, dtype, grad, "meta")) + "\n")


@pytest.fixture(scope="module")
def absent() -> dict[tuple[str, str, bool], dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(json.dumps, CASES)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(CASES, lines, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_without_a_gpu_the_plan_is_that_of_the_gpu(case: tuple[str, str, bool], absent: dict[Any, Any]) -> None:
    name, dtype, grad = case
    here = described(name, dtype, grad, "cuda")
    assert not differences(absent[case], here)


def differences(absent: dict[str, Any], here: dict[str, Any]) -> str:
    """The first lines in which two descriptions differ, nodes before plans; "" where none do."""
    one, other = ([*map(json.dumps, each["nodes"]), *each["plan"].splitlines()] for each in (absent, here))
    changed = difflib.unified_diff(one, other, "without a GPU", "on the GPU", n=1, lineterm="")
    return "\n".join(itertools.islice(changed, 30))


@pytest.mark.parametrize("name", ["llama", "vit", "t5", "resnet"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_that_is_not_on_the_gpu_has_the_plan_of_one_that_is(name: str, grad: bool, device: str) -> None:
    """Re-homing: traced with fake CUDA tensors."""
    there, here = (described(name, "bfloat16", grad, each) for each in (device, "cuda"))
    assert there == here


@pytest.mark.parametrize("case", CHOICES)
def test_the_chosen_operator_is_what_torch_chooses(case: str) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the rules are those of compute capability 9.0")
    tensors, options, expected = CHOICES[case]
    query, key, value = (_like(each) for each in tensors)
    others = {name: each for name, each in options.items() if name != "mask"}
    mask = _like(options["mask"]) if "mask" in options else None
    chosen = torch._fused_sdp_choice(
        query, key, value, mask, others.get("dropout_p", 0.0), others.get("is_causal", False),
        enable_gqa=others.get("enable_gqa", False),
    )  # fmt: skip
    assert SDPBackend(chosen) == expected == choose_operator(query, key, value, mask, **others)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def test_a_plan_of_a_large_model_takes_no_device_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(16384, 16384, bias=False) for _ in range(8)))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        plan = spcompile.plan(model, (torch.empty(1, 16384, device="meta"),), k=2, m=1, machine="h100")
    assert plan.device == "cuda:0"
    assert plan.weights_bytes == 8 << 30
    assert torch.cuda.max_memory_allocated() - before < 1 << 20  # importing Inductor takes a few bytes
