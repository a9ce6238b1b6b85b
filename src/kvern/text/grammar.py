"""Grammars over token ids: which ids may come next in an answer, with llguidance.

A grammar is text in llguidance's variant of Lark. It speaks of characters, and each id stands for the bytes that it
decodes to, so any way to cut a text into tokens is allowed. Control tokens (`<|im_end|>`, `<think>`) have no
characters: they come only where a grammar names one by its id. The end of an answer is no token of the grammar's; the
engine adds the ids that end it where the answer may end.

The vocabulary is arranged once, at the first grammar (a second for 152k ids). A compiled grammar is kept for as long as
it is among the last that were asked for. A mask costs 30 microseconds, or up to 2 ms at a place that is seen for the
first time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from kvern.errors import KvernError
from kvern.text.tokenizer import Tokenizer

KEPT = 128
"""Compiled grammars."""

LIMITS = llguidance.LLParserLimits(verbose_errors=False)


class GrammarStuckError(KvernError):
    """A grammar became too complex while an answer was written."""

    code = "grammar_too_complex"


class GrammarSyntaxError(ValueError):
    """What is wrong with a grammar, in a line."""


class TokenMatcher:
    """The state of one answer; see `engine.grammar.Matcher`."""

    def __init__(self, matcher: llguidance.LLMatcher, ids: int) -> None:
        self._matcher = matcher
        self._words: NDArray[np.uint32] = np.zeros(-(-(ids + 1) // 32), np.uint32)
        self._end = ids

    @property
    def may_end(self) -> bool:
        """Whether the answer is complete as it is."""
        return self._matcher.is_accepting()

    @property
    def is_done(self) -> bool:
        """Whether nothing may follow but the end."""
        return self._matcher.is_stopped()

    def mask(self) -> NDArray[np.uint32]:
        """The ids that may come next, a bit each; the last bit of all is not set."""
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._check()
        self._words[self._end // 32] &= np.uint32(~(1 << self._end % 32) & 0xFFFFFFFF)
        return self._words

    def allows(self, token: int) -> bool:
        """Whether this id may come next."""
        return self.fitting((token,)) == 1

    def fitting(self, tokens: Sequence[int]) -> int:
        """How many of these ids, from the first on, may come next one after the other."""
        known = next((index for index, token in enumerate(tokens) if token >= self._end), len(tokens))
        return self._matcher.validate_tokens(list(tokens[:known])) if known else 0

    def advance(self, token: int) -> None:
        """This id came. Raises GrammarStuckError where that can not be followed."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarStuckError(f"the answer's grammar can not go on: {in_a_line(self._matcher.get_error())}")


class CompiledGrammar:
    """A grammar over the ids of a vocabulary; see `engine.grammar.Grammar`. Threads may share it."""

    def __init__(self, matcher: llguidance.LLMatcher, ids: int) -> None:
        self._matcher, self._ids = matcher, ids

    def matcher(self) -> TokenMatcher:
        """A matcher at the beginning of an answer."""
        return TokenMatcher(self._matcher.deep_copy(), self._ids)


class Grammars:
    """Compiles grammars for the ids below `ids` of a tokenizer. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, ids: int) -> None:
        self._tokenizer, self._ids = tokenizer, ids
        self._lock = threading.Lock()
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._compiled = lru_cache(KEPT)(self._compile)

    def compile(self, grammar: str) -> CompiledGrammar:
        """A grammar, in Lark's syntax or as llguidance's JSON. Raises GrammarSyntaxError."""
        return self._compiled(grammar)

    def _compile(self, grammar: str) -> CompiledGrammar:
        matcher = llguidance.LLMatcher(self._arranged(), grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarSyntaxError(in_a_line(matcher.get_error()))
        compiled = CompiledGrammar(matcher, self._ids)
        start = compiled.matcher()
        if not start.mask().any():
            raise GrammarSyntaxError("it leaves nothing to write")
        return compiled

    def _arranged(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = llguidance.LLTokenizer(_Vocabulary(self._tokenizer, self._ids))  # type: ignore[arg-type]
            return self._vocabulary


class _Vocabulary:
    """A tokenizer as llguidance reads it: the bytes of all ids, and one more that stands for the end."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, ids: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = [*(tokenizer.token_bytes(token) for token in range(ids)), b"<end>"]
        self.eos_token_id = ids
        self.special_token_ids = [*(token for token in tokenizer.control.values() if token < ids), ids]

    def __call__(self, text: Any) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else bytes(text).decode(errors="replace"))


def syntax_error(grammar: str) -> str | None:
    """What is wrong with a grammar, whichever ids there are; None for nothing."""
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    return in_a_line(messages[0]) if failed else None


def in_a_line(message: str) -> str:
    """What a message of llguidance's says, without its drawing of the place."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "")
    return telling.removeprefix("error: ")[:300]
