"""What happens around the step of any optimizer.

torch calls two hooks around every step of every optimizer, fused ones included, which leave no other trace. Behind a
step the weights that it owns count as changed. Before it, whatever still reads or writes them has to be done, and
gradients have to be where the optimizer looks for them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from spcompile.runtime.store import PageStore
from spcompile.runtime.weights import tag_on

logger = logging.getLogger(__name__)


@functools.cache
def watch_optimizers() -> None:
    """From now on, for good, know of every step of any optimizer."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


@_disable_dynamo  # in a compiled function a wait would become a node of its graph
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001  # the hook's
    for store in _stores(optimizer):
        if store.hosted or store.rehomed:  # the host is about to write what copies read
            with store.lock:
                store.settle()
                store.hosted.follow_zeroing(store)
                store.hosted.show_gradients(store)
                store.hosted.follow_edits(store)


@_disable_dynamo
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001  # the hook's
    for store in _stores(optimizer):
        with store.lock:
            if store.hosted:
                store.hosted.stepped(store, _parameters(optimizer))
            store.touch()
        _tell_where_the_state_is(optimizer, store)


def _stores(optimizer: Optimizer) -> set[PageStore]:
    """The stores of the weights that an optimizer owns."""
    return {tag.store for tensor in _parameters(optimizer) if (tag := tag_on(tensor)) is not None}


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _tell_where_the_state_is(optimizer: Optimizer, store: PageStore) -> None:
    """Once: an optimizer over the parameters of an offloaded model keeps its state where they seem to be. That of a CPU
    model is where `spcompile.host_parameters` would have it."""
    if (
        store.has_cpu_parameters
        or store.knows_of_state
        or not any(runtime.plan.intervals for runtime in store.runtimes())
    ):
        return
    mine = [parameter for parameter in _parameters(optimizer) if store.holds(parameter)]
    state = (value for parameter in mine for value in optimizer.state.get(parameter, {}).values())
    nbytes = sum(each.nbytes for each in state if isinstance(each, torch.Tensor) and each.device == store.device)
    if nbytes:
        store.knows_of_state = True
        logger.warning(
            "the state of this %s, %s bytes, is on %s, as its parameters are tensors of that device. To keep it in "
            "host memory and update the weights there, make it over spcompile.host_parameters(model)",
            type(optimizer).__name__,
            f"{nbytes:,}",
            store.device,
        )
