"""Ops with gradients of their own, where a gradient is wanted: one pass over memory forward, one backward.

    rms_norm         dx = r (w dy - x r^2 mean(w dy x)),  dw = sum of dy x r,     r = 1 / sqrt(mean(x^2) + eps)
    swiglu           dgate = dy up s (1 + gate (1 - s)),  dup = dy gate s,        s = sigmoid(gate)
    apply_rope       dx = dy turned back
    expert_rows      dx[t] = sum of the gradients of its copies
    combine_experts  drows = weight dy[t],  dweight = rows . dy[t]

All is computed in FP32 by the kernels of csrc/train.h or, on a card, of `triton_training`; what they do not take (other
dtypes, no library, no Triton) goes to the reference and torch's autograd. `linear` is the grouped product with one
group: its rows come in few sizes (see `grouped_linear`). Documents attend by csrc/train_attention.h on CPUs with BF16
dot products and no AMX; else by torch's flash attention, those of one length together.

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

from kvern.ops import native_training, reference, reference_experts
from kvern.ops.grouped_linear import grouped_linear
from kvern.ops.training_kernels import TrainingKernels, kernels_for


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`reference.linear`; the weight's gradient is in its dtype."""
    if scale is not None or x.dtype not in (torch.float32, torch.bfloat16):
        return reference.linear(x, weight, scale, bias)
    flat = x.reshape(-1, x.shape[-1])
    out = grouped_linear(flat, weight[None], (len(flat),)).view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    flat = x.reshape(-1, x.shape[-1])
    kernels = kernels_for(flat, weight)
    if kernels is None or weight.dtype is not torch.float32 or not x.numel():
        return reference.rms_norm(x, weight, eps)
    out: Tensor = _RMSNorm.apply(flat, weight, eps, kernels)  # type: ignore[no-untyped-call]
    return out.view(x.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`reference.swiglu`."""
    flat = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
    kernels = kernels_for(*flat)
    if kernels is None or gate.dtype is not up.dtype or not gate.numel():
        return reference.swiglu(gate, up)
    out: Tensor = _SwiGLU.apply(*flat, kernels)  # type: ignore[no-untyped-call]
    return out.view(gate.shape)


def swiglu_halves(x: Tensor) -> Tensor:
    """`reference.swiglu_halves`; its gradient comes in one piece."""
    kernels = kernels_for(x)
    if kernels is None or x.dim() != 2 or not x.numel():
        return reference.swiglu_halves(x)
    out: Tensor = _SwiGLUHalves.apply(x, kernels)  # type: ignore[no-untyped-call]
    return out


def apply_rope(x: Tensor, rotation: Tensor) -> Tensor:
    """`reference.apply_rope`."""
    kernels = kernels_for(x)
    if kernels is None or x.dim() not in (2, 3) or not (rotation.is_contiguous() and x.numel()):
        return reference.apply_rope(x, rotation)
    out: Tensor = _Rope.apply(x[:, None] if x.dim() == 2 else x, rotation, kernels)  # type: ignore[no-untyped-call]
    return out.view(x.shape)


def expert_rows(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """`reference_experts.expert_rows`."""
    kernels = kernels_for(x)
    if kernels is None:
        return reference_experts.expert_rows(x, order, top_k)
    out: Tensor = _ExpertRows.apply(x, order, top_k, kernels)  # type: ignore[no-untyped-call]
    return out


def combine_experts(rows: Tensor, weights: Tensor, order: Tensor, counts: Sequence[int]) -> Tensor:
    """`reference_experts.combine_experts`, added up in FP32 with weights in FP32."""
    kernels = kernels_for(rows, weights)
    if kernels is None or not rows.is_contiguous() or weights.dtype is not torch.float32:
        return reference_experts.combine_experts(rows, weights, order, counts)
    out: Tensor = _Combine.apply(rows, weights, order, kernels)  # type: ignore[no-untyped-call]
    return out


def document_attention(q: Tensor, kv: Tensor, rope: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """`reference.document_attention`. Documents are split, not sliced: a slice's gradient is as long as the batch."""
    if native_training.takes_documents(q, kv, rope):
        dense = q.contiguous(), kv.contiguous(), rope
        out: Tensor = _DocumentAttention.apply(*dense, starts, scale)  # type: ignore[no-untyped-call]
        return out
    lengths = [last - first for first, last in pairwise(starts)]
    key, value = torch.tensor_split(kv, [q.shape[2] - rope.shape[1]], dim=2)
    k = torch.cat([key, rope[:, None].expand(-1, kv.shape[1], -1)], dim=2)
    ragged = len(set(lengths)) > 1
    if q.is_cuda and q.dtype is torch.bfloat16 and ragged:
        return _ragged_attention(q, k, value, starts, scale)
    size = max(q.shape[2], value.shape[2])
    parts = [q, k, value] if q.is_cuda else [F.pad(t, (0, size - t.shape[2])) for t in (q, k, value)]  # CPUs: one size
    if not ragged:
        q, k, v = (t.view(len(lengths), lengths[0], *t.shape[1:]).transpose(1, 2) for t in parts)
        together = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return together.transpose(1, 2).flatten(0, 1)[..., : value.shape[2]]
    documents = (torch.split(t.transpose(0, 1)[None], lengths, dim=2) for t in parts)
    outs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) for q, k, v in zip(*documents, strict=True)
    ]
    return torch.cat(outs, dim=2)[0].transpose(0, 1)[..., : value.shape[2]]


