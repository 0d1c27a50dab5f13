"""Example inputs of a plain model, from its first layer.

What: one tensor that fits the first layer of a known kind, for models of plain vision (convolutions), sequences of
features (linear, recurrent, attention) and tokens (embeddings). Why: such a model says nowhere else what it takes.

    Conv2d(1, 32, 3)    [1, 1, 28, 28], [1, 1, 224, 224], ...       Embedding(1000, 64)    int64 [1, 128], [1, 16]
    Linear(784, 64)     [8, 784], [1, 16, 784]                      LSTM(32, 64)           [1, 16, 32]

How: usual sizes, the likeliest first; who asked takes the first that can be traced, so a flattened convolution whose
next layer is linear finds the size that it was made for. First is meant in the order in which modules are held, which
is nearly always that of their use. A forward with several inputs is given the same tensor for each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SIDES_OF_DIGITS = (28, 32, 64, 224)
"""Pixels of images with one channel."""

SIDES_OF_PHOTOS = (224, 32, 64, 256, 299, 384, 512)
"""Pixels of images with three channels: ImageNet, CIFAR, Tiny ImageNet, and what larger models take."""

SIDES_OF_OTHERS = (64, 32, 224)
"""Pixels where channels are neither: latents of 512 pixels, features."""

LENGTHS = (128, 16)
"""Steps of a sequence; the shorter one for models with few positions."""

SAMPLES = (16_000, 1024)
"""Steps of a sequence with one channel: a second of sound."""

CLIP = (16, 112, 112)
"""Frames and pixels of a clip (3D convolutions of Kinetics models)."""

ROWS = 8
"""Rows of features: more than one, which batch norm needs in training."""


@dataclass(frozen=True)
class FirstLayer:
    """The first layer of a known kind: its name in the model, and the shapes that it may be given."""

    name: str
    kind: type
    shapes: tuple[tuple[int, ...], ...]

    @property
    def takes_tokens(self) -> bool:
        return issubclass(self.kind, (nn.Embedding, nn.EmbeddingBag))


def find_first_layer(model: nn.Module) -> FirstLayer | None:
    """The first module of a kind whose input is known; None where there is none."""
    for name, module in model.named_modules():
        for kinds, shapes_of in SHAPES:
            if isinstance(module, kinds):
                return FirstLayer(name, type(module), tuple(shapes_of(module)))
    return None


def inputs_from_first_layer(
    model: nn.Module, layer: FirstLayer, dtype: torch.dtype, shape: Sequence[int] | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Positional arguments to try, the most likely ones first.

    Args:
        model: whose forward they are for.
        layer: its first layer.
        dtype: of everything but tokens.
        shape: the only one to try; None: usual ones.
    """
    n_inputs = max(1, required_inputs(model))
    for each in layer.shapes if shape is None else (tuple(shape),):
        tensor = torch.zeros(each, dtype=torch.int64 if layer.takes_tokens else dtype, device="cpu")
        yield (tensor,) * n_inputs


def required_inputs(model: nn.Module) -> int:
    """How many arguments ``forward`` cannot do without."""
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in plain and each.default is each.empty for each in _parameters(model) or ())


def takes_nothing(model: nn.Module) -> bool:
    """Whether ``forward`` has no arguments at all."""
    return _parameters(model) == []


def _parameters(model: nn.Module) -> list[inspect.Parameter] | None:
    """The arguments of ``forward``; None where it does not tell (one that is built in)."""
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return None


_Shapes = Iterator[tuple[int, ...]]


def _of_images(layer: Any) -> _Shapes:
    sides = {1: SIDES_OF_DIGITS, 3: SIDES_OF_PHOTOS}.get(layer.in_channels, SIDES_OF_OTHERS)
    yield from ((1, layer.in_channels, side, side) for side in sides)


def _of_series(layer: Any) -> _Shapes:
    lengths = SAMPLES if layer.in_channels == 1 else LENGTHS
    yield from ((1, layer.in_channels, length) for length in lengths)


def _of_clips(layer: Any) -> _Shapes:
    yield 1, layer.in_channels, *CLIP


def _of_tokens(_: Any) -> _Shapes:
    yield from ((1, length) for length in LENGTHS)


def _of_features(layer: Any) -> _Shapes:
    width = layer.in_features if hasattr(layer, "in_features") else layer.num_features
    yield from ((ROWS, width), (1, LENGTHS[-1], width))


def _of_norms(layer: Any) -> _Shapes:
    yield from ((ROWS, *layer.normalized_shape), (1, LENGTHS[-1], *layer.normalized_shape))


def _of_sequences(layer: Any) -> _Shapes:
    width = layer.embed_dim if isinstance(layer, nn.MultiheadAttention) else layer.input_size
    yield 1, LENGTHS[-1], width


SHAPES: tuple[tuple[type | tuple[type, ...], Callable[[Any], _Shapes]], ...] = (
    (nn.Conv2d, _of_images),
    (nn.Conv1d, _of_series),
    (nn.Conv3d, _of_clips),
    ((nn.Embedding, nn.EmbeddingBag), _of_tokens),
    ((nn.MultiheadAttention, nn.RNNBase), _of_sequences),
    ((nn.Linear, nn.BatchNorm1d), _of_features),
    ((nn.LayerNorm, nn.RMSNorm), _of_norms),
)
"""Kinds of layers, and the shapes that each may be given."""
