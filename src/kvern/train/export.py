"""Writes what was trained in the official layout: FP8 with block scales, BF16 or F32, shard by shard, MTP included.

The names, shapes and dtypes are those of a `Transformer` of the target configuration, which for DeepSeek-V3 is the
released checkpoint's, 91,991 tensors: Linears in E4M3 with 128x128 scales, the gate's bias F32, the rest BF16. Stacked
experts come out one by one, MTP's embedding and head as copies of the model's, an import's rows times its delta again.
A weight that the run began from in FP8 and that training left alone is copied byte for byte. `checkpoint.save` writes:
one tensor in memory, config.json last, resumable. What it gives up: the optimizer's state stays in the run.
Source: DeepSeek-V3 technical report section 3.3, README_WEIGHTS of the release.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kvern.checkpoint.family import target_config
from kvern.checkpoint.floats import read_floats
from kvern.checkpoint.quantize import FP8, SCALE_SUFFIX, QuantizedWeight, Rows, scale_shape
from kvern.checkpoint.reader import CheckpointReader
from kvern.checkpoint.save import (
    SHARD_BYTES,
    PlannedTensor,
    Progress,
    plan_shards,
    planned_from_model,
    write_checkpoint,
)
from kvern.checkpoint.target import HEAD, LATENT_NORM
from kvern.config import ModelConfig, QuantizationConfig
from kvern.errors import CheckpointError, ConfigError
from kvern.model import Transformer
from kvern.train.experts import part, place
from kvern.train.imported import SCALED_NORM, scaled_rows
from kvern.train.masters import Masters

DType = Literal["fp8", "bf16", "f32"]
Make = Callable[[], Tensor]

COPY = re.compile(r"model\.layers\.\d+\.(?P<what>embed_tokens|shared_head\.head)\.weight")
ORIGINALS = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}


@dataclass(frozen=True)
class ExportOptions:
    """dtype: of the weights. ue8m0: FP8 scales are powers of two, as in V3.1. head_fp8: the head in FP8, too."""

    dtype: DType
    ue8m0: bool = False
    head_fp8: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("fp8", "bf16", "f32"):
            raise ConfigError(f"dtype {self.dtype!r} is not one of fp8, bf16, f32", param="dtype")
        for name in ("ue8m0", "head_fp8"):
            if getattr(self, name) and self.dtype != "fp8":
                raise ConfigError(f"{name} needs dtype fp8", param="dtype")

    def record(self) -> dict[str, str]:
        """As conversion.json keeps them: another export into the same folder is refused."""
        return {"dtype": self.dtype, "ue8m0": str(self.ue8m0), "head_fp8": str(self.head_fp8)}


def export(
    config: ModelConfig,
    masters: Masters,
    dst: Path,
    options: ExportOptions,
    *,
    source: str,
    files: Mapping[str, bytes] | None = None,
    start: Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    force: bool = False,
) -> list[PlannedTensor]:
    """Write the model of `config`, as it trained, with the weights `masters` into the folder `dst`.

    source: names this very state, so that an interrupted export goes on and another one is refused, unless `force`.
    files: what lies beside the weights. start: the checkpoint that the run began from, if any.
    """
    reader = None if start is None else CheckpointReader(start)
    target, tensors = plan_export(config, masters, options, reader)
    write_checkpoint(
        dst,
        target,
        plan_shards(tensors, max_shard_bytes),
        files=files or {},
        source=source,
        options=options.record(),
        progress=progress,
        force=force,
    )
    return tensors


def plan_export(
    config: ModelConfig, masters: Masters, options: ExportOptions, start: CheckpointReader | None = None
) -> tuple[ModelConfig, list[PlannedTensor]]:
    """config.json and every tensor, made when its turn comes.

    CheckpointError where the masters are not those of `config`: a tensor is missing, left over or of another shape.
    """
    target = target_config(config, options.dtype, options.ue8m0)
    plan = _Plan(target, masters, options, start)
    tensors = [new for planned in planned_from_model(Transformer(target)) for new in plan.tensors(planned)]
    plan.check_complete()
    return target, tensors


class _Plan:
    """Decides for each tensor of the target what makes it."""

    def __init__(
        self, target: ModelConfig, masters: Masters, options: ExportOptions, start: CheckpointReader | None
    ) -> None:
        self.target, self.masters, self.options, self.start = target, masters, options, start
        self.shapes = masters.shapes()
        self.is_import = any(name.endswith("." + SCALED_NORM) for name in self.shapes)
        self.used: set[str] = set()

    def tensors(self, planned: PlannedTensor) -> Iterator[PlannedTensor]:
        """What takes the place of one tensor of the layout; scales come with their weight."""
        name, dtype, shape = planned.name, planned.dtype, planned.shape
        if name.endswith(SCALE_SUFFIX):
            return
        if dtype is FP8 or (self.options.head_fp8 and HEAD.fullmatch(name)):
            yield from self._quantized(name, shape)
            return
        if self.is_import and LATENT_NORM.fullmatch(name):
            name_there, dtype = name.removesuffix("weight") + SCALED_NORM, torch.float32
            yield PlannedTensor(name, dtype, shape, self._whole(name_there, shape))
            return
        pieces = self._pieces(name, shape)
        yield PlannedTensor(name, dtype, shape, lambda: torch.cat([piece.scaled().to(dtype) for piece in pieces]))

    def check_complete(self) -> None:
        """Every master must have gone somewhere."""
        spare = sorted(self.shapes.keys() - self.used - {name for name in self.shapes if COPY.fullmatch(name)})
        if spare:
            raise CheckpointError(f"{len(spare)} tensors of the run are not the model's", tensor=spare[0])

    def _quantized(self, name: str, shape: tuple[int, ...]) -> Iterator[PlannedTensor]:
        weight = _Fp8Weight(name, self._pieces(name, shape), self.options.ue8m0, self._stored(name))
        yield PlannedTensor(name, FP8, shape, weight.weight)
        yield PlannedTensor(name + SCALE_SUFFIX, torch.float32, scale_shape(shape), weight.scale)

    def _stored(self, name: str) -> CheckpointReader | None:
        """The checkpoint of the beginning, where it has `name` in the very form that is wanted now."""
        start = self.start
        if start is None or name not in start:
            return None
        quantization = start.config.quantization_config
        if not isinstance(quantization, QuantizationConfig) or start.spec(name).dtype is not FP8:
            return None
        return start if (quantization.scale_fmt == "ue8m0") == self.options.ue8m0 else None

    def _pieces(self, name: str, shape: tuple[int, ...]) -> list[Rows]:
        """The numbers of the tensor `name`, by rows that share a factor."""
        whole = self._read(name, shape)
        if not self.is_import:
            return [Rows(whole)]
        return [Rows(partial(_some, whole, rows), factor) for rows, factor in scaled_rows(name, self.target)]

    def _read(self, name: str, shape: tuple[int, ...]) -> Make:
        """What makes the tensor `name` of the layout out of the masters: a whole one, or an expert of a stack."""
        name = self._shared(name)
        found = place(name)
        if name in self.shapes or found is None:
            return self._whole(name, shape)
        return self._expert(*found, shape)

    def _shared(self, name: str) -> str:
        """Where the run keeps `name`: a tensor that MTP shares is saved once, under the first name that it has."""
        copied = COPY.fullmatch(name)
        original = ORIGINALS[copied["what"]] if copied else name
        if original in self.shapes or original not in ORIGINALS.values():
            return original
        copies = (
            there for there in self.shapes if (match := COPY.fullmatch(there)) and ORIGINALS[match["what"]] == original
        )
        return next(copies, original)

    def _whole(self, name: str, shape: tuple[int, ...]) -> Make:
        self._expect(name, shape)
        return partial(self.masters.tensor, name)

    def _expert(self, stack: str, expert: int, projection: str, shape: tuple[int, ...]) -> Make:
        rows, columns = shape
        stacked = rows if projection == "down_proj" else 2 * rows
        self._expect(stack, (self.target.n_routed_experts or 0, stacked, columns))
        return lambda: part(self.masters.row(stack, expert)[None], 0, projection)

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.shapes:
            raise CheckpointError("the run has no such tensor", tensor=name)
        if self.shapes[name] != shape:
            raise CheckpointError(f"has the shape {list(self.shapes[name])}, expected {list(shape)}", tensor=name)
        self.used.add(name)


class _Fp8Weight:
    """An FP8 weight and its scales: the first checkpoint's bytes where its numbers are the masters', or new ones."""

    def __init__(self, name: str, pieces: list[Rows], ue8m0: bool, start: CheckpointReader | None) -> None:
        self.name, self.pieces, self.start = name, pieces, start
        self.made = QuantizedWeight(name, pieces, ue8m0=ue8m0)

    def weight(self) -> Tensor | memoryview:
        """The weight in E4M3."""
        return self.made.weight() if self._untouched is None else self._untouched.raw(self.name)

    def scale(self) -> Tensor | memoryview:
        """The scales in float32."""
        return self.made.scale() if self._untouched is None else self._untouched.raw(self.name + SCALE_SUFFIX)

    @cached_property
    def _untouched(self) -> CheckpointReader | None:
        if self.start is None:
            return None
        now = torch.cat([piece.scaled() for piece in self.pieces])
        return self.start if torch.equal(read_floats(self.start, self.name), now) else None


def _some(whole: Make, rows: slice) -> Tensor:
    return whole()[rows]
