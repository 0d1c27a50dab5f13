"""Hugging Face Trainer on a streamed model: what it logs, evaluates and saves is that with every page resident.

The ways that work: ``model.compile(backend="superpipeline", options=...)`` in place, of a CPU model or an offloaded
one, and ``torch.compile`` of ``model.forward``. The model stays what it is, so Trainer reads its signature and saves
its weights under their own names.

The odd cases: what torch.compile returns for a model is taken only with its columns and labels named, and its weights
are saved under names with a prefix, as with any backend; and the argument ``torch_compile_backend`` is checked by
accelerate against a list of its own, which has no place for other packages' backends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset

import spcompile
from spcompile.runtime.store import find_store

pytest.importorskip("accelerate", reason="transformers.Trainer needs it")

STEPS, SAVED_STEP = 6, 4

STREAMED: dict[str, Any] = {"k": 2, "m": 1, "compiler": "eager"}

RESIDENT: dict[str, Any] = {**STREAMED, "k": 1000}

NAMED_COLUMNS: dict[str, Any] = {"remove_unused_columns": False, "label_names": ["labels"]}
"""What Trainer otherwise takes from the signature of the model, which a compiled one does not show."""


class Sentences(Dataset[dict[str, Tensor]]):
    """Numbers that count up, 40 sentences of 12."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = (torch.arange(12) + index) % 29
        return {"input_ids": tokens, "labels": tokens}


