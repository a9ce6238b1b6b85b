"""The CPU kernels of a training step (csrc/train.h) through ctypes, for the autograd functions of `kvern.ops.training`.

Each call takes dense tensors of float32 or bfloat16 on the CPU, as its caller has made sure of with `takes`, and
computes in FP32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvern.errors import KvernError
from kvern.ops.library import CODES, isa, library

PARTS = 16
"""Sums of a norm's weight gradient that are held beside each other."""


@cache
def kernels() -> ctypes.CDLL | None:
    """The library with these functions declared; None where there is none, or an older one without them."""
    lib = library()
    if lib is None or not hasattr(lib, "kvern_document_attention"):
        return None
    pointer, size, code, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    signatures: dict[str, list[Any]] = {
        "kvern_rms_norm": [pointer, pointer, pointer, size, pointer, code, size, size, real],
        "kvern_rms_norm_backward": [pointer, pointer, size, pointer, pointer, size, pointer, pointer, code, size, size],
        "kvern_swiglu": [pointer, pointer, pointer, size, code, size, size],
        "kvern_swiglu_backward": [pointer, pointer, size, pointer, pointer, pointer, size, code, size, size],
        "kvern_rotate": [pointer, pointer, size, size, pointer, code, code, size, size, size],
        "kvern_combine": [pointer, pointer, pointer, pointer, code, size, size, size],
        "kvern_combine_backward": [pointer, pointer, pointer, pointer, pointer, pointer, code, size, size, size],
        "kvern_cross_entropy": [pointer, pointer, pointer, code, code, size, size],
        "kvern_adamw": [pointer, pointer, pointer, pointer, code, size, *[real] * 6],
        "kvern_quantize_tiles": [pointer, pointer, pointer, size, code, size, size, size, size, code, real],
        "kvern_dequantize_tiles": [pointer, pointer, size, pointer, size, size, size, size],
        "kvern_document_attention": [*[pointer] * 5, size, pointer, *[size] * 6, real],
        "kvern_document_attention_backward": [*[pointer] * 9, size, pointer, *[size] * 6, real],
    }
    for name, types in signatures.items():
        getattr(lib, name).argtypes = types
    return lib


