"""Balance of the experts without a loss that fights the model: a bias in the choice, moved by sign after each step.

    load_i = tokens of the global batch that chose expert i;   bias_i += gamma * sign(mean(load) - load_i)

The bias enters the choice of experts and never their weights, so no gradient flows through it; gamma is 0.001, and 0
for the last 500B of 14.8T tokens. Beside it, the report keeps a small loss against imbalance within one sequence:

    L = alpha * sum_i f_i P_i,   f_i = N / (K T) * (times i is among the K best),   P_i = mean over T of s_i / sum_j s_j

alpha is 1e-4; "among the K best" counts the scores s without bias (eq. 18), or the experts really chosen where
`by_choice`. Layers are summed, sequences averaged. The MTP layers' gates are balanced like all others, on which the
report is silent. No token is ever dropped.

`RoutingLog` learns what gates did from hooks, which compute the scores a second time: K N products a token more, and no
line in the model. Source: DeepSeek-V3 technical report, eq. 16-20.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvern.errors import ConfigError
from kvern.model.moe import Gate

GAMMA = 0.001
GAMMA_TOKENS = 14_300_000_000_000
ALPHA = 1e-4


@dataclass(frozen=True)
class Routing:
    """What one gate did with T tokens: scores [T, N] float32, with gradient, and the chosen experts [T, K] int64."""

    scores_TN: Tensor
    experts_TK: Tensor


@dataclass(frozen=True)
class Load:
    """Tokens of each of a gate's experts, [N] int64."""

    counts_N: Tensor

    @property
    def max_over_mean(self) -> float:
        """1: balanced; N: all tokens at one expert. 0 where nothing was counted."""
        total = int(self.counts_N.sum())
        return float(self.counts_N.max()) * len(self.counts_N) / total if total else 0.0

    @property
    def idle(self) -> int:
        """Experts without a token."""
        return int((self.counts_N == 0).sum())


class RoutingLog:
    """Listens to every gate of a model while it trains; evaluation is not heard."""

    def __init__(self, model: nn.Module) -> None:
        self._routings: dict[str, Routing] = {}
        self._handles = [gate.register_forward_hook(self._hook(name)) for name, gate in named_gates(model).items()]

    def take(self) -> dict[str, Routing]:
        """What was heard since the last `take`, by the gate's name.

        A forward pass that is repeated for the backward pass is heard again: take (and drop) that, too.
        """
        taken, self._routings = self._routings, {}
        return taken

    def close(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[Gate, tuple[Any, ...], tuple[Tensor, Tensor]], None]:
        def hear(gate: Gate, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            if gate.training and torch.is_grad_enabled():
                scores = F.linear(inputs[0].float(), gate.weight.float()).sigmoid()
                self._routings[name] = Routing(scores, output[1])

        return hear


class LoadBalancer:
    """Counts the load of every gate over the micro-batches of a step, then moves the biases."""

    def __init__(self, model: nn.Module) -> None:
        self.gates = named_gates(model)
        for name, gate in self.gates.items():
            if gate.e_score_correction_bias.dtype is not torch.float32:
                raise ConfigError(f"{name}.e_score_correction_bias must be float32: steps of 0.001 vanish in others")
        self._counts = {name: self._zeros(gate) for name, gate in self.gates.items()}

    def count(self, routings: Mapping[str, Routing]) -> None:
        """Add the choices of one micro-batch."""
        for name, routing in routings.items():
            self._counts[name] += expert_counts(routing.experts_TK, len(self._counts[name]))

    def step(self, gamma: float = GAMMA, reduce: Callable[[Tensor], None] | None = None) -> dict[str, Load]:
        """Move every bias by `gamma` and start counting anew; returns the loads by gate.

        `reduce` adds a tensor [gates * N] int64 over all ranks, in place: the batch is the global one.
        """
        if not self._counts:
            return {}
        counts = torch.cat(list(self._counts.values()))
        if reduce is not None:
            reduce(counts)
        sizes = [len(part) for part in self._counts.values()]
        loads = {name: Load(part) for name, part in zip(self._counts, torch.split(counts, sizes), strict=True)}
        for name, load in loads.items():
            move_bias(self.gates[name].e_score_correction_bias, load.counts_N, gamma)
        self._counts = {name: self._zeros(gate) for name, gate in self.gates.items()}
        return loads

    @staticmethod
    def _zeros(gate: Gate) -> Tensor:
        bias = gate.e_score_correction_bias
        return torch.zeros(len(bias), dtype=torch.int64, device=bias.device)


def gamma_at(tokens: int, gamma: float = GAMMA, until: int = GAMMA_TOKENS) -> float:
    """The bias's step after `tokens` trained tokens: `gamma`, and 0 from `until` on."""
    return gamma if tokens < until else 0.0


def named_gates(model: nn.Module) -> dict[str, Gate]:
    """Every gate by its module's name, the MTP layers' included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Gate)}


def expert_counts(experts_TK: Tensor, experts: int) -> Tensor:
    """[N] int64: how often each of `experts` experts was chosen."""
    return experts_TK.flatten().bincount(minlength=experts)


@torch.no_grad()
def move_bias(bias_N: Tensor, counts_N: Tensor, gamma: float) -> None:
    """bias += gamma * sign(mean - count), in place; the sign is computed in whole numbers."""
    bias_N += gamma * torch.sign(counts_N.sum() - counts_N * len(counts_N)).to(bias_N.dtype)


def sequence_balance_loss(
    routings: Mapping[str, Routing], rows: Sequence[int], alpha: float = ALPHA, by_choice: bool = False
) -> Tensor:
    """The loss (eq. 17-20) of the sequences that begin and end at the offsets `rows` of the tokens, float32 scalar.

    A sequence is a packed row, as in the report; its documents are not looked at. Rows without tokens do not count.
    """
    spans = [slice(first, last) for first, last in pairwise(rows) if last > first]
    if not spans or not routings:
        return torch.zeros(())
    losses = [_row_loss(routing, span, by_choice) for routing in routings.values() for span in spans]
    return torch.stack(losses).sum() * (alpha / len(spans))


def _row_loss(routing: Routing, span: slice, by_choice: bool) -> Tensor:
    scores_TN, experts_TK = routing.scores_TN[span], routing.experts_TK[span]
    tokens, experts = scores_TN.shape
    top_k = experts_TK.shape[1]
    best = experts_TK if by_choice else scores_TN.topk(top_k, dim=-1).indices
    fraction_N = expert_counts(best, experts).float() * (experts / (top_k * tokens))
    share_N = (scores_TN / scores_TN.sum(-1, keepdim=True)).mean(0)
    return (fraction_N * share_N).sum()
