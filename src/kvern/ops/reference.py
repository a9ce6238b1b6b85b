"""The ops in plain torch: the specification that every kernel is tested against, and the fallback.

Accumulation is FP32 (torch's own matmuls accumulate bfloat16 inputs so). What it gives up is speed: FP8 weights are
dequantised whole before each product.

Shape letters: T tokens (queries), C context rows, H heads, D latent_dim, K key size, V value size, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kvern.ops.reference_latent8 import decode_latents

BLOCK = 128
"""Rows and columns of a weight block that share one scale (`quantization_config.weight_block_size`)."""

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x [.., K] times weight [N, K] transposed, plus bias [N]; returns [.., N] in x.dtype.

    `weight` may be float32, bfloat16 or float8_e4m3fn; FP8 needs `scale`, its weight_scale_inv.
    """
    dense = weight.to(x.dtype) if scale is None else dequantize(weight, scale, x.dtype)
    return F.linear(x, dense, None if bias is None else bias.to(x.dtype))


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """weight [N, K] float8_e4m3fn times scale [ceil(N/128), ceil(K/128)] of its block, in `dtype`.

    Ragged edges belong to the last block (DeepSeek-V3 inference/kernel.py, weight_dequant).
    """
    rows, columns = weight.shape
    spread = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return (weight.float() * spread).to(dtype)


