"""Attention as CUDA would run it, traced where there is no CUDA.

``scaled_dot_product_attention`` becomes one of several operators, chosen by torch when it is traced; the choice asks
the GPU. Without one torch takes the CPU's operator, or matrix products and a softmax: other nodes, and quadratic
memory that no GPU would need. `choose_operator` repeats the choice for a GPU of compute capability 9.0 (H100, H200),
and `attention` what is done around the chosen operator (masks, padding, autocast).

The rules are those of torch's ``aten/src/ATen/native/transformers`` (``cuda/sdp_utils.cpp``: ``select_sdp_backend``,
``can_use_*``; ``sdp_utils_cpp.h``: shapes, strides; ``attention.cpp``: ``scaled_dot_product_attention``) with cuDNN
newer than 9.15, as wheels from torch 2.11 on bring it. Those of torch 2.11 are compared with an H100 by
``tests/gpu/test_gpu_planning.py``; where later sources differ they are followed from 2.12 on. Left out: nested tensors,
ROCm, alignment of single addresses, and an order that ``sdpa_kernel(..., set_priority=True)`` sets.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

BEFORE_2_12 = torch.__version__ < "2.12"

CUDNN_HEAD_DIMENSION = 256 if BEFORE_2_12 else 128
"""Largest head of cuDNN's operator; 192 for queries and keys goes with 128 for values (check_cudnn_tensor_shapes)."""

CUDNN_DROPOUT_STEPS = None if BEFORE_2_12 else 16
"""Steps from 0 to 1 in which cuDNN's dropout goes; None: any (check_cudnn_dropout)."""

FLASH_HEAD_DIMENSION = 256
"""Largest head of the flash operator (check_head_dim_size_flash)."""

CUDNN_LARGEST_DIMENSION = 65535
"""Most heads, and largest batch, of cuDNN's operator (check_cudnn_tensor_shapes)."""

CUDNN_MASKED = -65504.0
"""What stands for minus infinity in a mask that cuDNN reads (convert_boolean_attn_mask_cudnn)."""