def _ragged_attention(q: Tensor, k: Tensor, value: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """`document_attention` on a card, of documents of any lengths: torch's flash kernel, which wants equal sizes."""
    from torch.nn.attention.varlen import varlen_attn

    borders, longest = torch.tensor(starts, dtype=torch.int32, device=q.device), max(b - a for a, b in pairwise(starts))
    size = max(q.shape[2], value.shape[2])
    q, k, v = (F.pad(t, (0, size - t.shape[2])) for t in (q, k, value))
    out = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scale, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out[..., : value.shape[2]]


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, rope: Tensor, starts: Sequence[int], scale: float) -> Tensor:
        out, lse = native_training.document_attention(q, kv, rope, starts, scale)
        ctx.save_for_backward(out, lse, q, kv, rope)
        ctx.starts, ctx.scale = starts, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        out, lse, q, kv, rope = ctx.saved_tensors
        dout = dout.contiguous()
        gradients = native_training.document_attention_backward(dout, out, lse, q, kv, rope, ctx.starts, ctx.scale)
        return *gradients, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: TrainingKernels) -> Tensor:
        y, inverse = kernels.rms_norm(x, weight.contiguous(), eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.kernels = kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        return *ctx.kernels.rms_norm_backward(dy.contiguous(), x, weight.contiguous(), inverse), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernels: TrainingKernels) -> Tensor:
        if gate.stride() != up.stride():
            gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        return kernels.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        dgate, dup = dy.new_empty(dy.shape), dy.new_empty(dy.shape)
        ctx.kernels.swiglu_backward(dgate, dup, dy.contiguous(), *ctx.saved_tensors)
        return dgate, dup, None


class _SwiGLUHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: TrainingKernels) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kernels = kernels
        return kernels.swiglu(*x.chunk(2, dim=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dx = x.new_empty(x.shape)
        dgate, dup = dx.chunk(2, dim=-1)
        ctx.kernels.swiglu_backward(dgate, dup, dy.contiguous(), *x.chunk(2, dim=-1))
        return dx, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor, kernels: TrainingKernels) -> Tensor:
        ctx.save_for_backward(rotation)
        ctx.kernels = kernels
        return kernels.rotate(x, rotation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (rotation,) = ctx.saved_tensors
        return ctx.kernels.rotate(dy if dy.stride(-1) == 1 else dy.contiguous(), rotation, back=True), None, None


class _ExpertRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, top_k: int, kernels: TrainingKernels) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k, ctx.kernels = top_k, kernels
        return x.index_select(0, order // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return ctx.kernels.combine(dy.contiguous(), None, _places(order, ctx.top_k)), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, kernels: TrainingKernels) -> Tensor:
        weights, places = weights.contiguous(), _places(order, weights.shape[1])
        ctx.save_for_backward(rows, weights, places)
        ctx.kernels = kernels
        return kernels.combine(rows, weights, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *ctx.kernels.combine_backward(dy.contiguous(), *ctx.saved_tensors), None, None


def _places(order: Tensor, top_k: int) -> Tensor:
    """[T, K]: which of the sorted rows is token t's k-th; the inverse of `order`."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places.view(-1, top_k)
