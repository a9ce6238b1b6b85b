"""Converts checkpoints to the V3 layout: between FP8, 4 bits, BF16 and F32, or by importing a Llama or Qwen2 model.

Within the family, each shard of the source becomes one shard, and every tensor that the target dtype leaves alone is
copied byte for byte. FP8 covers what the official checkpoint has in FP8, the Linear weights of the layers; embedding,
norms, gate, eh_proj and (without `head_fp8`) the head are BF16, the gate's bias and an import's latent norms F32. 4-bit
covers the same Linears, but for those whose columns the group does not divide. What it gives up: a BF16 detour moves
FP8 scales by up to 0.3 %, and 4 bits are never made finer again: convert from the original where there is one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kvern.checkpoint.family import plan_family
from kvern.checkpoint.gqa import ImportCost, import_cost, plan_import
from kvern.checkpoint.gqa_source import SourceModel
from kvern.checkpoint.quantize import INT4_SCALE_SUFFIX, SCALE_SUFFIX
from kvern.checkpoint.reader import CONFIG_FILE, CONVERSION_FILE, SafetensorsFolder, open_safetensors
from kvern.checkpoint.save import PlannedTensor, Progress, plan_shards, total_size, write_checkpoint
from kvern.checkpoint.target import FLOAT_OF, HEAD, DType, int4_config, packed_tensors, packs, quantized_tensors
from kvern.config import MODEL_TYPES, ModelConfig, read_config_json
from kvern.errors import CheckpointError, ConfigError

GROUP_SIZE = 32

CARRIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
"""Files beside the weights that a converted checkpoint keeps: tokenizer, templates, generation settings, licences."""
CARRIED_MAX_BYTES = 64 << 20


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
        config, shards = plan_family(src, dtype, head_fp8, ue8m0, group_size)
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
    return quantized_tensors(tensor.name, tensor.shape, _made(tensor), suffix=suffix)


def _import_in_int4(
    config: ModelConfig, tensors: Sequence[PlannedTensor], group_size: int, head_fp8: bool
) -> tuple[ModelConfig, list[PlannedTensor]]:
    """A planned BF16 import with its Linears in 4 bits; its selection matrices of 0 and 1 are exact."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    quantization = int4_config(shapes, group_size, head_fp8)
    out: list[PlannedTensor] = []
    for tensor in tensors:
        if packs(quantization, tensor.name):
            out += packed_tensors(tensor.name, tensor.shape, group_size, _made(tensor))
        else:
            out += _head_in_fp8(tensor, INT4_SCALE_SUFFIX) if head_fp8 else [tensor]
    return replace(config, quantization_config=quantization), out


def _made(tensor: PlannedTensor) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        made = tensor.make()
        assert isinstance(made, torch.Tensor)
        return made

    return make
