"""From a typed request to an answer: the engine requests behind it, their text as it comes, one body or events.

A request has `n` choices for each of its prompts; choice `index` belongs to prompt `index // n`.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from typing import Protocol

from kvern.errors import KvernError
from kvern.llm import LLM, Piece, Prepared, TextStream, collect
from kvern.server.generate import Answer
from kvern.text.messages import Completion
from kvern.wire import chat, completions
from kvern.wire.answers import Usage
from kvern.wire.stream import Head

log = logging.getLogger(__name__)


def spread(prepared: Sequence[Prepared], n: int) -> list[Prepared]:
    """Each request `n` times. Where there is a seed, choice i gets seed + i, or all would be the same."""
    return [_seeded(one, choice) for one in prepared for choice in range(n)]


def _seeded(prepared: Prepared, choice: int) -> Prepared:
    seed = prepared.params.seed
    if seed is None or choice == 0:
        return prepared
    wrapped = (seed + choice + 2**63) % 2**64 - 2**63
    return replace(prepared, params=replace(prepared.params, seed=wrapped))


class Pieces:
    """The text of all choices, as lists of (index, piece); and, at the end, the usage.

    A list is empty where nothing came for `patience` seconds.
    """

    def __init__(self, llm: LLM, answer: Answer, requests: Sequence[Prepared], n: int, patience: float) -> None:
        self._answer = answer
        self._requests = requests
        self._n = n
        self.patience = patience
        self._streams: list[TextStream | None] = [TextStream(llm.tokenizer, request) for request in requests]
        self._tokens = 0
        self._cached = 0
        self._reasoning = 0

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """What each wake-up brings, for as long as anything runs. Raises what ended the answer early."""
        async for updates in self._answer.batches(self.patience):
            pieces: list[tuple[int, Piece]] = []
            for index, update in updates:
                stream = self._streams[index]
                if stream is not None:  # else a stop string ended it already
                    pieces.append((index, self._count(index, stream.push(update))))
            yield pieces

    def usage(self) -> Usage:
        """Each prompt is counted once, whatever `n`; its cached tokens are those of its first choice."""
        prompts = sum(len(request.prompt) for request in self._requests[:: self._n])
        return Usage.of(prompts, self._tokens, self._cached, self._reasoning)

    def _count(self, index: int, piece: Piece) -> Piece:
        self._tokens += len(piece.token_ids)
        self._reasoning += piece.reasoning_tokens
        if index % self._n == 0:
            self._cached += piece.cached_tokens
        if piece.finish_reason is not None:
            self._streams[index] = None
            self._answer.end(index)
        return piece


async def whole(pieces: Pieces, requests: Sequence[Prepared]) -> list[Completion]:
    """Wait for all choices."""
    parts: list[list[Piece]] = [[] for _ in requests]
    async for batch in pieces:
        for index, piece in batch:
            parts[index].append(piece)
    return [collect(part, len(request.prompt)) for part, request in zip(parts, requests, strict=True)]


class Stream(Protocol):
    """Builds the events of an answer, in the words of one dialect."""

    def start(self, index: int) -> bytes:
        """The first events of a choice."""

    def piece(self, index: int, piece: Piece) -> bytes:
        """The events of a piece; nothing for an empty one."""

    def finish(self, usage: Usage) -> bytes:
        """The last events."""

    def keep_alive(self) -> bytes:
        """What is sent where nothing else is."""

    def error(self, error: KvernError) -> bytes:
        """What ends a stream that failed."""


async def events(pieces: Pieces, stream: Stream, choices: int) -> AsyncGenerator[bytes]:
    """The answer as events; those that are ready together leave as one, and a comment where there are none for long."""
    if start := b"".join(stream.start(index) for index in range(choices)):
        yield start
    sent = time.monotonic()
    try:
        async for batch in pieces:
            if ready := b"".join(stream.piece(index, piece) for index, piece in batch):
                yield ready
                sent = time.monotonic()
            elif time.monotonic() - sent >= pieces.patience:
                yield stream.keep_alive()
                sent = time.monotonic()
        yield stream.finish(pieces.usage())
    except KvernError as error:
        yield stream.error(error)
    except Exception:
        log.exception("an answer failed")
        yield stream.error(KvernError("the answer failed inside the server"))


def head(llm: LLM, prefix: str, name: str) -> Head:
    """Id, time and names of a new answer; `name` is the model's as the client said it, which may be an alias."""
    return Head(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), name, llm.fingerprint)


def chat_body(head: Head, answers: Sequence[Completion], usage: Usage, logprobs: bool) -> chat.ChatCompletion:
    """A chat answer as one body."""
    choices = [
        chat.Choice(
            index=index,
            message=chat.AnswerMessage.of(answer),
            logprobs=chat.ChoiceLogprobs.of(answer.scores) if logprobs else None,
            finish_reason=answer.finish_reason,
        )
        for index, answer in enumerate(answers)
    ]
    return chat.ChatCompletion(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=choices,
        usage=usage,
        system_fingerprint=head.system_fingerprint,
    )


def completion_body(
    head: Head, answers: Sequence[Completion], usage: Usage, logprobs: bool, prompts: Sequence[str]
) -> completions.Completion:
    """A completion as one body; `prompts` is what each choice's text begins with ("" without echo)."""
    choices = [
        completions.CompletionChoice(
            index=index,
            text=prompt + answer.text,
            logprobs=_legacy_logprobs(answer, len(prompt)) if logprobs else None,
            finish_reason=answer.finish_reason,
        )
        for index, (answer, prompt) in enumerate(zip(answers, prompts, strict=True))
    ]
    return completions.Completion(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=choices,
        usage=usage,
        system_fingerprint=head.system_fingerprint,
    )


def _legacy_logprobs(answer: Completion, offset: int) -> completions.CompletionLogprobs:
    shifted = tuple(replace(score, offset=score.offset + offset) for score in answer.scores)
    return completions.CompletionLogprobs.of((*answer.prompt_scores, *shifted), 0)