def build(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        attention_dropout=dropout,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


# Ways to hand a model over.


def in_place(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    model.compile(backend="superpipeline", options=options)
    return model


def offloaded(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    return in_place(spcompile.offload(model), options)


def its_forward(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="superpipeline", options=options)
    return model


def compiled(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    fast: nn.Module = torch.compile(model, backend="superpipeline", options=options)  # type: ignore[assignment]
    return fast


def plain(model: nn.Module, _options: dict[str, Any]) -> nn.Module:
    return model


Way = Callable[[nn.Module, dict[str, Any]], nn.Module]

ON_THE_CPU: dict[str, Way] = {"in place": in_place, "its forward": its_forward, "compiled": compiled}


@dataclass(frozen=True)
class Training:
    """How a model is trained, and where its checkpoints go."""

    folder: Path
    way: Way = in_place
    options: dict[str, Any] | None = None
    dropout: float = 0.2
    on_host: bool = False
    """Whether the optimizer is made of the host's parameters."""

    resume_from: Path | None = None

    def run(self) -> Seen:
        torch._dynamo.reset()
        model = build(self.dropout)
        trainer = transformers.Trainer(
            self.way(model, self.options or STREAMED),
            arguments(self.folder, use_cpu=self.way is not offloaded, **self.names),
            train_dataset=Sentences(),
            eval_dataset=Sentences(),
            optimizers=(self.optimizer(model), None),
        )
        trainer.train(resume_from_checkpoint=None if self.resume_from is None else str(self.resume_from))
        store = find_store(model.parameters())
        plans = [] if store is None else [runtime.plan for runtime in store.runtimes()]
        log = trainer.state.log_history[:-1]  # the last entry has times
        return Seen(model, log, sum(plan.bytes_moved for plan in plans))

    @property
    def names(self) -> dict[str, Any]:
        return NAMED_COLUMNS if self.way is compiled else {}

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer | None:
        return torch.optim.AdamW(spcompile.host_parameters(model), lr=0.02) if self.on_host else None


def arguments(folder: Path, **others: Any) -> Any:
    """Accumulation, clipping, a schedule, evaluations in between and checkpoints."""
    return transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        learning_rate=0.02,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_steps=STEPS,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=SAVED_STEP,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **others,
    )


@dataclass(frozen=True)
class Seen:
    """The trained model, what Trainer logged, and the bytes that one run of each graph moves."""

    model: nn.Module
    log: list[dict[str, float]]
    bytes_moved: int

    def values(self, key: str) -> list[float]:
        return [entry[key] for entry in self.log if key in entry]


def assert_same(seen: Seen, expected: Seen) -> None:
    for key, count in (("loss", STEPS), ("grad_norm", STEPS), ("learning_rate", STEPS), ("eval_loss", STEPS // 3)):
        assert len(expected.values(key)) == count, key
        assert seen.values(key) == expected.values(key), key
    assert_same_weights(seen.model, expected.model)


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    own = expected.state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in model.state_dict().items())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another take longer than models of this size, where other processes run too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, Seen]:
    training = Training(tmp_path_factory.mktemp("resident"), options=RESIDENT)
    seen = training.run()
    assert seen.bytes_moved == 0
    assert seen.values("loss")[-1] < seen.values("loss")[0] - 0.1
    return training, seen


@pytest.mark.parametrize("way", ON_THE_CPU)
def test_training_is_exact(way: str, resident: tuple[Training, Seen], tmp_path: Path) -> None:
    seen = Training(tmp_path, ON_THE_CPU[way]).run()
    assert_same(seen, resident[1])
    assert seen.bytes_moved > 0
    assert {each.device.type for each in seen.model.parameters()} == {"cpu"}


@pytest.mark.parametrize("on_host", [False, True])
def test_training_an_offloaded_model_is_exact(on_host: bool, tmp_path: Path) -> None:
    """With Trainer's own optimizer, and with one over the host's parameters."""
    training = Training(tmp_path / "streamed", offloaded, on_host=on_host)
    seen = training.run()
    assert_same(seen, replace(training, folder=tmp_path / "resident", options=RESIDENT).run())
    assert seen.bytes_moved > 0


def test_resumed_training_goes_on_exactly(resident: tuple[Training, Seen], tmp_path: Path) -> None:
    """Also where the model was resident until then."""
    checkpoint = resident[0].folder / f"checkpoint-{SAVED_STEP}"
    seen = Training(tmp_path, resume_from=checkpoint).run()
    assert_same(seen, resident[1])
    assert seen.bytes_moved > 0


@pytest.mark.parametrize(("first", "second"), [(plain, in_place), (offloaded, plain)])
def test_checkpoints_are_ordinary_ones(first: Way, second: Way, tmp_path: Path) -> None:
    """What one saves the other resumes from; plain PyTorch rounds some gradients of this model differently."""
    whole = Training(tmp_path / "whole", first, dropout=0.0)
    expected = whole.run()
    checkpoint = whole.folder / f"checkpoint-{SAVED_STEP}"
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(build().state_dict())
    seen = Training(tmp_path / "resumed", second, dropout=0.0, resume_from=checkpoint).run()
    for key in ("loss", "grad_norm", "eval_loss"):
        assert seen.values(key) == pytest.approx(expected.values(key), rel=1e-4), key
    assert seen.values("loss")[:SAVED_STEP] == expected.values("loss")[:SAVED_STEP]


# What others refuse.


def test_accelerate_takes_no_backends_but_its_own(tmp_path: Path) -> None:
    settings = arguments(tmp_path, use_cpu=True, torch_compile=True, torch_compile_backend="superpipeline")
    with pytest.raises(ValueError, match="'SUPERPIPELINE' is not a valid DynamoBackend"):
        transformers.Trainer(build(), settings, train_dataset=Sentences(), eval_dataset=Sentences())


def test_trainer_drops_the_columns_of_a_compiled_model(tmp_path: Path) -> None:
    """Whatever the backend: it reads them from the signature, which is ``(*args, **kwargs)``."""
    model = torch.compile(build(), backend="eager")
    settings = arguments(tmp_path, use_cpu=True)
    trainer = transformers.Trainer(model, settings, train_dataset=Sentences(), eval_dataset=Sentences())
    with pytest.raises(ValueError, match="The batch received was empty"):
        trainer.train()
