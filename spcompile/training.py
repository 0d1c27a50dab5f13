"""Training with the optimizer on the host: `host_parameters`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spcompile.errors import OffloadError, OptionError
from spcompile.runtime.optimizers import watch_optimizers
from spcompile.runtime.weights import tag_of

NO_PARAMETERS = (
    "host_parameters needs a torch.nn.Module or some of its parameters, such as model.head.parameters(), not {what}"
)


def host_parameters(
    model: nn.Module | Iterable[nn.Parameter], master_dtype: torch.dtype | None = None
) -> list[nn.Parameter]:
    """CPU parameters over the memory of a model's weights, for an optimizer whose state and step are on the host::

        spcompile.offload(model)
        fast = torch.compile(model, backend="superpipeline", options={"budget": "8GiB"})
        optimizer = torch.optim.AdamW(spcompile.host_parameters(model), lr=1e-4, fused=True)
        for batch in data:
            loss = fast(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    Each shares its memory with the weight, so there is no second copy of the model, and the weights that the device
    reads next are the updated ones. After each ``backward()`` its ``.grad`` is the gradient of the model's parameter,
    in the same memory too: clip, scale or zero either. A frozen parameter has none. Everything else is as with any CPU
    parameters: all of ``torch.optim``, schedulers, parameter groups (call this for each part of the model), state dicts
    that load into an optimizer over an ordinary model.

    From the first call on the model's weights are updated on the host: eager code reads them over the link, and weights
    that a plan keeps on the device are copied there again after each step. Edits of a host parameter in place count
    like those of any weight; `spcompile.refresh` is for edits through ``.data``. Those of a copy in another precision
    reach the weight, and edits of the weight (a checkpoint that is loaded) the copy, when a compiled graph of the model
    runs or an optimizer steps. Hooks of gradients belong on the model's parameters: on the host's none is called.

    Args:
        model: offloaded, or on the GPU and compiled with this backend, or some of its parameters. A model on the CPU
            has CPU parameters already: they are returned as they are.
        master_dtype: None, or the dtype of copies that the optimizer works on, while the model has weights of lower
            precision (``torch.float32`` for a model in ``bfloat16``). After each step they are rounded to the weights.

    Returns:
        One parameter for each of the model's, in the order of ``model.parameters()``; the same ones each time.

    Raises:
        OffloadError: a parameter is on a GPU, or copies in another precision were asked for, and the model is neither
            offloaded nor has it been compiled and run; or there is not enough host memory.
        OptionError: a parameter was asked for in another precision before; or ``model`` or ``master_dtype`` is not what
            it should be.
    """
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else _checked_parameters(model)
    _check_dtype(master_dtype)
    watch_optimizers()
    found = [_host_parameter(each, master_dtype) for each in parameters]
    for store in {tag.store for tag in map(tag_of, parameters) if tag is not None}:
        with store.lock:
            store.settle()
            store.hosted.show_gradients(store)  # of a backward before this call
    return found


def _checked_parameters(given: Any) -> list[nn.Parameter]:
    if isinstance(given, (str, Tensor)) or not isinstance(given, Iterable):
        raise OptionError(NO_PARAMETERS.format(what=f"a {type(given).__name__}"))
    parameters = list(given)
    for each in parameters:
        if not isinstance(each, nn.Parameter):
            raise OptionError(NO_PARAMETERS.format(what=f"an iterable with a {type(each).__name__} in it"))
    return parameters


def _check_dtype(master_dtype: object) -> None:
    if master_dtype is None:
        return
    if not isinstance(master_dtype, torch.dtype) or not (master_dtype.is_floating_point or master_dtype.is_complex):
        raise OptionError(
            f"master_dtype must be None or a floating-point dtype such as torch.float32, not {master_dtype!r}"
        )


def _host_parameter(parameter: nn.Parameter, master_dtype: torch.dtype | None) -> nn.Parameter:
    tag = tag_of(parameter)
    if tag is None and parameter.device.type != "cpu":
        raise OffloadError(
            f"a parameter of shape {tuple(parameter.shape)} is on {parameter.device}, not in host memory: call "
            "spcompile.offload(model) first, or run the compiled model once"
        )
    is_own = tag is None or tag.store.has_cpu_parameters
    if is_own and master_dtype in (None, parameter.dtype):
        return parameter
    if tag is None:
        raise OffloadError("master copies need an offloaded or compiled model: call spcompile.offload(model) first")
    tag.store.master_on_host()
    return tag.store.hosted.parameter_for(tag.store, parameter, master_dtype)
