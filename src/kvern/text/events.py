"""What an answer consists of, whichever markup the model writes it in.

    Reasoning*  Content*  (CallStart CallArguments* CallEnd)*    in the order in which the model wrote them

An answer may have text before, between and after its calls. The pieces of one kind, joined, are the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from kvern.text.messages import FinishReason, ScoredToken


@dataclass(frozen=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text that the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A tool call begins; `index` counts the calls of an answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A part of a call's arguments, JSON text as the model wrote it."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """A call ends: complete, or cut with the answer. Every call that starts has an end."""

    index: int


Event: TypeAlias = Content | Reasoning | CallStart | CallArguments | CallEnd


@dataclass(frozen=True)
class Piece:
    """What one update showed. The last piece carries the finish reason; it can come before the engine's own end.

    `text` is what the model wrote, `events` what that means; either may be empty while the other is not.
    `token_ids` counts every generated token, the stopping one included. `cached_tokens` and `prompt_scores` are in the
    first piece that has a token. `stopped_by`: the stop string that ended the answer, where one did.
    `reasoning_tokens`: how many of the tokens belong to the reasoning.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    scores: tuple[ScoredToken, ...] = ()
    cached_tokens: int = 0
    prompt_scores: tuple[ScoredToken, ...] = ()
    events: tuple[Event, ...] = ()
    stopped_by: str | None = None
    reasoning_tokens: int = 0
