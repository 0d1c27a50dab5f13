"""Plans of models that came without inputs: what is guessed, what is said of it, and what if nothing can be."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.example_inputs import guess_inputs
from spcompile.ir import Plan, Plans
from spcompile.options import Options
from spcompile.planner.machine import PROFILES
from spcompile.planning import plan_guessed
from spcompile.verify.plans import verify_plan

WIDTH = 16

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="plans for a GPU that is here are not for an absent one")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def inference_plan(model: nn.Module, **options: Any) -> Plan:
    with torch.no_grad():
        plan = spcompile.plan(model, **options)
    assert isinstance(plan, Plan)
    assert verify_plan(plan) == []
    assert Plan.from_json(plan.to_json()) == plan
    return plan


# Hugging Face.

TRACES_MASKED_IMAGES = torch.__version__ >= "2.13"
"""Dynamo of torch 2.11 stumbles over the number of places that LLaVA's images have in the text."""

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = SMALL | {"vocab_size": 50, "max_position_embeddings": 40, "num_key_value_heads": 1}
IMAGES = SMALL | {"image_size": 32, "patch_size": 16}
PAIR = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 50,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "LlamaForCausalLM": ("LlamaConfig", TEXT, "input_ids int64 [1, 40]", 2),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 24, **TOKENS},
        "input_ids int64 [1, 24]",
        2,
    ),
    "BertModel": ("BertConfig", SMALL | {"vocab_size": 50}, "input_ids int64 [1, 512]", 2),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50},
        "input_ids int64 [1, 512], decoder_input_ids int64 [1, 512]",
        4,
    ),
    "ViTForImageClassification": ("ViTConfig", IMAGES, "pixel_values float32 [1, 3, 32, 32]", 2),
    "CLIPModel": (
        "CLIPConfig",
        {
            "text_config": SMALL | {"vocab_size": 50, "max_position_embeddings": 12, **TOKENS},
            "vision_config": IMAGES,
            "projection_dim": 16,
        },
        "input_ids int64 [1, 12], pixel_values float32 [1, 3, 32, 32]",
        4,
    ),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        PAIR
        | TOKENS
        | {
            "max_source_positions": 20,
            "max_target_positions": 10,
            "num_mel_bins": 8,
            "decoder_start_token_id": 1,
        },
        "input_features float32 [1, 8, 40], decoder_input_ids int64 [1, 10]",
        6,  # the two convolutions in front are numbered, too
    ),
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": IMAGES | {"model_type": "clip_vision_model"},
            "image_token_id": 49,
        },
        "input_ids int64 [1, 40], pixel_values float32 [1, 3, 32, 32]",
        5,  # of the image encoder all but its last, which LLaVA does not read; two of the projector, two of text
    ),
    "ResNetForImageClassification": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "pixel_values float32 [1, 3, 224, 224]",
        2,
    ),
    "ConvNextForImageClassification": (
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
        "pixel_values float32 [1, 3, 32, 32]",
        2,
    ),
    "Wav2Vec2ForCTC": (
        "Wav2Vec2Config",
        SMALL
        | {
            "conv_dim": [8, 8],
            "conv_stride": [5, 2],
            "conv_kernel": [10, 3],
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
        },
        "input_values float32 [1, 16000]",
        2,
    ),
    "VideoMAEModel": (
        "VideoMAEConfig",
        IMAGES | {"num_frames": 4},
        "pixel_values float32 [1, 4, 3, 32, 32]",
        2,
    ),
    "VisionEncoderDecoderModel": (
        "VisionEncoderDecoderConfig",
        {
            "encoder": IMAGES | {"model_type": "vit"},
            "decoder": SMALL
            | {
                "model_type": "bert",
                "vocab_size": 50,
                "max_position_embeddings": 40,
                "is_decoder": True,
                "add_cross_attention": True,
            },
        },
        "pixel_values float32 [1, 3, 32, 32], decoder_input_ids int64 [1, 40]",
        4,
    ),
}
"""Each with its config, the inputs that are guessed, and how many layers are then found."""


def pretrained(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config, fields, _, _ = FAMILIES[name]
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**fields))
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_hugging_face(name: str) -> None:
    if name == "LlavaForConditionalGeneration" and not TRACES_MASKED_IMAGES:
        pytest.skip("this torch does not trace how LLaVA puts images into text")
    _, _, inputs, n_layers = FAMILIES[name]
    plan = inference_plan(pretrained(name), device="cuda", machine="rtx4090")
    note = plan.note.removesuffix(", use_cache False")  # which some versions of transformers need
    assert note == f"example inputs from the config of {name}: {inputs}"
    assert len(plan.layers) == n_layers
    assert plan.device.startswith("cuda")
    assert plan.activations_bytes > 0


