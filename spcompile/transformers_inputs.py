"""Example inputs of Hugging Face models, from what their configs say.

What: keyword arguments for ``forward`` of a `transformers` model, built from its main input, its forward's signature
and its config. Why not their ``dummy_inputs``: most classes inherit the same three rows of five tokens, whatever they
take.

    main input        what is made                                                  for instance
    input_ids         tokens; and images where there is a vision config             Llama, BERT, T5, CLIP, LLaVA
    pixel_values      one image, or one clip where the config counts frames         ViT, ResNet, VideoMAE
    input_features    a log-mel spectrogram                                         Whisper
    input_values      one second of sound, or a spectrogram                         Wav2Vec2, AST

How: what may be wrong is tried anyway, and who asked takes the first that can be traced: with images and without them,
with a cache and without one. Nothing here imports `transformers`: models are known by their attributes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spcompile.errors import OptionError

TOKENS = 512
"""Tokens of a prompt, where the model takes so many: a page of text."""

IMAGE_SIDE = 224
"""Pixels of an image where the config does not say: what most vision models were trained on."""

SOUND_SAMPLES = 16_000
"""One second at the rate of speech models."""

MOST_TOKENS_NAMES = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
"""What configs call the longest text; the least of them counts."""

VISION_CONFIG_NAMES = ("vision_config", "encoder")
"""Where the config of a model that reads images, too, keeps that of its image encoder."""

IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index")

IMAGE_TOKENS_NAMES = ("mm_tokens_per_image", "num_image_tokens", "image_seq_length", "image_seq_len")
"""What configs call the number of tokens that one image takes, where it does not follow from the patches."""


def is_transformers_model(model: nn.Module) -> bool:
    """Whether a module has what every pretrained model of `transformers` has."""
    return hasattr(getattr(model, "config", None), "model_type") and hasattr(model, "main_input_name")


@contextmanager
def capturing_hooks(model: nn.Module) -> Iterator[None]:
    """With the hooks that `transformers` puts on a model when it is first asked for hidden states.

    It does so under a lock, in front of which Dynamo breaks the graph: LLaVA's vision tower is such a case. The hooks
    are taken away again. Any other model stays as it is.
    """
    install = getattr(sys.modules.get("transformers.utils.output_capturing"), "maybe_install_capturing_hooks", None)
    if install is None or not is_transformers_model(model):
        yield
        return
    before = [(module, set(module._forward_hooks), set(vars(module))) for module in model.modules()]
    install(model)
    added = [(module, set(module._forward_hooks) - hooks, set(vars(module)) - names) for module, hooks, names in before]
    try:
        yield
    finally:
        for module, hooks, names in added:
            for hook in hooks:
                module._forward_hooks.pop(hook, None)
            for name in names:
                vars(module).pop(name, None)


def inputs_from_config(
    model: nn.Module, dtype: torch.dtype, shape: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Keyword arguments to try, the most likely ones first.

    Args:
        model: one for which `is_transformers_model` holds.
        dtype: of images and sound.
        shape: of the main input, or of the text where it has two numbers, of the images where it has four or five;
            None: usual ones.

    Raises:
        OptionError: no input of the model has a shape of so many numbers.

    Yields:
        CPU tensors by name: tokens int64 ``[batch, tokens]``, images ``[batch, channels, height, width]``, clips
        ``[batch, frames, channels, height, width]``, spectrograms ``[batch, bins, frames]``, sound
        ``[batch, samples]``.
    """
    makers = {
        "input_ids": _text_inputs,
        "pixel_values": _image_inputs,
        "input_features": _spectrogram_inputs,
        "input_values": _sound_inputs,
    }
    main_input = str(model.main_input_name)
    make = makers.get(main_input)
    if make is None:
        return
    known = _Model(model, dtype, shape)
    if shape is not None and not known.can_have(len(shape), main_input):
        raise OptionError(
            f"{type(model).__name__} has no input of shape {list(shape)}: it takes {known.takes(main_input)}"
        )
    for inputs in make(known):
        yield inputs
        if "use_cache" in inspect.signature(model.forward).parameters:
            yield {**inputs, "use_cache": False}


