"""The products of rows sorted by expert with a stack of weights, and their gradients, in floats and in FP8.

    y[rows of n] = x[rows of n] W[n]^T      dx[rows of n] = dy[rows of n] W[n]      dW[n] = dy[rows of n]^T x[rows of n]

One product for each expert with rows, written into its place of one result: nothing is concatenated, and an expert
without rows costs nothing and has a gradient of zeros. In FP8 the rows are quantised once, for all experts and for all
projections of a stack (gate and up); weights are quantised by projection, with the borders of blocks where a checkpoint
has them.

oneDNN, which multiplies BF16 on CPUs, compiles a kernel for each number of rows it meets, in 5 to 10 ms: longer than
the product takes. So there a product takes some more rows than the expert has, to one of eight sizes an octave. The
superfluous results lie in the rows of the next expert, whose own product overwrites them; for Wgrad they are zeros.

What it gives up: second derivatives; on a GPU, one launch for all experts. A tensorwise recipe scales the rows of all
experts together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvern.ops.fp8_linear import ROW_TILE, WEIGHT_BLOCK, Fp8Recipe, dgrad, retile, scaled_product, wgrad


def grouped_linear(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """x [R, K], its first counts[0] rows for weight[0] and so on, times weight [N, O, K]: [R, O] in x.dtype.

    Products are in x.dtype, the weight's gradient in the weight's. The counts add up to R.
    """
    out: Tensor = _GroupedProduct.apply(x, weight, counts)  # type: ignore[no-untyped-call]
    return out


def fp8_grouped_linear(x: Tensor, weight: Tensor, counts: Sequence[int], recipe: Fp8Recipe, projections: int) -> Tensor:
    """`grouped_linear` with its three products in FP8; each weight[n] is `projections` weights of as many rows."""
    out: Tensor = _Fp8GroupedProduct.apply(x, weight, counts, recipe, projections)  # type: ignore[no-untyped-call]
    return out


def spans(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows."""
    for expert, end in enumerate(accumulate(counts)):
        if counts[expert]:
            yield expert, slice(end - counts[expert], end)


class _GroupedProduct(torch.autograd.Function):
    """x [R, K], weight [N, O, K] -> [R, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
        dense = weight.to(x.dtype)
        out = x.new_empty(len(x), weight.shape[1])
        for expert, rows in spans(counts):
            _product(x, rows, dense[expert].T, out)
        ctx.save_for_backward(x, dense)
        ctx.counts, ctx.dtype = counts, weight.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, dense = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.empty_like(dense, dtype=ctx.dtype) if ctx.needs_input_grad[1] else None
        for expert, rows in spans(ctx.counts):
            if dx is not None:
                _product(dy, rows, dense[expert], dx)
            if dw is not None:
                left, right = _tail(dy, rows), _window(x, rows)
                dw[expert] = left.T @ right
        if dw is not None:
            _forget_idle(dw, ctx.counts)
        return dx, dw, None


class _Fp8GroupedProduct(torch.autograd.Function):
    """x [R, K], weight [N, O, K] -> [R, O], all products in FP8."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, counts: Sequence[int], recipe: Fp8Recipe, projections: int
    ) -> Tensor:
        codes, scale = recipe.quantize(x, ROW_TILE, recipe.power_of_two)
        out = x.new_empty(len(x), weight.shape[1])
        columns = _columns(weight.shape[1], projections)
        blocks = []
        for expert, rows in spans(counts):
            for part in columns:
                block, block_scale = recipe.quantize(weight[expert, part], WEIGHT_BLOCK)
                out[rows, part] = scaled_product(codes[rows], _of(scale, rows), block, block_scale, x.dtype)
                blocks += [block, block_scale]
        ctx.save_for_backward(codes, scale, *blocks)
        ctx.counts, ctx.recipe, ctx.columns = counts, recipe, columns
        ctx.dtypes, ctx.shape = (x.dtype, weight.dtype), weight.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        codes, scale, *blocks = ctx.saved_tensors
        dx = dy.new_zeros(codes.shape, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        dw = dy.new_empty(ctx.shape, dtype=ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        left = iter(zip(blocks[::2], blocks[1::2], strict=True))
        for expert, rows in spans(ctx.counts):
            tiled = retile(codes[rows], _of(scale, rows), ctx.recipe)
            for part in ctx.columns:
                block, block_scale = next(left)
                if dx is not None:
                    dx[rows] += dgrad(dy[rows, part], block, block_scale, ctx.recipe, torch.float32)
                if dw is not None:
                    dw[expert, part] = wgrad(dy[rows, part], *tiled, ctx.recipe, ctx.dtypes[1])
        if dw is not None:
            _forget_idle(dw, ctx.counts)
        return None if dx is None else dx.to(ctx.dtypes[0]), dw, None, None, None


def whole_size(rows: int) -> int:
    """`rows`, rounded up to 16 or to one of eight sizes an octave: at most an eighth more."""
    step = max(16, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def row_count(x: Tensor) -> int:
    """Rows with which a product over those of x is best computed: as many, or a whole size."""
    return whole_size(len(x)) if x.dtype is torch.bfloat16 and not x.is_cuda else len(x)


def _product(x: Tensor, rows: slice, weight: Tensor, out: Tensor) -> None:
    """out[rows] = x[rows] @ weight. What lies behind `rows` in `out` may be overwritten: go from first rows to last."""
    left = _window(x, rows)
    end = rows.start + len(left)
    if end <= len(out):
        torch.mm(left, weight, out=out[rows.start : end])
    else:
        out[rows] = (left @ weight)[: rows.stop - rows.start]


def _window(x: Tensor, rows: slice) -> Tensor:
    """x[rows] and, where whole sizes pay, what is behind them; zeros behind the last row of all."""
    end = rows.start + row_count(x[rows])
    return x[rows.start : end] if end <= len(x) else F.pad(x[rows.start :], (0, 0, 0, end - len(x)))


def _tail(x: Tensor, rows: slice) -> Tensor:
    """`_window` with zeros behind `rows`."""
    window = _window(x, rows)
    count = rows.stop - rows.start
    if len(window) == count:
        return window
    return F.pad(x[rows], (0, 0, 0, len(window) - count))


def _columns(outputs: int, projections: int) -> list[slice]:
    size = outputs // projections
    return [slice(first, first + size) for first in range(0, outputs, size)]


def _of(scale: Tensor, rows: slice) -> Tensor:
    """The scales of `rows`; one scale of the whole tensor is theirs, too."""
    return scale if len(scale) == 1 else scale[rows]


def _forget_idle(dw: Tensor, counts: Sequence[int]) -> None:
    """Zeros for the experts without rows."""
    for expert, count in enumerate(counts):
        if not count:
            dw[expert].zero_()
