"""Muon: a hidden matrix steps along its momentum with all singular values made about one. The rest steps by AdamW.

    m = mu m + (1 - mu) g;   u = (1 - mu) g + mu m
    x = u / |u|;             five times   a = x x^T,   x = 3.4445 x - 4.775 a x + 2.0315 a a x       -> about U V^T
    p = p (1 - lr wd) - lr 0.2 sqrt(max(rows, columns)) x

A gradient's few large directions drown all others in AdamW, which weighs numbers one by one; here each direction of a
matrix counts alike. The factor gives a step the size that AdamW's has, so both take one learning rate and weight decay.
kvern-nano's dense twin learns in 2M tokens with it what takes AdamW 3M (docs/LOG.md). V3 was trained with AdamW, which
stays the default; Kimi K2, of V3's architecture, with Muon.

A parameter is one matrix, or a stack of them: of experts, and of gate and up one above the other. The embedding and the
head, whose rows are tokens and not directions, and norms and biases step by AdamW. The momentum is BF16, as there.
Where rows of matrices lie on several ranks, these deal out whole matrices of one shape among them: each computes x of
its own, and the rows go back. Whole experts need nobody.
What it gives up: those products, a quarter of kvern-nano's step of 4,096 tokens in one process, 7 % of one of 16,384;
ranks without work where fewer matrices of a shape than ranks are left; and an expert that no token chooses goes on
along its last momentum at full length, so keep experts balanced.
Sources: Jordan, "Muon" (kellerjordan.github.io/posts/muon); Liu et al., arXiv 2502.16982, section 2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from kvern.errors import ConfigError
from kvern.train.experts import GATE_UP
from kvern.train.optim import BETAS, MOMENTS, WEIGHT_DECAY, AdamW, gradient_of, local, parameter_groups

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
LIKE_ADAMW = 0.2
"""The root mean square of AdamW's steps over their rate, about."""

PARTS = "parts"
"""Of a group: how many matrices lie one above the other in a parameter, or in each of its stack; 0: AdamW's."""

BY_TOKEN = ("embed_tokens.weight", "head.weight")


class Muon(AdamW):
    """Muon for the groups with `parts` (`matrix_groups` makes them), AdamW for those without."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = MOMENTUM,
        betas: tuple[float, float] = BETAS,
        eps: float = 1e-8,
        weight_decay: float = WEIGHT_DECAY,
        moments: torch.dtype = torch.bfloat16,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ConfigError(f"impossible Muon: momentum {momentum}", param="optimizer.momentum")
        self.momentum = momentum
        super().__init__(groups, lr, betas=betas, eps=eps, weight_decay=weight_decay, moments=moments)
        self._matrices = {p for group in self.param_groups if group.get(PARTS) for p in group["params"]}

    def moment_names(self, parameter: Tensor) -> tuple[str, ...]:
        """Matrices have the first moment alone."""
        return MOMENTS[:1] if parameter in self._matrices else MOMENTS

    def _update_all(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        if not group.get(PARTS):
            super()._update_all(parameters, group)
            return
        for some, ranks in _rounds(parameters):
            rows, columns = some[0].shape[-2:]
            size = group["lr"] * LIKE_ADAMW * max(rows // group[PARTS], columns) ** 0.5
            ahead = torch.stack([self._ahead(parameter) for parameter in some])
            steps = _of_shares(ahead.flatten(0, -3), rows, group[PARTS], ranks).view_as(ahead)
            for parameter, step in zip(some, steps, strict=True):
                local(parameter).mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-size)

    def _ahead(self, parameter: Tensor) -> Tensor:
        """This rank's share of u; the momentum moves on."""
        gradient, momentum = local(gradient_of(parameter)), local(self.state[parameter]["exp_avg"])
        mean = momentum.float().lerp_(gradient, 1 - self.momentum)
        momentum.copy_(mean)
        return gradient.lerp(mean, self.momentum)


