"""Products with packed weights against double precision, for every kind, and in every form of the kernels."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.test_native import PARITY, instruction_sets, run_with_isa
from torch import Tensor

from kvern import ops
from kvern.errors import KvernError
from kvern.ops import packed
from kvern.ops.packed import Kind, Packed

pytestmark = pytest.mark.skipif(not packed.available(), reason="the kernels were not built")

FP8 = torch.float8_e4m3fn
KINDS = (Kind.F32, Kind.BF16, Kind.E4M3, Kind.INT4, Kind.INT4_TURNED)
SHAPES = ((1, 1), (7, 5), (16, 32), (17, 33), (130, 191), (300, 384), (50, 1024))
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 5e-7}
"""Bounds as a share of sum |x||w|: FP32 counts with 16 bits of mantissa where BF16 pairs are multiplied."""


@dataclass(frozen=True)
class Case:
    """A packed weight and the same numbers in FP64."""

    weight: Packed
    dense: Tensor


def make(kind: Kind, n: int, k: int, seed: int = 0, group: int = 32) -> Case:
    generator = torch.Generator().manual_seed(seed)
    if kind is Kind.F32:
        weight = torch.randn(n, k, generator=generator)
        return Case(packed.pack(weight), weight.double())
    if kind is Kind.BF16:
        weight = torch.randn(n, k, generator=generator).bfloat16()
        return Case(packed.pack(weight), weight.double())
    if kind is Kind.E4M3:
        codes = torch.randint(0, 256, (n, k), generator=generator, dtype=torch.uint8)
        codes[codes & 0x7F == 0x7F] = 1  # no NaN; 1 is subnormal
        scale = torch.rand(-(-n // 128), -(-k // 128), generator=generator) + 0.1
        weight = codes.view(FP8)
        return Case(packed.pack(weight, scale), ops.reference.dequantize(weight, scale).double())
    if kind is Kind.INT4_TURNED:
        n, k = k, n
    k = -(-k // group) * group
    words = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), generator=generator, dtype=torch.int32)
    scale = (torch.rand(n, k // group, generator=generator) + 0.1).bfloat16()
    dense = ops.dequantize_int4(words, scale, torch.float32).double()
    if kind is Kind.INT4_TURNED:
        return Case(packed.pack_int4_turned(words, scale), dense.T)
    return Case(packed.pack_int4(words, scale), dense)


def check(case: Case, x: Tensor, activations: torch.dtype) -> Tensor:
    got = packed.multiply(x, case.weight, activations=activations)
    rounded = x.to(activations).double()
    expected, bound = rounded @ case.dense.T, rounded.abs() @ case.dense.abs().T
    assert torch.all((got - expected).abs() <= ROUNDED[activations] * bound + 1e-30)
    return got


@pytest.mark.parametrize("activations", ROUNDED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_right_and_a_row_does_not_depend_on_the_others(
    kind: Kind, shape: tuple[int, int], activations: torch.dtype
) -> None:
    case = make(kind, *shape)
    x = torch.randn(40, case.weight.k, generator=torch.Generator().manual_seed(1))
    together = check(case, x, activations)
    for rows in (1, 2, 3, 5, 6, 7, 11, 12, 13, 25):
        assert torch.equal(packed.multiply(x[:rows], case.weight, activations=activations), together[:rows])
    assert torch.equal(packed.multiply(x[39:], case.weight, activations=activations), together[39:])


@pytest.mark.parametrize("kind", KINDS)
def test_subnormal_numbers_count_alike_in_every_form(kind: Kind) -> None:
    case = make(kind, 33, 256)
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)) * 2.0**-125
    together = packed.multiply(x, case.weight, activations=torch.bfloat16)
    for rows in (1, 2, 3, 4, 5, 11):
        assert torch.equal(packed.multiply(x[:rows], case.weight, activations=torch.bfloat16), together[:rows])


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    m=st.integers(1, 30),
    group=st.sampled_from((32, 128)),
    seed=st.integers(0, 1000),
)
def test_any_shape(kind: Kind, n: int, k: int, m: int, group: int, seed: int) -> None:
    case = make(kind, n, k, seed, group)
    x = torch.randn(m, case.weight.k, generator=torch.Generator().manual_seed(seed))
    check(case, x, torch.float32)


def test_every_code_of_e4m3_counts_with_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 0x7F != 0x7F].view(FP8)
    weight = packed.pack(codes[:, None].contiguous(), torch.ones(2, 1))
    got = packed.multiply(torch.tensor([[1.0], [-0.5]]), weight)
    assert torch.equal(got, torch.stack([codes.float(), codes.float() * -0.5]))


def test_a_nan_among_the_codes_stays_in_its_row() -> None:
    weight = torch.ones(20, 140).to(FP8)
    weight.view(torch.uint8)[3, 131] = 0x7F
    one = packed.pack(weight, torch.full((1, 2), 2.0))
    assert one.kind is Kind.F32
    got = packed.multiply(torch.ones(1, 140), one)[0]
    assert got.isnan().nonzero().flatten().tolist() == [3]
    assert got[4] == 280


def test_rows_scaled_by_a_power_far_from_one_survive() -> None:
    """Exact imports scale rows by 2^-24 beside rows that are not."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight[:16] *= 2.0**-24
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    got, expected = packed.multiply(x, packed.pack(weight.bfloat16())), x @ weight.bfloat16().float().T
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_a_selection_matrix_becomes_picks(dtype: torch.dtype) -> None:
    weight = torch.zeros(150, 200)
    weight[torch.arange(150), (torch.arange(150) * 7) % 200] = 2.0
    weight[5] = 0
    scale = torch.full((2, 2), 0.5) if dtype == FP8 else None
    one = packed.pack(weight.to(dtype), scale, find_picks=True)
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    bias = torch.arange(150.0)
    assert one.kind is Kind.PICKS
    assert torch.equal(packed.multiply(x, one, bias), x @ weight.T * (0.5 if scale is not None else 1) + bias)
    weight[7, :2] = 1
    assert packed.pack(weight.to(dtype), scale, find_picks=True).kind is not Kind.PICKS


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(KvernError, match="in groups of 16 cannot be packed"):
        packed.pack_int4(torch.zeros(4, 4, dtype=torch.int32), torch.ones(4, 2).bfloat16())
    with pytest.raises(KvernError, match="in groups of 16 rows cannot be packed"):
        packed.pack_int4_turned(torch.zeros(4, 4, dtype=torch.int32), torch.ones(4, 2).bfloat16())
    with pytest.raises(KvernError, match="cannot be packed"):
        packed.pack(torch.zeros(4, 4).to(FP8))


def test_a_hash_sees_every_byte() -> None:
    data = torch.randint(0, 256, (3_000_001,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first = packed.content_hash(data)
    assert packed.content_hash(data.clone()) == first
    for at in (0, 1_500_000, 3_000_000):
        data[at] ^= 1
        assert packed.content_hash(data) != first
        data[at] ^= 1
    assert packed.content_hash(data[:-1]) != first


@pytest.mark.skipif("KVERN_ISA" in os.environ, reason="already forced")
@pytest.mark.parametrize("name", instruction_sets())
def test_each_instruction_set(name: str) -> None:
    model = Path(__file__).parents[1] / "model" / "test_packed.py"
    done = run_with_isa(name, "-c", PARITY, __file__, str(model))
    assert json.loads(done.stdout.splitlines()[-1]) == {"isa": name, "code": 0}, done.stdout[-3000:]
