"""Converts checkpoints to the V3 layout: between FP8, BF16 and F32, or by importing a Llama or Qwen2 model.

Within the family, each shard of the source becomes one shard, and every tensor that the target dtype leaves alone is
copied byte for byte. FP8 covers what the official checkpoint has in FP8, the Linear weights of the layers; embedding,
norms, gate, eh_proj and (without `head_fp8`) the head are BF16, the gate's bias and an import's latent norms F32. What
it gives up: a BF16 detour moves FP8 scales by up to 0.3 %, so convert from the original where there is one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch

from kvern.checkpoint.gqa import ImportCost, import_cost, plan_import
from kvern.checkpoint.gqa_source import SourceModel
from kvern.checkpoint.header import TensorSpec
from kvern.checkpoint.load import load
from kvern.checkpoint.quantize import FP8, SCALE_SUFFIX, QuantizedWeight, Rows, dequantize, scale_shape
from kvern.checkpoint.reader import (
    CONFIG_FILE,
    CONVERSION_FILE,
    CheckpointReader,
    SafetensorsFolder,
    open_safetensors,
)
from kvern.checkpoint.save import PlannedTensor, Progress, plan_shards, total_size, write_checkpoint
from kvern.config import MODEL_TYPES, ModelConfig, QuantizationConfig, read_config_json
from kvern.errors import CheckpointError, ConfigError

DType = Literal["fp8", "bf16", "f32"]
FLOAT_OF = {"fp8": torch.bfloat16, "bf16": torch.bfloat16, "f32": torch.float32}

CARRIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
"""Files beside the weights that a converted checkpoint keeps: tokenizer, templates, generation settings, licences."""
CARRIED_MAX_BYTES = 64 << 20

LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.\w+_proj(_with_mqa)?|mlp\.(\w+\.)*(gate|up|down)_proj)\.weight")
HEAD = re.compile(r"lm_head\.weight|model\.layers\.\d+\.shared_head\.head\.weight")
GATE_BIAS = re.compile(r".*\.e_score_correction_bias")
LATENT_NORM = re.compile(r".*\.(q|kv)_a_layernorm\.weight")


@dataclass(frozen=True)
class Conversion:
    """What will be written: the new configuration, the shards, and the files that go along.

    `source` identifies the weights read, `options` says what is done to them, `cost` what an import costs at run time.
    """

    config: ModelConfig
    shards: list[list[PlannedTensor]]
    files: Mapping[str, bytes]
    source: str
    options: Mapping[str, str]
    cost: ImportCost | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(total_size(shard) for shard in self.shards)


def convert(
    src: Path,
    dst: Path,
    *,
    dtype: DType | None = None,
    head_fp8: bool = False,
    ue8m0: bool = False,
    progress: Progress | None = None,
    force: bool = False,
) -> Conversion:
    """Write the checkpoint, Hugging Face folder or GGUF file `src` as a V3 checkpoint into the folder `dst`.

    dtype: None keeps what a V3 source has (an import becomes BF16). head_fp8: the head in FP8 too. ue8m0: new scales
    are powers of two, as in V3.1. Resumes a conversion that was cut short; `force` starts it again. Raises
    UnsupportedModelError naming what cannot be converted, CheckpointError naming file and tensor, ConfigError.
    """
    _check_places(src, dst)
    planned = plan_conversion(src, dtype=dtype, head_fp8=head_fp8, ue8m0=ue8m0)
    write_checkpoint(
        dst,
        planned.config,
        planned.shards,
        files=planned.files,
        source=planned.source,
        options=planned.options,
        progress=progress,
        force=force,
    )
    return planned


def plan_conversion(
    src: Path, *, dtype: DType | None = None, head_fp8: bool = False, ue8m0: bool = False
) -> Conversion:
    """Read and check the source, and plan every tensor, without writing anything."""
    if dtype not in (None, *FLOAT_OF):
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(FLOAT_OF)}", param="dtype")
    if (head_fp8 or ue8m0) and dtype != "fp8":
        raise ConfigError(f"{'head_fp8' if head_fp8 else 'ue8m0'} needs dtype fp8", param="dtype")
    if not src.exists():
        raise CheckpointError("no such file or folder", file=src)
    options = {"dtype": dtype or "as stored", "head_fp8": str(head_fp8), "ue8m0": str(ue8m0)}
    source = fingerprint(src)
    if _is_family(src):
        config, shards = _plan_family(src, dtype, head_fp8, ue8m0)
        return Conversion(config, shards, carried_files(src), source, options)
    if ue8m0:
        raise ConfigError("an import has no power-of-two scales", hint="leave ue8m0 out", param="ue8m0")
    model = _open_source(src)
    config, tensors = plan_import(model, dtype or "bf16")
    if head_fp8:
        tensors = [new for tensor in tensors for new in _head_in_fp8(tensor)]
    return Conversion(config, plan_shards(tensors), model.files, source, options, import_cost(model.config))


def fingerprint(src: Path) -> str:
    """Identifies a source: SHA-256 over the names, sizes and modification times of its configuration and weights."""
    files = [src] if src.is_file() else sorted(src.glob("*.safetensors")) + sorted(src.glob("*.json"))
    lines = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def carried_files(folder: Path) -> dict[str, bytes]:
    """Small files beside the weights, by name; not the weights' own, not code, not pickles."""
    found = {file for pattern in CARRIED for file in folder.glob(pattern) if file.is_file()}
    return {
        file.name: file.read_bytes()
        for file in sorted(found)
        if file.name not in (CONFIG_FILE, CONVERSION_FILE)
        and not file.name.endswith(".index.json")
        and file.stat().st_size <= CARRIED_MAX_BYTES
    }