def matrix_groups(model: nn.Module, weight_decay: float = WEIGHT_DECAY) -> list[dict[str, Any]]:
    """`parameter_groups`, with `parts` of the matrices that Muon steps. Each parameter once."""
    decaying, rest = parameter_groups(model, weight_decay)
    names = {parameter: name for name, parameter in model.named_parameters()}
    parts: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    for parameter in decaying["params"]:
        name = names[parameter]
        parts[0 if name.endswith(BY_TOKEN) else 2 if name.endswith(GATE_UP) else 1].append(parameter)
    groups = [{**decaying, "params": params, PARTS: count} for count, params in parts.items() if params]
    return [*groups, {**rest, PARTS: 0}]


def orthogonal(matrices: Tensor) -> Tensor:
    """[.., rows, columns] -> the same shape, float32: singular values of about one (0.7 to 1.2), or zeros for zeros.

    In BF16 where the processor multiplies it, else in float32.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)).to(_precision(x.device))
    x = x.reshape(-1, *x.shape[-2:])
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape).float()


def _rounds(parameters: Iterable[Tensor]) -> Iterator[tuple[Sequence[Tensor], DeviceMesh | None]]:
    """Parameters of one shape that step together, and the ranks over which their rows are cut, if they are.

    As many as there are ranks, so that each computes one; a stack of experts, or what no other rank needs, alone.
    """
    alike: defaultdict[tuple[torch.Size, DeviceMesh | None], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        alike[parameter.shape, _ranks_of(parameter)].append(parameter)
    for (shape, ranks), some in alike.items():
        count = ranks.size() if ranks is not None and len(shape) == 2 else 1
        for first in range(0, len(some), count):
            yield some[first : first + count], ranks


def _ranks_of(parameter: Tensor) -> DeviceMesh | None:
    """The ranks that hold rows of the same matrices; None where this one has whole matrices."""
    if not isinstance(parameter, DTensor):
        return None
    rows = Shard(parameter.dim() - 2)
    cut = [number for number, placement in enumerate(parameter.placements) if placement == rows]
    assert len(cut) <= 1  # what parallelize makes: one dimension of the mesh cuts rows, none cuts columns
    assert set(parameter.placements) <= {Replicate(), Shard(0), rows}
    if not cut:
        return None
    mesh = parameter.device_mesh
    return mesh if mesh.ndim == 1 else mesh[cast(tuple[str, ...], mesh.mesh_dim_names)[cut[0]]]


def _of_shares(shares: Tensor, rows: int, parts: int, ranks: DeviceMesh | None) -> Tensor:
    """u -> x: this rank's rows of some matrices, [matrices, its rows, columns]. All `ranks` must call it.

    They deal the matrices out, so that each computes whole ones, and then deal their rows back.
    """
    if ranks is None:
        return _each(shares, parts)
    shape = torch.Size((len(shares), rows, shares.shape[-1]))
    mine = _among(ranks, shares, Shard(1), shape).redistribute(placements=[Shard(0)])
    steps = _each(mine.to_local(), parts)
    return _among(ranks, steps, Shard(0), shape).redistribute(placements=[Shard(1)]).to_local()


def _among(ranks: DeviceMesh, share: Tensor, cut: Shard, shape: torch.Size) -> DTensor:
    """The whole of which each rank has a share; `shape` is the whole's, [matrices, rows, columns]."""
    _, rows, columns = shape
    return DTensor.from_local(share, ranks, [cut], run_check=False, shape=shape, stride=(rows * columns, columns, 1))


def _each(stack: Tensor, parts: int) -> Tensor:
    """`orthogonal` of each matrix of [stack, parts * rows, columns]."""
    count, rows, columns = stack.shape
    return orthogonal(stack.reshape(count, parts, rows // parts, columns)).view_as(stack)


def _precision(device: torch.device) -> torch.dtype:
    is_fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if is_fast else torch.float32
