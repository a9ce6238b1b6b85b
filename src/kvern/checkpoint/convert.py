"""Converts checkpoints to the V3 layout: between FP8, 4 bits, BF16 and F32, or by importing a Llama or Qwen2 model.

Within the family, each shard of the source becomes one shard, and every tensor that the target dtype leaves alone is
copied byte for byte. FP8 covers what the official checkpoint has in FP8, the Linear weights of the layers; embedding,
norms, gate, eh_proj and (without `head_fp8`) the head are BF16, the gate's bias and an import's latent norms F32. 4-bit
covers the same Linears, but for those whose columns the group does not divide. What it gives up: a BF16 detour moves
FP8 scales by up to 0.3 %, and 4 bits are never made finer again: convert from the original where there is one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch

from kvern.checkpoint.gqa import ImportCost, import_cost, plan_import
from kvern.checkpoint.gqa_source import SourceModel
from kvern.checkpoint.header import TensorSpec
from kvern.checkpoint.int4 import INT4_PARTS, INT4_WEIGHT, Int4Weight, dequantize_int4
from kvern.checkpoint.load import load
from kvern.checkpoint.quantize import (
    FP8,
    INT4_SCALE_SUFFIX,
    SCALE_SUFFIX,
    QuantizedWeight,
    Rows,
    dequantize,
    fp8_scale_name,
    scale_shape,
)
from kvern.checkpoint.reader import (
    CONFIG_FILE,
    CONVERSION_FILE,
    CheckpointReader,
    SafetensorsFolder,
    open_safetensors,
)
from kvern.checkpoint.save import PlannedTensor, Progress, plan_shards, total_size, write_checkpoint
from kvern.config import (
    MODEL_TYPES,
    Int4Config,
    ModelConfig,
    Quantization,
    QuantizationConfig,
    read_config_json,
)
from kvern.errors import CheckpointError, ConfigError
from kvern.ops.reference_int4 import PER_WORD

DType = Literal["fp8", "bf16", "f32", "int4"]
FLOAT_OF = {"fp8": torch.bfloat16, "bf16": torch.bfloat16, "f32": torch.float32, "int4": torch.bfloat16}
GROUP_SIZE = 32

CARRIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
"""Files beside the weights that a converted checkpoint keeps: tokenizer, templates, generation settings, licences."""
CARRIED_MAX_BYTES = 64 << 20

LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.\w+_proj(_with_mqa)?|mlp\.(\w+\.)*(gate|up|down)_proj)\.weight")
HEAD = re.compile(r"lm_head\.weight|model\.layers\.\d+\.shared_head\.head\.weight")
OTHER_LINEAR = re.compile(r"model\.layers\.\d+\.(eh_proj|mlp\.gate)\.weight")
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
    group_size: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Conversion:
    """Write the checkpoint, Hugging Face folder or GGUF file `src` as a V3 checkpoint into the folder `dst`.

    dtype: None keeps what a V3 source has (an import becomes BF16). head_fp8: the head in FP8 too (with fp8 and int4).
    ue8m0: new scales are powers of two, as in V3.1. group_size: columns that share a scale in int4, 32 (the default) or
    128. Resumes a conversion that was cut short; `force` starts it again. Raises
    UnsupportedModelError naming what cannot be converted, CheckpointError naming file and tensor, ConfigError.
    """
    _check_places(src, dst)
    planned = plan_conversion(src, dtype=dtype, head_fp8=head_fp8, ue8m0=ue8m0, group_size=group_size)
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
    src: Path,
    *,
    dtype: DType | None = None,
    head_fp8: bool = False,
    ue8m0: bool = False,
    group_size: int | None = None,
) -> Conversion:
    """Read and check the source, and plan every tensor, without writing anything."""
    _check_options(dtype, head_fp8, ue8m0, group_size)
    if not src.exists():
        raise CheckpointError("no such file or folder", file=src)
    options = {"dtype": dtype or "as stored", "head_fp8": str(head_fp8), "ue8m0": str(ue8m0)}
    group_size = group_size or GROUP_SIZE
    if dtype == "int4":
        options["group_size"] = str(group_size)
    source = fingerprint(src)
    if _is_family(src):
        config, shards = _plan_family(src, dtype, head_fp8, ue8m0, group_size)
        return Conversion(config, shards, carried_files(src), source, options)
    if ue8m0:
        raise ConfigError("an import has no power-of-two scales", hint="leave ue8m0 out", param="ue8m0")
    model = _open_source(src)
    config, tensors = plan_import(model, "bf16" if dtype is None or dtype == "int4" else dtype)
    if dtype == "int4":
        config, tensors = _import_in_int4(config, tensors, group_size, head_fp8)
    elif head_fp8:
        tensors = [new for tensor in tensors for new in _head_in_fp8(tensor)]
    return Conversion(config, plan_shards(tensors), model.files, source, options, import_cost(model.config))


def _check_options(dtype: DType | None, head_fp8: bool, ue8m0: bool, group_size: int | None) -> None:
    if dtype not in (None, *FLOAT_OF):
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(FLOAT_OF)}", param="dtype")
    if head_fp8 and dtype not in ("fp8", "int4"):
        raise ConfigError("head_fp8 needs dtype fp8 or int4", param="dtype")
    if ue8m0 and dtype != "fp8":
        raise ConfigError("ue8m0 needs dtype fp8", param="dtype")
    if group_size is not None and (dtype != "int4" or group_size not in (32, 128)):
        raise ConfigError(f"group_size {group_size} needs dtype int4, and is 32 or 128", param="group_size")


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


def _head_in_fp8(tensor: PlannedTensor, suffix: str = SCALE_SUFFIX) -> Sequence[PlannedTensor]:
    if not HEAD.fullmatch(tensor.name):
        return [tensor]
    return _quantized(tensor.name, tensor.shape, _made(tensor), suffix=suffix)


def _import_in_int4(
    config: ModelConfig, tensors: Sequence[PlannedTensor], group_size: int, head_fp8: bool
) -> tuple[ModelConfig, list[PlannedTensor]]:
    """A planned BF16 import with its Linears in 4 bits; its selection matrices of 0 and 1 are exact."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    quantization = int4_config(shapes, group_size, head_fp8)
    out: list[PlannedTensor] = []
    for tensor in tensors:
        if packs(quantization, tensor.name):
            out += _packed(tensor.name, tensor.shape, group_size, _made(tensor))
        else:
            out += _head_in_fp8(tensor, INT4_SCALE_SUFFIX) if head_fp8 else [tensor]
    return replace(config, quantization_config=quantization), out


