"""Texts for fill-in-the-middle: pieces of modules, short enough for a packed row, cut between lines.

The trainer's data side rearranges each of them (rate 1). Whole files would not do: most are many rows long, and a row
that shows a gap without its prefix or suffix teaches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from recipes.nano.corpus import Document
from recipes.nano.rows import Row, seeded

SIZES = (400, 2800)
"""Characters of a piece, at least and at most, about."""

SHARE = 0.5
"""Of the pieces that are taken."""


def gap_rows(documents: Iterable[Document]) -> Iterator[Row]:
    """Rows of text from the library's modules."""
    for document in documents:
        if document.kind == "library":
            for number, piece in enumerate(pieces(document)):
                if seeded("gap", document.path, number).random() < SHARE:
                    yield {"text": piece}


def pieces(document: Document) -> Iterator[str]:
    """The module in pieces that begin where a statement at the margin, or a method, does."""
    rng, held = seeded("pieces", document.path), ""
    limit = rng.randint(*SIZES)
    for block in re.split(r"(?m)^(?=(?:    )?(?:def|class|async def)\b|@)", document.text):
        if held and len(held) + len(block) > limit:
            if SIZES[0] <= len(held) <= 2 * SIZES[1]:
                yield held
            held, limit = "", rng.randint(*SIZES)
        held += block
    if SIZES[0] <= len(held) <= SIZES[1]:
        yield held
