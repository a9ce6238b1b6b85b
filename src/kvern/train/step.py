"""One training step: the rows of this rank -> loss -> gradients -> AdamW -> the gates' biases.

    L = (sum over the global batch of all cross entropies) / (its targets) + mean over its rows of the balance loss

Targets are counted over all ranks before the first backward pass, so the sum of the gradients over micro-batches and
ranks is the gradient of L: how the batch is split changes nothing but rounding. Gradients must therefore be added over
ranks, never averaged.

A loss or gradient that is not finite changes nothing and raises TrainingError, with the first module that computed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvern.data.row_stream import Row
from kvern.errors import TrainingError
from kvern.model import ForwardBatch, MLAForm, Transformer
from kvern.train.balance import Load, LoadBalancer, RoutingLog
from kvern.train.loss import LossOptions, training_loss
from kvern.train.optim import AdamW, clip_gradients
from kvern.train.packed_rows import IGNORED, PackedRows

Sum = Callable[[Tensor], None]
"""Adds a tensor over all ranks, in place."""


@dataclass(frozen=True)
class StepSettings:
    """lr: the rate of this step. bias_step: how far the gates' biases move. tokens: trained so far."""

    lr: float
    max_norm: float
    bias_step: float
    loss: LossOptions
    tokens: int
    micro_batch: int


@dataclass(frozen=True)
class StepResult:
    """Losses in nats; loads by gate; `tokens` and `pairs` (query and key of one document) of the global batch."""

    main: float
    mtp: float
    balance: float
    grad_norm: float
    loads: dict[str, Load]
    tokens: int
    pairs: int


class Learner:
    """A model with everything that learns beside it."""

    def __init__(self, model: Transformer, optimizer: AdamW, add_up: Sum, device: torch.device) -> None:
        self.model, self.optimizer, self.add_up, self.device = model, optimizer, add_up, device
        self.log, self.balancer = RoutingLog(model), LoadBalancer(model)

    def step(self, rows: Sequence[Row], batch: int, settings: StepSettings) -> StepResult:
        """Learn from this rank's `rows` of a global batch of `batch` rows."""
        micro = [pack(part, self.device) for part in _chunks(rows, settings.micro_batch)]
        targets, tokens, pairs = self._count(micro)
        if targets < 1:
            raise TrainingError("no token of the batch is to be predicted", hint="documents of one token teach nothing")
        losses = self._gradients(micro, targets, batch, settings)
        if not torch.isfinite(losses).all():
            raise TrainingError(f"the loss is not finite: {self._first_non_finite(micro)}")
        norm = clip_gradients(dict(self.model.named_parameters()), settings.max_norm, self.add_up)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        loads = self.balancer.step(settings.bias_step, self.add_up)
        main, mtp, balance = losses.tolist()
        return StepResult(main, mtp, balance, norm, loads, tokens, pairs)

    def _count(self, micro: Sequence[PackedRows]) -> tuple[int, int, int]:
        """(targets, tokens, attention's pairs) of the global batch."""
        counts = torch.tensor([0, 0, 0], device=self.device)
        for rows in micro:
            lengths = torch.tensor(rows.batch.query_starts).diff()
            counts[0] += (rows.targets() != IGNORED).sum()
            counts[1] += lengths.sum().to(self.device)
            counts[2] += (lengths * (lengths + 1) // 2).sum().to(self.device)
        self.add_up(counts)
        targets, tokens, pairs = counts.tolist()
        return targets, tokens, pairs

    def _gradients(self, micro: Sequence[PackedRows], targets: int, batch: int, settings: StepSettings) -> Tensor:
        """Add up the gradients of all micro-batches; returns [main, MTP, balance] of the global batch, float64."""
        losses = torch.zeros(3, dtype=torch.float64, device=self.device)
        for rows in micro:
            share = (len(rows.rows) - 1) / batch
            part = training_loss(
                self.model,
                rows,
                self.log,
                options=replace(settings.loss, balance=settings.loss.balance * share),
                tokens_seen=settings.tokens,
                divide_by=targets,
            )
            torch.autograd.backward(part.total)
            self.balancer.count(part.routings)
            losses += torch.stack([part.main, part.mtp, part.balance.to(self.device)]).double()
        self.add_up(losses)
        return losses

    def _first_non_finite(self, micro: Sequence[PackedRows]) -> str:
        """Which module's output is the first that is not finite. Every rank must call it."""
        found: list[str] = []
        handles = [
            module.register_forward_hook(_notice(name, found)) for name, module in self.model.named_modules() if name
        ]
        for rows in micro:
            training_loss(self.model, rows, self.log)
        for handle in handles:
            handle.remove()
        return f"the first module that computes NaN or infinity is {found[0]}" if found else "on another rank"


def pack(rows: Sequence[Row], device: torch.device) -> PackedRows:
    """Rows of documents, one after the other, as a micro-batch on `device`."""
    lengths = [length for row in rows for length in row.lengths]
    starts = (0, *accumulate(lengths))
    tokens = np.concatenate([row.tokens for row in rows])
    positions = np.concatenate([np.arange(length) for length in lengths])
    learned = None
    if any(row.learned is not None for row in rows):
        marks = [np.ones(len(row.tokens), dtype=bool) if row.learned is None else row.learned for row in rows]
        learned = torch.from_numpy(np.concatenate(marks)).to(device)
    batch = ForwardBatch(
        torch.from_numpy(tokens.astype(np.int64, copy=False)).to(device),
        torch.from_numpy(positions).to(device),
        starts,
        form=MLAForm.EXPANDED,
    )
    return PackedRows(batch, learned, (0, *accumulate(len(row.tokens) for row in rows)))


def _chunks(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _notice(name: str, found: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        if not found and not all(torch.isfinite(one).all() for one in outputs if isinstance(one, Tensor)):
            found.append(name)

    return look
