"""The training examples: the curve of the streamed model is the plain one, the loss falls, the exit code says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from examples import train_characters, train_digits
from spcompile.runtime.store import find_store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

WIDTH = 32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another take longer than models of this size, where other processes run too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_streamed(run: train_digits.Run | train_characters.Run) -> None:
    store = find_store(run.model.parameters())
    assert store is not None
    assert all(runtime.plan.bytes_moved for runtime in store.runtimes())


def digit_runs(n_epochs: int, k: int) -> tuple[train_digits.Run, train_digits.Run]:
    digits, _ = train_digits.load(DEVICE)
    torch.manual_seed(0)
    reference = train_digits.plain(train_digits.VisionTransformer(WIDTH), DEVICE)
    torch.manual_seed(0)
    run = train_digits.streamed(train_digits.VisionTransformer(WIDTH), k)
    for each in (reference, run):
        train_digits.train(each, digits, n_epochs, seed=0)
    return reference, run


def test_digits_train_as_with_plain_pytorch() -> None:
    reference, run = digit_runs(2, k=3)
    assert run.epochs == reference.epochs
    assert train_digits.equal_weights(run.model, reference.model)
    assert train_digits.mean(run.epochs[1]) < train_digits.mean(run.epochs[0]) - 0.05
    assert_streamed(run)


def test_characters_train_as_with_plain_pytorch() -> None:
    text = train_characters.load()
    torch.manual_seed(0)
    reference = train_characters.plain(train_characters.LanguageModel(len(text.alphabet), WIDTH), DEVICE)
    torch.manual_seed(0)
    run = train_characters.streamed(train_characters.LanguageModel(len(text.alphabet), WIDTH), 2)
    for each in (reference, run):
        train_characters.train(each, text, 30, 0, DEVICE)
    difference = train_characters.largest_difference(run.losses, reference.losses)
    assert difference <= (0 if DEVICE == "cpu" else train_characters.NEAR)
    assert train_characters.mean(run.losses[-5:]) < train_characters.mean(run.losses[:5]) - 0.5
    assert_streamed(run)
    assert train_characters.write(run, text, 3, 0, DEVICE).startswith('The "assert" statement')


@pytest.mark.parametrize("fault", ["", "accuracy", "curve"])
def test_digits_say_what_they_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five batches; the accuracy after them is low."""
    monkeypatch.setattr(train_digits, "BATCH", 256)
    monkeypatch.setattr(train_digits, "ASKED_ACCURACY", 1.0 if fault == "accuracy" else 0.0)
    if fault == "curve":
        monkeypatch.setattr(train_digits, "streamed", disturbed(train_digits.streamed))
    assert train_digits.main(["--epochs", "1"]) == (1 if fault else 0)
    assert f"losses and weights equal bit by bit  {'NO' if fault == 'curve' else 'yes':>10}" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["", "loss", "curve"])
def test_characters_say_what_they_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_characters, "ASKED_NATS", 0.0 if fault == "loss" else 100.0)
    monkeypatch.setattr(train_characters, "write", lambda *_: "")
    if fault == "curve":
        monkeypatch.setattr(train_characters, "streamed", disturbed(train_characters.streamed))
    assert train_characters.main(["--iterations", "3"]) == (1 if fault else 0)


def disturbed(start: Any) -> Any:
    """As ``start``, of a model with another bias."""

    def start_disturbed(model: Any, k: int) -> Any:
        with torch.no_grad():
            model.head.bias[0] += 0.5
        return start(model, k)

    return start_disturbed
