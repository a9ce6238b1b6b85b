"""Absorbed MLA over paged latents on a card: flash decoding, the context of a query split over programs.

    out[t, h] = sum over rows r that query t sees of softmax_r(scale * q[t, h] . row_r) * row_r[:rank]
              = sum over parts i of 2^(l_i - m) out_i  /  sum over parts i of 2^(l_i - m),   m = max l_i

A program takes one query, up to 16 of its heads and a part i of its context; it reads each latent row once for key and
value, and keeps the maximum, sum and weighted rows of an online softmax; l_i is the base-2 log of its sum. A second
kernel merges the parts. FP32 queries compute in FP32; BF16 queries multiply BF16 with FP32 sums, softmax weights
rounded to BF16 as the reference rounds them.

Made for decoding. What it gives up: queries of one sequence share nothing, so a long chunk of a prompt reads its
context once per query; rank and rope sizes are padded to powers of two; nothing is tuned per card. What it leaves to
the reference: autograd, other dtypes, cache rows that are not dense.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvern.ops import reference
from kvern.ops.library import is_dense
from kvern.ops.triton_linear import FLOATS, dot_dtype, needs_grad

HEADS = 16
"""Heads of a program: the fewest rows that tensor cores multiply."""

PROGRAMS = 256
"""Programs that a launch should have at least: contexts are split until it does. A guess."""

SMALLEST_PART = 256
"""Context rows below which splitting further costs more in the merge than it gives; a guess."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _part_kernel(
    part_ptr, log_ptr, q_ptr, rows_ptr, row_stride, tables_ptr, table_width, sequence_ptr, seen_ptr,
    H, D, rank, block_size, scale, parts,
    BH: tl.constexpr, BC: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    part = tl.program_id(2)
    seen = tl.load(seen_ptr + query)
    table = tables_ptr + tl.load(sequence_ptr + query) * table_width
    length = tl.cdiv(tl.cdiv(seen, parts), BC) * BC
    end = tl.minimum((part + 1) * length, seen)

    low = tl.arange(0, RANK)
    high = rank + tl.arange(0, ROPE)
    q_rows = q_ptr + (query.to(tl.int64) * H + heads) * D
    q_low = tl.load(q_rows[:, None] + low[None, :], mask=(heads < H)[:, None] & (low < rank)[None, :], other=0.0)
    q_high = tl.load(q_rows[:, None] + high[None, :], mask=(heads < H)[:, None] & (high < D)[None, :], other=0.0)
    most = tl.full((BH,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BH,), dtype=tl.float32)
    out = tl.zeros((BH, RANK), dtype=tl.float32)
    for first in range(part * length, end, BC):
        at = first + tl.arange(0, BC)
        block = tl.load(table + at // block_size, mask=at < end, other=0).to(tl.int64)
        row = rows_ptr + (block * block_size + at % block_size) * row_stride
        k_low = tl.load(row[:, None] + low[None, :], mask=(at < end)[:, None] & (low < rank)[None, :], other=0.0)
        k_high = tl.load(row[:, None] + high[None, :], mask=(at < end)[:, None] & (high < D)[None, :], other=0.0)
        k_low = k_low.to(DOT)
        scores = tl.dot(q_low.to(DOT), tl.trans(k_low), input_precision="ieee")
        scores += tl.dot(q_high.to(DOT), tl.trans(k_high.to(DOT)), input_precision="ieee")
        scores = tl.where((at < end)[None, :], scores * (scale * LOG2_E), float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(DOT), k_low, input_precision="ieee")
        most = higher
    slots = (query.to(tl.int64) * H + heads) * parts + part
    is_used = part * length < seen
    total = tl.where(is_used, total, 1.0)
    tl.store(log_ptr + slots, most + tl.log2(total), mask=heads < H)
    mean = out / total[:, None]
    tl.store(part_ptr + slots[:, None] * rank + low[None, :], mean, mask=(heads < H)[:, None] & (low < rank)[None, :])


@triton.jit
def _merge_kernel(out_ptr, part_ptr, log_ptr, rank, parts, PARTS: tl.constexpr, RANK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * parts
    part = tl.arange(0, PARTS)
    logs = tl.load(log_ptr + first + part, mask=part < parts, other=float("-inf"))
    most = tl.max(logs, 0)
    total = tl.sum(tl.exp2(logs - most), 0)
    low = tl.arange(0, RANK)
    out = tl.zeros((RANK,), dtype=tl.float32)
    for index in range(parts):
        weight = tl.exp2(tl.load(log_ptr + first + index) - most)
        out += weight * tl.load(part_ptr + (first + index) * rank + low, mask=low < rank, other=0.0)
    at = out_ptr + tl.program_id(0).to(tl.int64) * rank + low
    tl.store(at, (out / total).to(out_ptr.dtype.element_ty), mask=low < rank)


def paged_latent_attention(
    q: Tensor,
    rows: Tensor,
    tables: Tensor,
    contexts: Tensor,
    starts: Tensor,
    block_size: int,
    rank: int,
    scale: float,
    *,
    parts: int | None = None,
) -> Tensor:
    """`reference.paged_latent_attention`: q [T, H, D], rows [N, D], tables [S, B] int32 -> [T, H, rank] in q.dtype.

    `parts` is how many programs share a context; None chooses from the number of queries and heads and the width of the
    tables, so nothing waits for the device. With `parts` given, a query's result depends on its own rows alone.
    """
    if not _takes(q, rows, tables, contexts, starts, rank):
        return reference.paged_latent_attention(q, rows, tables, contexts, starts, block_size, rank, scale)
    tokens, heads, size = q.shape
    out = torch.empty(tokens, heads, rank, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    groups = triton.cdiv(heads, HEADS)
    if parts is None:
        longest = tables.shape[1] * block_size
        parts = max(1, min(-(-PROGRAMS // (tokens * groups)), -(-longest // SMALLEST_PART)))
    sequence, seen = _queries(tokens, contexts, starts)
    means = torch.empty(tokens, heads, parts, rank, dtype=torch.float32, device=q.device)
    logs = torch.empty(tokens, heads, parts, dtype=torch.float32, device=q.device)
    tile = tile_of(rank, size - rank, dot_dtype(q.dtype is torch.float32))
    with torch.cuda.device_of(q):
        _part_kernel[tokens, groups, parts](
            means, logs, q.contiguous(), rows, rows.stride(0), tables.contiguous(), tables.shape[1], sequence, seen,
            heads, size, rank, block_size, scale, parts,
            **tile,
        )  # fmt: skip
        _merge_kernel[(tokens * heads,)](
            out, means, logs, rank, parts, PARTS=triton.next_power_of_2(parts), RANK=tile["RANK"]
        )
    return out


def tile_of(rank: int, rope: int, dot: tl.dtype) -> dict[str, object]:
    """Constants of `_part_kernel`: heads and context rows of a step, padded sizes, dtype of the products."""
    rank, rope = (max(16, triton.next_power_of_2(size)) for size in (rank, rope))
    return {"BH": HEADS, "BC": 16 if dot is tl.float32 else 32, "RANK": rank, "ROPE": rope, "DOT": dot}


def _queries(tokens: int, contexts: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """For each query its sequence [T] int64 and the rows that it sees [T] int32."""
    query = torch.arange(tokens, device=starts.device, dtype=starts.dtype)
    sequence = torch.searchsorted(starts, query, right=True) - 1
    return sequence, contexts[sequence] - starts[sequence + 1] + query + 1


def _takes(q: Tensor, rows: Tensor, tables: Tensor, contexts: Tensor, starts: Tensor, rank: int) -> bool:
    return (
        not needs_grad(q, rows)
        and q.dtype in FLOATS
        and rows.dtype in FLOATS
        and q.dim() == 3
        and is_dense(rows)
        and q.shape[2] == rows.shape[1] >= rank
        and all(books.dtype is torch.int32 for books in (tables, contexts, starts))
        and tables.shape[:1] == contexts.shape
        and starts.shape == (len(contexts) + 1,)
    )
