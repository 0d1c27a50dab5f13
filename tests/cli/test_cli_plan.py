"""``spcompile plan``: which models a word means, what is printed and written, and how mistakes are answered."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from spcompile.cli import main
from spcompile.ir import Plan, Plans

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="plans for a GPU that is here are not for an absent one")

MODULE = """
import torch
from torch import nn

DEVICES = []

def stack():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    DEVICES.append(model[0].weight.device.type)
    return model

class Holder:
    made = stack

module = nn.Linear(3, 3)

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x):
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        return self.layers[1](x)

class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, batch):
        return self.fc(batch["x"])

number = 3

def returns_a_number():
    return 3

def raises():
    raise RuntimeError("no file\\nof weights")

class NeedsValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.scale = self.fc.weight.detach().sum().item()

    def forward(self, x):
        return self.fc(x) * self.scale

class NeedsNumpy(NeedsValues):
    def __init__(self):
        self.scale = torch.ones(3).numpy().sum()

def takes(width):
    return nn.Linear(width, width)
"""

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module ``own_models`` and a config in ``llama``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # what the command adds goes again
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    (tmp_path / "own_models.py").write_text(MODULE, encoding="utf-8")
    write_config(tmp_path / "llama", LLAMA)
    return tmp_path


def write_config(folder: Path, fields: Any) -> None:
    folder.mkdir(exist_ok=True)
    text = fields if isinstance(fields, str) else json.dumps(fields)
    (folder / "config.json").write_text(text, encoding="utf-8")


class Run:
    """What one command did."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *argv: str) -> None:
        self.code = main(argv)
        self.out, self.err = capsys.readouterr()

    def plan(self) -> Plan:
        assert self.code == 0, self.err
        return Plan.from_json(self.out)


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    assert folder.is_dir()
    return lambda *argv: Run(capsys, "plan", *argv)


def test_a_folder_of_hugging_face(run: Callable[..., Run]) -> None:
    pytest.importorskip("transformers")
    done = run("llama", "--k", "2", "--machine", "rtx4090")
    assert (done.code, done.out.splitlines()[0]) == (0, "Plan for cuda:0: 6 pages, 4 layers, 6 steps")
    note = "note: example inputs from the config of LlamaForCausalLM: input_ids int64 [1, 64]"
    assert note in " ".join(done.out.split())


def test_a_config_and_its_dtype(run: Callable[..., Run], folder: Path) -> None:
    pytest.importorskip("transformers")
    config = str((folder / "llama" / "config.json").rename(folder / "small.json"))
    as_configured = run(config, "--format", "json").plan()
    in_fp32 = run(config, "--format", "json", "--dtype", "float32").plan()
    assert in_fp32.weights_bytes == 2 * as_configured.weights_bytes > 0


def test_a_config_without_architectures(run: Callable[..., Run], folder: Path) -> None:
    pytest.importorskip("transformers")
    write_config(folder / "llama", {name: value for name, value in LLAMA.items() if name != "architectures"})
    assert "the config of LlamaModel" in run("llama", "--format", "json").plan().note


def test_a_shape_of_tokens(run: Callable[..., Run]) -> None:
    pytest.importorskip("transformers")
    assert run("llama", "--shape", "3x17", "--format", "json").plan().note.endswith("input_ids int64 [3, 17]")


@pytest.mark.parametrize("name", ["stack", "Holder.made"])
def test_a_function(run: Callable[..., Run], name: str) -> None:
    plan = run(f"own_models:{name}", "--format", "json", "--k", "3", "--m", "2").plan()
    assert (plan.k, plan.m, len(plan.pages)) == (3, 2, 6)
    assert plan.device == "cuda:0"
    assert sys.modules["own_models"].DEVICES == ["meta"]


def test_a_function_that_makes_values(run: Callable[..., Run]) -> None:
    assert run("own_models:stack", "--real", "--device", "cpu").code == 0
    assert sys.modules["own_models"].DEVICES == ["cpu"]


def test_a_module_and_a_class(run: Callable[..., Run], caplog: pytest.LogCaptureFixture) -> None:
    assert len(run("own_models:module", "--format", "json").plan().pages) == 1
    opaque = run("own_models:Opaque", "--format", "json")
    assert opaque.plan().note.startswith("weights only: no example inputs could be found")
    assert "weights only: no example inputs could be found" in caplog.text
    assert "Give the shape of the model's main input as --shape" in caplog.text
    assert run("own_models:NeedsValues", "--real").code == 0


def test_training(run: Callable[..., Run]) -> None:
    plan = run("own_models:stack", "--train", "--k", "2", "--format", "json").plan()
    assert plan.backward_step is not None
    assert run("own_models:stack", "--k", "2", "--format", "json").plan().backward_step is None


def test_a_dtype_of_a_function(run: Callable[..., Run]) -> None:
    plan = run("own_models:stack", "--dtype", "bfloat16", "--format", "json").plan()
    assert plan.weights_bytes == 6 * 2 * (64 * 64 + 64)


