"""Turns the engine's updates of one request into pieces: whole characters, cut at stop strings, and what they mean.

The parser reads what the stop strings let through, so these also apply to reasoning and to calls.

Text that may become part of a stop string is held back, and so are the scores of the tokens it came from: a scored
token leaves with the text in which it begins. A token that lies wholly in a stop string never leaves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from kvern.engine.request import TokenLogprob, Update
from kvern.errors import KvernError
from kvern.llm.prepare import Prepared
from kvern.text.detokenizer import Detokenizer
from kvern.text.events import Event, Piece
from kvern.text.messages import FinishReason, ScoredToken, TokenScore
from kvern.text.parser import AnswerParser
from kvern.text.stop import StopMatcher
from kvern.text.tokenizer import Tokenizer


class TextStream:
    """The text of one request, update by update."""

    def __init__(self, tokenizer: Tokenizer, prepared: Prepared) -> None:
        self._tokenizer = tokenizer
        self._prepared = prepared
        self._detokenizer = Detokenizer(tokenizer, prepared.parsing.format.markup)
        self._parser = AnswerParser(prepared.parsing)
        self._matcher = StopMatcher(prepared.stop)
        self._drawn = 0
        self._decoded = 0  # characters that left the detokenizer
        self._shown = 0  # characters that left this stream
        self._held: deque[ScoredToken] = deque()

    def push(self, update: Update) -> Piece:
        """Take an update; raises its error. After a piece with a finish reason there is nothing more to push."""
        if update.error is not None:
            raise update.error
        if update.finish in ("cancelled", "error"):
            raise KvernError(f"the request ended: {update.finish}")
        text, ids, events, reasoning = self._read(update)
        reason: FinishReason | None = "stop" if self._matcher.matched is not None or self._parser.done else None
        if reason is None and (update.finish == "stop" or update.finish == "length"):
            rest = self._match(self._decode_rest()) + self._matcher.finish()
            text, events = text + rest, events + self._parse(rest)
            reason = "stop" if self._matcher.matched else update.finish
        if reason is not None:
            events += () if self._parser.done else self._parser.finish()
            reason = "tool_calls" if reason == "stop" and self._parser.calls else reason
        return Piece(
            text,
            ids,
            reason,
            self._release(text, reason),
            update.cached_tokens,
            self._prompt_scores(update),
            events,
            self._matcher.matched,
            reasoning,
        )

    def _read(self, update: Update) -> tuple[str, tuple[int, ...], tuple[Event, ...], int]:
        """The text that became certain, the ids that were read, the events, how many tokens belong to reasoning."""
        text, events, reasoning = "", self._parse(""), 0
        for index, token in enumerate(update.tokens):
            last = index == len(update.tokens) - 1
            ends = last and update.finish == "stop" and token in self._prepared.params.stop_token_ids
            if index < len(update.logprobs):
                self._held.append(self._scored(update.logprobs[index], self._decoded, ends))
            self._drawn += 1
            if not ends:
                shown = self._match(self._decode(token))
                text, events = text + shown, events + self._parse(shown)
                reasoning += self._parser.reasons
            if self._matcher.matched is not None or self._parser.done:
                return text, update.tokens[: index + 1], events, reasoning
        return text, update.tokens, events, reasoning

    def _parse(self, text: str) -> tuple[Event, ...]:
        return () if self._parser.done else self._parser.push(text)

    def _decode(self, token: int) -> str:
        text = self._detokenizer.push(token)
        self._decoded += len(text)
        return text

    def _decode_rest(self) -> str:
        text = self._detokenizer.finish()
        self._decoded += len(text)
        return text

    def _match(self, text: str) -> str:
        """Stop strings count from `min_tokens` on."""
        return text if self._drawn < self._prepared.params.min_tokens else self._matcher.push(text)

    def _release(self, text: str, reason: FinishReason | None) -> tuple[ScoredToken, ...]:
        self._shown += len(text)
        whole = reason is not None and not self._matcher.matched
        released = []
        while self._held and (whole or self._held[0].offset < self._shown):
            released.append(self._held.popleft())
        return tuple(released)

    def _prompt_scores(self, update: Update) -> tuple[ScoredToken, ...]:
        return tuple(self._scored_prompt(update)) if update.prompt_logprobs else ()

    def _scored_prompt(self, update: Update) -> Iterator[ScoredToken]:
        detokenizer, offset = Detokenizer(self._tokenizer), 0
        for token, score in zip(self._prepared.prompt, update.prompt_logprobs, strict=True):
            if score is None:
                first = self._score(token, None)
                yield ScoredToken(first.text, first.raw, None, (), offset)
            else:
                yield self._scored(score, offset, False)
            offset += len(detokenizer.push(token))

    def _scored(self, score: TokenLogprob, offset: int, ends: bool) -> ScoredToken:
        own, top = self._score(score.token, score.logprob), tuple(self._score(*best) for best in score.top)
        return ScoredToken(own.text, own.raw, own.logprob, top, offset, ends)

    def _score(self, token: int, logprob: float | None) -> TokenScore:
        raw = self._tokenizer.token_bytes(token)
        return TokenScore(raw.decode(errors="replace"), raw, logprob)
