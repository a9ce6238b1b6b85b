"""Converts within the V3 family: for each tensor of a checkpoint, copy, cast, quantise or dequantise.

Each shard of the source becomes one shard, and every tensor that the target dtype leaves alone is copied byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from kvern.checkpoint.floats import read_floats
from kvern.checkpoint.header import TensorSpec
from kvern.checkpoint.int4 import INT4_PARTS, INT4_WEIGHT
from kvern.checkpoint.load import load
from kvern.checkpoint.quantize import FP8, INT4_SCALE_SUFFIX, SCALE_SUFFIX
from kvern.checkpoint.reader import CheckpointReader
from kvern.checkpoint.save import PlannedTensor
from kvern.checkpoint.target import (
    FLOAT_OF,
    GATE_BIAS,
    HEAD,
    LATENT_NORM,
    LINEAR,
    DType,
    float_shape,
    int4_config,
    packed_tensors,
    packs,
    quantized_tensors,
    weight_name,
)
from kvern.config import Int4Config, ModelConfig, QuantizationConfig
from kvern.errors import ConfigError


def plan_family(
    src: Path, dtype: DType | None, head_fp8: bool, ue8m0: bool, group_size: int
) -> tuple[ModelConfig, list[list[PlannedTensor]]]:
    """config.json and the shards of the converted checkpoint; refuses a source that would not load."""
    reader = CheckpointReader(src)
    _check_loads(reader)
    config = target_config(reader.config, dtype, ue8m0)
    if dtype == "int4":
        config = replace(config, quantization_config=_int4_target(reader, group_size, head_fp8))
    plan = FamilyPlan(reader, dtype, config, head_fp8)
    return plan.config, [shard for shard in plan.shards() if shard]


def _int4_target(reader: CheckpointReader, group_size: int, head_fp8: bool) -> Int4Config:
    present = reader.config.quantization_config
    if isinstance(present, Int4Config) and present.group_size != group_size:
        raise ConfigError(
            f"the source is 4-bit already, in groups of {present.group_size}",
            hint="convert from the original instead",
            param="group_size",
        )
    shapes = {weight_name(spec.name): float_shape(spec) for spec in reader.specs()}
    return int4_config(shapes, group_size, head_fp8)


def _check_loads(reader: CheckpointReader) -> None:
    """Refuse a damaged source before anything is written, by the loader's own checks."""
    layers = reader.config.num_hidden_layers
    has_mtp = any(name.startswith(f"model.layers.{layers}.") for name in reader.names())
    load(reader.folder, mtp=has_mtp)


def target_config(config: ModelConfig, dtype: DType | None, ue8m0: bool = False) -> ModelConfig:
    """config.json of the converted checkpoint."""
    if dtype is None:
        return config
    quantization = _target_quantization(config, ue8m0) if dtype == "fp8" else None
    return replace(config, torch_dtype="float32" if dtype == "f32" else "bfloat16", quantization_config=quantization)


def _target_quantization(config: ModelConfig, ue8m0: bool) -> QuantizationConfig:
    scale_fmt = "ue8m0" if ue8m0 else None
    present = config.quantization_config
    if not isinstance(present, QuantizationConfig):
        return QuantizationConfig(scale_fmt=scale_fmt, modules_to_not_convert=_mixed_blocks(config))
    if ue8m0 and present.scale_fmt != scale_fmt:
        raise ConfigError(
            "the source is FP8 already, its scales are copied as they are", hint="leave ue8m0 out", param="ue8m0"
        )
    return present


def _mixed_blocks(config: ModelConfig) -> tuple[str, ...]:
    """Rows that an import scaled by 2^-24 must not share an FP8 block with rows that it did not."""
    imported = config.qk_nope_head_dim == 0
    return ("kv_a_proj_with_mqa",) if imported and config.kv_lora_rank % 128 else ()


