"""Routed experts on several ranks: each holds its share of them, and rows of tokens travel there and back.

    rows sorted by expert -> counts to all -> rows to their experts' ranks -> sorted by expert there
                          -> the local experts                             -> the same way back, in the order of before

Rank e of E holds experts e N / E .. (e + 1) N / E. How many rows go where is known only once the gate has chosen, so
counts travel first. The backward pass sends gradients the same ways, reversed: dispatch and combine are each other's
backward. No row is dropped, no buffer is padded, and an expert or a rank without a token takes part with zero rows.

What it gives up: FP8 rows on the way there (rows travel in the activations' dtype, twice the report's bytes), sending a
row once to a machine that holds several of its experts, and computing while rows travel. Reading counts waits for the
card, once a layer. Source: DeepSeek-V3 technical report, section 3.2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from kvern.train.experts import GroupedExperts


class ParallelExperts(GroupedExperts):
    """A rank's share of N experts, over parameters whose DTensors have the global shapes [N, ..]; called alike."""

    def __init__(self, experts: GroupedExperts, mesh: DeviceMesh) -> None:
        """mesh: the ranks that share these experts, one dimension; their number divides the experts'."""
        nn.Module.__init__(self)
        self.recipe, self.group = experts.recipe, mesh.get_group()
        self.gate_up_proj = _share(experts.gate_up_proj, mesh)
        self.down_proj = _share(experts.down_proj, mesh)

    def forward(self, x_RE: Tensor, counts: Sequence[int]) -> Tensor:
        """x [R, hidden], sorted by global expert, the first counts[0] of expert 0 -> [R, hidden]."""
        sent = torch.tensor(counts, device=x_RE.device).view(self.group.size(), -1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        there, here = sent.sum(1).tolist(), received.sum(1).tolist()
        rows_RE: Tensor = _Exchange.apply(x_RE, there, here, self.group)  # type: ignore[no-untyped-call]
        order = by_expert(received)
        out_RE = super().forward(rows_RE[order], received.sum(0).tolist())
        back_RE = torch.empty_like(out_RE).index_copy(0, order, out_RE)
        out: Tensor = _Exchange.apply(back_RE, here, there, self.group)  # type: ignore[no-untyped-call]
        return out

    def _product(self, x: Tensor, weight: Tensor, counts: Sequence[int], projections: int) -> Tensor:
        return super()._product(x, weight.to_local() if isinstance(weight, DTensor) else weight, counts, projections)


def by_expert(counts: Tensor) -> Tensor:
    """[R] int64: rows that lie by sender, then expert, in the order expert, then sender. counts [senders, experts]."""
    experts = torch.arange(counts.shape[1], device=counts.device).repeat(counts.shape[0])
    return experts.repeat_interleave(counts.flatten()).argsort(stable=True)


class _Exchange(torch.autograd.Function):
    """Rows [R, E], the first sent[0] for rank 0 of the group -> rows [sum(received), E], the first from rank 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(x, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


def _share(stack: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """This rank's experts of a whole stack, as a DTensor of the whole."""
    mine = stack.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
    return nn.Parameter(DTensor.from_local(mine, mesh, [Shard(0)], run_check=False), stack.requires_grad)
