"""Where an export reads FP32 masters: a model in memory, or a checkpoint that any number of ranks saved.

A checkpoint of `torch.distributed.checkpoint` holds each tensor in the pieces that its ranks had. Tensors are read one
at a time, or some rows of one, so an export needs the memory of one tensor (of a stack of experts: of the pieces that
hold one expert), however many ranks saved and whatever one rank could hold.

What it gives up: safety against a hostile file. The index of such a checkpoint is a pickle, as torch writes it, here
and when a run goes on: read only what you trust.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from kvern.errors import CheckpointError

INDEX = ".metadata"
ANCHOR = "model.norm.weight"
"""Every model has this one, under one name."""


class Masters(Protocol):
    """Float32 tensors by the names of the model that trains."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's whole shape."""

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""

    def row(self, name: str, row: int) -> Tensor:
        """tensor(name)[row]."""


class LiveMasters:
    """The tensors of a model in this process."""

    def __init__(self, model: nn.Module) -> None:
        self._state: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's whole shape."""
        return {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        return self._state[name].cpu()

    def row(self, name: str, row: int) -> Tensor:
        """tensor(name)[row]."""
        return self._state[name][row].cpu()


class SavedMasters:
    """The tensors of a checkpoint folder; CheckpointError where it is incomplete or holds no model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / INDEX).is_file():
            raise CheckpointError(f"no {INDEX}: this is no complete checkpoint of a run", file=folder)
        self._reader = FileSystemReader(folder)
        try:
            metadata = self._reader.read_metadata()
        except Exception as error:  # a damaged pickle raises whatever it happens to call
            raise CheckpointError(f"{INDEX} cannot be read: {error}", file=folder) from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        prefix = _prefix(metadata.state_dict_metadata, folder)
        self._tensors = {
            key.removeprefix(prefix): (key, entry)
            for key, entry in metadata.state_dict_metadata.items()
            if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        self._rows: dict[str, tuple[int, Tensor]] = {}

    def fingerprint(self) -> str:
        """Identifies the state: SHA-256 of the index, which names every piece and its place, and the files' sizes."""
        digest = hashlib.sha256((self.folder / INDEX).read_bytes())
        for file in sorted(self.folder.glob("*.distcp")):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        return digest.hexdigest()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's whole shape."""
        return {name: tuple(entry.size) for name, (_, entry) in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        return self._read(name, 0, self._tensors[name][1].size[0])

    def row(self, name: str, row: int) -> Tensor:
        """tensor(name)[row]; the rows that were saved with it stay in memory for the next call."""
        first, rows = self._rows.get(name, (0, torch.empty(0)))
        if not first <= row < first + len(rows):
            first, last = self._piece(name, row)
            self._make_room(name)
            rows = self._read(name, first, last)
            self._rows[name] = first, rows
        return rows[row - first]

    def _make_room(self, name: str) -> None:
        """Keep one other stack at most: a layer's experts come as gate and up in one, down in another."""
        self._rows.pop(name, None)
        while len(self._rows) > 1:
            self._rows.pop(next(iter(self._rows)))

    def _piece(self, name: str, row: int) -> tuple[int, int]:
        """The rows that one rank saved together with `row`."""
        for chunk in self._tensors[name][1].chunks:
            first = chunk.offsets[0]
            if first <= row < first + chunk.sizes[0]:
                return first, first + chunk.sizes[0]
        raise CheckpointError(f"row {row} is in none of the pieces", file=self.folder, tensor=name)

    def _read(self, name: str, first: int, last: int) -> Tensor:
        key, entry = self._tensors[name]
        shape = [last - first, *entry.size[1:]]
        out = torch.empty(shape, dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size([first, *[0] * (len(shape) - 1)]), torch.Size(shape))
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        if sum(torch.Size(item.lengths).numel() for item in items) != out.numel():
            raise CheckpointError("pieces of the tensor are missing", file=self.folder, tensor=name)
        try:
            self._reader.read_data(LoadPlan(items), _Into(out)).wait()
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            raise CheckpointError(f"cannot be read: {error}", file=self.folder, tensor=name) from error
        return out


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of the tensor that an item fills."""
        places = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._out[tuple(slice(offset, offset + length) for offset, length in places)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The part is a view: nothing is left to do."""


def _prefix(names: Mapping[str, object], folder: Path) -> str:
    """What stands before a parameter's name: a run saves its model beside the optimizer's moments."""
    anchors = [name.removesuffix(ANCHOR) for name in names if name == ANCHOR or name.endswith("." + ANCHOR)]
    found = [prefix for prefix in anchors if not prefix.startswith("optim")]
    if len(found) != 1:
        raise CheckpointError(f"holds no model: {ANCHOR} is in it {len(found)} times", file=folder)
    return found[0]
