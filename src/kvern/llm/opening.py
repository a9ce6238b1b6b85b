"""From a checkpoint folder to a model that is ready to compute: packed where the kernels and the memory allow it.

Packed, weights stay as they are stored and `dtype` is what the products' activations are rounded to; "auto" is BF16
where the CPU multiplies BF16 pairs, else FP32, which costs nothing more there. A checkpoint that does not fit into
memory runs from its own files, mapped, and so does everything on machines without kernels; then "auto" is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

import torch

from kvern.checkpoint.load import load
from kvern.checkpoint.packed import packed_transformer
from kvern.checkpoint.save import Progress
from kvern.config import ModelConfig
from kvern.engine.dtype import choose
from kvern.errors import ConfigError
from kvern.model import Model
from kvern.ops import library, packed
from kvern.plan.hardware import machine
from kvern.plan.memory import account

Dtype: TypeAlias = Literal["auto", "bf16", "f32"]
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def open_model(
    folder: Path, dtype: Dtype = "auto", *, mtp: bool = False, pack: bool = True, progress: Progress | None = None
) -> Model:
    """Load the checkpoint in `folder`; `pack` False: always from its own files.

    `progress(done, total, what)` counts bytes while it is packed for the first time.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of auto, {', '.join(DTYPES)}, not {dtype!r}")
    config = ModelConfig.load(folder)
    if pack and packed.available() and account(config).checkpoint_bytes < machine().memory_available:
        activations = DTYPES.get(dtype) or (torch.bfloat16 if packed.order() == "pairs" else torch.float32)
        model = packed_transformer(load(folder, activation_dtype=activations, mtp=mtp), folder, _packing(progress))
        library.read_bandwidth(model.model.model.embed_tokens.weight)  # so that look-ups, at random, meet mapped pages
        return model
    if dtype == "auto":
        choice = choose(config)
        return load(folder, dtype=choice.weight_dtype, activation_dtype=choice.activation_dtype, mtp=mtp)
    return load(folder, dtype=DTYPES[dtype], mtp=mtp)


def _packing(progress: Progress | None) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total, weight: progress(done, total, f"packing {weight}")
