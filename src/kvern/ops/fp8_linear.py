"""A linear layer whose three products are in FP8: the report's recipe as one differentiable function.

    Fprop   y  = q(x)  q(W)^T       x in 1x128 tiles along its columns, W in 128x128 blocks
    Dgrad   dx = q(dy) q(W)         dy in 1x128 tiles along its columns, the same codes of W
    Wgrad   dW = q(dy)^T q(x)       both in 128x1 tiles along the tokens, over which this product sums

E4M3 everywhere, scale = amax / 448 of the tile, measured at each call. x is kept for the backward pass as E4M3, a byte
a number, and tiled again for Wgrad from those codes; with power-of-two scales (the default for x) that changes codes by
an exponent only, so it costs nothing unless a number falls under the larger tile's smallest. Sums and dW are FP32.

Two layers with one input (gate_proj and up_proj) share its codes where they are given (`fp8_codes`). What it gives up:
each tiles them again for its own Wgrad; and second derivatives.
Source: DeepSeek-V3 technical report, section 3.3 and appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvern.ops import fp8_hopper, native_fp8, reference, reference_fp8, triton_backends
from kvern.ops.dispatch import Op
from kvern.ops.reference import BLOCK

SMALLEST_AMAX = 1e-30
"""Keeps tiles of zeros finite. Gradients of a mean over millions of tokens are far below the 1e-4 of DeepSeek's
inference kernel, which would flush them."""

quantize_tiles = Op(
    "quantize_tiles",
    reference.quantize_tiles,
    native_fp8.backends("quantize_tiles") | triton_backends.backends("quantize_tiles"),
)
retile_columns = Op("retile", reference_fp8.retile, native_fp8.backends("retile") | triton_backends.backends("retile"))
scaled_product = Op(
    "scaled_product",
    reference_fp8.scaled_product,
    native_fp8.backends("scaled_product") | fp8_hopper.backends("scaled_product"),
)


@dataclass(frozen=True)
class Fp8Recipe:
    """How operands are scaled.

    power_of_two: scales of activations are powers of two, also when they are tiled again for Wgrad.
    tensorwise: one scale for a whole tensor instead of one for each 128 numbers, for comparison; E4M3 all the same.
    """

    power_of_two: bool = True
    tensorwise: bool = False

    def quantize(self, x: Tensor, tile: tuple[int, int], power_of_two: bool = False) -> tuple[Tensor, Tensor]:
        """x [R, C] -> (codes [R, C] E4M3, their scales) in tiles of `tile`, or with one scale where tensorwise."""
        if self.tensorwise:
            tile = (max(1, x.shape[0]), max(1, x.shape[1]))
        return quantize_tiles(x, tile, power_of_two, SMALLEST_AMAX)


ROW_TILE, COLUMN_TILE, WEIGHT_BLOCK = (1, BLOCK), (BLOCK, 1), (BLOCK, BLOCK)


Codes = tuple[Tensor, Tensor]
"""Of x [.., K], as [T, K] in E4M3, with their scales."""


def fp8_codes(x: Tensor, recipe: Fp8Recipe) -> Codes:
    """What `fp8_linear` makes of x [.., K], for several that have the same x and recipe."""
    with torch.no_grad():
        return recipe.quantize(x.reshape(-1, x.shape[-1]), ROW_TILE, recipe.power_of_two)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    recipe: Fp8Recipe | None = None,
    codes: Codes | None = None,
) -> Tensor:
    """x [.., K] times weight [N, K] transposed, plus bias [N]: the three products in FP8; returns [.., N] in x.dtype.

    x and weight in float32 or bfloat16. codes: `fp8_codes` of x, where they are there already. Sizes need not
    be multiples of 128. NaN and infinity in a tile come out as NaN.
    """
    flat = x.reshape(-1, x.shape[-1])
    recipe = recipe or Fp8Recipe()
    out: Tensor = _Fp8Product.apply(flat, weight, recipe, *(codes or fp8_codes(x, recipe)))  # type: ignore[no-untyped-call]
    out = out.view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias.to(out.dtype)


class _Fp8Product(torch.autograd.Function):
    """x [T, K], weight [N, K] -> [T, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Fp8Recipe, codes: Tensor, scale: Tensor) -> Tensor:
        blocks, block_scale = recipe.quantize(weight, WEIGHT_BLOCK)
        ctx.save_for_backward(codes, scale, blocks, block_scale)
        ctx.recipe, ctx.dtypes = recipe, (x.dtype, weight.dtype)
        return scaled_product(codes, scale, blocks, block_scale, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        codes, scale, blocks, block_scale = ctx.saved_tensors
        dx = dgrad(dy, blocks, block_scale, ctx.recipe, ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = wgrad(dy, *retile(codes, scale, ctx.recipe), ctx.recipe, ctx.dtypes[1])
        return dx, dw, None, None, None


def dgrad(dy: Tensor, blocks: Tensor, block_scale: Tensor, recipe: Fp8Recipe, dtype: torch.dtype) -> Tensor:
    """[T, K]: dy [T, N] through the weight's codes [N, K]."""
    codes, scale = recipe.quantize(dy, ROW_TILE)
    return scaled_product(codes, scale, blocks.T, block_scale.T, dtype)


def wgrad(dy: Tensor, columns: Tensor, column_scale: Tensor, recipe: Fp8Recipe, dtype: torch.dtype) -> Tensor:
    """[N, K]: dy [T, N], tiled along the tokens, and the codes [T, K] of x that `retile` gave."""
    left, left_scale = recipe.quantize(dy, COLUMN_TILE)
    return scaled_product(left.T, left_scale.T, columns.T, column_scale.T, dtype)


def retile(codes: Tensor, scale: Tensor, recipe: Fp8Recipe) -> tuple[Tensor, Tensor]:
    """Codes [T, K] in 1x128 tiles -> codes [T, K] in 128x1 tiles with scales [ceil(T/128), K]."""
    if recipe.tensorwise:
        return codes, scale
    return retile_columns(codes, scale, recipe.power_of_two, SMALLEST_AMAX)