def quantize_blocks(
    weight: Tensor, power_of_two: bool = False, smallest_amax: float = SMALLEST_AMAX
) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> (E4M3 [N, K], scale [ceil(N/128), ceil(K/128)] float32): s = amax/448, y = w/s, per block.

    `power_of_two` rounds s up to 2^ceil(log2 s) (scale_fmt ue8m0). A block of zeros gets the scale of `smallest_amax`,
    which DeepSeek's kernel sets to 1e-4; weights with rows scaled by 2^-24 (exact imports) need it far smaller.
    """
    return quantize_tiles(weight, (BLOCK, BLOCK), power_of_two, smallest_amax)


def quantize_tiles(x: Tensor, tile: tuple[int, int], power_of_two: bool, smallest_amax: float) -> tuple[Tensor, Tensor]:
    """`quantize_blocks` with tiles of (r, c) numbers: x [R, C] -> (E4M3 [R, C], scale [ceil(R/r), ceil(C/c)] float32).

    Tiles at the right and lower edge are ragged. NaN in a tile makes its scale and all its codes NaN.
    """
    rows, columns = x.shape
    padded = F.pad(x.float(), (0, -columns % tile[1], 0, -rows % tile[0]))
    blocks = padded.view(padded.shape[0] // tile[0], tile[0], padded.shape[1] // tile[1], tile[1])
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=smallest_amax) / E4M3_MAX
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scaled = (blocks / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).view_as(padded)[:rows, :columns]
    return scaled.to(torch.float8_e4m3fn).contiguous(), scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in FP32, returned in x.dtype."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def apply_rope(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the pairs (x[2i], x[2i+1]) of x [T, .., D] by rotation [T, D/2] complex64, interleaved."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turned = pairs * rotation.view(rotation.shape[0], *(1,) * (x.dim() - 2), rotation.shape[1])
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    return F.silu(gate) * up


def swiglu_halves(x: Tensor) -> Tensor:
    """`swiglu` of the two halves of x [R, 2 I]: gate, then up."""
    gate, up = x.chunk(2, dim=-1)
    return swiglu(gate, up)


def route(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, groups: int, kept_groups: int, normalise: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """The V3 gate (report eq. 12-16): x [T, hidden] -> (weights [T, top_k] float32, experts [T, top_k] int64).

    s = sigmoid(x W^T) in FP32. The choice uses s + bias: first the `kept_groups` groups whose two best sum to most, all
    others at -inf, then the `top_k` best. The weights are s without bias, normalised, times `factor`.
    """
    scores = F.linear(x.float(), weight.float()).sigmoid()
    choice = scores + bias
    if kept_groups < groups:
        grouped = choice.view(len(x), groups, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(kept_groups, dim=-1).indices
        dropped = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
        choice = grouped.masked_fill(dropped[..., None], float("-inf")).view_as(choice)
    experts = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * factor, experts


QUERY_ROWS = 1 << 24
"""Scores (T*H*C) that `latent_attention` holds at a time: 64 MiB in float32."""


def latent_attention(q: Tensor, latent: Tensor, rank: int, scale: float) -> Tensor:
    """Absorbed MLA: q [T, H, D] against latent [C, D], values its first `rank` columns; returns [T, H, rank].

    The T queries are the last T of the C rows: query t sees rows 0 .. C - T + t. Softmax in FP32.
    """
    tokens, heads, _ = q.shape
    context = len(latent)
    step = max(1, QUERY_ROWS // (heads * context))
    parts = []
    for first in range(0, tokens, step):
        chunk = q[first : first + step]
        seen = context - tokens + first + len(chunk)
        scores = (chunk.flatten(0, 1) @ latent[:seen].T).view(len(chunk), heads, seen).float() * scale
        if len(chunk) > 1:
            scores = scores.masked_fill(~_visible(len(chunk), seen, q.device)[:, None], float("-inf"))
        weights = scores.softmax(-1).to(q.dtype)
        parts.append((weights.flatten(0, 1) @ latent[:seen, :rank]).view(len(chunk), heads, rank))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
    """`latent_attention` for S sequences whose latents lie in blocks: q [T, H, D] -> [T, H, rank] in q.dtype.

    rows: [N, D], the cache of one layer, in q.dtype or bfloat16; or uint8 [N, latent8_bytes], records that count with
    their numbers in q.dtype (see `reference_latent8`). tables: [S, B] int32 block numbers: row r of sequence
    s is rows[tables[s, r // block_size] * block_size + r % block_size], and entries past its context are not read.
    contexts: [S] int32, rows that the last query of each sequence sees. starts: [S + 1] int32 offsets into q: query j
    of the n of sequence s sees contexts[s] - n + 1 + j rows, and n is at most contexts[s].
    """
    out = q.new_empty(*q.shape[:2], rank)
    offsets = starts.tolist()
    for sequence, context in enumerate(contexts.tolist()):
        span = slice(offsets[sequence], offsets[sequence + 1])
        if span.stop > span.start:
            latent = rows[paged_rows(tables[sequence], context, block_size)]
            if rows.dtype is torch.uint8:
                latent = decode_latents(latent, rank, q.shape[2] - rank)
            latent = latent.to(q.dtype)
            out[span] = latent_attention(q[span], latent, rank, scale)
    return out


def paged_rows(table: Tensor, context: int, block_size: int) -> Tensor:
    """[context] int64: where the first `context` rows of a sequence lie in the flattened blocks; table [B]."""
    blocks = table[: -(-context // block_size)].long()
    offsets = torch.arange(block_size, device=table.device)
    return (blocks[:, None] * block_size + offsets).flatten()[:context]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Multi-head attention: q [T, H, K], k [C, H, K], v [C, H, V] -> [T, H, V], the same causal rule.

    Values are padded to the key size, because torch's CPU flash kernel wants them equal.
    """
    tokens, context, size = len(q), len(k), v.shape[-1]
    width = max(q.shape[-1], size)
    q, k, v = (F.pad(t, (0, width - t.shape[-1])).transpose(0, 1)[None] for t in (q, k, v))
    if tokens == context:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(tokens, context, q.device), scale=scale)
    return out[0].transpose(0, 1)[..., :size]


def expanded_attention(q: Tensor, kv: Tensor, rope: Tensor, scale: float) -> Tensor:
    """Expanded MLA: q [T, H, N + P], kv [C, H, N + V], rope [C, P] -> [T, H, V] in their dtype, the same causal rule.

    The key of head h and row c is (kv[c, h, :N], rope[c]): the rotated part is shared by all heads. Its value is
    kv[c, h, N:].
    """
    shared = rope.shape[1]
    key, value = torch.tensor_split(kv, [q.shape[2] - shared], dim=2)
    k = torch.cat([key, rope[:, None].expand(-1, kv.shape[1], -1)], dim=2)
    return causal_attention(q, k, value, scale)


def document_attention(q: Tensor, kv: Tensor, rope: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """`expanded_attention` [T, H, V] within each document: q [T, H, N + P], kv [T, H, N + V], rope [T, P].

    starts: where documents begin, and T.
    """
    spans = [slice(first, last) for first, last in pairwise(starts)]
    return torch.cat([expanded_attention(q[span], kv[span], rope[span], scale) for span in spans])


def _visible(tokens: int, context: int, device: torch.device) -> Tensor:
    """[T, C] bool: whether query t, the (C - T + t)-th row, sees row c."""
    rows = torch.arange(context - tokens, context, device=device)
    return torch.arange(context, device=device) <= rows[:, None]
