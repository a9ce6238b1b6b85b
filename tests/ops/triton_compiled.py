"""Compile the Triton kernels for cards that are not here, down to machine code: `python -m tests.ops.triton_compiled`.

Prints {kernel, dtypes and compute capability: {"shared": bytes of shared memory, "tensor_cores": bool}}. The sizes are
those of DeepSeek-V3, pointers and rows aligned to 16 bytes, as they are there.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvern.ops import triton_attention, triton_experts, triton_fp8, triton_linear, triton_training

CAPABILITIES = (80, 90)
ALIGNED = [["tt.divisibility", 16]]
TILES = dict.fromkeys(("order_ptr", "expert_ptr", "first_ptr", "end_ptr"), "*i64")
SCALES = {"gate_scale_ptr": "*fp32", "up_scale_ptr": "*fp32"}
ODD = ("M", "R", "C", "D", "V", "E", "H", "heads", "pairs", "top_k", "parts", "table_width", "scale_stride")
ODD += ("scale_rows", "scale_columns")
"""Integers that need not be multiples of 16."""


def kernels(x: str, w: str) -> dict[str, tuple[Any, dict[str, str], dict[str, Any]]]:
    """Name -> (kernel, its pointers' types, its constants) for activations x and weights w."""
    x_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[x]
    tile = triton_linear.tile_of(64, x_dtype, torch.uint8)
    dot = tl.float32 if x == "fp32" else tl.bfloat16
    books = {"tables_ptr": "*i32", "sequence_ptr": "*i64", "seen_ptr": "*i32", "scale": "fp32"}
    parts = {"part_ptr": "*fp32", "log_ptr": "*fp32"}
    a, b = f"*{x}", f"*{w}"
    return {
        "linear": (
            triton_linear._linear_kernel,
            {"out_ptr": a, "x_ptr": a, "w_ptr": b, "scale_ptr": "*fp32", "bias_ptr": a},
            tile,
        ),
        "gate_up": (
            triton_experts._gate_up_kernel,
            {"out_ptr": a, "x_ptr": a, "gate_ptr": b, "up_ptr": b} | SCALES | TILES,
            tile,
        ),
        "down": (
            triton_experts._down_kernel,
            {"out_ptr": a, "inner_ptr": a, "down_ptr": b, "scale_ptr": "*fp32", "weight_ptr": "*fp32"} | TILES,
            tile,
        ),
        "attention": (
            triton_attention._part_kernel,
            parts | {"q_ptr": a, "rows_ptr": a} | books,
            triton_attention.tile_of(512, 64, dot),
        ),
        "merge": (triton_attention._merge_kernel, parts | {"out_ptr": a}, {"PARTS": 4, "RANK": 512}),
    }


def training_kernels(x: str, capability: int) -> dict[str, tuple[Any, dict[str, str], dict[str, Any]]]:
    """Those of a training step, likewise: every pointer that is not in the types is one to activations x."""
    training, fp8 = triton_training, triton_fp8
    row, strip = {"WIDTH": 8192}, {"WIDTH": 1024}
    f32, i64 = "*fp32", "*i64"
    tile = {"BM": 128, "BN": 128, "AXIS": 2, "POWER_OF_TWO": False, "SCALE_BLOCK": 128, "BY_HAND": False}
    numbers = dict.fromkeys(("eps", "first", "second", "decay", "rate", "correction", "smallest", "most"), "fp32")
    found: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
        "norm": (training._rms_norm_kernel, {"inverse_ptr": f32, "weight_ptr": f32}, row),
        "norm_back": (
            training._rms_norm_backward_kernel,
            {"inverse_ptr": f32, "weight_ptr": f32, "dw_ptr": f32},
            row,
        ),
        "swiglu": (training._swiglu_kernel, {}, strip),
        "swiglu_back": (training._swiglu_backward_kernel, {}, strip),
        "rotate": (training._rotate_kernel, {"rotation_ptr": f32}, {"BACK": True, "HEADS": 32, "PAIRS": 32}),
        "combine": (training._combine_kernel, {"weights_ptr": f32, "places_ptr": i64}, strip),
        "combine_back": (
            training._combine_backward_kernel,
            {"dweights_ptr": f32, "weights_ptr": f32, "places_ptr": i64},
            strip,
        ),
        "cross_entropy": (
            training._cross_entropy_kernel,
            {"losses_ptr": f32, "targets_ptr": i64},
            {"GRADIENT": True, "WIDTH": 4096},
        ),
        "adamw": (training._adamw_kernel, {"parameter_ptr": f32, "gradient_ptr": f32}, strip),
        "quantize": (
            fp8._quantize_kernel,
            {"codes_ptr": "*u8", "scale_ptr": f32},
            tile | {"known_ptr": None, "HAS_FP8": capability >= 89},
        ),
        "retile": (
            fp8._quantize_kernel,
            {"codes_ptr": "*u8", "scale_ptr": f32, "known_ptr": f32, "x_ptr": "*u8"},
            tile | {"AXIS": 0, "BN": 64, "HAS_FP8": capability >= 89},
        ),
        "transpose": (fp8._transpose_kernel, {"out_ptr": "*u8", "x_ptr": "*u8"}, {"SIDE": 64}),
    }
    return {
        name: (kernel, {p: f"*{x}" for p in kernel.arg_names if p.endswith("_ptr")} | numbers | types, constants)
        for name, (kernel, types, constants) in found.items()
    }


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> dict[str, Any]:
    """Compile for a card of this compute capability."""
    if types.keys() & {"w_ptr", "down_ptr"} and types.get("w_ptr", types.get("down_ptr")) != "*u8":
        constants = constants | {"scale_ptr": None}
    if "gate_scale_ptr" in kernel.arg_names and types["gate_ptr"] != "*u8":
        constants = constants | dict.fromkeys(SCALES)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (index,): ALIGNED
        for index, name in enumerate(kernel.arg_names)
        if name not in ODD and signature[name] not in ("constexpr", "fp32")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    return {"shared": code.metadata.shared, "tensor_cores": "mma" in code.asm["ptx"], "bytes": len(code.asm["cubin"])}


def main() -> None:
    """Compile every kernel for every capability and print what came out."""
    found = {
        f"{name} {x} {w} sm_{capability}": compiled(*kernel, capability)
        for capability in CAPABILITIES
        for x, w in (("bf16", "u8"), ("bf16", "bf16"), ("fp32", "u8"))
        for name, kernel in kernels(x, w).items()
        if w == "u8" or name not in ("attention", "merge")
    } | {
        f"{name} {x} sm_{capability}": compiled(*kernel, capability)
        for capability in CAPABILITIES
        for x in ("bf16", "fp32")
        for name, kernel in training_kernels(x, capability).items()
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
