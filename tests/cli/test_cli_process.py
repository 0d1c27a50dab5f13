"""The command line as a process: what only a process shows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hand_plans import chain_in_batches

ROOT = Path(__file__).resolve().parent.parent.parent

COMMAND = [sys.executable, "-m", "spcompile"]

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def run(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *argv], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def test_help_comes_at_once() -> None:
    """Without what takes long to import; 0.1 s then."""
    done = run("plan", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    code = (
        "import sys, spcompile.cli; spcompile.cli.main(['plan', '--help'])\n"
        "slow = {'torch', 'numpy', 'sympy', 'networkx', 'matplotlib', 'transformers'}\n"
        "print(slow & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stderr == "set()\n"


def test_a_mistake_is_one_line_and_no_traceback() -> None:
    done = run("plan", "no_such_file.json", "--k", "2", "--budget", "1GB")
    expected = "spcompile: error: options 'k' and 'budget' contradict each other: give one of them\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_a_config_without_a_dtype_is_read_without_a_warning(tmp_path: Path) -> None:
    """transformers warns once per process whoever asks for the name that it has given up."""
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = {"architectures": ["LlamaModel"], "model_type": "llama", "vocab_size": 9, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = run("plan", "config.json", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0
    assert "deprecated" not in done.stderr


def test_a_plan_of_a_model_of_this_folder(tmp_path: Path) -> None:
    text = "from torch import nn\n\ndef make():\n    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))\n"
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    done = run("plan", "mine:make", "--k", "2", "--device", "cpu", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Plan for cpu: 3 pages")


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(chain_in_batches().to_json(), encoding="utf-8")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*COMMAND, "show", str(path)],
            env=ENVIRONMENT,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_an_interrupt(tmp_path: Path) -> None:
    text = "import os, signal\n\ndef make():\n    os.kill(os.getpid(), signal.SIGINT)\n    while True:\n        pass\n"
    (tmp_path / "waiting.py").write_text(text, encoding="utf-8")
    done = run("plan", "waiting:make", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "")
