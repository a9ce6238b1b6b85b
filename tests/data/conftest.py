"""Documents in memory, and what a file of them must give back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class InMemory:
    """Documents as lists of ids; `marks`: what is learned of each, for all or none of them."""

    documents: Sequence[Sequence[int]]
    marks: Sequence[Sequence[bool]] | None = None
    digest: str = "in memory"
    utf8_bytes: int = 0

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(document) for document in self.documents], dtype=np.int64)

    def read(self, document: int, begin: int, end: int) -> tuple[NDArray[np.integer], NDArray[np.bool_] | None]:
        ids = np.array(self.documents[document][begin:end], dtype=np.uint16)
        return ids, None if self.marks is None else np.array(self.marks[document][begin:end], dtype=np.bool_)

    def origin(self, document: int) -> str:
        return f"memory:{document}"
