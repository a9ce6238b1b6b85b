"""Tiles to codes and back by the kernels, against the reference bit for bit: any shape, tile, dtype and magnitude."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvern.ops import native_fp8, native_training, reference, reference_fp8
from kvern.ops.fp8_linear import COLUMN_TILE, ROW_TILE, SMALLEST_AMAX, WEIGHT_BLOCK

pytestmark = pytest.mark.skipif(native_training.kernels() is None, reason="no native library")
TILES = [ROW_TILE, COLUMN_TILE, WEIGHT_BLOCK]


def spread(rows: int, columns: int, seed: int) -> Tensor:
    """Numbers of very different sizes, some zero."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-40, 20, (rows, 1), generator=generator).float())
    x = (
        torch.randn(rows, columns, generator=generator)
        * size
        * torch.exp(3 * torch.randn(1, columns, generator=generator))
    )
    return torch.where(torch.rand(rows, columns, generator=generator) < 0.1, 0.0, x)


def bytes_of(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 1200),
    tile=st.sampled_from([*TILES, (3, 5), (1, 512)]),
    power_of_two=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
def test_codes_and_scales_are_the_references(
    rows: int, columns: int, tile: tuple[int, int], power_of_two: bool, dtype: torch.dtype, seed: int
) -> None:
    x = spread(rows, columns, seed).to(dtype)
    codes, scale = native_fp8.quantize_tiles(x, tile, power_of_two, SMALLEST_AMAX)
    expected, expected_scale = reference.quantize_tiles(x, tile, power_of_two, SMALLEST_AMAX)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(bytes_of(codes), bytes_of(expected))
    if tile in TILES:
        assert torch.equal(native_fp8.dense(codes, scale), reference_fp8.dense(codes, scale))
        assert torch.equal(native_fp8.dense(codes.T, scale.T), reference_fp8.dense(codes.T, scale.T))


def test_every_number_goes_to_the_nearest_code() -> None:
    """Every BF16 number up to 448 in size, and the middles between codes."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    numbers = numbers[numbers.abs() <= 448]
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat([numbers, (codes[1:] + codes[:-1]) / 2, torch.tensor([448.0])])[None]
    x = torch.cat([x, x.new_full((1, -x.shape[1] % 128), 448.0)], 1).view(-1, 128).clone()
    x[:, 0] = 448.0  # so that every scale is one
    got, scale = native_fp8.quantize_tiles(x, ROW_TILE, False, SMALLEST_AMAX)
    assert torch.equal(scale, torch.ones_like(scale))
    assert torch.equal(bytes_of(got), bytes_of(x.to(torch.float8_e4m3fn)))


@pytest.mark.parametrize("scale_columns", [1, 3, 300])
def test_all_codes_become_their_numbers(scale_columns: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 2)[:, :300].contiguous().view(torch.float8_e4m3fn)
    for scale in (torch.full((3, scale_columns), 2.0), torch.full((1, scale_columns), 2.0**-130)):
        got, expected = native_fp8.dense(codes, scale), reference_fp8.dense(codes, scale)
        assert torch.equal(torch.isnan(got), torch.isnan(expected))
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_tile(bad: float, tile: tuple[int, int]) -> None:
    x = spread(140, 300, 1)
    x[130, 200] = bad
    got = native_fp8.dense(*native_fp8.quantize_tiles(x, tile, True, SMALLEST_AMAX))
    expected = reference_fp8.dense(*reference.quantize_tiles(x, tile, True, SMALLEST_AMAX))
    assert torch.equal(torch.isnan(got), torch.isnan(expected))
    assert torch.isnan(got[130, 200])
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


def test_rows_apart_and_rows_in_each_other() -> None:
    wide = spread(64, 400, 2)
    for x in (wide[:, 100:300], wide[:1, 7:].expand(50, 393), wide[:, :1], wide.T):
        codes, scale = native_fp8.quantize_tiles(x, ROW_TILE, False, SMALLEST_AMAX)
        expected, expected_scale = reference.quantize_tiles(x, ROW_TILE, False, SMALLEST_AMAX)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(bytes_of(codes), bytes_of(expected))
        assert torch.equal(native_fp8.dense(codes[3:40], scale[3:40]), reference_fp8.dense(codes[3:40], scale[3:40]))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_nothing(shape: tuple[int, int]) -> None:
    codes, scale = native_fp8.quantize_tiles(torch.zeros(shape), ROW_TILE, False, SMALLEST_AMAX)
    assert codes.shape == native_fp8.dense(codes, scale).shape == shape


def test_one_scale_for_a_wide_tensor() -> None:
    codes, scale = reference.quantize_tiles(spread(9, 1300, 3), (9, 1300), False, SMALLEST_AMAX)
    assert torch.equal(native_fp8.dense(codes, scale), reference_fp8.dense(codes, scale))
