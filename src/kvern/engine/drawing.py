"""The drawing of a request's next tokens from one computed chunk: one token, or as many as confirm its drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvern.engine.request import FinishReason
from kvern.engine.sampler import Sampled
from kvern.engine.scheduler import Chunk
from kvern.errors import KvernError


@dataclass
class Drawing:
    """A chunk, the rows of logits to draw from (of its last token and of each draft), and what was drawn so far.

    rows is empty for a chunk that leaves tokens to compute. finish and error: the end that the request met.
    """

    chunk: Chunk
    rows: Sequence[int] = ()
    finish: FinishReason | None = None
    error: KvernError | None = None
    drawn: list[Sampled] = field(default_factory=list)

    @property
    def confirmed(self) -> bool:
        """Whether the token drawn last is the draft at its place."""
        drafts, place = self.chunk.drafts, len(self.drawn) - 1
        return place < len(drafts) and drafts[place] == self.drawn[-1].token

    @property
    def count(self) -> int:
        """Tokens of the chunk that are the request's: its own, and the drafts that were confirmed."""
        return self.chunk.count + max(0, len(self.drawn) - 1)