def test_the_tokens_of_an_image_have_their_place_in_the_text() -> None:
    guess = next(iter(guess_inputs(pretrained("LlavaForConditionalGeneration"))))
    assert guess.kwargs["input_ids"].tolist() == [[49] * 4 + [0] * 36]


def test_the_hooks_of_a_model_are_as_before() -> None:
    model = pretrained("LlavaForConditionalGeneration")
    plan = inference_plan(model, device="cpu")
    assert "pixel_values" in plan.note or not TRACES_MASKED_IMAGES
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("hooks_installed" in name for module in model.modules() for name in vars(module))


def test_training_without_inputs() -> None:
    plan = spcompile.plan(pretrained("LlamaForCausalLM").train(), device="cuda", k=2)
    assert isinstance(plan, Plan)
    assert plan.backward_step is not None
    assert plan.note.endswith("input_ids int64 [1, 40]")


@pytest.mark.parametrize(
    ("name", "shape", "inputs"),
    [
        ("LlamaForCausalLM", (2, 9), "input_ids int64 [2, 9]"),
        ("T5ForConditionalGeneration", (2, 9), "input_ids int64 [2, 9], decoder_input_ids int64 [2, 9]"),
        ("ViTForImageClassification", (4, 3, 64, 64), "pixel_values float32 [4, 3, 64, 64]"),
        ("CLIPModel", (4, 3, 32, 32), "input_ids int64 [4, 12], pixel_values float32 [4, 3, 32, 32]"),
        ("CLIPModel", (4, 7), "input_ids int64 [4, 7], pixel_values float32 [4, 3, 32, 32]"),
        (
            "WhisperForConditionalGeneration",
            (2, 8, 40),
            "input_features float32 [2, 8, 40], decoder_input_ids int64 [2, 10]",
        ),
        (
            "WhisperForConditionalGeneration",
            (2, 5),
            "input_features float32 [2, 8, 40], decoder_input_ids int64 [2, 5]",
        ),
        ("Wav2Vec2ForCTC", (2, 800), "input_values float32 [2, 800]"),
        ("VideoMAEModel", (1, 4, 3, 32, 32), "pixel_values float32 [1, 4, 3, 32, 32]"),
    ],
)
def test_a_shape_is_that_of_the_input_it_fits(name: str, shape: tuple[int, ...], inputs: str) -> None:
    assert str(next(iter(guess_inputs(pretrained(name), shape)))) == f"the config of {name}: {inputs}"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("LlamaForCausalLM", (4,), r"LlamaForCausalLM has no input of shape \[4\]: it takes text \[batch, tokens\]$"),
        ("LlamaForCausalLM", (2, 3, 8, 8), r"no input of shape \[2, 3, 8, 8\]: it takes text \[batch, tokens\]$"),
        ("ViTForImageClassification", (2, 9), r"no input of shape \[2, 9\]: it takes images \[batch, channels,"),
        ("CLIPModel", (9,), r"it takes text \[batch, tokens\] or images \[batch, channels, height, width\] or clips"),
        ("ViTForImageClassification", (1, 9, 32, 32), r"cannot be traced with an input of shape \[1, 9, 32, 32\]"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    with torch.no_grad(), pytest.raises(spcompile.OptionError, match=message):
        plan_guessed(pretrained(name), Options(device="cpu"), shape)


def test_the_dtype_of_the_weights() -> None:
    guess = next(iter(guess_inputs(pretrained("ViTForImageClassification").to(torch.bfloat16))))
    assert str(guess) == "the config of ViTForImageClassification: pixel_values bfloat16 [1, 3, 32, 32]"


# Plain models.


class Positions(nn.Module):
    """Tokens and their positions, of which there are few."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, WIDTH)
        self.positions = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > 20:
            raise ValueError(f"{length} tokens, but only 20 positions")
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        for layer in self.layers:
            x = torch.relu(layer(x))
        y: Tensor = x
        return y


class Pair(nn.Module):
    """Two inputs of one kind."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, left: Tensor, right: Tensor, *, scale: float = 1.0) -> Tensor:
        y: Tensor = self.fc(left) * self.fc(right) * scale
        return y


class Source(nn.Module):
    """Takes no inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self) -> Tensor:
        y: Tensor = self.fc(torch.ones(2, WIDTH, device=self.fc.weight.device))
        return y


def convolutions(channels: int, side: int) -> nn.Module:
    """Flattened for one size of image."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * side * side, WIDTH)
    )