HALVES = (torch.float16, torch.bfloat16)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` for tracing: the operators that CUDA would choose.

    Works on fake tensors of any device, as it only calls what has a meta kernel.
    """
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):  # the operator as a whole is on autocast's list, not its parts
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = (_lowered(each, dtype) for each in (query, key, value))
        attn_mask = None if attn_mask is None else _lowered(attn_mask, dtype)
    chosen = choose_operator(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa=enable_gqa)
    with torch.autocast(device_type, enabled=False):
        if chosen is SDPBackend.CUDNN_ATTENTION:
            return _cudnn(query, key, value, attn_mask, dropout_p, is_causal, scale)
        if chosen is SDPBackend.FLASH_ATTENTION:
            return _flash(query, key, value, dropout_p, is_causal, scale)
        if chosen is SDPBackend.EFFICIENT_ATTENTION:
            return _efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)
        mask = _additive(attn_mask, query.dtype, -math.inf)
        parts: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )
        return parts[0]


def _lowered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    mask = _additive(mask, query.dtype, CUDNN_MASKED)
    keeps_sums = _needs_gradients(query, key, value)
    result: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, mask, keeps_sums, dropout_p, is_causal, False, scale=scale
    )
    return result[0]


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> Tensor:
    head = query.size(-1)
    padding = -head % 8
    if padding:
        query, key, value = (torch.nn.functional.pad(each, (0, padding)) for each in (query, key, value))
    if scale is None:
        scale = 1 / math.sqrt(head)
    result: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )
    return result[0][..., :head] if padding else result[0]


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    mask = _additive(mask, query.dtype, -math.inf)
    if mask is not None:
        mask = _aligned(mask).expand(query.size(0), query.size(1), query.size(2), key.size(2))
    keeps_sums = _needs_gradients(query, key, value)
    result: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, keeps_sums, dropout_p, is_causal, scale=scale
    )
    return result[0]


def _additive(mask: Tensor | None, dtype: torch.dtype, masked: float) -> Tensor | None:
    """The mask as numbers that are added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    outside, inside = (torch.scalar_tensor(each, dtype=dtype, device=mask.device) for each in (masked, 0.0))
    return torch.where(mask, inside, outside)


def _aligned(mask: Tensor) -> Tensor:
    """The mask with rows at multiples of 8 elements (preprocess_mask)."""
    strides = mask.stride()
    if strides[-1] == 1 and all(type(each) is int and each % 8 == 0 for each in strides[:-1]):
        return mask
    length = mask.size(-1)
    return torch.nn.functional.pad(mask, (0, 8 - length % 8))[..., :length]


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def choose_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    enable_gqa: bool = False,
) -> SDPBackend:
    """What ``torch._fused_sdp_choice`` answers on a GPU of compute capability 9.0.

    Args:
        query, key, value: ``[..., heads, length, head]``; only shapes, strides, dtypes and requires_grad are read.
        mask, dropout_p, is_causal, enable_gqa: as for ``scaled_dot_product_attention``.
    """
    cudnn = _cudnn_can(query, key, value, mask, dropout_p, enable_gqa)
    if cudnn and os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") != "1":
        return SDPBackend.CUDNN_ATTENTION
    if _flash_can(query, key, value, mask, is_causal, enable_gqa):
        return SDPBackend.FLASH_ATTENTION
    if _efficient_can(query, key, value, mask):
        return SDPBackend.EFFICIENT_ATTENTION
    # The default order has cuDNN behind math, where it is never reached unless math is switched off.
    return SDPBackend.CUDNN_ATTENTION if cudnn and not _is_on("math_sdp_enabled") else SDPBackend.MATH


def _cudnn_can(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, enable_gqa: bool
) -> bool:
    if not _is_on("cudnn_sdp_enabled") or not _are(HALVES, query, key, value):
        return False
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return False
    if not _fits_shapes(query, key, value, enable_gqa) or not _has_rows(query, key, value, mask, ignore_single=True):
        return False
    if mask is not None and not _cudnn_takes_mask(query, key, mask):
        return False
    if query.size(0) > CUDNN_LARGEST_DIMENSION or query.size(1) > CUDNN_LARGEST_DIMENSION:
        return False
    head, value_head = query.size(-1), value.size(-1)
    if head % 8 or value_head % 8:
        return False
    if max(head, value_head) > CUDNN_HEAD_DIMENSION and (head, value_head) != (192, 128):
        return False
    if dropout_p and query.size(2) == 1:
        return False
    if CUDNN_DROPOUT_STEPS and not float(dropout_p * CUDNN_DROPOUT_STEPS).is_integer():
        return False
    return bool(key.size(2) != 1)


def _cudnn_takes_mask(query: Tensor, key: Tensor, mask: Tensor) -> bool:
    wanted = (query.size(0), query.size(1), query.size(2), key.size(2))
    if mask.requires_grad or mask.dim() not in (2, 4):
        return False
    return all(size in (1, other) for size, other in zip(mask.shape, wanted[-mask.dim() :], strict=True))


def _flash_can(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> bool:
    if not _is_on("flash_sdp_enabled") or mask is not None or not _are(HALVES, query, key, value):
        return False
    if not _fits_shapes(query, key, value, enable_gqa) or not _has_rows(query, key, value, mask, ignore_single=True):
        return False
    head = query.size(-1)
    if head != key.size(-1) or head != value.size(-1) or head > FLASH_HEAD_DIMENSION:
        return False
    return not is_causal or bool(query.size(-2) == key.size(-2))


def _efficient_can(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    if not _is_on("mem_efficient_sdp_enabled"):
        return False
    if not _are((*HALVES, torch.float32), query, key, value):
        return False
    # Grouped heads are not its own: with as many heads everywhere it takes part all the same.
    if not _fits_shapes(query, key, value, False) or not _has_rows(query, key, value, mask, ignore_single=False):
        return False
    alignment = 8 if query.dtype in HALVES else 4
    head, value_head = query.size(-1), value.size(-1)
    return bool(head == key.size(-1) and head and value_head and head % alignment == 0 and value_head % alignment == 0)


def _is_on(switch: str) -> bool:
    """One of the switches that ``torch.nn.attention.sdpa_kernel`` sets; they are there without CUDA, too."""
    on: bool = getattr(torch.backends.cuda, switch)()
    return on


def _are(dtypes: tuple[torch.dtype, ...], query: Tensor, key: Tensor, value: Tensor) -> bool:
    return query.dtype in dtypes and key.dtype == query.dtype and value.dtype == query.dtype


def _fits_shapes(query: Tensor, key: Tensor, value: Tensor, takes_groups: bool) -> bool:
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    if not query.size(0) == key.size(0) == value.size(0):
        return False
    if takes_groups:
        return bool(key.size(1) == value.size(1) and query.size(1) % key.size(1) == 0)
    return bool(query.size(1) == key.size(1) == value.size(1))


def _has_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, ignore_single: bool) -> bool:
    """No empty sequence, and neighbours in a row are neighbours in memory."""
    if query.size(-2) == 0 or key.size(-2) == 0:
        return False
    rows = all(each.stride(-1) == 1 for each in (query, key, value)) or (ignore_single and query.size(-1) == 1)
    return bool(rows and (mask is None or mask.stride(-1) == 1))