def takes(*tensors: Tensor) -> bool:
    """Whether there are kernels, and for these: float32 or bfloat16 on the CPU, the last dimension dense."""
    return kernels() is not None and all(
        type(t) in (Tensor, torch.nn.Parameter)
        and t.device.type == "cpu"
        and t.dtype in (torch.float32, torch.bfloat16)
        and (t.dim() == 0 or t.shape[-1] < 2 or t.stride(-1) == 1)
        for t in tensors
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [R, D], its rows possibly apart, weight [D] float32 -> (y [R, D], 1 / root mean square [R] float32)."""
    y, inverse = torch.empty(x.shape, dtype=x.dtype), torch.empty(len(x))
    _call("rms_norm", y, inverse, x, x.stride(0), weight, CODES[x.dtype], *x.shape, eps)
    return y, inverse


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """(dx [R, D], dweight [D] float32)."""
    dx, dw = torch.empty(x.shape, dtype=x.dtype), torch.zeros(PARTS, x.shape[1])
    _call("rms_norm_backward", dx, dw, PARTS, dy, x, x.stride(0), weight, inverse, CODES[x.dtype], *x.shape)
    return dx, dw.sum(0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [R, I] with one stride -> [R, I]."""
    y = torch.empty(gate.shape, dtype=gate.dtype)
    _call("swiglu", y, gate, up, gate.stride(0), CODES[gate.dtype], *gate.shape)
    return y


def swiglu_backward(dgate: Tensor, dup: Tensor, dy: Tensor, gate: Tensor, up: Tensor) -> None:
    """Writes dgate and dup [R, I], which have one stride."""
    strides = dgate.stride(0), gate.stride(0)
    _call("swiglu_backward", dgate, dup, strides[0], dy, gate, up, strides[1], CODES[dy.dtype], *dy.shape)


def rotate(x: Tensor, rotation: Tensor, back: bool = False) -> Tensor:
    """x [T, H, P], in any strides of T and H, by rotation [T, P / 2] complex64, or its conjugate -> [T, H, P]."""
    y = torch.empty(x.shape, dtype=x.dtype)
    tokens, heads, size = x.shape
    _call("rotate", y, x, x.stride(0), x.stride(1), rotation, int(back), CODES[x.dtype], tokens, heads, size // 2)
    return y


def combine(rows: Tensor, weights: Tensor | None, places: Tensor) -> Tensor:
    """rows [T K, D], weights [T, K] float32 or None (ones), places [T, K] int64 -> [T, D]."""
    out = torch.empty(len(places), rows.shape[1], dtype=rows.dtype)
    _call("combine", out, rows, weights, places, CODES[rows.dtype], *places.shape, rows.shape[1])
    return out


def combine_backward(dy: Tensor, rows: Tensor, weights: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """(drows [T K, D], dweights [T, K] float32)."""
    drows, dweights = torch.empty_like(rows), torch.empty(weights.shape)
    size = rows.shape[1]
    _call("combine_backward", drows, dweights, dy, rows, weights, places, CODES[rows.dtype], *places.shape, size)
    return drows, dweights


def cross_entropy(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """Losses [L] float32 of logits [L, V], which become gradients where `gradient`; negative targets have none."""
    losses = torch.empty(len(logits))
    _call("cross_entropy", losses, logits, targets, int(gradient), CODES[logits.dtype], *logits.shape)
    return losses


def adamw(parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, numbers: Sequence[float]) -> None:
    """One step in place; parameter and gradient float32, moments of one dtype; numbers: `train.optim.step_numbers`."""
    _call("adamw", parameter, gradient, mean, square, CODES[mean.dtype], parameter.numel(), *numbers)


def quantize_tiles(x: Tensor, tile: tuple[int, int], power_of_two: bool, smallest: float) -> tuple[Tensor, Tensor]:
    """x [R, C], its rows possibly apart -> (codes [R, C] E4M3, scale [ceil(R/r), ceil(C/c)] float32)."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-x.shape[0] // tile[0]), -(-x.shape[1] // tile[1]))
    stride = max(x.stride(0), x.shape[1])
    _call("quantize_tiles", codes, scale, x, stride, CODES[x.dtype], *x.shape, *tile, int(power_of_two), smallest)
    return codes, scale


def dequantize_tiles(codes: Tensor, scale: Tensor, tile: tuple[int, int]) -> Tensor:
    """codes [R, C] E4M3, its rows possibly apart, and dense scales -> [R, C] float32."""
    out = torch.empty(codes.shape)
    _call("dequantize_tiles", out, codes, max(codes.stride(0), codes.shape[1]), scale, *codes.shape, *tile)
    return out


def takes_documents(*tensors: Tensor) -> bool:
    """Whether `document_attention` takes these and is the fastest there is.

    It needs BF16 dot products. Where there is AMX, torch's attention multiplies by it, and is used.
    """
    return isa() == "avx512bf16" and takes(*tensors) and all(t.dtype is torch.bfloat16 for t in tensors)


def document_attention(
    q: Tensor, kv: Tensor, rope: Tensor, starts: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """`reference.document_attention` of BF16, rows of rope possibly apart -> (out [T, H, V], lse [T, H] float32)."""
    heads, value = q.shape[1], kv.shape[2] + rope.shape[1] - q.shape[2]
    out, lse = torch.empty(len(q), heads, value, dtype=q.dtype), torch.empty(len(q), heads)
    _call("document_attention", out, lse, q, kv, rope, *_documents(q, kv, rope, starts), scale)
    return out, lse


def document_attention_backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, kv: Tensor, rope: Tensor, starts: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dkv, drope), each as what it is the gradient of."""
    dq, dkv, drope = torch.empty_like(q), torch.empty_like(kv), torch.empty(*q.shape[:2], rope.shape[1])
    documents = _documents(q, kv, rope, starts)
    _call("document_attention_backward", dq, dkv, drope, dout, out, lse, q, kv, rope, *documents, scale)
    return dq, dkv, drope.sum(1).to(rope.dtype)


def _documents(q: Tensor, kv: Tensor, rope: Tensor, starts: Sequence[int]) -> tuple[Tensor | int, ...]:
    """The arguments from rope's stride to the size of a value."""
    tokens, heads, size = q.shape
    shared = rope.shape[1]
    sizes = tokens, heads, size - shared, shared, kv.shape[2] - size + shared
    return max(rope.stride(0), shared), torch.tensor(starts), len(starts) - 1, *sizes


def _call(name: str, *arguments: Tensor | float | None) -> None:
    lib = kernels()
    assert lib is not None
    code = getattr(lib, f"kvern_{name}")(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))
    if code:
        raise KvernError(f"kvern_{name} refused its arguments")
