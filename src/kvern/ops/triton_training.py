"""The kernels of a training step on a card: what `native_training` has for CPUs, under the same names.

    each op is one launch that reads its inputs once, computes in FP32 and writes its results once

Sums over rows (a norm's weight gradient) have one program for each of `PARTS` shares, added up in a fixed order: no
atomics, the same bits every time. Rows are dense but for the distance between them. What it gives up: sizes are not
tuned per card; a row of a norm is held whole, up to `WIDEST` numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvern.ops.triton_linear import FLOATS

WIDEST = 16384
"""Numbers of a row that one program holds."""
PARTS = 264
"""Shares of a sum over rows: two for each multiprocessor of an H100."""
STRIP = 1024


def takes(*tensors: Tensor) -> bool:
    """Whether there are kernels for these: float32 or bfloat16, the last dimension dense."""
    return all(
        type(t) in (Tensor, torch.nn.Parameter)
        and t.dtype in FLOATS
        and (t.dim() == 0 or t.shape[-1] < 2 or t.stride(-1) == 1)
        and (t.dim() != 2 or t.shape[1] <= WIDEST or t.is_contiguous())
        for t in tensors
    )


@triton.jit
def _rms_norm_kernel(y_ptr, inverse_ptr, x_ptr, x_stride, weight_ptr, D, eps, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + row * x_stride + at, mask=at < D, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=at < D, other=0.0)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / D + eps)
    tl.store(y_ptr + row * D + at, (x * inverse * weight).to(y_ptr.dtype.element_ty), mask=at < D)
    tl.store(inverse_ptr + row, inverse)


@triton.jit
def _rms_norm_backward_kernel(
    dx_ptr, dw_ptr, dy_ptr, x_ptr, x_stride, weight_ptr, inverse_ptr, R, D, WIDTH: tl.constexpr
):  # fmt: skip
    part, at = tl.program_id(0), tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + at, mask=at < D, other=0.0)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for index in range(part, R, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        x = tl.load(x_ptr + row * x_stride + at, mask=at < D, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * D + at, mask=at < D, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row)
        total += dy * x * inverse
        shared = tl.sum(dy * weight * x, 0) / D * inverse * inverse
        dx = (dy * weight - x * shared) * inverse
        tl.store(dx_ptr + row * D + at, dx.to(dx_ptr.dtype.element_ty), mask=at < D)
    tl.store(dw_ptr + part.to(tl.int64) * D + at, total, mask=at < D)


@triton.jit
def _swiglu_kernel(y_ptr, gate_ptr, up_ptr, stride, D, WIDTH: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    gate = tl.load(gate_ptr + row * stride + at, mask=at < D, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride + at, mask=at < D, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * D + at, y.to(y_ptr.dtype.element_ty), mask=at < D)


@triton.jit
def _swiglu_backward_kernel(
    dgate_ptr, dup_ptr, d_stride, dy_ptr, gate_ptr, up_ptr, stride, D, WIDTH: tl.constexpr
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    gate = tl.load(gate_ptr + row * stride + at, mask=at < D, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride + at, mask=at < D, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * D + at, mask=at < D, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * share * (1.0 + gate * (1.0 - share))
    tl.store(dgate_ptr + row * d_stride + at, dgate.to(dgate_ptr.dtype.element_ty), mask=at < D)
    tl.store(dup_ptr + row * d_stride + at, (dy * gate * share).to(dup_ptr.dtype.element_ty), mask=at < D)


@triton.jit
def _rotate_kernel(
    y_ptr, x_ptr, token_stride, head_stride, rotation_ptr, heads, pairs, BACK: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, pair, both = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, PAIRS), tl.arange(0, 2 * PAIRS)
    exists = (head < heads)[:, None] & (both < 2 * pairs)[None, :]
    x_at = x_ptr + token * token_stride + head.to(tl.int64)[:, None] * head_stride + both[None, :]
    x = tl.load(x_at, mask=exists, other=0.0).to(tl.float32)
    real, imaginary = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
    r_at = rotation_ptr + token * 2 * pairs + 2 * pair
    cosine = tl.load(r_at, mask=pair < pairs, other=0.0)[None, :]
    sine = tl.load(r_at + 1, mask=pair < pairs, other=0.0)[None, :]
    if BACK:
        sine = -sine
    turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    y_at = y_ptr + (token * heads + head)[:, None] * 2 * pairs + both[None, :]
    tl.store(y_at, tl.reshape(turned, (HEADS, 2 * PAIRS)).to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _combine_kernel(out_ptr, rows_ptr, weights_ptr, places_ptr, K, D, WIDTH: tl.constexpr):
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for k in range(K):
        place = tl.load(places_ptr + token * K + k)
        row = tl.load(rows_ptr + place * D + at, mask=at < D, other=0.0).to(tl.float32)
        if weights_ptr is None:
            total += row
        else:
            total += row * tl.load(weights_ptr + token * K + k)
    tl.store(out_ptr + token * D + at, total.to(out_ptr.dtype.element_ty), mask=at < D)


@triton.jit
def _combine_backward_kernel(
    drows_ptr, dweights_ptr, dy_ptr, rows_ptr, weights_ptr, places_ptr, K, D, WIDTH: tl.constexpr
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    place, weight = tl.load(places_ptr + slot), tl.load(weights_ptr + slot)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for first in range(0, D, WIDTH):
        at = first + tl.arange(0, WIDTH)
        dy = tl.load(dy_ptr + slot // K * D + at, mask=at < D, other=0.0).to(tl.float32)
        row = tl.load(rows_ptr + place * D + at, mask=at < D, other=0.0).to(tl.float32)
        total += dy * row
        tl.store(drows_ptr + place * D + at, (dy * weight).to(drows_ptr.dtype.element_ty), mask=at < D)
    tl.store(dweights_ptr + slot, tl.sum(total, 0))


@triton.jit
def _cross_entropy_kernel(losses_ptr, logits_ptr, targets_ptr, V, GRADIENT: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target, logits = tl.load(targets_ptr + row), logits_ptr + row * V
    most, total = tl.full((WIDTH,), float("-inf"), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for first in range(0, V, WIDTH):
        at = first + tl.arange(0, WIDTH)
        z = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
        above = tl.where(z > most, z, most)
        shift = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(most - shift) + tl.exp(z - shift)
        most = above
    top = tl.max(most, 0)
    shift = tl.where(most == float("-inf"), top, most)
    normaliser = top + tl.log(tl.sum(total * tl.exp(shift - top), 0))
    if target >= 0:
        loss = normaliser - tl.load(logits + target, mask=target < V, other=float("nan")).to(tl.float32)
    else:
        loss = 0.0
    tl.store(losses_ptr + row, loss)
    if GRADIENT:
        tl.debug_barrier()
        for first in range(0, V, WIDTH):
            at = first + tl.arange(0, WIDTH)
            z = tl.load(logits + at, mask=at < V, other=0.0).to(tl.float32)
            slope = tl.exp(z - normaliser) - tl.where(at == target, 1.0, 0.0)
            slope = tl.where(target >= 0, slope, 0.0)
            tl.store(logits + at, slope.to(logits_ptr.dtype.element_ty), mask=at < V)


@triton.jit
def _adamw_kernel(
    parameter_ptr, gradient_ptr, mean_ptr, square_ptr, N, first, second, decay, rate, correction, eps,
    WIDTH: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    exists = at < N
    gradient = tl.load(gradient_ptr + at, mask=exists, other=0.0)
    mean = tl.load(mean_ptr + at, mask=exists, other=0.0).to(tl.float32)
    square = tl.load(square_ptr + at, mask=exists, other=0.0).to(tl.float32)
    mean += first * (gradient - mean)
    square = square * second + gradient * gradient * (1.0 - second)
    tl.store(mean_ptr + at, mean.to(mean_ptr.dtype.element_ty), mask=exists)
    tl.store(square_ptr + at, square.to(square_ptr.dtype.element_ty), mask=exists)
    parameter = tl.load(parameter_ptr + at, mask=exists, other=0.0)
    parameter = parameter * decay - rate * mean / (tl.sqrt_rn(square * correction) + eps)
    tl.store(parameter_ptr + at, parameter, mask=exists)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [R, D], its rows possibly apart, weight [D] float32 -> (y [R, D], 1 / root mean square [R] float32)."""
    rows, size = x.shape
    y, inverse = x.new_empty(x.shape), x.new_empty((rows,), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _rms_norm_kernel[rows,](y, inverse, x, x.stride(0), weight, size, eps, **_row(size))
    return y, inverse


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """(dx [R, D], dweight [D] float32)."""
    rows, size = x.shape
    parts = min(PARTS, rows)
    dx, dw = x.new_empty(x.shape), x.new_empty((parts, size), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _rms_norm_backward_kernel[parts,](dx, dw, dy, x, x.stride(0), weight, inverse, rows, size, **_row(size))
    return dx, dw.sum(0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [R, I] with one stride -> [R, I]."""
    y = gate.new_empty(gate.shape)
    with torch.cuda.device_of(gate):
        _swiglu_kernel[_strips(gate)](y, gate, up, gate.stride(0), gate.shape[1], WIDTH=STRIP)
    return y


def swiglu_backward(dgate: Tensor, dup: Tensor, dy: Tensor, gate: Tensor, up: Tensor) -> None:
    """Writes dgate and dup [R, I], which have one stride."""
    with torch.cuda.device_of(dy):
        _swiglu_backward_kernel[_strips(gate)](
            dgate, dup, dgate.stride(0), dy, gate, up, gate.stride(0), gate.shape[1], WIDTH=STRIP
        )


def rotate(x: Tensor, rotation: Tensor, back: bool = False) -> Tensor:
    """x [T, H, P], in any strides of T and H, by rotation [T, P / 2] complex64, or its conjugate -> [T, H, P]."""
    tokens, heads, size = x.shape
    y, wide = x.new_empty(x.shape), triton.next_power_of_2(size // 2)
    block = max(1, min(triton.next_power_of_2(heads), STRIP // wide))
    with torch.cuda.device_of(x):
        _rotate_kernel[tokens, triton.cdiv(heads, block)](
            y, x, x.stride(0), x.stride(1), torch.view_as_real(rotation), heads, size // 2, back,
            HEADS=block, PAIRS=wide,
        )  # fmt: skip
    return y


def combine(rows: Tensor, weights: Tensor | None, places: Tensor) -> Tensor:
    """rows [T K, D], weights [T, K] float32 or None (ones), places [T, K] int64 -> [T, D]."""
    (tokens, top_k), size = places.shape, rows.shape[1]
    out = rows.new_empty((tokens, size))
    if out.numel():
        with torch.cuda.device_of(rows):
            _combine_kernel[tokens, triton.cdiv(size, STRIP)](out, rows, weights, places, top_k, size, WIDTH=STRIP)
    return out


def combine_backward(dy: Tensor, rows: Tensor, weights: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """(drows [T K, D], dweights [T, K] float32)."""
    drows, dweights = rows.new_empty(rows.shape), rows.new_empty(weights.shape, dtype=torch.float32)
    if drows.numel():
        with torch.cuda.device_of(rows):
            _combine_backward_kernel[places.numel(),](
                drows, dweights, dy, rows, weights, places, places.shape[1], rows.shape[1], WIDTH=STRIP
            )
    return drows, dweights


def cross_entropy(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """Losses [L] float32 of logits [L, V], which become gradients where `gradient`; negative targets have none.

    A target beyond V has the loss NaN: the host does not wait to look at targets.
    """
    losses = logits.new_empty((len(logits),), dtype=torch.float32)
    if len(logits):
        with torch.cuda.device_of(logits):
            _cross_entropy_kernel[len(logits),](losses, logits, targets, logits.shape[1], gradient, WIDTH=4 * STRIP)
    return losses


def adamw(parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, numbers: Sequence[float]) -> None:
    """One step in place; parameter and gradient float32, moments of one dtype; numbers: `train.optim.step_numbers`."""
    if parameter.numel():
        with torch.cuda.device_of(parameter):
            _adamw_kernel[triton.cdiv(parameter.numel(), STRIP),](
                parameter, gradient, mean, square, parameter.numel(), *numbers, WIDTH=STRIP
            )


def _strips(x: Tensor) -> tuple[int, int]:
    return x.shape[0], triton.cdiv(x.shape[1], STRIP)


def _row(size: int) -> dict[str, int]:
    """For programs that hold a row."""
    width = triton.next_power_of_2(size)
    return {"WIDTH": width, "num_warps": min(16, max(1, width // 512))}
