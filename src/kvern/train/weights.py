"""The first values of a model that trains, written where each rank holds them: drawn, or read from a checkpoint.

A model is built on the meta device, cut over the ranks, and only then given memory, so no rank ever holds more than its
share and one matrix. A number depends on the seed, its tensor's name in the checkpoint and its row alone: blocks of
`DRAWN` rows are drawn each from a generator of its own (Philox, keyed by a hash), so any world, and any grouping of
experts, begins with the same bits.

What it gives up: a rank draws whole blocks and keeps its rows of them, and unpacks whole matrices of 4-bit groups.
Source: DeepSeek-V3 technical report, section 4.2 (N(0, 0.006) for all weights).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kvern import ops
from kvern.model import Transformer
from kvern.model.linear import Linear, RMSNorm
from kvern.ops.reference import BLOCK
from kvern.train.experts import GATE_UP, GroupedExperts

INITIAL_STD = 0.006
"""The report's standard deviation of all weights, whatever config.json's initializer_range says."""

DRAWN = 128
"""Rows that one generator draws."""

GATE_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor of the checkpoint that this rank holds: `values` are rows `first`, `first` + 1, .. of `name`."""

    name: str
    first: int
    values: Tensor


def pieces(model: Transformer) -> Iterator[Piece]:
    """Every parameter of a trainable model that is in this rank's memory, under the checkpoint's names."""
    for name, parameter in model.named_parameters():
        values, offset = _local(parameter.detach())
        stem, _, stack = name.rpartition(".")
        if not isinstance(model.get_submodule(stem), GroupedExperts):
            yield Piece(name, offset[0], values)
            continue
        projections = ("gate_proj", "up_proj") if stack == GATE_UP else (stack,)
        size = parameter.shape[1] // len(projections)
        for expert, rows in enumerate(values, offset[0]):
            for index, projection in enumerate(projections):
                begin, end = max(offset[1], index * size), min(offset[1] + len(rows), (index + 1) * size)
                if begin < end:
                    held = rows[begin - offset[1] : end - offset[1]]
                    yield Piece(f"{stem}.{expert}.{projection}.weight", begin - index * size, held)


@torch.no_grad()
def initialise(model: Transformer, seed: int, std: float = INITIAL_STD) -> None:
    """Fresh weights: N(0, std), norms 1, biases 0."""
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    for piece in pieces(model):
        if piece.name in norms:
            piece.values.fill_(1.0)
        elif piece.name.endswith(".bias"):
            piece.values.zero_()
        else:
            _draw(piece, seed, std)
    for name, buffer in model.named_buffers():
        if name.endswith(GATE_BIAS):
            buffer.zero_()


@torch.no_grad()
def fill(model: Transformer, stored: Transformer) -> None:
    """The weights of `stored`, in whatever form it has them, as float32; both have one architecture."""
    for piece in pieces(model):
        piece.values.copy_(_stored_rows(stored, piece))
    for name, buffer in model.named_buffers():
        if name.endswith(GATE_BIAS):
            buffer.copy_(stored.get_buffer(name))


def _stored_rows(stored: Transformer, piece: Piece) -> Tensor:
    """The rows of `piece` in float32, or what is cast to it without loss; out of FP8 block by block."""
    stem, _, last = piece.name.rpartition(".")
    module, end = stored.get_submodule(stem), piece.first + len(piece.values)
    if isinstance(module, Linear) and last == "weight":
        if module.weight is None:
            return module.dense(torch.float32)[piece.first : end]
        if module.weight_scale_inv is not None:
            block = piece.first // BLOCK
            scale = module.weight_scale_inv[block : -(-end // BLOCK)]
            return ops.dequantize(module.weight[block * BLOCK : end], scale)[piece.first - block * BLOCK :]
    return stored.get_parameter(piece.name)[piece.first : end]


def _draw(piece: Piece, seed: int, std: float) -> None:
    rows, columns = len(piece.values), piece.values[0].numel() if len(piece.values) else 0
    for block in range(piece.first // DRAWN, -(-(piece.first + rows) // DRAWN) if rows else 0):
        key = hashlib.sha256(f"{seed} {piece.name} {block}".encode()).digest()[:16]
        generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))
        begin, end = max(piece.first, block * DRAWN), min(piece.first + rows, (block + 1) * DRAWN)
        drawn = generator.standard_normal((end - block * DRAWN, columns), dtype=np.float32)
        piece.values[begin - piece.first : end - piece.first] = torch.from_numpy(drawn[begin - block * DRAWN :]) * std


def _local(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What this rank holds of a tensor, and where in it that begins."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)
