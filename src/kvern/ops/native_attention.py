"""Attention on the CPU kernels of csrc/. What they do not take (autograd, other dtypes) goes to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from kvern.ops import reference
from kvern.ops.library import CODES, ROW_CODES, is_dense, loaded
from kvern.plan.memory import latent8_bytes


def paged_latent_attention(
    q: Tensor,
    rows: Tensor,
    tables: Tensor,
    contexts: Tensor,
    starts: Tensor,
    block_size: int,
    rank: int,
    scale: float,
) -> Tensor:
    """`reference.paged_latent_attention` in FP32 throughout: relative error under 3e-6 of sum p|v|.

    On avx512bf16, BF16 queries over BF16 rows or over records (their numbers rounded to BF16) take BF16 dot products:
    exact products and FP32 sums, the softmax weights rounded to BF16 (as the reference rounds them), subnormal numbers
    taken as zeros. Elsewhere the numbers of records count in FP32.

    A query's result depends on its rows alone, bit for bit: not on the rest of the batch, nor on the number of threads.
    """
    if not _takes_attention(q, rows, tables, contexts, starts, rank):
        return reference.paged_latent_attention(q, rows, tables, contexts, starts, block_size, rank, scale)
    q, tables, contexts, starts = (t.contiguous() for t in (q, tables, contexts, starts))
    out = torch.empty(*q.shape[:2], rank, dtype=q.dtype)
    code = loaded().kvern_paged_latent_attention(
        out.data_ptr(),
        q.data_ptr(),
        CODES[q.dtype],
        q.shape[0],
        rows.data_ptr(),
        ROW_CODES[rows.dtype],
        rows.shape[0],
        rows.stride(0),
        tables.data_ptr(),
        tables.shape[1],
        contexts.data_ptr(),
        starts.data_ptr(),
        tables.shape[0],
        block_size,
        q.shape[1],
        q.shape[2],
        rank,
        scale,
    )
    if code:
        raise IndexError(
            "starts are not offsets into q, a context is too short, or a block number is outside the cache"
        )
    return out


def expanded_attention(q: Tensor, kv: Tensor, rope: Tensor, scale: float) -> Tensor:
    """`reference.expanded_attention`, keys and values read where they lie; accuracy as `paged_latent_attention`.

    A query's result depends on its rows alone, bit for bit: not on the other queries, nor on the number of threads.
    """
    if not _takes_expanded(q, kv, rope):
        return reference.expanded_attention(q, kv, rope, scale)
    q, kv = q.contiguous(), kv.contiguous()
    rope = rope if rope.shape[1] <= 1 or rope.stride(1) == 1 else rope.contiguous()
    tokens, heads, size = q.shape
    nope = size - rope.shape[1]
    value = kv.shape[2] - nope
    out = torch.empty(tokens, heads, value, dtype=q.dtype)
    code = loaded().kvern_expanded_attention(
        out.data_ptr(),
        q.data_ptr(),
        kv.data_ptr(),
        rope.data_ptr(),
        rope.stride(0),
        CODES[q.dtype],
        tokens,
        len(kv),
        heads,
        nope,
        rope.shape[1],
        value,
        scale,
    )
    assert code == 0, "kvern_expanded_attention refused its arguments"
    return out


def _takes_expanded(q: Tensor, kv: Tensor, rope: Tensor) -> bool:
    if torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad or rope.requires_grad):
        return False
    return (
        q.dtype in (torch.float32, torch.bfloat16)
        and q.dtype == kv.dtype == rope.dtype
        and (q.dim(), kv.dim(), rope.dim()) == (3, 3, 2)
        and q.shape[1] == kv.shape[1] >= 1
        and len(q) <= len(kv) == len(rope)
        and 0 <= q.shape[2] - rope.shape[1] < kv.shape[2]
    )


def _takes_attention(q: Tensor, rows: Tensor, tables: Tensor, contexts: Tensor, starts: Tensor, rank: int) -> bool:
    if torch.is_grad_enabled() and (q.requires_grad or rows.requires_grad):
        return False
    return (
        q.dtype in (torch.float32, torch.bfloat16)
        and rows.dtype in ROW_CODES
        and q.dim() == 3
        and is_dense(rows)
        and rows.shape[1] == (latent8_bytes(rank, q.shape[2] - rank) if rows.dtype is torch.uint8 else q.shape[2])
        and all(books.dtype is torch.int32 for books in (tables, contexts, starts))
        and tables.shape[:1] == contexts.shape
        and starts.shape == (len(contexts) + 1,)
    )