@no_cuda
def test_the_memory_of_the_machine(run: Callable[..., Run], caplog: pytest.LogCaptureFixture) -> None:
    assert run("own_models:stack", "--machine", "rtx4090").code == 0
    assert "planning for a cuda:0 with 24.00 GiB" in caplog.text


# timm, which is imitated here.


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, *, pretrained: bool) -> nn.Module:
        assert (name, pretrained) == ("resnet50", False)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
        vars(model)["pretrained_cfg"] = {"input_size": (3, 96, 96)}
        return model

    fake = ModuleType("timm")
    vars(fake).update(
        is_model=lambda name: name == "resnet50", list_models=lambda: ["resnet50"], create_model=create_model
    )
    monkeypatch.setitem(sys.modules, "timm", fake)


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("name", ["timm:resnet50", "resnet50"])
def test_a_model_of_timm(run: Callable[..., Run], name: str) -> None:
    plan = run(name, "--format", "json").plan()
    assert plan.note == "example inputs from pretrained_cfg of Sequential: float32 [1, 3, 96, 96]"
    with_shape = run(name, "--format", "json", "--shape", "2x3x20x20").plan()
    assert with_shape.note == "example inputs from the first layer of Sequential, '0' Conv2d: float32 [2, 3, 20, 20]"


@pytest.mark.usefixtures("timm")
def test_a_name_that_is_nearly_right(run: Callable[..., Run]) -> None:
    assert run("timm:resnet5").err == "spcompile: error: timm has no model 'resnet5': did you mean resnet50?\n"


# What is written.


def test_files(run: Callable[..., Run], folder: Path) -> None:
    printed = run("own_models:stack", "--k", "2")
    for name in ("plan.txt", "plan.json"):
        torch._dynamo.reset()
        written = run("own_models:stack", "--k", "2", "-o", name)
        assert (written.code, written.out) == (0, "")
    written_plan = Plan.from_text((folder / "plan.txt").read_text(encoding="utf-8").rstrip("\n"))
    assert f"{written_plan}\n" == printed.out
    assert f"{Plan.from_json((folder / 'plan.json').read_text(encoding='utf-8'))}\n" == printed.out