class FolderSource:
    """A Hugging Face folder of a Llama or Qwen2 model, as the import wants it (`gqa_source.SourceModel`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Mapping[str, Any] = read_config_json(folder)

    @cached_property
    def _weights(self) -> SafetensorsFolder:
        return open_safetensors(self.folder)

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        return carried_files(self.folder)

    def names(self) -> list[str]:
        return self._weights.names()

    def tensor(self, name: str) -> torch.Tensor:
        return self._weights.tensor(name)


def _check_places(src: Path, dst: Path) -> None:
    inside, outside = dst.resolve(), src.resolve()
    if inside == outside or outside in inside.parents:
        raise ConfigError(f"destination {dst} is the source or lies inside it", hint="choose a folder beside it")


def _is_family(src: Path) -> bool:
    """Whether the source is a V3-family folder (or a broken one); everything else is the importer's to judge."""
    if src.is_file() or not (src / CONFIG_FILE).is_file():
        return src.is_dir()
    return read_config_json(src).get("model_type") in MODEL_TYPES


def _open_source(src: Path) -> SourceModel:
    if src.is_dir():
        return FolderSource(src)
    if src.suffix != ".gguf":
        raise CheckpointError("neither a folder nor a .gguf file", file=src)
    from kvern.checkpoint.gguf import GGUFSource

    return GGUFSource(src)


def _head_in_fp8(tensor: PlannedTensor) -> Iterable[PlannedTensor]:
    if not HEAD.fullmatch(tensor.name):
        return [tensor]

    def read() -> torch.Tensor:
        made = tensor.make()
        assert isinstance(made, torch.Tensor)
        return made

    return _quantized(tensor.name, tensor.shape, read)


def _plan_family(
    src: Path, dtype: DType | None, head_fp8: bool, ue8m0: bool
) -> tuple[ModelConfig, list[list[PlannedTensor]]]:
    reader = CheckpointReader(src)
    _check_loads(reader)
    plan = _FamilyPlan(reader, dtype, target_config(reader.config, dtype, ue8m0), head_fp8)
    return plan.config, [shard for shard in plan.shards() if shard]


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
    if present is None:
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


class _FamilyPlan:
    """Decides for each tensor of a V3 checkpoint: copy, cast, quantise or dequantise."""

    def __init__(self, reader: CheckpointReader, dtype: DType | None, config: ModelConfig, head_fp8: bool) -> None:
        self.reader, self.dtype, self.config, self.head_fp8 = reader, dtype, config, head_fp8
        self.ue8m0 = config.quantization_config is not None and config.quantization_config.scale_fmt == "ue8m0"

    def shards(self) -> Iterator[list[PlannedTensor]]:
        """For each file of the source, the tensors that take the place of its own."""
        for _, specs in groupby(self.reader.specs(), key=lambda spec: spec.file):
            yield [planned for spec in specs for planned in self._tensor(spec)]

    def _tensor(self, spec: TensorSpec) -> Iterator[PlannedTensor]:
        if self.dtype is None or (self.dtype == "fp8" and self._is_fp8(spec)):
            yield self._copied(spec)
        elif spec.dtype is FP8:
            yield self._dequantized(spec)
        elif self._is_fp8(spec):
            return
        elif self.dtype == "fp8" and self._quantizes(spec.name):
            read = partial(self.reader.tensor, spec.name)
            yield from _quantized(spec.name, spec.shape, read, ue8m0=self.ue8m0)
        else:
            yield self._cast(spec)

    def _is_fp8(self, spec: TensorSpec) -> bool:
        """Whether this is an FP8 weight or its scales."""
        return spec.dtype is FP8 or spec.name.endswith(SCALE_SUFFIX)

    def _quantizes(self, name: str) -> bool:
        quantization = self.config.quantization_config
        if HEAD.fullmatch(name):
            return self.head_fp8
        covered = quantization is not None and quantization.covers(name.removesuffix(".weight"))
        return covered and LINEAR.fullmatch(name) is not None

    def _copied(self, spec: TensorSpec) -> PlannedTensor:
        return PlannedTensor(spec.name, spec.dtype, spec.shape, partial(self.reader.raw, spec.name))

    def _dequantized(self, spec: TensorSpec) -> PlannedTensor:
        dtype = self._float()

        def make() -> torch.Tensor:
            scale = self.reader.tensor(spec.name + SCALE_SUFFIX)
            return dequantize(self.reader.tensor(spec.name), scale, dtype)

        return PlannedTensor(spec.name, dtype, spec.shape, make)

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


def _quantized(
    name: str, shape: tuple[int, ...], read: Callable[[], torch.Tensor], *, ue8m0: bool = False
) -> list[PlannedTensor]:
    """A weight in FP8 and its scales."""
    made = QuantizedWeight(name, [Rows(read)], ue8m0=ue8m0)
    return [
        PlannedTensor(name, FP8, shape, made.weight),
        PlannedTensor(name + SCALE_SUFFIX, torch.float32, scale_shape(shape), made.scale),
    ]
