"""Two mixtures in one run: rows of the first up to a row's number, then rows of the second.

A row depends on its number alone, as the trainer wants it, so a run goes on after a kill as it would have gone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from kvern.data.row_stream import Row
from kvern.train.trainer import Rows


@dataclass(frozen=True)
class Phases:
    """`first` for the rows below `switch`, then `second` from its own row 0."""

    first: Rows
    second: Rows
    switch: int

    @property
    def fingerprint(self) -> str:
        """Names both mixtures and where they change."""
        text = f"{self.first.fingerprint} {self.second.fingerprint} {self.switch}"
        return hashlib.sha256(text.encode()).hexdigest()

    def row(self, index: int) -> Row:
        """Row `index`, from 0, without end."""
        return self.first.row(index) if index < self.switch else self.second.row(index - self.switch)
