"""Drafts by the model's own MTP layer: from the hidden state of the last token, the token after next.

    after a step:    MTP over (h_i, t_{i+1}) of accepted tokens       -> latents i, state, draft 1
    before a step:   MTP over (state, draft j)                        -> state, draft j + 1

The layer's latents lie in the same blocks as the main ones, row i for token i: computed chunk by chunk, again after a
preemption, and with a shared prefix they are there already. Until a draft is wanted or a block is full, hidden states
wait: where drafts do not pay, a request costs one pass for a block of tokens. It makes a draft as well, to see whether
they are better now. Rows that drafts wrote are written again once the drafts are verified. It gives up one row: the
last of a shared prefix knows the token that followed it where it was computed first. That can cost a draft, never
change an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvern.engine.cache import Span
from kvern.engine.request import Request


class Predicts(Protocol):
    """Runs the MTP layer."""

    def predict(
        self, hidden_TE: Tensor, spans: Sequence[Span], tokens: Sequence[int], wanted: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states and the tokens after them -> (states [T, hidden], logits [len(wanted), vocab_size])."""


@dataclass(frozen=True)
class Followed:
    """Tokens of a request whose main latents a step computed: the first, how many, their rows of its hidden states.

    fills: whether they fill a block, which others may find from now on. ahead: whether a draft after the last of them
    is wanted.
    """

    request: Request
    first: int
    count: int
    row: int
    fills: bool
    ahead: bool


@dataclass
class Waiting:
    """Hidden states [T, hidden] of a request's tokens from `first` to before `end`: the layer has not seen them yet."""

    first: int
    end: int
    parts: list[Tensor]

    def add(self, part: Followed, hidden_TE: Tensor) -> None:
        """A step's hidden states: those of `part` go behind the others, or take their place after a preemption."""
        if part.first != self.end:
            self.first, self.parts = part.first, []
        own = hidden_TE[part.row : part.row + part.count]
        self.parts.append(own if part.count == len(hidden_TE) else own.clone())  # else it keeps all of them alive
        self.end = part.first + part.count


@dataclass(frozen=True)
class Ahead:
    """The draft that continues a request of `length` tokens, and the state it came from."""

    length: int
    state_E: Tensor
    token: int


class MTPDrafter:
    """Keeps the MTP layer's latents up with the main ones, and at most one draft for each request."""

    def __init__(self) -> None:
        self._ahead: dict[int, Ahead] = {}
        self._waiting: dict[int, Waiting] = {}

    def ready(self, request: Request) -> bool:
        """Whether there is a draft for what the request is now."""
        ahead = self._ahead.get(request.id)
        return ahead is not None and ahead.length == len(request.tokens)

    def first(self, request: Request) -> int:
        """The first draft of a request that is ready."""
        return self._ahead[request.id].token

    def follow(self, runner: Predicts, hidden_TE: Tensor, parts: Sequence[Followed]) -> None:
        """Run the layer over what steps computed and accepted, where it cannot wait any longer."""
        for part in parts:
            self._waiting.setdefault(part.request.id, Waiting(part.first, part.first, [])).add(part, hidden_TE)
        due = [(part, self._waiting.pop(part.request.id)) for part in parts if part.fills or part.ahead]
        if not due:
            return
        tokens: list[int] = []
        last = []
        for part, waiting in due:
            following = part.request.tokens[waiting.first + 1 : waiting.end + 1]
            tokens += following + part.request.tokens[-1:] * (waiting.end - waiting.first - len(following))  # ended
            last.append(len(tokens) - 1)
        spans = [Span(part.request.blocks, one.first, one.end - one.first) for part, one in due]
        wanted = [row for (part, _), row in zip(due, last, strict=True) if part.ahead]
        states, logits = runner.predict(torch.cat([h for _, one in due for h in one.parts]), spans, tokens, wanted)
        best = logits.numpy().argmax(-1).tolist() if wanted else []
        asked = [part.request for part, _ in due if part.ahead]
        for request, row, token in zip(asked, wanted, best, strict=True):
            self._ahead[request.id] = Ahead(len(request.tokens), states[row].clone(), token)

    def drafts(self, runner: Predicts, wishes: Sequence[tuple[Request, int]]) -> list[tuple[int, ...]]:
        """So many drafts (1 or more) for each request, which is ready and has blocks for them."""
        drafts = [[self.first(request)] for request, _ in wishes]
        states = [self._ahead[request.id].state_E for request, _ in wishes]
        for depth in range(1, max((count for _, count in wishes), default=0)):
            going = [index for index, (_, count) in enumerate(wishes) if count > depth]
            spans = [Span(wishes[i][0].blocks, len(wishes[i][0].tokens) + depth - 2, 1) for i in going]
            hidden_TE = torch.stack([states[i] for i in going])
            out_TE, logits = runner.predict(hidden_TE, spans, [drafts[i][-1] for i in going], range(len(going)))
            for row, (index, token) in enumerate(zip(going, logits.numpy().argmax(-1).tolist(), strict=True)):
                states[index] = out_TE[row]
                drafts[index].append(token)
        return [tuple(one) for one in drafts]

    def forget(self, request: Request) -> None:
        """A request ended."""
        self._ahead.pop(request.id, None)
        self._waiting.pop(request.id, None)