PLAIN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "photos": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, WIDTH)),
        "the first layer of Sequential, '0' Conv2d: float32 [1, 3, 224, 224]",
    ),
    "photos of 32 pixels": (
        lambda: convolutions(3, 32),
        "the first layer of Sequential, '0' Conv2d: float32 [1, 3, 32, 32]",
    ),
    "digits": (lambda: convolutions(1, 28), "the first layer of Sequential, '0' Conv2d: float32 [1, 1, 28, 28]"),
    "sound": (
        lambda: nn.Sequential(nn.Conv1d(1, 4, 8)),
        "the first layer of Sequential, '0' Conv1d: float32 [1, 1, 16000]",
    ),
    "clips": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3)),
        "the first layer of Sequential, '0' Conv3d: float32 [1, 3, 16, 112, 112]",
    ),
    "features": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, WIDTH), nn.BatchNorm1d(WIDTH)),
        "the first layer of Sequential, '1' Linear: float32 [8, 784]",
    ),
    "in half precision": (
        lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)).bfloat16(),
        "the first layer of Sequential, '0' LayerNorm: bfloat16 [8, 16]",
    ),
    "a lone layer": (lambda: nn.Linear(WIDTH, 2), "the first layer of Linear, Linear: float32 [8, 16]"),
    "tokens": (Positions, "the first layer of Positions, 'tokens' Embedding: int64 [1, 16]"),
    "attention": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True), 2),
        "the first layer of TransformerEncoder, 'layers.0.self_attn' MultiheadAttention: float32 [1, 16, 16]",
    ),
    "two inputs": (Pair, "the first layer of Pair, 'fc' Linear: float32 [8, 16], float32 [8, 16]"),
    "no inputs": (Source, "Source takes no inputs: none"),
}


