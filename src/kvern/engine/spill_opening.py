"""Opens the disk's side of an engine's cache, and says which rows on the disk are right for it.

    name of a block on the disk = keyed hash of (validity, its chained hash), in which the salt is

`validity` covers all that makes rows right: the checkpoint's state, layers and dtype of the rows, block size, and
what computes them, for kernels of another instruction set, another build and another version round differently. What
differs in any of that has other names, is not found and goes when room is needed. It gives up: a folder that moves to
another machine may be cold there.
"""

from __future__ import annotations

import hashlib
import json
import logging

import torch

from kvern import __version__
from kvern.engine.disk_cache import DiskCache, file_bytes
from kvern.engine.runner import Runner
from kvern.engine.settings import EngineSettings
from kvern.engine.spill import Spill, block_records
from kvern.errors import ConfigError
from kvern.model import PackedTransformer
from kvern.ops import library

FORMAT = 1

log = logging.getLogger(__name__)


def open_spill(settings: EngineSettings, runner: Runner, identity: str) -> Spill | None:
    """The disk's side of the runner's cache; None where the settings have none, or, with a warning, where it fails.

    identity: which weights the model has. Raises ConfigError where that is missing or the bound holds not one block.
    """
    if settings.cache_dir is None:
        return None
    if not identity:
        raise ConfigError("a cache on disk needs to know which weights the model has", param="cache_dir")
    layers = len(runner.cache.rows) if runner.mtp else runner.model.config.num_hidden_layers
    payload = block_records(runner.cache, layers)[:, 0].size
    if file_bytes(payload) > settings.cache_disk_bytes:
        raise ConfigError(
            f"cache_disk_bytes {settings.cache_disk_bytes} holds not one block of {file_bytes(payload)} bytes",
            param="cache_disk_bytes",
        )
    try:
        disk = DiskCache(settings.cache_dir, settings.cache_disk_bytes, payload)
    except OSError as error:
        log.warning("there is no prefix cache on disk: %s", error)
        return None
    return Spill(disk, runner.cache, layers, validity(runner, identity))


def validity(runner: Runner, identity: str) -> bytes:
    """32 bytes that differ wherever rows of one engine may not be those of another."""
    model, rows = runner.model, runner.cache.rows
    weights = None if isinstance(model, PackedTransformer) else str(next(model.parameters()).dtype)
    what = {
        "format": FORMAT,
        "kvern": __version__,
        "torch": torch.__version__,
        "kernels": [library.isa(), library.fingerprint()],
        "model": type(model).__name__,
        "weights": weights,
        "activations": str(model.activation_dtype),
        "checkpoint": identity,
        "config": repr(model.config),
        "rows": [str(rows.dtype), len(rows), rows.shape[-1]],
        "mtp": runner.mtp,
        "block": runner.cache.block_size,
    }
    return hashlib.blake2b(json.dumps(what).encode(), digest_size=32).digest()
