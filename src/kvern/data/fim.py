"""Fill-in-the-middle: some texts are cut in three, and the middle comes last.

    [begin] prefix [hole] suffix [end] middle [end of text]        (PSM, as DeepSeek-V3 was trained: rate 0.1)

Whether a text is rearranged and where it is cut, at two characters, follows from its own hash: the same in every epoch
and on every machine, whatever else is trained on. Source: DeepSeek-V3 technical report, 4.1.
"""

from __future__ import annotations

import hashlib

WORD = 1 << 64


def cut(text: str, rate: float) -> tuple[str, str, str] | None:
    """(prefix, middle, suffix), which together are `text`; None for a text that stays as it is."""
    digest = hashlib.blake2b(text.encode(), digest_size=24, person=b"kvern fim").digest()
    chosen, first, second = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8, 16))
    if chosen >= rate * WORD:
        return None
    begin, end = sorted((first % (len(text) + 1), second % (len(text) + 1)))
    return text[:begin], text[begin:end], text[end:]
