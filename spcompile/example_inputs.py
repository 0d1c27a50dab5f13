"""Example inputs for a model that came without any.

What: guesses, the likeliest first, of what a model may be called with. A plan needs one call that can be traced, and
most models say somewhere what that is: Hugging Face's in their config, Lightning's in ``example_input_array``, timm's
in ``pretrained_cfg``, others in ``dummy_inputs``; a plain model, by its first layer.

How: guesses are made one at a time, as they are asked for. Each says where it comes from, so that whoever uses it can
say so. A guess may be wrong; the caller traces it and goes on to the next one where that fails. None of the libraries
is imported: their models are known by their attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from spcompile.first_layer import find_first_layer, inputs_from_first_layer, takes_nothing
from spcompile.transformers_inputs import inputs_from_config, is_transformers_model

TIMM_CONFIGS = ("pretrained_cfg", "default_cfg")
"""Where timm keeps what a model was trained for; the second is the older name."""


@dataclass(frozen=True, eq=False)
class Guess:
    """A call that a model may take.

    Attributes:
        source: where it comes from, for people.
        args, kwargs: the call.
    """

    source: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        named = [(name, value) for name, value in self.kwargs.items() if value is not None]
        parts = [_describe(value) for value in self.args] + [f"{name} {_describe(value)}" for name, value in named]
        return f"{self.source}: {', '.join(parts) or 'none'}"


def guess_inputs(model: nn.Module, shape: Sequence[int] | None = None) -> Iterator[Guess]:
    """Calls to try, the most likely ones first. Their tensors are where the model's are (on the CPU for a meta model).

    Args:
        model: any module.
        shape: of the main input, where it is known; then nothing is guessed that has another one.
    """
    device, dtype = _home(model), _dtype(model)
    for guess in _guesses(model, dtype, shape):

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) and not value.is_meta else value

        yield Guess(guess.source, tree_map(move, guess.args), tree_map(move, dict(guess.kwargs)))


def _guesses(model: nn.Module, dtype: torch.dtype, shape: Sequence[int] | None) -> Iterator[Guess]:
    kind = type(model).__name__
    is_pretrained = is_transformers_model(model)
    if is_pretrained:
        source = f"the config of {kind}"
        yield from (Guess(source, kwargs=kwargs) for kwargs in inputs_from_config(model, dtype, shape))
    if shape is None:
        yield from _from_lightning(model, kind)
        yield from _from_timm(model, kind, dtype)
        yield from _from_dummy_inputs(model, kind)
    if takes_nothing(model):
        yield Guess(f"{kind} takes no inputs")
        return
    layer = None if is_pretrained else find_first_layer(model)
    if layer is not None:
        where = f" {layer.name!r}" if layer.name else ""
        source = f"the first layer of {kind},{where} {layer.kind.__name__}"
        yield from (Guess(source, args) for args in inputs_from_first_layer(model, layer, dtype, shape))


def _from_lightning(model: nn.Module, kind: str) -> Iterator[Guess]:
    """Lightning calls ``forward`` with a tuple's or a dict's members, and with anything else as it is."""
    example = _attribute(model, "example_input_array")
    source = f"example_input_array of {kind}"
    if isinstance(example, Mapping):
        yield Guess(source, kwargs=dict(example))
    elif isinstance(example, tuple):
        yield Guess(source, example)
    elif example is not None:
        yield Guess(source, (example,))


def _from_timm(model: nn.Module, kind: str, dtype: torch.dtype) -> Iterator[Guess]:
    for name in TIMM_CONFIGS:
        config = _attribute(model, name)
        size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
        if isinstance(size, (tuple, list)) and all(isinstance(each, int) for each in size):
            yield Guess(f"{name} of {kind}", (torch.zeros(1, *size, dtype=dtype, device="cpu"),))
            return


def _from_dummy_inputs(model: nn.Module, kind: str) -> Iterator[Guess]:
    dummies = _attribute(model, "dummy_inputs")
    if isinstance(dummies, Mapping):
        yield Guess(f"dummy_inputs of {kind}", kwargs=dict(dummies))
    elif isinstance(dummies, (tuple, list)):
        yield Guess(f"dummy_inputs of {kind}", tuple(dummies))
    elif isinstance(dummies, Tensor):
        yield Guess(f"dummy_inputs of {kind}", (dummies,))


def _attribute(model: nn.Module, name: str) -> Any:
    """An attribute, None where there is none; some are properties that raise what they like."""
    with suppress(Exception):
        return getattr(model, name, None)
    return None


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _home(model: nn.Module) -> torch.device:
    device = next((tensor.device for tensor in _tensors(model)), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _dtype(model: nn.Module) -> torch.dtype:
    """What the model computes in: that of its first weights that are not packed into smaller numbers."""
    dtypes = (tensor.dtype for tensor in _tensors(model))
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.float32)


def _describe(value: Any) -> str:
    """Dtypes and shapes of the tensors in a value, which may be nested."""
    parts = [
        f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" if isinstance(each, Tensor) else repr(each)
        for each in tree_iter(value)
    ]
    return ", ".join(parts)
