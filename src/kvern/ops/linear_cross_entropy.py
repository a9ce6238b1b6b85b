"""The cross entropy over a head's logits, with its gradients computed in the same pass: no logits wait for a backward.

    z = h W^T,   loss = sum over rows of  logsumexp(z) - z[target],   dz = softmax(z) - onehot(target)
    dh = dz W,   dW = dz^T h

Some rows at a time: their logits exist once, become dz in their place, and are gone. Since the loss is a sum, its
backward pass only multiplies both gradients by the number that comes from above.

What it gives up: second derivatives; both gradients are held from the forward pass on, dW in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvern.ops.grouped_linear import row_count
from kvern.ops.training_kernels import kernels_for

ROWS = 1024
"""Rows whose logits are held at a time: 0.5 GiB in float32 at V3's vocabulary."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int = ROWS) -> Tensor:
    """Sum of the cross entropies of targets [L] int64 over the logits of hidden [L, D] times weight [V, D]; float32.

    The product and dz are in hidden.dtype, softmax and sums in float32. Negative targets are ignored.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, rows)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dense, loss = weight.to(hidden.dtype), torch.zeros((), device=hidden.device)
        dh = torch.empty_like(hidden) if wants_hidden else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for first in range(0, len(hidden), rows):
            chosen = slice(first, first + rows)
            h, wanted = _whole(hidden[chosen], targets[chosen])
            logits = F.linear(h, dense)
            loss += _cross_entropy(logits, wanted, gradient=wants_hidden or wants_weight)
            if dh is not None:
                dh[chosen] = (logits @ dense)[: len(dh[chosen])]
            if dw is not None:
                dw += logits.T @ h
        ctx.gradients = dh, dw
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dh, dw = ctx.gradients
        ctx.gradients = None, None
        if dh is not None:
            dh = (dh * above).to(dh.dtype)
        return dh, None if dw is None else (dw * above).to(ctx.dtype), None, None


def _whole(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both with ignored rows of zeros behind them, where products should come in few sizes (see `grouped_linear`)."""
    more = row_count(hidden) - len(hidden)
    return (F.pad(hidden, (0, 0, 0, more)), F.pad(targets, (0, more), value=-1)) if more else (hidden, targets)


def _cross_entropy(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """The sum of losses; `logits` [L, V] become their gradients where `gradient`."""
    kernels = kernels_for(logits)
    if kernels is not None:
        return kernels.cross_entropy(logits, targets.contiguous(), gradient).sum()
    known, exact = targets >= 0, logits.float()
    columns = targets.clamp(min=0)[:, None]
    normaliser = exact.logsumexp(-1, keepdim=True)
    losses = (normaliser - exact.gather(1, columns))[:, 0]
    if gradient:
        slopes = (exact - normaliser).exp()
        slopes.scatter_add_(1, columns, torch.full_like(columns, -1, dtype=slopes.dtype))
        logits.copy_(slopes * known[:, None])
    return losses[known].sum()