BEGINNINGS = {
    "page.html": b"<!doctype html>",
    "picture.svg": b"<?xml",
    "picture.png": b"\x89png",
    "lanes.trace.json": b"{",
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_pictures(run: Callable[..., Run], folder: Path, name: str) -> None:
    assert run("own_models:stack", "--budget", "1GB", "-o", name).code == 0
    assert (folder / name).read_bytes().lower().startswith(BEGINNINGS[name])


def test_a_picture_that_cannot_be_written(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_plan: Plan, _path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Plan, "visualize", fail)
    done = run("own_models:stack", "-o", "page.html")
    assert done.code == 2
    assert "cannot write page.html: Permission denied" in done.err


def test_the_curve(run: Callable[..., Run]) -> None:
    rows = run("own_models:stack", "--tradeoff", "--k", "2").out.splitlines()
    assert rows[0].startswith("note: example inputs from the first layer of Sequential")
    assert rows[1].split() == ["device", "memory", "iteration", "slowdown", "resident", "moved"]
    assert rows[-2].split()[-5:] == ["6", "of", "6", "0", "B"]
    assert rows[-1].endswith("<- as asked for")
    points = json.loads(run("own_models:stack", "--tradeoff", "--k", "2", "--format", "json").out)
    assert len(points) == len(rows) - 3
    assert [point["peak_bytes"] for point in points] == sorted(point["peak_bytes"] for point in points)
    assert (points[-1]["resident_pages"], points[-1]["bytes_moved"]) == (6, 0)


def test_several_graphs(run: Callable[..., Run], folder: Path) -> None:
    both = ("own_models:Broken", "--real", "--device", "cpu")
    printed = run(*both).out
    torch._dynamo.reset()
    assert run(*both, "-o", "plans.json").code == 0
    written = json.loads((folder / "plans.json").read_text(encoding="utf-8"))
    assert len(written) == 2
    assert printed == f"{Plans(Plan.from_json(json.dumps(each)) for each in written)}\n"
    torch._dynamo.reset()
    assert run(*both, "-o", "page.html").code == 0
    assert (folder / "page.html").read_text(encoding="utf-8").count('"title":"Plan for') == 2
    torch._dynamo.reset()
    curve = run(*both, "--tradeoff")
    assert (curve.code, "--tradeoff is of one graph, and this model has 2" in curve.err) == (2, True)


# Mistakes.

MISTAKES: dict[str, tuple[str, str]] = {
    "nothing": ("", "the following arguments are required: MODEL ('spcompile plan --help' shows what is allowed)"),
    "no file": ("nowhere/config.json", "there is no file or folder 'nowhere/config.json': nothing is downloaded"),
    "a name of the hub": ("meta-llama/Llama-3.1-8B", "there is no file or folder 'meta-llama/Llama-3.1-8B'"),
    "an unknown word": ("resnet51", "'resnet51' is no file or folder, not module:callable, and no model of timm"),
    "no module": ("no_such_module:make", "there is no module 'no_such_module'"),
    "no such function": ("own_models:stak", "own_models has no 'stak': did you mean stack or takes?"),
    "a number": ("own_models:number", "own_models:number is of type int: give what returns a torch.nn.Module"),
    "returns a number": (
        "own_models:returns_a_number",
        "returned a value of type int: it must return a torch.nn.Module",
    ),
    "raises": ("own_models:raises", "calling own_models:raises() failed: RuntimeError: no file of weights, "),
    "looks at values": ("own_models:NeedsValues", " (models are made without values: --real makes this one with them)"),
    "makes an array": ("own_models:NeedsNumpy", " (models are made without values: --real makes this one with them)"),
    "takes arguments": ("own_models:takes", "TypeError: takes() missing 1 required positional argument: 'width'\n"),
    "budget": ("own_models:stack --budget 8Gigs", "'budget' must be a number of bytes or text such as '8GiB'"),
    "too little": ("own_models:stack --budget 1KB", "is too little: the smallest that can be kept is "),
    "k and budget": ("own_models:stack --k 2 --budget 1GB", "options 'k' and 'budget' contradict each other"),
    "k": ("own_models:stack --k 0", "option 'k' must be a whole number of pages, 1 or more, not 0"),
    "k in letters": ("own_models:stack --k two", "argument --k: invalid int value: 'two'"),
    "m alone": ("own_models:stack --m 2", "option 'm' needs option 'k'"),
    "slowdown": ("own_models:stack --max-slowdown 0.5", "option 'max_slowdown' must be a number, 1 or more"),
    "machine": ("own_models:stack --machine rtx9090", "option 'machine' must be one of h100, rtx4090"),
    "device": ("own_models:stack --device tpu", "option 'device' must be 'cuda', 'cuda:<index>' or 'cpu'"),
    "dtype": ("own_models:stack --dtype int8", "--dtype must be a floating-point dtype such as bfloat16"),
    "shape": ("own_models:stack --shape 3,64", "argument --shape: a shape is numbers with x between them"),
    "a shape of nothing": ("own_models:stack --shape 0x64", "argument --shape: a shape is numbers"),
    "a shape that does not fit": ("own_models:stack --shape 3x65", "cannot be traced with an input of shape [3, 65]"),
    "suffix": (
        "own_models:stack -o plan.pdf",
        "cannot tell from 'plan.pdf' what to write: end it in one of .trace.json",
    ),
    "no folder": ("own_models:stack -o nowhere/plan.txt", "cannot write nowhere/plan.txt: there is no folder nowhere"),
    "a curve as a picture": ("own_models:stack --tradeoff -o curve.png", "--tradeoff is a table: write .json or .txt"),
    "an unknown option": ("own_models:stack --budgets 1GB", "unrecognized arguments: --budgets 1GB"),
    "format": ("own_models:stack --format xml", "argument --format: invalid choice: 'xml'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(run: Callable[..., Run], case: str) -> None:
    arguments, message = MISTAKES[case]
    done = run(*arguments.split())
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("spcompile: error: ")
    assert done.err.count("\n") == 1
    assert message in done.err


def test_the_file_that_cannot_be_written_is_refused_before_the_work(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # tests may run as root, who may write anywhere
    done = run("own_models:stack", "-o", "plan.txt")
    assert (done.code, "own_models" in sys.modules) == (2, False)
    assert "cannot write plan.txt" in done.err


CONFIGS: dict[str, tuple[Any, str]] = {
    "not JSON": ("{'model_type': 'llama'}", "config.json is not JSON (Expecting property name"),
    "no config": ({"hidden_size": 3}, "is not the config of a transformers model: it has no model_type"),
    "a list": ([1], "is not the config of a transformers model: it has no model_type"),
    "diffusers": ({"_class_name": "UNet2DConditionModel"}, "it is of diffusers (write a function"),
    "an unknown type": ({"model_type": "lama"}, "has model_type 'lama', which transformers"),
    "its own code": ({"model_type": "lama", "auto_map": {}}, "does not know: it needs code of its own"),
    "an unknown architecture": (
        LLAMA | {"architectures": ["LamaForCausalLM"]},
        "names the architecture 'LamaForCausalLM', which transformers",
    ),
    "values that do not fit": (LLAMA | {"hidden_size": "wide"}, "config.json "),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_wrong_configs(run: Callable[..., Run], folder: Path, case: str) -> None:
    pytest.importorskip("transformers")
    fields, message = CONFIGS[case]
    write_config(folder / "wrong", fields)
    done = run("wrong")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("spcompile: error: ")
    assert done.err.count("\n") == 1
    assert message in done.err


def test_a_folder_without_a_config(run: Callable[..., Run], folder: Path) -> None:
    (folder / "empty").mkdir()
    assert "there is no config.json in empty: give a folder that has one" in run("empty").err


def test_without_timm(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm:resnet50 needs timm, which is not installed: pip install timm" in run("timm:resnet50").err
    assert "no model of timm (which is not installed)" in run("resnet50").err


def test_a_bug_shows_its_traceback(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("spcompile.planning.plan_guessed", fail)
    with pytest.raises(ZeroDivisionError):
        run("own_models:stack")
