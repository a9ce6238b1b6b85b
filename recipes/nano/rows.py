"""Rows of chat, as a file of training data holds them, and what all generators share.

A row is drawn with a generator seeded by its own key, so it does not depend on which other rows there are.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]

SEED = 0
LONGEST = 4000
"""Characters of a row's JSON: never more than 2048 tokens, the length of a packed row."""


def seeded(*key: object) -> random.Random:
    """A generator of this key's own."""
    return random.Random(":".join(map(str, (SEED, *key))))


def chat(*turns: str) -> Row:
    """A row of user and assistant turns, in turn, the user's first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)]}


def fenced(code: str) -> str:
    """Python as chats show it."""
    return f"```python\n{code.rstrip()}\n```"


def listed(names: Sequence[str]) -> str:
    """`a`, `b` and `c`."""
    quoted = [f"`{name}`" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def write(rows: Iterable[Row], path: Path) -> int:
    """Write JSONL, a row a line, without those that are too long; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False)
            if len(line) > LONGEST:
                continue
            stream.write(line + "\n")
            count += 1
    return count
