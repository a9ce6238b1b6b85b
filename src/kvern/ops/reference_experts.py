"""The routed experts of a layer over a whole batch, in plain torch: the specification of the grouped product.

    out[t] = sum over k of weights[t, k] * down_e(silu(gate_e(x[t])) * up_e(x[t])),  e = experts[t, k]

Each expert runs once, over the tokens routed to it. What it gives up: one launch per expert and projection, and a look
at the counts, which waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvern.ops import reference


def grouped_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    scales: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """x [T, D] through the experts that `route` chose for its tokens; returns [T, D] in x.dtype.

    weights [T, K] float32 and experts [T, K] integers are what `route` gives. gate and up [E, I, D] and down [E, D, I]
    are stacked, float32, bfloat16 or float8_e4m3fn; E4M3 needs `scales`, the three stacks of weight_scale_inv,
    [E, ceil(I/128), ceil(D/128)] twice and [E, ceil(D/128), ceil(I/128)].
    """
    out = torch.zeros_like(x)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    tokens = order // max(1, experts.shape[1])
    counts = flat.bincount(minlength=len(gate)).tolist()
    shares = weights.flatten()[order].to(x.dtype)[:, None]
    first = 0
    for expert in (index for index, count in enumerate(counts) if count):
        rows = slice(first, first + counts[expert])
        one = [stack[expert] for stack in (gate, up, down)]
        scale = [None] * 3 if scales is None else [stack[expert] for stack in scales]
        chosen = x[tokens[rows]]
        inner = reference.swiglu(reference.linear(chosen, one[0], scale[0]), reference.linear(chosen, one[1], scale[1]))
        out.index_add_(0, tokens[rows], reference.linear(inner, one[2], scale[2]) * shares[rows])
        first = rows.stop
    return out


def expert_rows(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """The rows of x [T, D] that experts see: [T top_k, D], row r that of token order[r] // top_k."""
    return x[order // top_k]


def combine_experts(rows: Tensor, weights: Tensor, order: Tensor, counts: Sequence[int]) -> Tensor:
    """Add up what experts made of each token: rows [R, D], sorted by expert, weights [T, K], R = T K; returns [T, D].

    order [R]: rows[r] belongs to weights.flatten()[order[r]]. counts: rows of each expert. Expert after expert adds to
    the result in rows.dtype.
    """
    out = rows.new_zeros(len(weights), rows.shape[1])
    tokens = order // max(1, weights.shape[1])
    scaled = rows * weights.flatten()[order].to(rows.dtype)[:, None]
    for part, place in zip(torch.split(scaled, list(counts)), torch.split(tokens, list(counts)), strict=True):
        out.index_add_(0, place, part)
    return out
