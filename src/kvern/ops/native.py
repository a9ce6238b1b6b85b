"""The CPU kernels of csrc/ through ctypes: weights are multiplied as they are stored, E4M3, BF16 or F32.

A product with few rows reads its weights once, at the speed of the memory, and never makes a converted copy. With many
rows the weights are converted block by block (a few MiB at a time) and torch multiplies, which is faster there (numbers
in `FEW_ROWS`).

What it leaves to the reference: autograd, dtypes other than FP32 and BF16, weights whose columns are not dense. Where
there is no library nothing is registered (see `kvern.ops.library`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvern.ops import native_attention, native_latent8, native_sampling, reference
from kvern.ops.library import CODES, is_dense, library, loaded

BLOCK = reference.BLOCK
FEW_ROWS = {
    (torch.float32, torch.float8_e4m3fn): 128,
    (torch.float32, torch.bfloat16): 128,
    (torch.float32, torch.float32): 32,
    (torch.bfloat16, torch.float8_e4m3fn): 16,
    (torch.bfloat16, torch.bfloat16): 8,
    (torch.bfloat16, torch.float32): 16,
}
"""(x.dtype, weight.dtype) -> rows of x up to which the kernels beat conversion plus torch.

Zen 4, AVX-512, one thread, weight 2048x7168, times faster than conversion plus torch at 4 / 16 / 64 / 128 rows:
FP32 x FP8 6.0 / 2.5 / 1.5 / 1.2, FP32 x BF16 10 / 3.9 / 1.3 / 1.1, FP32 x FP32 3.9 / 1.5 / 0.8 / 1.0,
BF16 x FP8 4.5 / 1.1 / 0.5 / 0.4, BF16 x BF16 1.9 / 1.0 / 0.4 / 0.4 (torch has BF16 dot products there, these kernels
compute in FP32).
"""

DENSE_BYTES = 4 << 20
"""Converted weights held at a time when x has many rows; small enough to stay in the outer cache."""


def backends(op: str) -> dict[str, Callable[..., Any]]:
    """Device type -> implementation of `op`; empty where there is no library."""
    known: dict[str, Callable[..., Any]] = {
        "linear": linear,
        "dequantize": dequantize,
        "paged_latent_attention": native_attention.paged_latent_attention,
        "expanded_attention": native_attention.expanded_attention,
        "encode_latents": native_latent8.encode_latents,
        "decode_latents": native_latent8.decode_latents,
        "draw": native_sampling.draw,
        "logprobs": native_sampling.logprobs,
    }
    return {"cpu": known[op]} if library() is not None and op in known else {}


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`reference.linear`, accumulated in FP32 from the weights as stored: relative error under 2e-6 of sum |x||w|."""
    if not _takes_linear(x, weight, scale, bias):
        return reference.linear(x, weight, scale, bias)
    rows = x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()
    if rows > FEW_ROWS[x.dtype, weight.dtype]:
        return _linear_many(x, weight, scale, bias)
    x = x.contiguous()
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
    _linear_few(x, weight, scale, bias, out, rows)
    return out


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`reference.dequantize`, bit for bit, in one pass over the bytes."""
    if not (dtype in (torch.float32, torch.bfloat16) and is_dense(weight) and _is_scale(scale, weight)):
        return reference.dequantize(weight, scale, dtype)
    out = torch.empty(weight.shape, dtype=dtype)
    lib = loaded()
    code = lib.kvern_dequantize(
        out.data_ptr(),
        CODES[dtype],
        weight.data_ptr(),
        weight.stride(0),
        scale.data_ptr(),
        scale.stride(0),
        *weight.shape,
    )
    assert code == 0, "kvern_dequantize refused its arguments"
    return out


def kernel_rows(activations: torch.dtype, weights: torch.dtype) -> int:
    """Rows up to which `linear` runs in the kernels for these dtypes; 0 without the library."""
    return 0 if library() is None else FEW_ROWS.get((activations, weights), 0)


def _linear_few(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor, rows: int) -> None:
    code = loaded().kvern_linear(
        out.data_ptr(),
        CODES[out.dtype],
        x.data_ptr(),
        CODES[x.dtype],
        weight.data_ptr(),
        CODES[weight.dtype],
        weight.stride(0),
        None if scale is None else scale.data_ptr(),
        0 if scale is None else scale.stride(0),
        None if bias is None else bias.data_ptr(),
        0 if bias is None else CODES[bias.dtype],
        rows,
        *weight.shape,
    )
    assert code == 0, "kvern_linear refused its arguments"


def _linear_many(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Convert a block of rows of the weight to x.dtype, multiply with torch, next block."""
    if weight.dtype == x.dtype:
        return reference.linear(x, weight, None, bias)
    outputs, inputs = weight.shape
    x_2d = x.reshape(-1, inputs)
    out = torch.empty(x_2d.shape[0], outputs, dtype=x.dtype)
    step = max(1, DENSE_BYTES // max(1, inputs * x.element_size() * BLOCK)) * BLOCK
    for first in range(0, outputs, step):
        rows = slice(first, first + step)
        if scale is None:
            dense = weight[rows].to(x.dtype)
        else:
            dense = dequantize(weight[rows], scale[first // BLOCK : (first + step) // BLOCK], x.dtype)
        torch.mm(x_2d, dense.T, out=out[:, rows])
    if bias is not None:
        out += bias.to(x.dtype)
    return out.view(*x.shape[:-1], outputs)


def _takes_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> bool:
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return False
    is_f8 = weight.dtype is torch.float8_e4m3fn
    return (
        x.dtype in (torch.float32, torch.bfloat16)
        and x.dim() > 0
        and (is_f8 or weight.dtype in (torch.float32, torch.bfloat16))
        and is_dense(weight)
        and x.shape[-1] == weight.shape[1]
        and is_f8 == (scale is not None)
        and (scale is None or _is_scale(scale, weight))
        and (
            bias is None
            or (
                bias.dtype in (torch.float32, torch.bfloat16)
                and bias.shape == weight.shape[:1]
                and bias.is_contiguous()
            )
        )
    )


def _is_scale(scale: Tensor, weight: Tensor) -> bool:
    blocks = tuple(-(-size // BLOCK) for size in weight.shape)
    return (
        scale.dtype is torch.float32
        and scale.shape == blocks
        and (blocks[1] <= 1 or scale.stride(1) == 1)
        and scale.stride(0) >= blocks[1]
    )