def _made(tensor: PlannedTensor) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        made = tensor.make()
        assert isinstance(made, torch.Tensor)
        return made

    return make


def int4_config(shapes: Mapping[str, tuple[int, ...]], group_size: int, head_fp8: bool) -> Int4Config:
    """What to pack among the weights of these names: the layers' Linears, but for those that the group does not divide.

    Raises ConfigError where none is left.
    """
    linears = [name for name in shapes if LINEAR.fullmatch(name)]
    undivided = [name for name in linears if shapes[name][1] % group_size]
    if len(undivided) == len(linears):
        raise ConfigError(
            f"no weight has a multiple of {group_size} columns",
            hint="groups of 32 fit more shapes" if group_size > 32 else None,
            param="group_size",
        )
    floats = [name for name in shapes if OTHER_LINEAR.fullmatch(name)]
    heads = [name for name in shapes if HEAD.fullmatch(name)]
    ignore = _kinds([*(() if head_fp8 else heads), *floats, *undivided])
    return Int4Config(group_size, ignore, _kinds(heads) if head_fp8 else ())


def _kinds(weights: Iterable[str]) -> tuple[str, ...]:
    """The modules of these weights, each once; those that come in every layer as one expression."""
    return tuple(dict.fromkeys(_kind(weight.removesuffix(".weight")) for weight in weights))


def _kind(module: str) -> str:
    parts = module.split(".")
    numberless = [r"\d+" if part.isdigit() else part for part in parts]
    return module if numberless == parts else "re:" + r"\.".join(numberless) + "$"


def packs(quantization: Quantization | None, name: str) -> bool:
    """Whether the tensor `name` of the float layout is stored in 4 bits."""
    if not isinstance(quantization, Int4Config) or LINEAR.fullmatch(name) is None:
        return False
    return quantization.covers(name.removesuffix(".weight"))


def _plan_family(
    src: Path, dtype: DType | None, head_fp8: bool, ue8m0: bool, group_size: int
) -> tuple[ModelConfig, list[list[PlannedTensor]]]:
    reader = CheckpointReader(src)
    _check_loads(reader)
    config = target_config(reader.config, dtype, ue8m0)
    if dtype == "int4":
        config = replace(config, quantization_config=_int4_target(reader, group_size, head_fp8))
    plan = _FamilyPlan(reader, dtype, config, head_fp8)
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


def weight_name(name: str) -> str:
    """The name that a tensor has in a float checkpoint: that of the weight for a 4-bit one."""
    return name.removesuffix("_packed") if name.endswith("." + INT4_WEIGHT) else name


def float_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of the weight that a tensor stores."""
    if not spec.name.endswith("." + INT4_WEIGHT):
        return spec.shape
    rows, words = spec.shape
    return rows, words * PER_WORD


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


class _FamilyPlan:
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
            return _packed(name, shape, self.config.quantization_config.group_size, partial(self._floats, spec))
        if self._in_fp8(name):
            return _quantized(name, shape, partial(self._floats, spec), ue8m0=self.ue8m0, suffix=self.scale_suffix)
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
        """The weight as numbers, however it is stored: `dtype` where it is quantised, otherwise as it is."""
        stored = self.reader.tensor(spec.name)
        if spec.dtype is FP8:
            return dequantize(stored, self.reader.tensor(fp8_scale_name(self.reader, spec.name)), dtype)
        if spec.name.endswith("." + INT4_WEIGHT):
            return dequantize_int4(stored, self.reader.tensor(weight_name(spec.name) + INT4_SCALE_SUFFIX), dtype)
        return stored

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


def _packed(
    name: str, shape: tuple[int, ...], group_size: int, read: Callable[[], torch.Tensor]
) -> list[PlannedTensor]:
    """A weight in 4 bits, its scales and its shape."""
    rows, columns = shape
    return Int4Weight(name.removesuffix(".weight"), (rows, columns), group_size, read).tensors()


def _quantized(
    name: str,
    shape: tuple[int, ...],
    read: Callable[[], torch.Tensor],
    *,
    ue8m0: bool = False,
    suffix: str = SCALE_SUFFIX,
) -> list[PlannedTensor]:
    """A weight in FP8 and its scales."""
    made = QuantizedWeight(name, [Rows(read)], ue8m0=ue8m0)
    return [
        PlannedTensor(name, FP8, shape, made.weight),
        PlannedTensor(name + suffix, torch.float32, scale_shape(shape), made.scale),
    ]
