"""Routed experts as two stacks of weights: a layer's experts are one grouped product and two parameters.

    y = down_n(silu(gate_n(x)) * up_n(x)),   gate_up_proj[n] = (gate_n | up_n) [2 I, hidden],   down_proj[n] [hidden, I]

A checkpoint has three tensors an expert, `experts.N.gate_proj.weight` and so on; `ungrouped` and `place` map names both
ways, as views, so that nothing is copied but once, when a model is grouped.
Source: DeepSeek-V3 technical report, eq. 12-13.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kvern import ops
from kvern.model.linear import parameter
from kvern.model.moe import MoE
from kvern.ops import Fp8Recipe

GATE_UP, DOWN = "gate_up_proj", "down_proj"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""Of an expert, in the order of its names."""

_STACKED = re.compile(rf"(.+\.experts\.)({GATE_UP}|{DOWN})")
_SEPARATE = re.compile(r"(.+\.experts\.)(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


class GroupedExperts(nn.Module):
    """N experts of one layer. gate_up_proj [N, 2 I, hidden] and down_proj [N, hidden, I] are the float32 masters."""

    def __init__(
        self, experts: int, hidden: int, intermediate: int, device: str = "cpu", recipe: Fp8Recipe | None = None
    ) -> None:
        super().__init__()
        self.gate_up_proj = parameter((experts, 2 * intermediate, hidden), torch.float32, device)
        self.down_proj = parameter((experts, hidden, intermediate), torch.float32, device)
        self.recipe = recipe

    @classmethod
    def of(cls, experts: nn.ModuleList, recipe: Fp8Recipe | None = None) -> GroupedExperts:
        """The same experts, copied out of MLPs with float32 weights."""
        weights = dict(experts.named_parameters())
        gate = weights["0.gate_proj.weight"]
        grouped = cls(len(experts), gate.shape[1], gate.shape[0], gate.device.type, recipe)
        with torch.no_grad():
            for name, view in grouped.separate(""):
                view.copy_(weights[name])
        return grouped

    def forward(self, x_RE: Tensor, counts: Sequence[int]) -> Tensor:
        """x [R, hidden], sorted by expert, the first counts[0] of expert 0 -> [R, hidden]."""
        inner_RI = self.activate(self._product(x_RE, self.gate_up_proj, counts, 2))
        return self._product(inner_RI, self.down_proj, counts, 1)

    def activate(self, gate_up: Tensor) -> Tensor:
        """What the down-projections multiply."""
        return ops.swiglu_halves(gate_up)

    def separate(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name under `prefix`, view), in the order in which separate experts are named."""
        for expert in range(len(self.down_proj)):
            for projection in PROJECTIONS:
                stack = self.down_proj if projection == "down_proj" else self.gate_up_proj
                yield f"{prefix}{expert}.{projection}.weight", part(stack, expert, projection)

    def _product(self, x: Tensor, weight: Tensor, counts: Sequence[int], projections: int) -> Tensor:
        if self.recipe is not None:
            return ops.fp8_grouped_linear(x, weight, counts, self.recipe, projections)
        return ops.grouped_linear(x, weight, counts)


def group_experts(model: nn.Module, recipe: Fp8Recipe | None = None) -> None:
    """Replace the separate experts of every MoE, the MTP layers' included, by GroupedExperts."""
    for moe in [module for module in model.modules() if isinstance(module, MoE)]:
        if isinstance(moe.experts, nn.ModuleList):
            moe.add_module("experts", GroupedExperts.of(moe.experts, recipe))


def ungrouped(name: str, tensor: Tensor, first: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, view) of all that the parameter or buffer `name` holds, expert by expert.

    first: the number of tensor[0]'s expert, where a rank holds only some. A name outside a stack comes back as it is.
    """
    match = _STACKED.fullmatch(name)
    if match is None:
        yield name, tensor
        return
    projections = ("gate_proj", "up_proj") if match[2] == GATE_UP else ("down_proj",)
    for expert in range(len(tensor)):
        for projection in projections:
            yield f"{match[1]}{first + expert}.{projection}.weight", part(tensor, expert, projection)


def place(name: str) -> tuple[str, int, str] | None:
    """(name of the stack, expert, projection) of a checkpoint's name; None for what is in no stack.

    With `part` this is the inverse of `ungrouped`.
    """
    match = _SEPARATE.fullmatch(name)
    if match is None:
        return None
    stem, expert, projection = match.groups()
    return f"{stem}{DOWN if projection == 'down_proj' else GATE_UP}", int(expert), projection


def part(stack: Tensor, expert: int, projection: str) -> Tensor:
    """The view of a stack (gate_up_proj or down_proj) that is one expert's gate_proj, up_proj or down_proj."""
    if projection == "down_proj":
        return stack[expert]
    return stack[expert].chunk(2)[projection == "up_proj"]


def checkpoint_state(model: nn.Module) -> dict[str, Tensor]:
    """`state_dict()` under the checkpoint's names: views of what is trained."""
    return dict(pair for name, tensor in model.state_dict().items() for pair in ungrouped(name, tensor))
