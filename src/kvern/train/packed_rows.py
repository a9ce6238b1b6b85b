"""What a micro-batch of packed rows teaches: which token each token predicts, and the same one token further on.

Documents in a row are sequences of a `ForwardBatch`: attention never leaves them, and neither do targets. At MTP's
depth k token i meets the embedding of token i + k, so each depth drops every document's last state and first token:

    depth 0   states a b c | d e     tokens a b c | d e     targets b c . | e .
    depth 1   states a b   | d       tokens b c   | e       targets c .   | .

Source: DeepSeek-V3 technical report, eq. 21-25.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kvern.errors import ConfigError
from kvern.model import ForwardBatch, MLAForm

IGNORED = -100
"""The target of a token that predicts nothing."""


@dataclass(frozen=True)
class PackedRows:
    """T tokens to train on.

    batch: the documents as its sequences, without a cache. learned [T] bool: tokens that are to be predicted (None:
    all; in chats, the answers). rows: offsets where packed rows begin and end.
    """

    batch: ForwardBatch
    learned: Tensor | None
    rows: tuple[int, ...]

    @classmethod
    def of(cls, *documents: list[int], learned: list[bool] | None = None) -> PackedRows:
        """One row of documents, each of them from position 0. ConfigError for none, or an empty one."""
        if not documents or not all(documents):
            raise ConfigError("a row to train on has no document, or an empty one")
        batch = ForwardBatch.of(*documents, form=MLAForm.EXPANDED)
        if learned is not None and len(learned) != len(batch.tokens):
            raise ConfigError(f"a row has {len(batch.tokens)} tokens and {len(learned)} marks of what is learned")
        marks = None if learned is None else torch.tensor(learned)
        return cls(batch, marks, (0, len(batch.tokens)))

    def targets(self) -> Tensor:
        """[T] int64: the next token of the same document where that is to be learned, else IGNORED."""
        targets = self.batch.tokens.roll(-1)
        if self.learned is not None:
            targets = targets.masked_fill(~self.learned.roll(-1), IGNORED)
        return targets.masked_fill(self._at(self._ends()), IGNORED)

    def shifted(self) -> tuple[PackedRows, Tensor] | None:
        """(The rows one token on, [T] bool: which states meet them); None where no document has two tokens."""
        starts = self.batch.query_starts
        kept, followers = ~self._at(self._ends()), ~self._at(list(starts[:-1]))
        lengths = [last - first - 1 for first, last in pairwise(starts) if last - first > 1]
        if not lengths:
            return None
        batch = ForwardBatch(
            self.batch.tokens[followers],
            self.batch.places[kept],
            tuple(accumulate(lengths, initial=0)),
            form=self.batch.form,
        )
        learned = None if self.learned is None else self.learned[followers]
        return PackedRows(batch, learned, tuple(int(kept[:offset].sum()) for offset in self.rows)), kept

    def _ends(self) -> list[int]:
        return [last - 1 for last in self.batch.query_starts[1:]]

    def _at(self, places: list[int]) -> Tensor:
        """[T] bool, true at `places`."""
        marks = torch.zeros(len(self.batch.tokens), dtype=torch.bool, device=self.batch.tokens.device)
        marks[places] = True
        return marks
