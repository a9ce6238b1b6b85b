"""Calls that a model wrote without any markup: JSON objects, perhaps fenced, at the end of an answer.

Small models often forget their markup, and Llama 3 has none. So an object that begins a line and starts like a call is
held back until it is clear what it is: a call if it names a known tool and nothing but such objects follows, else text.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from kvern.text.formats import BARE_HEAD, read_object
from kvern.text.json_object import ObjectScanner
from kvern.text.patterns import Lit, Match, Maybe, Partial, Space, match

BEGIN = re.compile(r"^[ \t]*(?:\{|```)", re.MULTILINE)
FENCE = "```"


def find_begin(text: str, at_line_start: bool) -> int | None:
    """Where the first line begins that might be a call; `at_line_start`: whether `text` begins a line."""
    return next((found.start() for found in BEGIN.finditer(text) if found.start() or at_line_start), None)


def read_bare_calls(text: str, tools: Collection[str], *, final: bool) -> list[tuple[str, str]] | Partial | None:
    """Names and arguments of the calls that `text` consists of; None if it is something else."""
    calls, at = [], 0
    while at < len(text):
        end = _object_end(text, at, final)
        if end is None or end == "partial":
            return end
        call = read_object(text[at:end])
        if call is None or call[0] not in tools:
            return None
        calls.append(call)
        at = end
    return calls if final else "partial"


def _object_end(text: str, at: int, final: bool) -> int | Partial | None:
    """The end of an object with its fence and the space behind it."""
    fence = match((Space(), Lit(FENCE), Maybe("json"), Space()), text, at, final=final)
    start = fence.end if isinstance(fence, Match) else at
    head = fence if fence == "partial" else match(BARE_HEAD, text, start, final=final)
    if not isinstance(head, Match):
        return head
    taken, ending = ObjectScanner().scan(text[start:])
    if ending is None:
        return None if final else "partial"
    closing = (Space(), Lit(FENCE), Space()) if start > at else (Space(),)
    behind = match(closing, text, start + taken, final=final)
    return behind.end if isinstance(behind, Match) else behind
