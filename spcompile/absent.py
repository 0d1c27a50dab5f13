"""Planning for what is not here: models without values (on the meta device), and a GPU that this machine lacks.

*Models without values.* Dynamo captures a model on the device of its tensors, and a meta tensor belongs to no device
that computes. For the time of a capture `stand_ins` puts a CPU tensor in the place of each one: memory that is mapped
but never touched, so it costs addresses and nothing else. A capture reads no values, and nothing is run.

*A GPU that is not here.* Fake CUDA tensors do not work where there is no CUDA: indexing one raises, and in training
autograd ends the process. So AOTAutograd traces with CPU tensors, and `rehome_for_absent_gpu` rewrites Dynamo's graph
so that it comes out as a GPU's would:

    before                                             after
    y = scaled_dot_product_attention(q, k, v)          y = spcompile.cuda_attention.attention(q, k, v)
    enter = _enter_autocast('cuda', bfloat16, True)    enter = _enter_autocast('cpu', bfloat16, True)

Decompositions and passes that ask for the device are treated in ``cuda_decompositions``. What remains different is
small, and none of it moves weights or cuts:

- Inductor's arithmetic for a group norm with weights, and for products with an inner size of one;
- without decompositions (``compiler="eager"``), batch norm is not cuDNN's operator;
- operators that only one of the autocasts lowers or raises;
- what the model's own Python code does only ``if x.is_cuda``: it sees CPU tensors.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.amp.autocast_mode import _enter_autocast
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from spcompile.cuda_attention import attention
from spcompile.errors import OptionError
from spcompile.runtime.weights import storage_key

ABSENT_GPU_BYTES = 80 * 10**9
"""Memory of a GPU that nobody described: an H100 with 80 GB, where the figures of docs/design.md were measured."""

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Flag of a mapping that the system need not be able to fill (named in Python 3.13 and later)."""


def is_absent(device: torch.device) -> bool:
    """Whether a device is a GPU and this machine has none."""
    return device.type == "cuda" and not torch.cuda.is_available()


# Models without values.


class StandIns:
    """CPU tensors in the place of meta tensors: one for each tensor, over one untouched mapping for each storage."""

    def __init__(self) -> None:
        self.tensors: dict[int, tuple[Tensor, Tensor]] = {}  # each with the original, so that no id is used again
        self.memories: dict[int, Tensor] = {}

    def of(self, value: Any) -> Any:
        """The stand-in of a meta tensor; anything else as it is.

        Raises:
            OptionError: the tensor is not a plain one, or the system does not give so many addresses.
        """
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        if id(value) not in self.tensors:
            self.tensors[id(value)] = value, self._make(value)
        return self.tensors[id(value)][1]

    def _make(self, original: Tensor) -> Tensor:
        if is_lazy(original) or type(original.data) is not Tensor or original.layout is not torch.strided:
            raise OptionError(
                f"a {type(original).__name__} on the meta device cannot be planned: only plain dense tensors can. Make "
                "the model with real values, or without its quantization or lazy modules"
            )
        memory = self._memory(original).untyped_storage()
        with torch.no_grad():
            tensor = torch.empty(0, dtype=original.dtype, device="cpu")
            tensor.set_(memory, original.storage_offset(), original.size(), original.stride())
        if isinstance(original, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
            vars(tensor).update(vars(original))
        return tensor.requires_grad_(original.requires_grad)

    def _memory(self, original: Tensor) -> Tensor:
        """Untouched memory, uint8, in the place of the tensor's storage."""
        key, nbytes = storage_key(original), original.untyped_storage().nbytes()
        if key not in self.memories:
            self.memories[key] = untouched(nbytes)
        return self.memories[key]


def untouched(nbytes: int) -> Tensor:
    """Memory of which not a byte is in use until it is touched; reads as zeros. CPU tensor, uint8 ``[nbytes]``.

    Raises:
        OptionError: the system does not give so many addresses.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    except OSError as error:
        raise OptionError(
            f"the system gives no addresses for a stand-in of {nbytes:,} bytes ({error}): raise the limit on virtual "
            "memory (ulimit -v), or allow overcommitting (vm.overcommit_memory)"
        ) from error
    return torch.frombuffer(mapping, dtype=torch.uint8)


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[StandIns]:
    """Put stand-ins in the place of a model's meta tensors, and take them out again.

    Parameters, buffers and tensors that are plain attributes of a module are replaced. What is tied stays tied. On
    leaving, each holder has its own objects back, whatever happened in between.

    Raises:
        OptionError: see `StandIns.of`.
    """
    made = StandIns()
    with ExitStack() as stack:
        for module in model.modules():
            for holder in (module._parameters, module._buffers, vars(module)):
                _replace(holder, made, stack)
        yield made


def _replace(holder: dict[str, Any], made: StandIns, stack: ExitStack) -> None:
    for name, value in tuple(holder.items()):
        stand_in = made.of(value)
        if stand_in is not value:
            stack.callback(holder.__setitem__, name, value)
            holder[name] = stand_in


def stand_in_inputs(made: StandIns, values: Any) -> Any:
    """Example inputs, nested, with stand-ins for those on the meta device."""
    return tree_map(made.of, values)


# A GPU that is not here.


def rehome_for_absent_gpu(gm: fx.GraphModule) -> None:
    """Rewrite a graph of Dynamo, and the bodies of its higher-order operators, for a GPU that is not here; in place."""
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.find_nodes(op="call_function", target=torch._C._nn.scaled_dot_product_attention):
            node.target = attention
        for node in module.graph.find_nodes(op="call_function", target=_enter_autocast):
            if node.args[0] == "cuda":
                node.args = ("cpu", node.args[1] or torch.get_autocast_dtype("cuda"), *node.args[2:])
        module.recompile()
