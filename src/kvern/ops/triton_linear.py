"""y = x W^T on a card: W as it is stored, E4M3 with a scale for every 128x128 block, BF16 or F32.

    y[m, n] = sum over blocks b of K of scale[n / 128, b] * (sum over k in b of x[m, k] * w[n, k])  +  bias[n]

A tile of W is decoded in registers and multiplied as BF16 where x is BF16 (E4M3 fits BF16 exactly), else as FP32; sums
are FP32 and the scale multiplies a block's sum. E4M3 is decoded by bit arithmetic, so cards without FP8 compute the
same numbers. What it gives up: FP8 tensor cores (activations stay as they are, no error of theirs is added),
splitting K for few rows, and tuning per card. What it leaves to the reference: autograd, other dtypes, columns that are
not dense.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvern.ops import reference
from kvern.ops.library import is_dense

BLOCK = reference.BLOCK
SCALE_BLOCK = tl.constexpr(BLOCK)
INTERPRETED = triton.knobs.runtime.interpret
FLOATS = (torch.float32, torch.bfloat16)


@triton.jit
def decode_e4m3(code):
    """uint8 codes -> float32, exactly: the bits of an E4M3 number, moved, are the float16 that is 2^-8 of it."""
    bits = code.to(tl.uint16)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def tile_product(
    x_rows, row_exists, w_ptr, w_stride, scale_ptr, scale_first, scale_stride, columns, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """[BM, BN] float32: rows at the pointers x_rows [BM] times rows `columns` [BN] of W; BN and BK divide 128.

    The scales of W begin at scale_ptr[scale_first]; scale_ptr is None for W in BF16 or F32.
    """
    total = tl.zeros((BM, BN), dtype=tl.float32)
    w_rows = w_ptr + columns.to(tl.int64) * w_stride
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        x = tl.load(x_rows[:, None] + k[None, :], mask=row_exists[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(w_rows[None, :] + k[:, None], mask=(columns < N)[None, :] & (k < K)[:, None], other=0)
        if scale_ptr is None:
            total += tl.dot(x.to(DOT), w.to(DOT), input_precision="ieee")
        else:
            at = scale_first + (columns // SCALE_BLOCK).to(tl.int64) * scale_stride + first // SCALE_BLOCK
            scale = tl.load(scale_ptr + at, mask=columns < N, other=0.0)
            total += tl.dot(x.to(DOT), decode_e4m3(w).to(DOT), input_precision="ieee") * scale[None, :]
    return total


@triton.jit
def _linear_kernel(
    out_ptr, x_ptr, w_ptr, scale_ptr, bias_ptr, M, N, K, w_stride, scale_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    x_rows = x_ptr + rows.to(tl.int64) * K
    y = tile_product(x_rows, rows < M, w_ptr, w_stride, scale_ptr, 0, scale_stride, columns, N, K, BM, BN, BK, DOT)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    at = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`reference.linear`: x [.., K], weight [N, K], scale [ceil(N/128), ceil(K/128)], bias [N] -> [.., N]."""
    if not _takes(x, weight, scale, bias):
        return reference.linear(x, weight, scale, bias)
    x = x.contiguous()
    (outputs, inputs), rows = weight.shape, x.numel() // x.shape[-1]
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = tile_of(rows, x.dtype, weight.dtype)
    with torch.cuda.device_of(x):
        _linear_kernel[triton.cdiv(outputs, tile["BN"]), triton.cdiv(rows, tile["BM"])](
            out, x, codes(weight), scale, bias, rows, outputs, inputs,
            weight.stride(0), 0 if scale is None else scale.stride(0), **tile,
        )  # fmt: skip
    return out


def tile_of(rows: int, activations: torch.dtype, weights: torch.dtype) -> dict[str, object]:
    """BM, BN, BK and DOT, the dtype of the products, for tiles with up to `rows` rows of x. Not tuned on a card."""
    is_exact = torch.float32 in (activations, weights)
    most, inner = (32, 32) if is_exact else (64, 64)
    height = min(most, max(16, triton.next_power_of_2(rows)))
    width = 128 if height == 64 else 64
    return {"BM": height, "BN": width, "BK": inner, "DOT": dot_dtype(is_exact)}


def dot_dtype(is_exact: bool) -> tl.dtype:
    """Of the factors of a product; FP32 under the interpreter, which multiplies the bit patterns of BF16."""
    return tl.float32 if is_exact or INTERPRETED else tl.bfloat16


def codes(weight: Tensor) -> Tensor:
    """The weight as kernels read it: E4M3 as bytes."""
    return weight.view(torch.uint8) if weight.dtype is torch.float8_e4m3fn else weight


def are_scales(scale: Tensor | None, weight: Tensor) -> bool:
    """Whether `scale` is what a (stack of) weight [.., N, K] needs: blocks of 128 for E4M3, else None."""
    if weight.dtype is not torch.float8_e4m3fn:
        return scale is None and weight.dtype in FLOATS
    if scale is None or scale.dtype is not torch.float32:
        return False
    shape = (*weight.shape[:-2], *(-(-size // BLOCK) for size in weight.shape[-2:]))
    return scale.shape == shape and (scale.is_contiguous() or is_dense(scale))


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd follows any of them."""
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)


def _takes(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> bool:
    return (
        not needs_grad(x, weight, bias)
        and x.dtype in FLOATS
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1] > 0
        and is_dense(weight)
        and are_scales(scale, weight)
        and (bias is None or (bias.dtype in FLOATS and bias.shape == weight.shape[:1] and bias.is_contiguous()))
    )
