"""The routed experts of a batch on a card: one launch for gate, up and SwiGLU of all experts, one for down.

    inner[p] = silu(gate_e x[t]) * (up_e x[t]),   share[p] = weights[p] * (down_e inner[p]),  out[t] = sum_k share[t, k]

The pairs p = (t, k) are sorted by their expert e and cut into tiles of rows of one expert; a program finds its expert
in a table made on the device, so nothing waits for the counts. Every pair's share is written once and summed in a
fixed order: no atomics, the same bits every time. Products as in `triton_linear`. What it gives up: memory for the
shares (T * K * D in x.dtype), and x is read once for gate and once for up. What it leaves to the reference: autograd,
other dtypes, stacks that are not dense.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvern.ops import reference_experts
from kvern.ops.triton_linear import FLOATS, are_scales, codes, needs_grad, tile_of, tile_product


@triton.jit
def _gate_up_kernel(
    out_ptr, x_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr,
    order_ptr, expert_ptr, first_ptr, end_ptr, N, K, top_k, E, scale_rows, scale_columns,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    expert = tl.load(expert_ptr + tile)
    if expert < E:
        pairs = tl.load(first_ptr + tile) + tl.arange(0, BM)
        exists = pairs < tl.load(end_ptr + tile)
        tokens = tl.load(order_ptr + pairs, mask=exists, other=0) // top_k
        columns = tl.program_id(0) * BN + tl.arange(0, BN)
        x_rows = x_ptr + tokens.to(tl.int64) * K
        member = expert.to(tl.int64) * N * K
        scale_member = expert.to(tl.int64) * scale_rows * scale_columns
        gate = tile_product(
            x_rows, exists, gate_ptr + member, K, gate_scale_ptr, scale_member, scale_columns,
            columns, N, K, BM, BN, BK, DOT,
        )  # fmt: skip
        up = tile_product(
            x_rows, exists, up_ptr + member, K, up_scale_ptr, scale_member, scale_columns,
            columns, N, K, BM, BN, BK, DOT,
        )  # fmt: skip
        inner = gate / (1.0 + tl.exp(-gate)) * up
        at = out_ptr + pairs.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(at, inner.to(out_ptr.dtype.element_ty), mask=exists[:, None] & (columns < N)[None, :])


@triton.jit
def _down_kernel(
    out_ptr, inner_ptr, down_ptr, scale_ptr, weight_ptr,
    order_ptr, expert_ptr, first_ptr, end_ptr, N, K, E, scale_rows, scale_columns,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    expert = tl.load(expert_ptr + tile)
    if expert < E:
        pairs = tl.load(first_ptr + tile) + tl.arange(0, BM)
        exists = pairs < tl.load(end_ptr + tile)
        slots = tl.load(order_ptr + pairs, mask=exists, other=0)
        columns = tl.program_id(0) * BN + tl.arange(0, BN)
        y = tile_product(
            inner_ptr + pairs.to(tl.int64) * K, exists, down_ptr + expert.to(tl.int64) * N * K, K,
            scale_ptr, expert.to(tl.int64) * scale_rows * scale_columns, scale_columns, columns, N, K, BM, BN, BK, DOT,
        )  # fmt: skip
        y *= tl.load(weight_ptr + slots, mask=exists, other=0.0).to(tl.float32)[:, None]
        at = out_ptr + slots.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=exists[:, None] & (columns < N)[None, :])


def grouped_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    scales: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """`reference_experts.grouped_experts`, with FP32 sums: x [T, D], weights and experts [T, K] -> [T, D]."""
    if not _takes(x, weights, experts, gate, up, down, scales):
        return reference_experts.grouped_experts(x, weights, experts, gate, up, down, scales)
    (count, width, size), top_k = gate.shape, experts.shape[1]
    if experts.numel() == 0 or size == 0:
        return torch.zeros_like(x)
    gate_scale, up_scale, down_scale = scales or (None, None, None)
    inner = torch.empty(experts.numel(), width, dtype=x.dtype, device=x.device)
    shares = torch.empty(len(x), top_k, size, dtype=x.dtype, device=x.device)
    tile = tile_of(-(-experts.numel() // count), x.dtype, gate.dtype)
    order, *table = _tiles(experts, count, tile["BM"])
    tiles, blocks = len(table[0]), [-(-length // 128) for length in (width, size)]
    with torch.cuda.device_of(x):
        _gate_up_kernel[triton.cdiv(width, tile["BN"]), tiles](
            inner, x.contiguous(), codes(gate), codes(up), gate_scale, up_scale,
            order, *table, width, size, top_k, count, *blocks, **tile,
        )  # fmt: skip
        _down_kernel[triton.cdiv(size, tile["BN"]), tiles](
            shares, inner, codes(down), down_scale, weights.contiguous(),
            order, *table, size, width, count, *reversed(blocks), **tile,
        )  # fmt: skip
    return shares.sum(1, dtype=torch.float32).to(x.dtype)


def _tiles(experts: Tensor, count: int, height: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs sorted by expert [P], then for every tile its expert (`count` where it has none), first pair and end.

    There are as many tiles as the worst distribution needs, so that the launch needs no number from the device.
    """
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    numbers = torch.arange(count + 1, device=flat.device, dtype=flat.dtype)
    starts = torch.searchsorted(flat[order], numbers)
    until = ((starts.diff() + height - 1) // height).cumsum(0)
    tile = torch.arange(len(flat) // height + min(count, len(flat)), device=flat.device)
    expert = torch.searchsorted(until, tile, right=True)
    known = expert.clamp(max=count - 1)
    before = until[known] - (starts[known + 1] - starts[known] + height - 1) // height
    return order, expert, starts[known] + (tile - before) * height, starts[known + 1]


def _takes(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    scales: tuple[Tensor, Tensor, Tensor] | None,
) -> bool:
    stacks = (gate, up, down)
    return (
        not needs_grad(x, weights, *stacks)
        and x.dtype in FLOATS
        and weights.dtype is torch.float32
        and x.dim() == 2
        and gate.shape == up.shape == (len(down), down.shape[2], x.shape[1])
        and down.shape[1] == x.shape[1]
        and gate.numel() > 0
        and gate.dtype is up.dtype is down.dtype
        and all(stack.is_contiguous() for stack in stacks)
        and all(are_scales(one, stack) for one, stack in zip(scales or (None,) * 3, stacks, strict=True))
    )
