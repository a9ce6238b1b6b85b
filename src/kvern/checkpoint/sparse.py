"""Writes a checkpoint with the names, shapes and shards of a full model of which almost everything is a hole.

A file may be longer than what was written to it: the rest reads as zeros and takes no space on disk. So the 671B model,
689 GB of files, takes 0.3 GB and a few seconds, and yet every header, mapping and product is the real one. Seeded are
    all norms; the embedding and head rows of the given token ids;
    of one dense and one MoE layer every Linear up to 8 MB, every fifth block of 128 rows of the others, all scales;
    the gate of that MoE layer, such that it chooses among a known set of experts, and those experts.
Everywhere else weights and scales are zero, so a layer passes its input on unchanged. What it gives up: the holes cost
reading time like real weights, but say nothing about a real model's answers.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

from kvern.checkpoint.quantize import BLOCK, FP8
from kvern.checkpoint.reader import CONFIG_FILE, INDEX_FILE
from kvern.checkpoint.save import (
    PlacedShard,
    PlannedTensor,
    index_of,
    json_bytes,
    place_shards,
    planned_from_model,
    total_size,
    write_file,
)
from kvern.config import ModelConfig
from kvern.errors import CheckpointError
from kvern.model.transformer import Transformer

OFFICIAL_SHARDS = 163
SEEDED_BLOCK_EVERY = 5
"""Coprime to what heads are made of, so that every part of a head (nope, rope, values) is hit somewhere."""
SMALL_BYTES = 8 << 20

Part = tuple[int, bytes]
"""Bytes, and where they go within the tensor."""


@dataclass(frozen=True)
class Seeded:
    """What holds data. `experts` are the only ones that the gate of `moe_layer` can choose, whatever it is given."""

    token_ids: tuple[int, ...]
    dense_layer: int
    moe_layer: int
    experts: tuple[int, ...]


def write_sparse(
    dst: Path,
    config: ModelConfig,
    *,
    token_ids: Sequence[int],
    dense_layer: int = 0,
    moe_layer: int | None = None,
    shards: int = OFFICIAL_SHARDS,
    seed: int = 0,
) -> Seeded:
    """Write a sparse checkpoint of `config` into the new folder `dst`; its `seed` decides every byte.

    moe_layer: None means the first one. Raises CheckpointError when `dst` is not empty. The file system must know holes
    (ext4, xfs, btrfs, tmpfs do).
    """
    moe_layer = config.first_k_dense_replace if moe_layer is None else moe_layer
    if not config.is_moe(moe_layer) or config.is_moe(dense_layer):
        raise CheckpointError(f"layers {dense_layer} and {moe_layer} are not a dense and a MoE layer", file=dst)
    dst.mkdir(parents=True, exist_ok=True)
    if any(dst.iterdir()):
        raise CheckpointError("folder is not empty", file=dst)
    seeded = Seeded(tuple(token_ids), dense_layer, moe_layer, choosable_experts(config, seed))
    content = _Content(seeded, seed)
    planned = place_shards(dst, _split(planned_from_model(Transformer(config)), shards))
    for shard in planned:
        _write_shard(shard, content)
    write_file(dst / INDEX_FILE, json_bytes(index_of(planned)))
    write_file(dst / CONFIG_FILE, json_bytes(config.to_dict()))
    return seeded


def choosable_experts(config: ModelConfig, seed: int = 0) -> tuple[int, ...]:
    """Experts, equally many in each of one group more than are kept: enough that both limits of the choice bite."""
    assert config.n_routed_experts is not None
    size = config.n_routed_experts // config.n_group
    groups = min(config.n_group, config.topk_group + 1)
    each = min(size, max(2, -(-config.num_experts_per_tok // config.topk_group) + 1))
    draw = random.Random(seed)
    chosen = draw.sample(range(config.n_group), groups)
    return tuple(sorted(group * size + expert for group in chosen for expert in draw.sample(range(size), each)))


def disk_bytes(folder: Path) -> int:
    """Bytes that the files of a folder take on disk, holes not counted."""
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir())


def apparent_bytes(folder: Path) -> int:
    """Bytes that the files of a folder seem to have, holes counted."""
    return sum(file.stat().st_size for file in folder.iterdir())


def _split(tensors: Sequence[PlannedTensor], count: int) -> list[list[PlannedTensor]]:
    """`count` shards of about the same size, in order."""
    total, before = total_size(tensors), 0
    shards: list[list[PlannedTensor]] = [[] for _ in range(count)]
    for tensor in tensors:
        shards[min(count - 1, before * count // total)].append(tensor)
        before += tensor.nbytes
    return [shard for shard in shards if shard]


def _write_shard(shard: PlacedShard, content: _Content) -> None:
    with shard.path.open("wb") as stream:
        stream.write(shard.header)
        for tensor, offset in shard.tensors:
            for start, data in content.parts(tensor):
                stream.seek(offset + start)
                stream.write(data)
        stream.truncate(shard.nbytes)


class _Content:
    """The seeded bytes of each tensor, drawn by its name, so that they depend on no order."""

    def __init__(self, seeded: Seeded, seed: int) -> None:
        self.seeded, self.seed = seeded, seed
        layer = f"model.layers.{seeded.moe_layer}.mlp"
        self.gate = f"{layer}.gate.weight"
        self.gate_bias = f"{layer}.gate.e_score_correction_bias"
        self.unused = f"{layer}.experts."
        self.used = tuple(f"{layer}.experts.{expert}." for expert in seeded.experts)
        self.layers = tuple(f"model.layers.{number}." for number in (seeded.dense_layer, seeded.moe_layer))

    def parts(self, tensor: PlannedTensor) -> Iterator[Part]:
        """What `tensor` holds; nothing for a hole."""
        name, draw = tensor.name, np.random.default_rng([self.seed, zlib.crc32(tensor.name.encode())])
        if name.endswith("norm.weight"):
            yield 0, _bfloat16(1 + 0.1 * draw.standard_normal(tensor.shape))
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            yield from _rows(tensor, self.seeded.token_ids, draw, 1.0 if "embed" in name else tensor.shape[1] ** -0.5)
        elif name == self.gate:
            yield from _rows(tensor, self.seeded.experts, draw, 2 * tensor.shape[1] ** -0.5)
        elif name == self.gate_bias:
            yield 0, self._bias(tensor, draw)
        elif name.startswith(self.layers) and (name.startswith(self.used) or not name.startswith(self.unused)):
            yield from _linear(tensor, draw)

    def _bias(self, tensor: PlannedTensor, draw: np.random.Generator) -> bytes:
        """About 1 for the choosable experts: more than any score, which is below 1, can make up for."""
        bias = np.zeros(tensor.shape, np.float32)
        bias[list(self.seeded.experts)] = 1.5 + 0.1 * draw.uniform(-1, 1, len(self.seeded.experts))
        return bias.tobytes()


def _rows(tensor: PlannedTensor, rows: Sequence[int], draw: np.random.Generator, std: float) -> Iterator[Part]:
    width = tensor.shape[1]
    for row in sorted(rows):
        yield row * width * tensor.dtype.itemsize, _bfloat16(std * draw.standard_normal(width))


def _linear(tensor: PlannedTensor, draw: np.random.Generator) -> Iterator[Part]:
    """An FP8 weight of standard deviation about columns^-1/2, or its scales."""
    if tensor.dtype is torch.float32:
        scale = draw.uniform(0.5, 1.5, tensor.shape) / _TABLE_STD * (tensor.shape[1] * BLOCK) ** -0.5
        yield 0, scale.astype(np.float32).tobytes()
        return
    rows, columns = tensor.shape
    every = 1 if tensor.nbytes <= SMALL_BYTES else SEEDED_BLOCK_EVERY
    for first in range(every // 2 * BLOCK, rows, every * BLOCK):
        count = min(BLOCK, rows - first) * columns
        yield first * columns, _TABLE[np.frombuffer(draw.bytes(count), np.uint8)].tobytes()


def _bfloat16(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> bytes:
    return torch.from_numpy(values).bfloat16().view(torch.uint8).numpy().tobytes()


def _normal_table() -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], float]:
    """256 quantiles of a normal distribution as E4M3 bytes, the outermost near 448, and their standard deviation."""
    quantiles = torch.tensor([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])
    codes = (quantiles * (440 / quantiles.max())).to(FP8)
    return codes.view(torch.uint8).numpy(), float(codes.float().std())


_TABLE, _TABLE_STD = _normal_table()
