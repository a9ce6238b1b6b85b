"""Puts a checkpoint into a Transformer: built on the meta device, each parameter then becomes a view of the file.

Opening costs the headers and the modules (the 671B checkpoint opens in seconds); weights are read from disk when a
forward pass touches them, so a checkpoint may exceed memory. Every name, shape and dtype is checked before anything is
computed. What it gives up: with `dtype` set, converted weights live in memory, whole.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from kvern.checkpoint.header import TensorSpec
from kvern.checkpoint.int4 import INT4_PARTS, INT4_WEIGHT, dequantize_int4, int4_layout
from kvern.checkpoint.quantize import FP8, dequantize, fp8_scale_name, scale_shape
from kvern.checkpoint.reader import CheckpointReader
from kvern.config import Int4Config, ModelConfig
from kvern.errors import CheckpointError
from kvern.model.linear import Linear
from kvern.model.transformer import Transformer

WEIGHT_PARTS = ("weight", "weight_scale_inv", *INT4_PARTS)
FLOATS = (torch.bfloat16, torch.float32)
DERIVED = ".rotary_emb.inv_freq"
"""Some files of the family carry RoPE frequencies; the model computes them from config.json."""


def load(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    activation_dtype: torch.dtype | None = None,
    mtp: bool = False,
) -> Transformer:
    """The model in `folder`, in eval mode and without gradients; its parameters are mapped views of the files.

    dtype: None keeps every weight as stored; float32 or bfloat16 holds all Linear weights in memory in that dtype.
    activation_dtype: what flows between layers; None: `dtype`, or else config.json's torch_dtype. mtp: with the MTP
    layers; False skips their tensors. Raises CheckpointError naming file and tensor when a tensor is missing,
    unexpected, or has another shape or kind than config.json implies.
    """
    with _collector_paused():
        reader = CheckpointReader(folder)
        model = Transformer(reader.config, activation_dtype=activation_dtype or dtype, mtp=mtp)
        loader = _Loader(reader, dtype)
        for prefix, module in model.named_modules():
            loader.fill(prefix + "." if prefix else "", module)
    loader.check_complete(_skipped(reader.config, mtp))
    return model.eval()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection while some 300,000 objects are made that all stay: it would take half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Loader:
    """Fills modules and keeps account of the names that were wanted."""

    def __init__(self, reader: CheckpointReader, dtype: torch.dtype | None) -> None:
        self.reader = reader
        self.dtype = dtype
        self.quantization = reader.config.quantization_config
        self.missing: list[str] = []
        self.used: set[str] = set()

    def fill(self, prefix: str, module: nn.Module) -> None:
        by_hand: tuple[str, ...] = ()
        if isinstance(module, Linear):
            self._fill_linear(prefix, module)
            by_hand = WEIGHT_PARTS
        for key, parameter in module.named_parameters(recurse=False):
            if key not in by_hand and (spec := self._find(prefix + key)) is not None:
                _check_float(spec, parameter)
                setattr(module, key, _parameter(self.reader.tensor(spec.name)))
        for key, buffer in module.named_buffers(recurse=False):
            if (spec := self._find(prefix + key)) is not None:
                _check_float(spec, buffer)
                setattr(module, key, self.reader.tensor(spec.name).to(buffer.dtype))

    def check_complete(self, skipped: tuple[str, ...]) -> None:
        """Raise unless every wanted tensor was there and every other one is known to be of no use."""
        if self.missing:
            raise CheckpointError(
                f"tensor is missing{_and_more(self.missing)}",
                file=self.reader.folder,
                tensor=self.missing[0],
                hint="config.json and the shards must be of the same model, and complete",
            )
        extra = [
            name
            for name in self.reader.names()
            if name not in self.used and not name.startswith(skipped) and not name.endswith(DERIVED)
        ]
        if extra:
            raise CheckpointError(
                f"tensor is not part of the model that config.json describes{_and_more(extra)}",
                file=self.reader.spec(extra[0]).file,
                tensor=extra[0],
            )

    def _find(self, name: str) -> TensorSpec | None:
        if name not in self.reader:
            self.missing.append(name)
            return None
        self.used.add(name)
        return self.reader.spec(name)

    def _fill_linear(self, prefix: str, module: Linear) -> None:
        """A Linear is stored as the file says: 4-bit groups, FP8 with its scales, or a float without."""
        expected_int4 = module.weight_packed is not None and prefix + "weight" not in self.reader
        if prefix + INT4_WEIGHT in self.reader or expected_int4:
            self._fill_int4(prefix, module)
        elif (spec := self._find(prefix + "weight")) is not None:
            self._fill_weight(spec, module)

    def _fill_weight(self, spec: TensorSpec, module: Linear) -> None:
        _check_shape(spec, (module.outputs, module.inputs))
        scale = self._scale(spec)
        weight = self.reader.tensor(spec.name)
        if self.dtype is not None:
            weight, scale = weight.to(self.dtype) if scale is None else dequantize(weight, scale, self.dtype), None
        module.hold(weight, scale)

    def _fill_int4(self, prefix: str, module: Linear) -> None:
        packed, scale, shape = (self._find(prefix + name) for name in INT4_PARTS)
        if packed is None or scale is None or shape is None:
            return
        if not isinstance(self.quantization, Int4Config):
            raise _refused(packed, "weight is 4-bit, but config.json has no quantization_config for that")
        size, group = (module.outputs, module.inputs), self.quantization.group_size
        if module.inputs % group:
            raise _refused(packed, f"{module.inputs} inputs are no multiple of the group size {group}")
        for spec, (dtype, expected) in zip((packed, scale, shape), int4_layout(size, group), strict=True):
            if (spec.dtype, spec.shape) != (dtype, expected):
                raise _refused(spec, f"expected {dtype} {list(expected)}, found {spec.dtype} {list(spec.shape)}")
        tensors = self.reader.tensor(packed.name), self.reader.tensor(scale.name), self.reader.tensor(shape.name)
        if tensors[2].tolist() != list(size):
            raise _refused(shape, f"says {tensors[2].tolist()}, config.json implies {list(size)}")
        if self.dtype is None:
            module.hold_int4(*tensors)
        else:
            module.hold(dequantize_int4(tensors[0], tensors[1], self.dtype))

    def _scale(self, weight: TensorSpec) -> torch.Tensor | None:
        name = fp8_scale_name(self.reader, weight.name)
        if weight.dtype is not FP8:
            if weight.dtype not in FLOATS:
                raise _refused(weight, f"a weight is stored as FP8 E4M3, bfloat16 or float32, not {weight.dtype}")
            if name in self.reader:
                raise _refused(weight, f"{weight.dtype} weight has {name}, which only FP8 has")
            return None
        if self.quantization is None:
            raise _refused(weight, "weight is FP8, but config.json has no quantization_config")
        spec = self._find(name)
        if spec is None:
            return None
        expected = scale_shape(weight.shape)
        if spec.dtype is not torch.float32 or spec.shape != expected:
            raise _refused(spec, f"expected scales float32 {list(expected)}, found {spec.dtype} {list(spec.shape)}")
        return self.reader.tensor(name)


def _skipped(config: ModelConfig, mtp: bool) -> tuple[str, ...]:
    """Prefixes of the tensors that the caller did not ask for."""
    first = config.num_hidden_layers
    layers = () if mtp else range(first, first + config.num_nextn_predict_layers)
    return tuple(f"model.layers.{layer}." for layer in layers)


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _check_float(spec: TensorSpec, expected: torch.Tensor) -> None:
    _check_shape(spec, tuple(expected.shape))
    if spec.dtype not in FLOATS:
        raise _refused(spec, f"stored as bfloat16 or float32 only, not {spec.dtype}")


def _check_shape(spec: TensorSpec, expected: tuple[int, ...]) -> None:
    if spec.shape != expected:
        raise _refused(spec, f"shape is {list(spec.shape)}, config.json implies {list(expected)}")


def _refused(spec: TensorSpec, message: str) -> CheckpointError:
    return CheckpointError(message, file=spec.file, tensor=spec.name)


def _and_more(names: list[str]) -> str:
    """The next few names and how many more there are."""
    if len(names) == 1:
        return ""
    shown = ", ".join(names[1:4])
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f", and so {'is' if len(names) == 2 else 'are'} {shown}{rest}"
