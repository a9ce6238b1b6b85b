"""Ops with gradients of their own, where a gradient is wanted: one pass over memory forward, one backward.

    rms_norm         dx = r (w dy - x r^2 mean(w dy x)),  dw = sum of dy x r,     r = 1 / sqrt(mean(x^2) + eps)
    swiglu           dgate = dy up s (1 + gate (1 - s)),  dup = dy gate s,        s = sigmoid(gate)
    apply_rope       dx = dy turned back
    expert_rows      dx[t] = sum of the gradients of its copies
    combine_experts  drows = weight dy[t],  dweight = rows . dy[t]

All is computed in FP32 by the kernels of csrc/train.h; what they do not take (other devices and dtypes, no library)
goes to the reference and torch's autograd. `linear` is the grouped product with one group: its rows come in few sizes
(see `grouped_linear`). Documents of one length attend together.

What it gives up: second derivatives, and results that are the reference's bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvern.ops import native_training as native
from kvern.ops import reference, reference_experts
from kvern.ops.grouped_linear import grouped_linear


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`reference.linear`; the weight's gradient is in its dtype."""
    if scale is not None or x.dtype not in (torch.float32, torch.bfloat16):
        return reference.linear(x, weight, scale, bias)
    flat = x.reshape(-1, x.shape[-1])
    out = grouped_linear(flat, weight[None], (len(flat),)).view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    if not (native.takes(x, weight) and weight.dtype is torch.float32 and x.numel()):
        return reference.rms_norm(x, weight, eps)
    out: Tensor = _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps)  # type: ignore[no-untyped-call]
    return out.view(x.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`reference.swiglu`."""
    if not (native.takes(gate, up) and gate.dtype is up.dtype and gate.numel()):
        return reference.swiglu(gate, up)
    out: Tensor = _SwiGLU.apply(gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1]))  # type: ignore[no-untyped-call]
    return out.view(gate.shape)


def swiglu_halves(x: Tensor) -> Tensor:
    """`reference.swiglu_halves`; its gradient comes in one piece."""
    if not (native.takes(x) and x.dim() == 2 and x.numel()):
        return reference.swiglu_halves(x)
    out: Tensor = _SwiGLUHalves.apply(x)  # type: ignore[no-untyped-call]
    return out


def apply_rope(x: Tensor, rotation: Tensor) -> Tensor:
    """`reference.apply_rope`."""
    if not (native.takes(x) and x.dim() in (2, 3) and rotation.is_contiguous() and x.numel()):
        return reference.apply_rope(x, rotation)
    out: Tensor = _Rope.apply(x[:, None] if x.dim() == 2 else x, rotation)  # type: ignore[no-untyped-call]
    return out.view(x.shape)


def expert_rows(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """`reference_experts.expert_rows`."""
    if not native.takes(x):
        return reference_experts.expert_rows(x, order, top_k)
    out: Tensor = _ExpertRows.apply(x, order, top_k)  # type: ignore[no-untyped-call]
    return out


def combine_experts(rows: Tensor, weights: Tensor, order: Tensor, counts: Sequence[int]) -> Tensor:
    """`reference_experts.combine_experts`, added up in FP32 with weights in FP32."""
    if not (native.takes(rows, weights) and rows.is_contiguous() and weights.dtype is torch.float32):
        return reference_experts.combine_experts(rows, weights, order, counts)
    out: Tensor = _Combine.apply(rows, weights, order)  # type: ignore[no-untyped-call]
    return out


def document_attention(q: Tensor, kv: Tensor, rope: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """`reference.document_attention`. Documents are split, not sliced: a slice's gradient is as long as the batch."""
    lengths = [last - first for first, last in pairwise(starts)]
    key, value = torch.tensor_split(kv, [q.shape[2] - rope.shape[1]], dim=2)
    k = torch.cat([key, rope[:, None].expand(-1, kv.shape[1], -1)], dim=2)
    size = max(q.shape[2], value.shape[2])  # torch's CPU flash kernel wants equal sizes
    parts = [F.pad(t, (0, size - t.shape[2])) for t in (q, k, value)]
    if len(set(lengths)) == 1:
        q, k, v = (t.view(len(lengths), lengths[0], *t.shape[1:]).transpose(1, 2) for t in parts)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out.transpose(1, 2).flatten(0, 1)[..., : value.shape[2]]
    documents = (torch.split(t.transpose(0, 1)[None], lengths, dim=2) for t in parts)
    outs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) for q, k, v in zip(*documents, strict=True)
    ]
    return torch.cat(outs, dim=2)[0].transpose(0, 1)[..., : value.shape[2]]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = native.rms_norm(x, weight.contiguous(), eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        return *native.rms_norm_backward(dy.contiguous(), x, weight.contiguous(), inverse), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        if gate.stride() != up.stride():
            gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return native.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        dgate, dup = torch.empty(dy.shape, dtype=dy.dtype), torch.empty(dy.shape, dtype=dy.dtype)
        native.swiglu_backward(dgate, dup, dy.contiguous(), *ctx.saved_tensors)
        return dgate, dup


class _SwiGLUHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return native.swiglu(*x.chunk(2, dim=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype)
        dgate, dup = dx.chunk(2, dim=-1)
        native.swiglu_backward(dgate, dup, dy.contiguous(), *x.chunk(2, dim=-1))
        return dx


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        return native.rotate(x, rotation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        return native.rotate(dy if dy.stride(-1) == 1 else dy.contiguous(), rotation, back=True), None


class _ExpertRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return native.combine(dy.contiguous(), None, _places(order, ctx.top_k)), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        weights, places = weights.contiguous(), _places(order, weights.shape[1])
        ctx.save_for_backward(rows, weights, places)
        return native.combine(rows, weights, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return *native.combine_backward(dy.contiguous(), *ctx.saved_tensors), None


def _places(order: Tensor, top_k: int) -> Tensor:
    """[T, K]: which of the sorted rows is token t's k-th; the inverse of `order`."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places.view(-1, top_k)
