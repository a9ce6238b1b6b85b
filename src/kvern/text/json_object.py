"""Finds the end of a JSON object in text that is still arriving.

Only strings and brackets are looked at. Whether what stands between is valid JSON is not judged: models write line
breaks into strings, and their readers forgive that.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

Ending: TypeAlias = Literal["object", "stop"] | None


class ObjectScanner:
    """Scans one object, which begins with `{`. `stop`: a text that ends it early, within strings only if `anywhere`."""

    def __init__(self, stop: str = "", anywhere: bool = False) -> None:
        self._stop = stop
        self._anywhere = anywhere
        self._depth = 0
        self._quoted = False
        self._escaped = False

    def scan(self, text: str, *, final: bool = False) -> tuple[int, Ending]:
        """Go on with `text`. Returns how much of it belongs to the object for certain, and what ended the object.

        What is not taken has to be given again, with more behind it. `final`: there will be no more.
        """
        for at, character in enumerate(text):
            if self._stop and character == self._stop[0] and (self._anywhere or not self._quoted):
                if text.startswith(self._stop, at):
                    return at, "stop"
                if self._stop.startswith(text[at:]) and not final:
                    return at, None
            if self._take(character):
                return at + 1, "object"
        return len(text), None

    def _take(self, character: str) -> bool:
        """Go on by one character; true after the last one of the object."""
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped = character == "\\"
            self._quoted = character != '"'
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth <= 0
        return False