class FamilyPlan:
    """Decides for each tensor of a V3 checkpoint: copy, cast, quantise or dequantise."""

    def __init__(self, reader: CheckpointReader, dtype: DType | None, config: ModelConfig, head_fp8: bool) -> None:
        self.reader, self.dtype, self.config, self.head_fp8 = reader, dtype, config, head_fp8
        quantization = config.quantization_config
        self.ue8m0 = isinstance(quantization, QuantizationConfig) and quantization.scale_fmt == "ue8m0"
        self.scale_suffix = INT4_SCALE_SUFFIX if isinstance(quantization, Int4Config) else SCALE_SUFFIX

    def shards(self) -> Iterator[list[PlannedTensor]]:
        """For each file of the source, the tensors that take the place of its own."""
        for _, specs in groupby(self.reader.specs(), key=lambda spec: spec.file):
            yield [planned for spec in specs for planned in self._tensor(spec)]

    def _tensor(self, spec: TensorSpec) -> Iterable[PlannedTensor]:
        name, weight = weight_name(spec.name), self._weight_beside(spec.name)
        if self._stays(weight or spec.name):
            return [self._copied(spec)]
        if weight is not None:
            return []
        shape = float_shape(spec)
        if packs(self.config.quantization_config, name):
            assert isinstance(self.config.quantization_config, Int4Config)
            return packed_tensors(name, shape, self.config.quantization_config.group_size, partial(self._floats, spec))
        if self._in_fp8(name):
            return quantized_tensors(
                name, shape, partial(self._floats, spec), ue8m0=self.ue8m0, suffix=self.scale_suffix
            )
        if spec.dtype is FP8 or name != spec.name:
            return [PlannedTensor(name, self._float(), shape, partial(self._floats, spec, self._float()))]
        return [self._cast(spec)]

    def _stays(self, name: str) -> bool:
        """Whether a tensor is kept in the quantised form that it has."""
        if self.dtype is None:
            return True
        if self.dtype == "int4" and name.endswith("." + INT4_WEIGHT):
            return packs(self.config.quantization_config, weight_name(name))
        return self.dtype == "fp8" and self.reader.spec(name).dtype is FP8

    def _weight_beside(self, name: str) -> str | None:
        """The quantised weight that a tensor of scales (or a stored shape) belongs to."""
        module, _, part = name.rpartition(".")
        if part in ("weight" + SCALE_SUFFIX, *INT4_PARTS[1:]):
            return next(
                f"{module}.{weight}" for weight in (INT4_WEIGHT, "weight") if f"{module}.{weight}" in self.reader
            )
        return None

    def _in_fp8(self, name: str) -> bool:
        quantization = self.config.quantization_config
        if HEAD.fullmatch(name):
            return self.head_fp8
        if not isinstance(quantization, QuantizationConfig) or LINEAR.fullmatch(name) is None:
            return False
        return quantization.covers(name.removesuffix(".weight"))

    def _copied(self, spec: TensorSpec) -> PlannedTensor:
        return PlannedTensor(spec.name, spec.dtype, spec.shape, partial(self.reader.raw, spec.name))

    def _floats(self, spec: TensorSpec, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return read_floats(self.reader, spec.name, dtype)

    def _cast(self, spec: TensorSpec) -> PlannedTensor:
        dtype = self._float()
        if spec.dtype is dtype or self._stays_f32(spec):
            return self._copied(spec)
        return PlannedTensor(spec.name, dtype, spec.shape, lambda: self.reader.tensor(spec.name).to(dtype))

    def _stays_f32(self, spec: TensorSpec) -> bool:
        """The gate's bias always; a latent norm where BF16 would round it, as it would the constants of an import."""
        if spec.dtype is not torch.float32:
            return False
        if LATENT_NORM.fullmatch(spec.name):
            weight = self.reader.tensor(spec.name)
            return not torch.equal(weight, weight.bfloat16().float())
        return GATE_BIAS.fullmatch(spec.name) is not None

    def _float(self) -> torch.dtype:
        assert self.dtype is not None
        return FLOAT_OF[self.dtype]