class _Model:
    """What is known of a model, and the single inputs that follow from it."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, shape: Sequence[int] | None) -> None:
        self.config: Any = model.config
        find_text_config = getattr(self.config, "get_text_config", None)
        self.text: Any = find_text_config() if find_text_config is not None else self.config
        visions = (getattr(self.config, name, None) for name in VISION_CONFIG_NAMES)
        self.vision: Any = next((each for each in visions if hasattr(each, "model_type")), None)
        self.parameters = frozenset(inspect.signature(model.forward).parameters)
        self.dtype = dtype
        self.shape = tuple(shape) if shape is not None else None
        self.batch = self.shape[0] if self.shape else 1

    def can_have(self, n_dimensions: int, main_input: str) -> bool:
        """Whether a shape with so many numbers is one of the model's inputs."""
        is_text, is_images = n_dimensions == 2, n_dimensions in (4, 5)
        has_sound = main_input in ("input_features", "input_values")
        return has_sound or (is_text and self.has_text(main_input)) or (is_images and self.has_images(main_input))

    def has_text(self, main_input: str) -> bool:
        return main_input == "input_ids" or not self.parameters.isdisjoint({"input_ids", "decoder_input_ids"})

    def has_images(self, main_input: str) -> bool:
        return main_input == "pixel_values" or (self.vision is not None and "pixel_values" in self.parameters)

    def takes(self, main_input: str) -> str:
        """The shapes of the inputs that are no sound, for people."""
        shapes = ["text [batch, tokens]"] if self.has_text(main_input) else []
        if self.has_images(main_input):
            shapes += ["images [batch, channels, height, width]", "clips [batch, frames, channels, height, width]"]
        return " or ".join(shapes)

    def tokens(self, more: int = 0) -> Tensor:
        """Text, with so many tokens more than usual. int64 ``[batch, tokens]``"""
        if self.shape is not None and len(self.shape) == 2:
            return torch.zeros(self.batch, self.shape[1], dtype=torch.int64, device="cpu")
        limits = [getattr(self.text, name, None) for name in MOST_TOKENS_NAMES]
        length = min([TOKENS + more, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])
        return torch.zeros(self.batch, length, dtype=torch.int64, device="cpu")

    def image_shape(self) -> tuple[int, ...]:
        """``[batch, channels, height, width]``"""
        if self.shape is not None and len(self.shape) in (4, 5):
            return self.shape
        source = self.config if self.vision is None else self.vision
        channels = getattr(source, "num_channels", None)
        return (self.batch, channels if isinstance(channels, int) else 3, *_sides(source))

    def values(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device="cpu")

    def decoder_inputs(self) -> dict[str, Tensor]:
        """What the decoder of an encoder-decoder model takes beside the main input."""
        is_needed = getattr(self.config, "is_encoder_decoder", False) and "decoder_input_ids" in self.parameters
        return {"decoder_input_ids": self.tokens()} if is_needed else {}

    def image_tokens_counts(self) -> Iterator[int]:
        """How many tokens of the text one image may stand for."""
        patch = getattr(self.vision, "patch_size", None)
        if isinstance(patch, int) and patch > 0:
            height, width = self.image_shape()[-2:]
            has_class_token = getattr(self.config, "vision_feature_select_strategy", None) == "full"
            yield (height // patch) * (width // patch) + has_class_token
        for source in (self.config, self.vision):
            counts = (getattr(source, name, None) for name in IMAGE_TOKENS_NAMES)
            yield from (count for count in counts if isinstance(count, int) and count > 0)


def _text_inputs(model: _Model) -> Iterator[dict[str, Any]]:
    decoder = model.decoder_inputs()
    if model.vision is not None and "pixel_values" in model.parameters:
        yield from ({**inputs, **decoder} for inputs in _text_and_images(model))
    yield {"input_ids": model.tokens(), **decoder}


def _text_and_images(model: _Model) -> Iterator[dict[str, Any]]:
    """One image each; in models that read images as tokens, in the place of that many tokens of the text."""
    images = model.values(*model.image_shape())
    ids = (getattr(model.config, name, None) for name in IMAGE_TOKEN_NAMES)
    image_token = next((each for each in ids if isinstance(each, int)), None)
    if image_token is None:
        yield {"input_ids": model.tokens(), "pixel_values": images}
        return
    for count in dict.fromkeys(model.image_tokens_counts()):
        tokens = model.tokens(more=count)
        tokens[:, :count] = image_token
        yield {"input_ids": tokens, "pixel_values": images}


def _image_inputs(model: _Model) -> Iterator[dict[str, Any]]:
    shape = model.image_shape()
    others = model.decoder_inputs()
    if "input_ids" in model.parameters:
        others["input_ids"] = model.tokens()
    frames = getattr(model.config, "num_frames", None)
    if isinstance(frames, int) and len(shape) == 4:
        yield {"pixel_values": model.values(shape[0], frames, *shape[1:]), **others}
    yield {"pixel_values": model.values(*shape), **others}


def _spectrogram_inputs(model: _Model) -> Iterator[dict[str, Any]]:
    bins, positions = (getattr(model.config, name, None) for name in ("num_mel_bins", "max_source_positions"))
    if model.shape is not None and len(model.shape) > 2:
        yield {"input_features": model.values(*model.shape), **model.decoder_inputs()}
    elif isinstance(bins, int) and isinstance(positions, int):  # the first convolutions halve the frames
        yield {"input_features": model.values(model.batch, bins, 2 * positions), **model.decoder_inputs()}


def _sound_inputs(model: _Model) -> Iterator[dict[str, Any]]:
    bins, frames = (getattr(model.config, name, None) for name in ("num_mel_bins", "max_length"))
    if model.shape is not None:
        yield {"input_values": model.values(*model.shape), **model.decoder_inputs()}
        return
    if isinstance(bins, int) and isinstance(frames, int):
        yield {"input_values": model.values(model.batch, frames, bins), **model.decoder_inputs()}
    yield {"input_values": model.values(model.batch, SOUND_SAMPLES), **model.decoder_inputs()}
    yield {"input_values": model.values(model.batch, 1, SOUND_SAMPLES), **model.decoder_inputs()}


def _sides(config: Any) -> tuple[int, int]:
    """Height and width of the images that a config speaks of, which spell it in several ways."""
    size = getattr(config, "image_size", None)
    if isinstance(size, dict):
        size = (size.get("height", IMAGE_SIDE), size.get("width", IMAGE_SIDE))
    if isinstance(size, (tuple, list)) and len(size) == 2:
        return int(size[0]), int(size[1])
    return (size, size) if isinstance(size, int) else (IMAGE_SIDE, IMAGE_SIDE)
