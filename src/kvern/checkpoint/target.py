"""Which tensors of the V3 layout a dtype covers, and how one of them becomes FP8 or 4 bits when its turn comes.

FP8 covers what the official checkpoint has in FP8, the Linear weights of the layers, and the head on demand. 4-bit
covers the same, but for those whose columns the group does not divide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch

from kvern.checkpoint.header import TensorSpec
from kvern.checkpoint.int4 import INT4_WEIGHT, Int4Weight
from kvern.checkpoint.quantize import FP8, SCALE_SUFFIX, QuantizedWeight, Rows, scale_shape
from kvern.checkpoint.save import PlannedTensor
from kvern.config import Int4Config, Quantization
from kvern.errors import ConfigError
from kvern.ops.reference_int4 import PER_WORD

DType = Literal["fp8", "bf16", "f32", "int4"]
FLOAT_OF = {"fp8": torch.bfloat16, "bf16": torch.bfloat16, "f32": torch.float32, "int4": torch.bfloat16}

LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.\w+_proj(_with_mqa)?|mlp\.(\w+\.)*(gate|up|down)_proj)\.weight")
HEAD = re.compile(r"lm_head\.weight|model\.layers\.\d+\.shared_head\.head\.weight")
OTHER_LINEAR = re.compile(r"model\.layers\.\d+\.(eh_proj|mlp\.gate)\.weight")
GATE_BIAS = re.compile(r".*\.e_score_correction_bias")
LATENT_NORM = re.compile(r".*\.(q|kv)_a_layernorm\.weight")


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


def weight_name(name: str) -> str:
    """The name that a tensor has in a float checkpoint: that of the weight for a 4-bit one."""
    return name.removesuffix("_packed") if name.endswith("." + INT4_WEIGHT) else name


def float_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of the weight that a tensor stores."""
    if not spec.name.endswith("." + INT4_WEIGHT):
        return spec.shape
    rows, words = spec.shape
    return rows, words * PER_WORD


def packed_tensors(
    name: str, shape: tuple[int, ...], group_size: int, read: Callable[[], torch.Tensor]
) -> list[PlannedTensor]:
    """A weight in 4 bits, its scales and its shape."""
    rows, columns = shape
    return Int4Weight(name.removesuffix(".weight"), (rows, columns), group_size, read).tensors()


def quantized_tensors(
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
