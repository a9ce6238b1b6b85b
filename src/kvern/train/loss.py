"""The training loss: the next token, the tokens after it (MTP), and balance within a sequence.

    L = CE(t_{i+1}) + lambda / D * sum over depths k = 1 .. D of CE_k(t_{i+1+k}) + L_balance

Each cross entropy is a sum over targets divided by the number of main targets (the report's T), also for MTP, which has
fewer. lambda is 0.3 for the first 10T tokens, then 0.1.

MTP continues from the hidden state after `model.norm`, as transformers, Megatron and vLLM read the checkpoint, or
before it (`norm_first=False`), as torchtitan and llama.cpp do; DeepSeek has not said which. Deeper layers continue from
their predecessor's state on the same side of `shared_head.norm`.

Logits exist for some rows at a time and never wait for the backward pass (see `ops.linear_cross_entropy`).
Source: DeepSeek-V3 technical report, eq. 17-25 and section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvern.errors import ConfigError
from kvern.model import MLAForm, Transformer
from kvern.model.mtp import MTPLayer
from kvern.train.balance import ALPHA, Routing, RoutingLog, sequence_balance_loss
from kvern.train.packed_rows import IGNORED, PackedRows


@dataclass(frozen=True)
class MTPWeight:
    """lambda by tokens trained so far: `first` until `switch_tokens`, then `later`."""

    first: float = 0.3
    later: float = 0.1
    switch_tokens: int = 10_000_000_000_000

    def at(self, tokens: int) -> float:
        """lambda after `tokens` trained tokens."""
        return self.first if tokens < self.switch_tokens else self.later


@dataclass(frozen=True)
class LossOptions:
    """Which losses count, and how much. norm_first: MTP continues from the state after `model.norm`."""

    mtp: MTPWeight = field(default_factory=MTPWeight)
    norm_first: bool = True
    balance: float = ALPHA
    balance_by_choice: bool = False


@dataclass(frozen=True)
class Losses:
    """Scalars, float32: `total` is to be minimised; `main` and `mtp` are cross entropies in nats, without weight.

    targets: tokens that the batch's main loss predicts. routings: what every gate did, for `LoadBalancer.count`.
    """

    total: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor
    targets: int
    routings: Mapping[str, Routing]


def training_loss(
    model: Transformer,
    rows: PackedRows,
    log: RoutingLog | None = None,
    *,
    options: LossOptions | None = None,
    tokens_seen: int = 0,
    divide_by: int | None = None,
) -> Losses:
    """All losses of a micro-batch; call `backward` on `total`.

    log: a RoutingLog of the model; without it there is no balance loss. divide_by: targets of the whole batch, where
    micro-batches are added up; None: the batch's own. ConfigError where nothing is to be predicted.
    """
    options = options or LossOptions()
    targets_T = rows.targets()
    own = int((targets_T != IGNORED).sum())
    count = own if divide_by is None else divide_by
    if count < 1:
        raise ConfigError("no token of the batch is to be predicted", hint="a document of one token teaches nothing")
    if rows.batch.form is not MLAForm.EXPANDED:
        raise ConfigError("training computes attention in the expanded form only")
    if log:
        log.take()  # heard from the backward pass of the last batch

    def losses() -> Losses:
        states_TE = model.model.states(rows.batch, model.activation_dtype)
        hidden_TE = model.model.norm(states_TE)
        main = token_loss(model, hidden_TE, targets_T) / count
        routings, balance = _hear(log, rows, options)
        mtp = torch.zeros_like(main)
        for loss, heard, part in _mtp_losses(model, rows, hidden_TE if options.norm_first else states_TE, log, options):
            mtp, balance, routings = mtp + loss / count, balance + part, routings | heard
        total = main + options.mtp.at(tokens_seen) * mtp + balance
        return Losses(total, main.detach(), mtp.detach(), balance.detach(), own, routings)

    return model.within(losses)


def token_loss(model: Transformer, hidden_TE: Tensor, targets_T: Tensor) -> Tensor:
    """Sum of the cross entropies of `targets` [T] over the head's logits of `hidden` [T, hidden], float32 scalar."""
    wanted = targets_T != IGNORED
    if 2 * int(wanted.sum()) < len(targets_T):
        hidden_TE, targets_T = hidden_TE[wanted], targets_T[wanted]
    loss: Tensor = model.lm_head(hidden_TE, targets_T)
    return loss


def _mtp_losses(
    model: Transformer, rows: PackedRows, start_TE: Tensor, log: RoutingLog | None, options: LossOptions
) -> Iterator[tuple[Tensor, dict[str, Routing], Tensor]]:
    """(sum of cross entropies / D, what its gate did, its balance loss) of each MTP layer."""
    layers = [layer for layer in model.model.layers if isinstance(layer, MTPLayer)]
    for layer in layers:
        moved = rows.shifted()
        if moved is not None:
            rows, kept_T = moved
            start_TE = start_TE[kept_T]
        states_TE = layer.states(start_TE, model.model.rotation(rows.batch), rows.batch)
        hidden_TE = layer.shared_head.norm(states_TE)
        start_TE = hidden_TE if options.norm_first else states_TE
        loss = token_loss(model, hidden_TE, rows.targets()) / len(layers)
        heard = _hear(log, rows, options)
        if moved is None:  # no document is that long: nothing counts, but other ranks wait for this layer's collectives
            loss, heard = 0 * (loss + states_TE.sum()), ({}, torch.zeros_like(loss))
        yield loss, *heard


def _hear(log: RoutingLog | None, rows: PackedRows, options: LossOptions) -> tuple[dict[str, Routing], Tensor]:
    """What the gates did with `rows`, and the balance loss of it."""
    routings = log.take() if log else {}
    return routings, sequence_balance_loss(routings, rows.rows, options.balance, options.balance_by_choice)
