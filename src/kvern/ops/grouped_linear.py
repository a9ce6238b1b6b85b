"""The products of rows sorted by expert with a stack of weights, and their gradients, in floats and in FP8.

    y[rows of n] = x[rows of n] W[n]^T      dx[rows of n] = dy[rows of n] W[n]      dW[n] = dy[rows of n]^T x[rows of n]

One product for each expert with rows, written into its place of one result: nothing is concatenated, and an expert
without rows costs nothing and has a gradient of zeros. On a card torch's grouped product makes all y, or all dx, in one
launch; weight gradients stay apart, for only so they are summed in FP32. In FP8 the rows are quantised once, for all
experts and for all projections of a stack (gate and up); weights are quantised by projection, with the borders of
blocks where a checkpoint has them.

oneDNN, which multiplies BF16 on CPUs, compiles a kernel for each number of rows it meets, in 5 to 10 ms: longer than
the product takes. So there a product takes some more rows than the expert has, to one of eight sizes an octave. The
superfluous results lie in the rows of the next expert, whose own product overwrites them; for Wgrad they are zeros.

What it gives up: second derivatives; on a card, one launch for all products in FP8. A tensorwise recipe scales the rows
of all experts together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import accumulate, chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvern.ops.fp8_hopper import ALIGNED_ROWS
from kvern.ops.fp8_linear import ROW_TILE, WEIGHT_BLOCK, Codes, Fp8Recipe, retile, scaled_product, wgrad
from kvern.ops.reference import BLOCK


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
        ctx.save_for_backward(x, dense)
        ctx.counts, ctx.dtype = counts, weight.dtype
        return _products(x, dense.transpose(1, 2), counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, dense = ctx.saved_tensors
        dx = _products(dy, dense, ctx.counts) if ctx.needs_input_grad[0] else None
        dw = torch.empty_like(dense, dtype=ctx.dtype) if ctx.needs_input_grad[1] else None
        if dw is not None:
            for expert, rows in spans(ctx.counts):
                _sum_of_products(_tail(dy, rows), _window(x, rows), dw[expert])
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
        columns = _columns(weight.shape[1], projections, recipe)
        blocks = _blocks(weight, counts, columns, recipe)
        left = iter(blocks)
        for _, rows in spans(counts):
            more = _more_rows(x, rows)
            for part in columns:
                out[more, part] = scaled_product(codes[more], _of(scale, more), *next(left), x.dtype)
        ctx.save_for_backward(codes, scale, *chain.from_iterable(blocks))
        ctx.counts, ctx.recipe, ctx.columns = counts, recipe, columns
        ctx.dtypes, ctx.shape = (x.dtype, weight.dtype), weight.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        codes, scale, *blocks = ctx.saved_tensors
        dx = dy.new_empty(codes.shape, dtype=ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        dw = dy.new_empty(ctx.shape, dtype=ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        left = iter(zip(blocks[::2], blocks[1::2], strict=True))
        exact = ctx.dtypes[0] if len(ctx.columns) == 1 else torch.float32
        dy_codes = [] if dx is None else [ctx.recipe.quantize(dy[:, part], ROW_TILE) for part in ctx.columns]
        for expert, rows in spans(ctx.counts):
            if dx is not None:
                more = _more_rows(dy, rows)
                parts = (
                    scaled_product(part_codes[more], _of(part_scale, more), block.T, block_scale.T, exact)
                    for (part_codes, part_scale), (block, block_scale) in zip(dy_codes, left, strict=False)
                )
                dx[more] = reduce(torch.add, parts)
            if dw is not None:
                tiled = retile(codes[rows], _of(scale, rows), ctx.recipe)
                for part in ctx.columns:
                    dw[expert, part] = wgrad(dy[rows, part], *tiled, ctx.recipe, ctx.dtypes[1])
        if dw is not None:
            _forget_idle(dw, ctx.counts)
        return dx, dw, None, None, None


def whole_size(rows: int) -> int:
    """`rows`, rounded up to 16 or to one of eight sizes an octave: at most an eighth more."""
    step = max(16, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def row_count(x: Tensor) -> int:
    """Rows with which a product over those of x is best computed: as many, or a whole size."""
    return whole_size(len(x)) if x.dtype is torch.bfloat16 and not x.is_cuda else len(x)


def _products(x: Tensor, stack: Tensor, counts: Sequence[int]) -> Tensor:
    """x [R, K], sorted by expert, times stack [N, K, O]: [R, O]."""
    if _takes_one_launch(x, stack):
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=x.device)
        return F.grouped_mm(x.contiguous(), stack, offs=ends)
    out = x.new_empty(len(x), stack.shape[2])
    for expert, rows in spans(counts):
        _product(x, rows, stack[expert], out)
    return out


def _takes_one_launch(x: Tensor, stack: Tensor) -> bool:
    """Whether torch's grouped product is for these: BF16 on a card, several experts, rows of whole 16 bytes."""
    are_aligned = not any(size % 8 for size in stack.shape[1:])
    return x.is_cuda and x.dtype is torch.bfloat16 and len(x) > 0 and len(stack) > 1 and are_aligned


