"""Patterns over text that is still arriving: a match, none, or "cannot say yet".

A pattern is a sequence of parts, each of which takes as much as it can; nothing is tried twice. So the answer depends
on the text alone and never on how it was cut into pieces. Python's `re` cannot tell a mismatch from a text that ends
too early.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

SPACES = re.compile(r"\s*")
WORD = re.compile(r"[A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Lit:
    """Exactly this text."""

    text: str


@dataclass(frozen=True)
class Maybe:
    """This text or nothing."""

    text: str


@dataclass(frozen=True)
class Space:
    """White space, or none."""


@dataclass(frozen=True)
class Word:
    """A name: letters, digits, `_`, `.` and `-`, at least one. `among`: it must be one of these, if there are any."""

    among: tuple[str, ...] = ()


Part: TypeAlias = Lit | Maybe | Space | Word
Partial: TypeAlias = Literal["partial"]


@dataclass(frozen=True)
class Match:
    """`end`: where it ends; `words`: what its Words took."""

    end: int
    words: tuple[str, ...]


def match(parts: Sequence[Part], text: str, start: int = 0, *, final: bool = False) -> Match | Partial | None:
    """Match `text` from `start` on. `final`: no more text will come, so the answer is never "partial"."""
    at, words = start, []
    for part in parts:
        end = _end(part, text, at, final)
        if end is None or end == "partial":
            return end
        if isinstance(part, Word):
            words.append(text[at:end])
            if part.among and words[-1] not in part.among:
                return None
        at = end
    return Match(at, tuple(words))


def _end(part: Part, text: str, at: int, final: bool) -> int | Partial | None:
    if isinstance(part, Lit | Maybe):
        if text.startswith(part.text, at):
            return at + len(part.text)
        if not final and part.text.startswith(text[at:]):
            return "partial"
        return at if isinstance(part, Maybe) else None
    found = (SPACES if isinstance(part, Space) else WORD).match(text, at)
    end = found.end() if found else at
    if end == len(text) and not final:
        return "partial"
    return None if isinstance(part, Word) and end == at else end
