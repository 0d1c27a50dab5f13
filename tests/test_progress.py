"""Progress of long work: on a terminal only, after a second only, and at no cost elsewhere."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import spcompile
from spcompile import progress as progress_module
from spcompile.progress import is_shown, progress
from spcompile.runtime.host import BLOCK_BYTES, TOUCH_BYTES, HostBlock
from tests.hand_plans import MIB

ROOT = Path(__file__).resolve().parent.parent

LONG_WORK = """
import time
from spcompile.progress import progress
with progress("{what}", 4 * 2**30, "B") as advance:
    for _ in range(8):
        time.sleep({seconds} / 8)
        advance(2**29)
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def terminal() -> Iterator[Terminal]:
    """A terminal on which everything shows at once. (No fixture: between them and tests, pytest sets stderr anew.)"""
    screen = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SPCOMPILE_PROGRESS", raising=False)
        patch.setattr(sys, "stderr", screen)
        patch.setattr(progress_module, "DELAY_S", 1e-6)
        patch.setattr(progress_module, "INTERVAL_S", 0.0)
        yield screen


def on_a_terminal(source: str, **environment: str) -> str:
    """What a process writes to its stderr, which is a terminal."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", source], cwd=ROOT, stderr=slave, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment
    ) as process:
        os.close(slave)
        written = b""
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # what Linux says of a terminal whose other side is closed
                break
            if not part:
                break
            written += part
    os.close(master)
    assert process.returncode == 0, written
    return written.decode()


def in_a_pipe(source: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    return done.stderr


def test_on_a_terminal_long_work_shows_rate_and_time_left_and_goes_away() -> None:
    """Also on one that does not tell its size. Short work before it and after it shows nothing."""
    short, long = LONG_WORK.format(what="short", seconds=0.1), LONG_WORK.format(what="long", seconds=1.6)
    written = on_a_terminal(short + long + short, SPCOMPILE_PROGRESS="")
    states = [state for state in written.split("\r") if state.strip()]
    assert states
    for state in states:
        assert re.fullmatch(r"long: +\d+%\|.*\| \d\.\d+G/4\.29G \[00:0\d<00:0\d, *\d\.\d+GB/s\]\s*", state), state
    assert written.endswith("\r")
    assert written.split("\r")[-2].strip() == ""  # wiped out


def test_elsewhere_long_work_shows_nothing_unless_it_is_asked_for() -> None:
    long, asked_for = LONG_WORK.format(what="long", seconds=1.2), LONG_WORK.format(what="asked for", seconds=1.2)
    written = in_a_pipe(
        f"{long}\nimport os\nos.environ['SPCOMPILE_PROGRESS'] = '1'\n{asked_for}", SPCOMPILE_PROGRESS=""
    )
    assert {line.partition(":")[0] for line in written.splitlines() if line.strip()} == {"asked for"}


def test_it_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal() as screen:
        assert is_shown()
        monkeypatch.setenv("SPCOMPILE_PROGRESS", "0")
        assert not is_shown()
        with progress("work", 1, "piece") as advance:
            advance(1)
    assert screen.getvalue() == ""


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_no_terminal(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None) -> None:
    monkeypatch.delenv("SPCOMPILE_PROGRESS", raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    assert not is_shown()


def test_closed_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.delenv("SPCOMPILE_PROGRESS", raising=False)
    monkeypatch.setattr(sys, "stderr", closed)
    assert not is_shown()


def test_where_nothing_is_shown_nothing_is_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPCOMPILE_PROGRESS", "0")
    monkeypatch.setitem(sys.modules, "tqdm", None)  # an import of it would fail
    begin_s = time.perf_counter()
    with progress("work", 10_000, "piece") as advance:
        for _ in range(10_000):
            advance(1)
    assert time.perf_counter() - begin_s < 0.5  # about a millisecond: calls of a function that does nothing


# Who reports.


def last_count(screen: Terminal, what: str) -> str:
    """The last count that a piece of work showed."""
    states = [state for state in screen.getvalue().split("\r") if state.startswith(what)]
    assert states, screen.getvalue()
    found = re.search(r"\| (\S+/\S+) \[", states[-1])
    assert found is not None
    return found[1]


def test_offload_and_restore_report_bytes() -> None:
    one, two = nn.Linear(1000, 2000), nn.Linear(2000, 1000)
    two.weight = nn.Parameter(one.weight.T)  # one storage, counted once
    model = nn.Sequential(one, two)
    with terminal() as screen:
        spcompile.offload(model, device="cpu")
        spcompile.restore(model)
    assert last_count(screen, "offloading weights") == "8.01M/8.01M"
    assert last_count(screen, "restoring weights") == "8.01M/8.01M"


def test_a_block_reports_every_byte_once() -> None:
    source = torch.zeros(2 * TOUCH_BYTES + 3, dtype=torch.uint8)
    told: list[int] = []
    HostBlock.filled([(0, source), (3 * TOUCH_BYTES, source[:MIB])], torch.device("cpu"), told.append)
    assert told == [TOUCH_BYTES, TOUCH_BYTES, 3, MIB]
    assert BLOCK_BYTES % TOUCH_BYTES == 0


def test_compiling_reports_distinct_segments() -> None:
    torch._dynamo.reset()
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])
    fast = torch.compile(layers, backend="superpipeline", options={"compiler": "eager", "k": 2, "device": "cpu"})
    with terminal() as screen, torch.no_grad():
        fast(torch.ones(2, 8))
    assert last_count(screen, "compiling segments, 1 distinct of 4") == "1/1"


def test_models_that_come_as_they_are_report_bytes_that_move() -> None:
    torch._dynamo.reset()
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(500, 500, bias=False), nn.Tanh()) for _ in range(4)])
    fast = torch.compile(layers, backend="superpipeline", options={"compiler": "eager", "k": 2, "device": "cpu"})
    with terminal() as screen, torch.no_grad():
        fast(torch.ones(2, 500))
    assert last_count(screen, "moving weights to host memory") == "4.00M/4.00M"
