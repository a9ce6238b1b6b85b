"""The CPU kernels against the reference, over one table of shapes, on every instruction set of this CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvern import ops
from kvern.ops import library, native, reference
from kvern.plan.hardware import machine

pytestmark = pytest.mark.skipif(library.library() is None, reason=str(library.why_absent()))

FP8 = torch.float8_e4m3fn
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, FP8)
SHAPES = ((1, 1), (1, 300), (3, 5), (130, 250), (256, 128), (40, 2050))
ROWS = (1, 2, 3, 4, 7, 16, 33, 129)
TOLERANCE = 2e-6
"""Of sum |x||w|, for a product accumulated in FP32."""

BF16_HALF_ULP = 2.0**-8


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = library.threads()
    library.set_threads(request.param)
    yield request.param
    library.set_threads(before)


def make(rows: int, n: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x [rows, k], weight [n, k], its scale or None, bias [n]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    weight = torch.randn(n, k, generator=generator)
    bias = torch.randn(n, generator=generator)
    if dtype is FP8:
        quantised, scale = reference.quantize_blocks(weight)
        return x, quantised, scale, bias
    return x, weight.to(dtype), None, bias


def exact(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x W^T + b, sum |x||w| + |b|) in double precision."""
    dense = (reference.dequantize(weight, scale) if scale is not None else weight.float()).double()
    y, bound = x.double() @ dense.T, x.double().abs() @ dense.T.abs()
    return (y, bound) if bias is None else (y + bias.double(), bound + bias.double().abs())