@pytest.mark.parametrize("case", PLAIN)
def test_plain_models(case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, guessed = PLAIN[case]
    with caplog.at_level(logging.INFO, "spcompile.planning"):
        plan = inference_plan(make(), device="cpu")
    assert plan.note == f"example inputs from {guessed}"
    assert f"note: {plan.note}" in " ".join(str(plan).split())
    assert plan.note in [record.getMessage() for record in caplog.records]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_recurrent_models_are_guessed_though_dynamo_does_not_trace_them() -> None:
    (guess,) = guess_inputs(nn.LSTM(WIDTH, 4))
    assert str(guess) == "the first layer of LSTM, LSTM: float32 [1, 16, 16]"


def test_a_guess_is_the_plan_of_those_inputs_however_many_were_tried_before() -> None:
    """Sizes that differ from guess to guess do not make the graph symbolic."""
    plan = inference_plan(Positions(), k=2, device="cpu")
    with torch.no_grad():
        torch._dynamo.reset()
        given = spcompile.plan(Positions(), (torch.zeros(1, 16, dtype=torch.int64),), k=2, device="cpu")
    assert given == dataclasses.replace(plan, note="")


# What ecosystems define.


class Defining(nn.Module):
    """Its attributes say what it takes; the first layer would be wrong, as there are two inputs of different widths."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, WIDTH), nn.Linear(5, WIDTH)
        vars(self).update(attributes)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        y: Tensor = self.left(left) + self.right(right)
        return y


EXAMPLE = torch.zeros(2, 3), torch.zeros(2, 5)
NAMED = dict(zip(("left", "right"), EXAMPLE, strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("example_input_array", EXAMPLE),
        ("example_input_array", NAMED),
        ("dummy_inputs", EXAMPLE),
        ("dummy_inputs", NAMED),
    ],
)
def test_inputs_that_the_model_defines(name: str, value: Any) -> None:
    shapes = (
        "left float32 [2, 3], right float32 [2, 5]" if isinstance(value, dict) else "float32 [2, 3], float32 [2, 5]"
    )
    assert (
        inference_plan(Defining(**{name: value}), device="cpu").note
        == f"example inputs from {name} of Defining: {shapes}"
    )


@pytest.mark.parametrize("kind", [dict, lambda **fields: type("PretrainedCfg", (), fields)()])
@pytest.mark.parametrize("name", ["pretrained_cfg", "default_cfg"])
def test_what_timm_knows_of_its_models(name: str, kind: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    vars(model)[name] = kind(input_size=(3, 48, 48))
    assert (
        inference_plan(model, device="cpu").note == f"example inputs from {name} of Sequential: float32 [1, 3, 48, 48]"
    )


def test_a_property_that_raises_is_none() -> None:
    class Raising(Pair):
        @property
        def example_input_array(self) -> Tensor:
            raise RuntimeError("not set")

    assert inference_plan(Raising(), device="cpu").note.startswith("example inputs from the first layer of Raising")


def test_inputs_that_cannot_be_traced_are_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "spcompile.planning"):
        model = nn.Sequential(nn.Linear(WIDTH, 2))
        vars(model)["example_input_array"] = torch.zeros(2, 3)
        plan = inference_plan(model, device="cpu")
    assert plan.note == "example inputs from the first layer of Sequential, '0' Linear: float32 [8, 16]"
    tried = "example inputs that cannot be traced, from example_input_array of Sequential: float32 [2, 3]: "
    assert any(record.getMessage().startswith(tried) for record in caplog.records)


# Nothing to go by.


class Opaque(nn.Module):
    """Its inputs are of a kind that nobody can guess."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, 8 * WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(8 * WIDTH, 8 * WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(2)
        self.head = nn.Linear(8 * WIDTH, WIDTH)
        self.tied = nn.Linear(8 * WIDTH, WIDTH)
        self.tied.weight = self.head.weight

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.stem(batch["features"])
        for block in self.blocks:
            x = torch.relu(block(x))
        y: Tensor = self.head(x)
        return y


NOTHING = "weights only: no example inputs could be found"


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_cuda)])
def test_weights_only(device: str, meta: bool, caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta" if meta else "cpu"):
        model = Opaque()
    plan = inference_plan(model, device=device, budget=150_000, machine="rtx4090")
    assert plan.note.startswith(NOTHING)
    assert f"note: {NOTHING}" in " ".join(str(plan).split())
    assert NOTHING in caplog.text
    assert [page.name for page in plan.pages] == ["stem", *(f"blocks.{index}" for index in range(4)), "head"]
    assert [step.reads for step in plan.steps] == [(index,) for index in range(6)]
    assert [layer.name for layer in plan.layers] == [f"blocks.{index}" for index in range(4)]
    assert plan.weights_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert plan.intervals
    assert plan.peak_bytes() <= 150_000
    assert plan.activations_bytes == 0
    assert len(plan.tradeoff()) > 1
    machine = PROFILES["rtx4090"]
    assert [step.compute_us for step in plan.steps] == [
        max(machine.kernel_us, page.nbytes / machine.memory_bytes_per_s * 1e6) for page in plan.pages
    ]


@pytest.mark.parametrize("options", [{"k": 3, "m": 2}, {"max_slowdown": 1000.0}, {}], ids=str)
def test_weights_only_with_other_options(options: dict[str, Any]) -> None:
    plan = inference_plan(Opaque(), device="cpu", **options)
    assert bool(plan.intervals) == bool(options)


def test_weights_only_in_too_little_memory() -> None:
    with pytest.raises(
        spcompile.OptionError, match="'budget' = 1000 B is too little: the smallest that can be kept is"
    ):
        inference_plan(Opaque(), device="cpu", budget=1000)


@pytest.mark.parametrize("options", [{}, {"k": 1}, {"budget": "1GB"}, {"max_slowdown": 1.0}], ids=str)
@pytest.mark.parametrize("kind", [nn.ReLU, nn.ModuleList, lambda: nn.ParameterList([torch.zeros(0)])])
def test_models_with_next_to_nothing_in_them(kind: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    plan = inference_plan(kind(), device="cpu", **options)
    assert plan.note.startswith(NOTHING)
    assert plan.weights_bytes == 0
    assert len(plan.tradeoff()) == 1


def test_a_lazy_model_has_no_weights_yet() -> None:
    plan = inference_plan(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, WIDTH)).to("meta"), device="cpu")
    assert [weight.name for page in plan.pages for weight in page.weights] == ["1.weight", "1.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 100}, "'budget' = 100 B is too little: the smallest that can be kept is"),
        ({"machine": "tpu"}, "'machine' must be one of h100, rtx4090"),
    ],
    ids=str,
)
def test_what_is_impossible_is_not_a_wrong_guess(options: dict[str, Any], message: str) -> None:
    with pytest.raises(spcompile.OptionError, match=message):
        inference_plan(Positions(), device="cpu", **options)


class Breaking(Positions):
    """The graph breaks behind the first layer."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layers[0](self.tokens(tokens))
        torch._dynamo.graph_break()
        y: Tensor = torch.relu(self.layers[1](x)) + 1
        return y


def test_several_graphs() -> None:
    with torch.no_grad():
        plans = spcompile.plan(Breaking(), device="cpu")
    assert isinstance(plans, Plans)
    note = "example inputs from the first layer of Breaking, 'tokens' Embedding: int64 [1, 128]"
    assert [plan.note for plan in plans] == [note, note]


def test_several_graphs_without_values() -> None:
    plan = inference_plan(Breaking().to("meta"), device="cpu")
    assert plan.note.startswith(f"{NOTHING} (2 guessed, none could be traced)")


@no_cuda
@pytest.mark.parametrize("kind", [Positions, Opaque])
def test_the_memory_of_the_machine_that_was_asked_for(kind: type[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    for machine, shown in (("rtx4090", "24.00 GiB"), (None, "74.51 GiB")):
        caplog.clear()
        inference_plan(kind(), device="cuda", machine=machine)
        assert f"no CUDA device here: planning for a cuda:0 with {shown}" in caplog.text
