"""Reads safetensors checkpoints as mapped views: opening costs the headers, a page of weights costs memory when used.

A folder holds `model.safetensors`, or shards and a `model.safetensors.index.json`. Everything is checked before a byte
of weights is touched (see `header`); every failure is a CheckpointError that names file and tensor. Pickles are never
loaded.

Files are mapped private, writable and without reserved swap: torch sees writable memory (no warning), pages stay backed
by the file and count for nothing until used, and an accidental write changes a private copy, never the file. What this
gives up: a shard that is truncated after opening kills the process when a lost page is touched (SIGBUS, as with any
mapping), and a tensor at an unaligned offset (legal, rare) is copied instead of mapped.
"""

from __future__ import annotations

import errno
import json
import mmap
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kvern.checkpoint.header import TensorSpec, read_header
from kvern.config import ModelConfig
from kvern.errors import CheckpointError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONVERSION_FILE = "conversion.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

# Python names this flag from 3.13 on; the value is Linux's on every architecture Kvern runs on.
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)


class SafetensorsFolder:
    """The tensors of any safetensors folder, by name. A tensor keeps its mapping alive; the folder may go first."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._specs = {spec.name: spec for spec in _folder_specs(self.folder)}
        self._maps: dict[Path, mmap.mmap] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def names(self) -> list[str]:
        """Tensor names, shard by shard, in the order of their data."""
        return list(self._specs)

    def specs(self) -> Iterable[TensorSpec]:
        return self._specs.values()

    def files(self) -> list[Path]:
        """The weight files, in order."""
        return list(dict.fromkeys(spec.file for spec in self._specs.values()))

    def spec(self, name: str) -> TensorSpec:
        """Dtype, shape and place of a tensor; CheckpointError if the checkpoint has none of that name."""
        try:
            return self._specs[name]
        except KeyError:
            raise CheckpointError("tensor is not in the checkpoint", file=self.folder, tensor=name) from None

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as a view of the file: no copy unless its offset is unaligned."""
        _, dtype, shape, file, start, end = self.spec(name)
        if start == end:
            return torch.empty(shape, dtype=dtype)
        if start % dtype.itemsize:
            return torch.frombuffer(bytearray(self._map(file)[start:end]), dtype=dtype).view(shape)
        count = (end - start) // dtype.itemsize
        return torch.frombuffer(self._map(file), dtype=dtype, count=count, offset=start).view(shape)

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor as stored, read-only."""
        spec = self.spec(name)
        if spec.start == spec.end:
            return memoryview(b"")
        return memoryview(self._map(spec.file))[spec.start : spec.end].toreadonly()

    def _map(self, file: Path) -> mmap.mmap:
        mapped = self._maps.get(file)
        return mapped if mapped is not None else self._maps.setdefault(file, _map_file(file))


class CheckpointReader(SafetensorsFolder):
    """A checkpoint of the DeepSeek-V3 family: tensors and the configuration they belong to."""

    def __init__(self, folder: Path | str) -> None:
        _require_config(Path(folder))
        super().__init__(folder)

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.load(self.folder)


def open_safetensors(folder: Path | str) -> SafetensorsFolder:
    """The weights of any Hugging Face folder, whatever its config.json says."""
    return SafetensorsFolder(folder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint, or a CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", file=path) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}", file=path) from error
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", file=path)
    return value


def _require_config(folder: Path) -> None:
    if (folder / CONFIG_FILE).is_file():
        return
    if (folder / CONVERSION_FILE).is_file():
        raise CheckpointError(
            "conversion or export was interrupted: the checkpoint is incomplete",
            file=folder,
            hint="run the same command again, it continues where it stopped",
        )
    if not folder.is_dir():
        raise CheckpointError("no such folder", file=folder)
    raise CheckpointError(f"{CONFIG_FILE} is missing", file=folder, hint="a checkpoint is a folder with config.json")


def _folder_specs(folder: Path) -> Iterator[TensorSpec]:
    if (folder / INDEX_FILE).is_file():
        return _sharded_specs(folder)
    if (folder / SINGLE_FILE).is_file():
        return iter(read_header(folder / SINGLE_FILE))
    raise _no_weights(folder)


def _no_weights(folder: Path) -> CheckpointError:
    if not folder.is_dir():
        return CheckpointError("no such folder", file=folder)
    pickle = next((file for pattern in PICKLES for file in sorted(folder.glob(pattern))), None)
    if pickle is not None:
        return CheckpointError(
            "holds pickled weights only; a pickle can run any code, so Kvern never loads one",
            file=pickle,
            hint="get the model's safetensors files, or convert it on a machine you can lose",
        )
    loose = sorted(folder.glob("*.safetensors"))
    found = f" ({len(loose)} other .safetensors files, but no index)" if loose else ""
    return CheckpointError(f"neither {SINGLE_FILE} nor {INDEX_FILE} is there{found}", file=folder)


def _sharded_specs(folder: Path) -> Iterator[TensorSpec]:
    weight_map = _weight_map(folder / INDEX_FILE)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"shard is missing ({len(missing)} of {len(shards)} are)",
            file=folder / missing[0],
            hint="download the checkpoint again; finished files are not fetched twice",
        )
    unseen = dict(weight_map)
    for shard in shards:
        for spec in read_header(folder / shard):
            _check_indexed(spec, unseen.pop(spec.name, None))
            yield spec
    for name, shard in unseen.items():
        raise CheckpointError("the index names this tensor, the file lacks it", file=folder / shard, tensor=name)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("weight_map is missing, empty or not an object", file=index)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_file_name(shard):
            raise CheckpointError(
                f"{shard!r} is not the name of a .safetensors file in this folder", file=index, tensor=name
            )
    return weight_map


def _is_plain_file_name(name: str) -> bool:
    return name.endswith(".safetensors") and not set(name) & set("/\\\0")


def _check_indexed(spec: TensorSpec, shard: str | None) -> None:
    if shard is None:
        raise CheckpointError("tensor is not in the index, or in two files", file=spec.file, tensor=spec.name)
    if shard != spec.file.name:
        raise CheckpointError(f"the index says that this tensor is in {shard}", file=spec.file, tensor=spec.name)


def _map_file(file: Path) -> mmap.mmap:
    flags, protection = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    try:
        with file.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, flags=flags, prot=protection)
    except OSError as error:
        hint = None
        if error.errno == errno.ENOMEM:
            hint = "vm.overcommit_memory=2 counts mapped files as memory; set it to 0, or raise vm.max_map_count"
        raise CheckpointError(f"cannot be mapped: {error.strerror}", file=file, hint=hint) from error
