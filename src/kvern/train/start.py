"""A model to train, begun from a checkpoint folder: FP32 masters of whatever form the weights are stored in.

FP8 with block scales, 4-bit groups, BF16 and F32 become float32, tensor by tensor, MTP layers included; FP8 exactly, so
that what training leaves alone is quantised to the same bytes again. Exact imports of Llama and Qwen2 models come in
the form that trains (`imported`). Names stay the checkpoint's. Other models need not be read whole: `weights.fill`
reads what a rank holds.

What it gives up: `open_masters` has the whole model in memory in float32, 4 bytes a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kvern.checkpoint.load import load
from kvern.checkpoint.reader import CheckpointReader
from kvern.config import ModelConfig
from kvern.errors import CheckpointError
from kvern.model import Transformer
from kvern.model.linear import Linear
from kvern.train.imported import unscale


def master_config(config: ModelConfig) -> ModelConfig:
    """config.json of the masters: float32, nothing quantised."""
    return replace(config, torch_dtype="float32", quantization_config=None)


def open_stored(folder: Path) -> Transformer:
    """The model in `folder`, mapped, in the form that the file has.

    Raises CheckpointError naming file and tensor where the folder is not what its config.json says, and where it has
    lost its MTP layers.
    """
    _check_mtp(CheckpointReader(folder))
    return load(folder, mtp=True)


def open_masters(source: Path | Transformer, *, activation_dtype: torch.dtype = torch.bfloat16) -> Transformer:
    """The model in a folder, or what `open_stored` gave: on the CPU, all parameters float32 and its own."""
    stored = source if isinstance(source, Transformer) else open_stored(source)
    model = Transformer(master_config(stored.config), activation_dtype=activation_dtype)
    model.load_state_dict(dict(_masters(stored)), assign=True)
    unscale(model)
    return model


def _masters(stored: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the float layout in float32, copied out of the file."""
    for prefix, module in stored.named_modules():
        if isinstance(module, Linear):
            yield f"{prefix}.weight", _copied(module.dense(torch.float32))
            if module.bias is not None:
                yield f"{prefix}.bias", _copied(module.bias)
            continue
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            yield f"{prefix}.{name}", _copied(tensor)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True)


def _check_mtp(reader: CheckpointReader) -> None:
    """transformers saves no MTP layer and keeps the number of them in config.json."""
    first, count = reader.config.num_hidden_layers, reader.config.num_nextn_predict_layers
    for layer in range(first, first + count):
        if not any(name.startswith(f"model.layers.{layer}.") for name in reader.names()):
            raise CheckpointError(
                f"config.json promises {count} MTP layer(s), and model.layers.{layer} is not there",
                file=reader.folder,
                hint="begin from the original, or train without: set num_nextn_predict_layers to 0 in config.json",
            )
