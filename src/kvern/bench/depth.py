"""Reaches a depth without computing it: sequences enter the prefix cache with random latents.

The engine runs the prompts as always, chunks, blocks, hashes and all; only the model's layers are exchanged meanwhile
for ones that store random rows and compute nothing. A later request with the same prompt finds them as its cached
prefix and attends over them at full cost: attention takes the same time whatever the rows hold. What it gives up:
answers that mean anything, and a choice of experts as real text would make it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kvern.engine import Engine, SamplingParams
from kvern.engine.cache import stored_rows
from kvern.model import ForwardBatch, Model, PackedTransformer
from kvern.model.packed import PackedStep


class RandomLatents(nn.Module):
    """Stands for a decoder layer: stores rows of a normal distribution for the batch's tokens, returns x as it came."""

    def __init__(self, layer: int, rows_RD: Tensor) -> None:
        super().__init__()
        self.layer, self.rows_RD = layer, rows_RD

    def forward(self, x_TE: Tensor, rotation_TF: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> x."""
        assert batch.cache is not None
        batch.cache.extend(self.layer, self.rows_RD[self.layer : self.layer + len(x_TE)])
        return x_TE


class RandomRows:
    """Stands for packed layers: stores such rows for the batch's tokens, and x stays as it came."""

    def __init__(self, rank: int, rows_RD: Tensor) -> None:
        self.rank, self.rows_RD = rank, rows_RD

    def __call__(self, step: PackedStep, first: int, count: int) -> None:
        """Only the rows of the step's tokens are written."""
        for layer in range(first, first + count):
            rows, random = step.pages.rows[layer], self.rows_RD[layer : layer + len(step.slots)]
            rows.index_copy_(0, step.slots, stored_rows(random, self.rank, rows.dtype))


def fill(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    """Put the whole blocks of each prompt into the prefix cache, with random latents. The engine must be idle."""
    with random_latents(engine.model, engine.settings.step_tokens):
        for prompt in prompts:
            engine.add(prompt, SamplingParams(max_tokens=1, ignore_eos=True))
        while engine.has_work():
            engine.step()


@contextmanager
def random_latents(model: Model, most_tokens: int) -> Iterator[None]:
    """Exchange the layers within the block for such that store rows; for passes of at most so many tokens."""
    config = model.config
    count = config.num_hidden_layers + config.num_nextn_predict_layers
    generator = torch.Generator().manual_seed(0)
    rows_RD = torch.randn(most_tokens + count, config.latent_dim, generator=generator).to(model.activation_dtype)
    if isinstance(model, PackedTransformer):
        packed_layers, model.layers = model.layers, RandomRows(config.kv_lora_rank, rows_RD)
        try:
            yield
        finally:
            model.layers = packed_layers
        return
    layers = model.model.layers
    model.model.layers = nn.ModuleList(RandomLatents(layer, rows_RD) for layer in range(len(layers)))
    try:
        yield
    finally:
        model.model.layers = layers