def check(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    y = native.linear(x, weight, scale, bias)
    expected, bound = exact(x, weight, scale, bias)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], len(weight))
    allowed = TOLERANCE * bound if x.dtype is torch.float32 else TOLERANCE * bound + BF16_HALF_ULP * expected.abs()
    assert ((y.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear_equals_the_reference(n: int, k: int, dtype: torch.dtype, threads: int) -> None:
    for rows in ROWS:
        x, weight, scale, bias = make(rows, n, k, dtype)
        check(x, weight, scale, bias)
        check(x, weight, scale, None)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_bfloat16_activations_and_biases(dtype: torch.dtype) -> None:
    for rows in (1, 3, 8):
        x, weight, scale, bias = make(rows, 130, 250, dtype)
        check(x.bfloat16(), weight, scale, bias.bfloat16())


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 20),
    n=st.integers(1, 150),
    k=st.integers(1, 400),
    dtype=st.sampled_from(WEIGHT_DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows: int, n: int, k: int, dtype: torch.dtype, seed: int) -> None:
    x, weight, scale, bias = make(rows, n, k, dtype, seed)
    check(x, weight, scale, bias)
    if scale is not None:
        assert torch.equal(native.dequantize(weight, scale), reference.dequantize(weight, scale))


def all_codes() -> tuple[Tensor, Tensor]:
    """Every E4M3 code once in each of 256 rows, at another place in each; scales of different sizes."""
    codes = (torch.arange(256)[:, None] + torch.arange(256)).remainder(256).to(torch.uint8)
    return codes.view(FP8), torch.tensor([[1.0, 2.0**-24], [3e-5, 0.7]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_is_dequantised_bit_for_bit(dtype: torch.dtype, threads: int) -> None:
    codes, scale = all_codes()
    for columns in (256, 250, 65):
        ours = native.dequantize(codes[:, :columns], scale[:, : -(-columns // 128)], dtype)
        theirs = reference.dequantize(codes[:, :columns], scale[:, : -(-columns // 128)], dtype)
        assert ours.dtype is dtype
        bits = torch.int32 if dtype is torch.float32 else torch.int16
        finite = ~theirs.isnan()
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours[finite].view(bits), theirs[finite].view(bits))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_every_code_is_multiplied(rows: int) -> None:
    codes, scale = all_codes()
    numbers = codes.clone()
    numbers.view(torch.uint8)[codes.float().isnan()] = 0
    for column in range(0, 256, 5):  # a unit vector reads one column, subnormal codes included
        x = torch.zeros(rows, 256)
        x[:, column] = 1.0
        expected = reference.dequantize(numbers, scale)[:, column].expand(rows, -1)
        assert torch.allclose(native.linear(x, numbers, scale), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("column", [0, 70, 200, 249])
def test_a_nan_code_makes_its_output_nan_and_no_other(rows: int, column: int) -> None:
    x, weight, scale, _ = make(rows, 131, 250, FP8)
    for code in (0x7F, 0xFF):
        damaged = weight.clone()
        damaged.view(torch.uint8)[7, column] = code
        damaged.view(torch.uint8)[130, column] = code
        is_nan = native.linear(x, damaged, scale).isnan()
        assert is_nan[:, [7, 130]].all()
        assert is_nan.sum() == 2 * rows


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_tiny_weights_survive(rows: int) -> None:
    x, weight, _, _ = make(rows, 70, 300, torch.float32)
    for factor in (2.0**-24, 2.0**-120, 2.0**-130):  # the last are BF16 subnormals
        tiny = (weight * factor).bfloat16()
        assert (tiny != 0).sum() > 0.9 * tiny.numel()
        y, (expected, bound) = native.linear(x, tiny), exact(x, tiny, None, None)
        # below 2^-126 a product itself rounds to a multiple of 2^-149
        assert ((y.double() - expected).abs() <= TOLERANCE * bound + 300 * 2.0**-149).all()
        assert (y != 0).any()
    small, scale = reference.quantize_blocks(weight * 2.0**-24, smallest_amax=1e-30)
    check(x, small, scale, None)


def test_infinities_and_nans_of_x_pass_through() -> None:
    x, weight, scale, _ = make(1, 20, 130, FP8)
    x[0, 3] = float("inf")
    assert torch.equal(native.linear(x, weight, scale), reference.linear(x, weight, scale))


@pytest.mark.parametrize("rows", [1, 5])
def test_nothing_of_an_earlier_call_leaks_into_the_padding(rows: int) -> None:
    x, weight, scale, bias = make(rows, 20, 256, FP8)
    native.linear(torch.full_like(x, float("inf")), weight, scale)
    check(x[:, :70].contiguous(), weight[:, :70], None if scale is None else scale[:, :1], bias)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_views_need_no_copy_and_batches_keep_their_shape(dtype: torch.dtype) -> None:
    x, weight, scale, _ = make(6, 256, 384, dtype)
    part = None if scale is None else scale[1:, :2]
    check(x[:, :256].view(2, 3, 256), weight[128:, :256], part, None)  # a slice of rows and columns
    check(x.T.contiguous().T, weight, scale, None)
    check(x[0], weight, scale, None)


def test_empty_tensors() -> None:
    assert native.linear(torch.empty(0, 8), torch.empty(4, 8)).shape == (0, 4)
    assert torch.equal(native.linear(torch.empty(2, 0), torch.empty(3, 0)), torch.zeros(2, 3))
    assert native.dequantize(torch.empty(0, 8, dtype=FP8), torch.empty(0, 1)).shape == (0, 8)


def test_gradients_go_through_the_reference() -> None:
    x, weight, _, bias = make(2, 8, 16, torch.float32)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(native.linear(x, weight, None, bias).sum(), x)
    assert torch.allclose(gradient, weight.sum(0).expand(2, -1))


def test_other_dtypes_and_layouts_go_through_the_reference() -> None:
    x, weight, _, _ = make(2, 8, 16, torch.float32)
    assert torch.equal(native.linear(x.double(), weight.double()), reference.linear(x.double(), weight.double()))
    transposed = weight.T.contiguous().T
    assert torch.equal(native.linear(x, transposed), reference.linear(x, transposed))


def test_wrong_shapes_raise_what_the_reference_raises() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        native.linear(torch.ones(1, 5), torch.ones(4, 6))


def test_it_is_registered() -> None:
    assert ops.linear.backend("cpu") == "native"
    assert ops.dequantize.backend("cpu") == "native"


def test_calls_from_several_threads() -> None:
    x, weight, scale, _ = make(1, 700, 512, FP8)
    expected = native.linear(x, weight, scale)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            if not torch.equal(native.linear(x, weight, scale), expected):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_a_forked_child_computes_too() -> None:
    script = """
import os, torch
from kvern.ops import library, native
library.set_threads(2)
x, w = torch.ones(1, 512), torch.ones(4096, 512)
assert (native.linear(x, w) == 512).all()
child = os.fork()
if child == 0:
    os._exit(0 if (native.linear(x, w) == 512).all() and library.threads() == 2 else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


PARITY = """
import json, pathlib, sys
import pytest
from kvern.ops import library
rules = ["-q", "-x", "-p", "no:cacheprovider", "-k", "not instruction_set and not forked"]
code = pytest.main([*rules, *sys.argv[1:]])
print(json.dumps({"isa": library.isa(), "code": int(code)}))
"""


def instruction_sets() -> list[str]:
    """Those of this CPU beside the one under test, which the other tests cover."""
    flags = machine().isa
    sets = {
        "scalar": True,
        "avx2": {"avx2", "fma", "f16c"} <= set(flags),
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512vbmi"} <= set(flags),
        "avx512bf16": {"avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512_bf16"} <= set(flags),
        "amx": {"avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512_bf16", "amx_bf16", "amx_tile"} <= set(flags),
    }
    return [name for name, present in sets.items() if present and name != library.isa()]


def run_with_isa(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KVERN_ISA": name}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.skipif("KVERN_ISA" in os.environ, reason="already forced")
@pytest.mark.parametrize("name", instruction_sets())
def test_each_instruction_set_passes_the_tests_of_the_kernels(name: str) -> None:
    names = (
        "test_paged_attention.py",
        "test_expanded_attention.py",
        "test_latent8.py",
        "test_sampling.py",
        "test_native_fp8.py",
        "test_document_attention.py",
    )
    done = run_with_isa(name, "-c", PARITY, __file__, *(str(Path(__file__).with_name(one)) for one in names))
    assert json.loads(done.stdout.splitlines()[-1]) == {"isa": name, "code": 0}, done.stdout[-3000:]


def test_an_unknown_instruction_set_is_refused() -> None:
    done = run_with_isa("sse9", "-c", "import kvern.ops")
    assert done.returncode != 0
    assert "KVERN_ISA=sse9: no such instruction set" in done.stderr
