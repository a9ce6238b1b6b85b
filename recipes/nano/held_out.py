"""Bits per byte on files that were never trained on, whatever the tokenizer.

    bits per byte = sum over tokens of -log2 p(token | before) / bytes of the text

Every token of a text is predicted, the first one from the start token; the end of the text is not. A window is as long
as the model's; the next one begins half a window later and counts its second half, so all but the first tokens see half
a window or more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from kvern.llm.opening import open_model
from kvern.model import ForwardBatch, Model
from kvern.text.tokenizer import Tokenizer
from recipes.nano.corpus import Document


@dataclass(frozen=True)
class Cost:
    """Of one kind of document."""

    kind: str
    files: int
    bytes: int
    tokens: int
    nats: float

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def cost_of(folder: Path, documents: Iterable[Document], window: int, *, most: int | None = None) -> list[Cost]:
    """By kind; `most`: stop after so many bytes of a kind. Reads any checkpoint folder."""
    tokenizer, model = Tokenizer.load(folder), open_model(folder)
    sums: dict[str, Cost] = {}
    for document in documents:
        so_far = sums.get(document.kind, Cost(document.kind, 0, 0, 0, 0.0))
        if most is not None and so_far.bytes >= most:
            continue
        tokens = tokenizer.encode(document.text)
        nats = _nats(model, [*_start(tokenizer), *tokens], window)
        size = so_far.bytes + len(document.text.encode())
        sums[document.kind] = Cost(
            document.kind, so_far.files + 1, size, so_far.tokens + len(tokens), so_far.nats + nats
        )
    return list(sums.values())


@torch.inference_mode()
def _nats(model: Model, tokens: list[int], window: int) -> float:
    total = 0.0
    for first, counted in windows(len(tokens), window):
        part = tokens[first : first + window]
        logits = model(ForwardBatch.of(part)).float()[counted - 1 : len(part) - 1]
        total += float(F.cross_entropy(logits, torch.tensor(part[counted:]), reduction="sum"))
    return total


def windows(count: int, window: int) -> Iterator[tuple[int, int]]:
    """(where a window begins, from which of its tokens on they count): every token but the first counts once."""
    yield 0, 1
    first, half = 0, window // 2
    while first + window < count:
        first += half
        yield first, window - half


def _start(tokenizer: Tokenizer) -> list[int]:
    """What texts begin with; a tokenizer without a start token leaves the first token out."""
    return [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
