"""The Triton kernels: parity under the interpreter and on a card, compilation for cards, registration."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ops.test_paged_attention import make

from kvern import ops
from kvern.ops import reference, triton_backends

ROOT = Path(__file__).parents[2]
CASES = (
    "linear_float32_times_float32",
    "linear_float32_times_bfloat16",
    "linear_float32_times_float8_e4m3fn",
    "linear_bfloat16_times_float32",
    "linear_bfloat16_times_bfloat16",
    "linear_bfloat16_times_float8_e4m3fn",
    "linear_decodes_every_code",
    "linear_keeps_nan_in_its_row",
    "linear_takes_slices_and_empty_tensors",
    "linear_leaves_the_rest_to_the_reference",
    "experts_float32_times_float32",
    "experts_float32_times_bfloat16",
    "experts_float32_times_float8_e4m3fn",
    "experts_bfloat16_times_float32",
    "experts_bfloat16_times_bfloat16",
    "experts_bfloat16_times_float8_e4m3fn",
    "experts_all_tokens_to_one",
    "experts_no_tokens",
    "experts_same_bits_every_time",
    "attention_float32",
    "attention_bfloat16",
    "attention_sizes_of_models",
    "attention_more_parts_than_rows",
    "attention_splits_long_contexts",
    "attention_of_large_scores",
    "attention_without_queries",
    "training_rms_norm",
    "training_swiglu",
    "training_rotate",
    "training_combine",
    "training_cross_entropy",
    "training_adamw",
    "fp8_codes_and_scales_are_the_references",
    "fp8_every_number_goes_to_the_nearest_code",
    "fp8_tiles_again",
    "fp8_transposed",
)
"""Names in `triton_cases`, which imports Triton and so cannot be imported here."""

PRODUCTS = ("linear", "gate_up", "down", "attention")
"""Kernels that multiply matrices."""

SMALLEST_SHARED = 99 * 1024
"""Bytes of shared memory that a program may have on compute capability 8.6 and 8.9; 8.0 and 9.0 have more."""

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install kvern[gpu]")


def run(module: str, **variables: str) -> dict[str, Any]:
    """What a module of the tests prints, run in a process of its own."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **variables}
    done = subprocess.run(
        [sys.executable, "-m", module], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@cache
def interpreted() -> Mapping[str, str | None]:
    """Case -> its error, of one run of all cases."""
    return run("tests.ops.triton_cases", TRITON_INTERPRET="1")


@needs_triton
def test_all_cases_are_listed() -> None:
    assert tuple(sorted(interpreted())) == tuple(sorted(CASES))


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_parity_under_the_interpreter(name: str) -> None:
    error = interpreted()[name]
    assert error is None, error


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_parity_on_a_card(name: str) -> None:
    torch.manual_seed(0)
    import_module("tests.ops.triton_cases").CASES[name]("cuda")


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_ops_on_a_card_use_the_kernels() -> None:
    case = make([40, 3])
    books = case.tables.cuda(), case.contexts.cuda(), case.starts.cuda()
    out = ops.paged_latent_attention(case.q.cuda(), case.rows.cuda(), *books, case.block_size, case.rank, case.scale)
    expected = reference.paged_latent_attention(*case.arguments())
    torch.testing.assert_close(out.cpu(), expected)


@needs_triton
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the compiler for cards comes for x86 only")
def test_every_kernel_compiles_for_cards(tmp_path: Path) -> None:
    """Machine code without a card: BF16 on tensor cores, FP32 not, and no more shared memory than small cards have."""
    found = run("tests.ops.triton_compiled", TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 26 + 48
    for name, kernel in found.items():
        assert kernel["bytes"] > 0, name
        assert kernel["shared"] <= SMALLEST_SHARED, name
        assert kernel["tensor_cores"] == ("bf16" in name and name.split()[0] in PRODUCTS), name


def test_importing_the_ops_does_not_import_triton(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise AssertionError('imported')\n")
    script = (
        "from kvern import ops, checkpoint\n"
        "names = ops.linear, ops.grouped_experts, ops.paged_latent_attention, ops.rms_norm\n"
        "print(*(op.backend('cuda') for op in names))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["triton_linear", "triton_experts", "triton_attention", "reference"], done.stderr


def test_nothing_is_registered_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backends, "find_spec", lambda name: None)
    assert triton_backends.backends("linear") == {}


def test_grouped_experts_equal_the_sum_over_a_tokens_experts() -> None:
    torch.manual_seed(0)
    gate, up, down = torch.randn(5, 12, 8), torch.randn(5, 12, 8), torch.randn(5, 8, 12)
    x, shares, chosen = torch.randn(6, 8), torch.rand(6, 2), torch.rand(6, 5).topk(2).indices
    expected = torch.zeros(6, 8)
    for token in range(6):
        for share, expert in zip(shares[token], chosen[token].tolist(), strict=True):
            inner = reference.swiglu(gate[expert] @ x[token], up[expert] @ x[token])
            expected[token] += share * (down[expert] @ inner)
    torch.testing.assert_close(ops.grouped_experts(x, shares, chosen, gate, up, down), expected)
    assert ops.grouped_experts(x[:0], shares[:0], chosen[:0], gate, up, down).shape == (0, 8)