def _product(x: Tensor, rows: slice, weight: Tensor, out: Tensor) -> None:
    """out[rows] = x[rows] @ weight. What lies behind `rows` in `out` may be overwritten: go from first rows to last."""
    left = _window(x, rows)
    end = rows.start + len(left)
    if end <= len(out):
        torch.mm(left, weight, out=out[rows.start : end])
    else:
        out[rows] = (left @ weight)[: rows.stop - rows.start]


def _sum_of_products(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left^T @ right. On a card sums in BF16 stay in FP32 where `out` is."""
    if left.is_cuda and left.dtype is not out.dtype:
        torch.mm(left.T, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(left.T @ right)


def _window(x: Tensor, rows: slice) -> Tensor:
    """x[rows] and, where whole sizes pay, what is behind them; zeros behind the last row of all."""
    end = rows.start + row_count(x[rows])
    return x[rows.start : end] if end <= len(x) else F.pad(x[rows.start :], (0, 0, 0, end - len(x)))


def _more_rows(x: Tensor, rows: slice) -> slice:
    """`rows`; on a card with as many behind them as FP8 products want: the next expert's overwrite them."""
    if not x.is_cuda:
        return rows
    count = -(-(rows.stop - rows.start) // ALIGNED_ROWS) * ALIGNED_ROWS
    return slice(rows.start, min(len(x), rows.start + count))


def _tail(x: Tensor, rows: slice) -> Tensor:
    """`_window` with zeros behind `rows`."""
    window = _window(x, rows)
    count = rows.stop - rows.start
    if len(window) == count:
        return window
    return F.pad(x[rows], (0, 0, 0, len(window) - count))


def _blocks(weight: Tensor, counts: Sequence[int], columns: Sequence[slice], recipe: Fp8Recipe) -> list[Codes]:
    """The weights of the experts with rows, part by part: in one go where blocks do not cross experts."""
    if len(columns) > 1 or weight.shape[1] % BLOCK or recipe.tensorwise:
        return [recipe.quantize(weight[expert, part], WEIGHT_BLOCK) for expert, _ in spans(counts) for part in columns]
    codes, scale = recipe.quantize(weight.flatten(0, 1), WEIGHT_BLOCK)
    stacks = codes.view(weight.shape), scale.view(len(weight), -1, scale.shape[1])
    return [(stacks[0][expert], stacks[1][expert]) for expert, _ in spans(counts)]


def _columns(outputs: int, projections: int, recipe: Fp8Recipe) -> list[slice]:
    """The rows of a weight that are scaled together: projections apart, unless their blocks are the same together."""
    size = outputs // projections
    if size % BLOCK == 0 and not recipe.tensorwise:
        size = outputs
    return [slice(first, first + size) for first in range(0, outputs, size)]


def _of(scale: Tensor, rows: slice) -> Tensor:
    """The scales of `rows`; one scale of the whole tensor is theirs, too."""
    return scale if len(scale) == 1 else scale[rows]


def _forget_idle(dw: Tensor, counts: Sequence[int]) -> None:
    """Zeros for the experts without rows."""
    for expert, count in enumerate(counts):
        if not count:
            dw[expert].zero_()
