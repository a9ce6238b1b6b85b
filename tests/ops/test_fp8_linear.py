"""FP8 training: each of the three products against a loop over K-blocks in float64, and what happens at the edges."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvern.ops import Fp8Recipe, fp8_codes, fp8_hopper, fp8_linear, reference_fp8, scaled_product
from kvern.ops.fp8_linear import COLUMN_TILE, ROW_TILE, SMALLEST_AMAX, WEIGHT_BLOCK, retile
from kvern.ops.reference import quantize_tiles

SHAPES = [(128, 128, 128), (130, 250, 300), (5, 576, 7), (1, 1, 1), (257, 129, 40)]
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are computed faster by one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def formula(x: Tensor, tile: tuple[int, int], power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """(x / s as E4M3 in float64, s of every number in float64): each tile by itself, in slices."""
    codes, scales = torch.empty(x.shape, dtype=torch.float64), torch.empty(x.shape, dtype=torch.float64)
    for row in range(0, x.shape[0], tile[0]):
        for column in range(0, x.shape[1], tile[1]):
            part = (slice(row, row + tile[0]), slice(column, column + tile[1]))
            scale = x[part].abs().max().clamp(min=SMALLEST_AMAX) / 448
            if power_of_two:
                scale = torch.tensor(2.0) ** torch.ceil(torch.log2(scale.double())).float()
            codes[part] = (x[part] / scale).clamp(-448, 448).to(FP8).double()
            scales[part] = scale.double()
    return codes, scales


def block_loop(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """a b^T, the codes of 128 columns multiplied first, then the scales of that block, in float64."""
    (left, left_scale), (right, right_scale) = a, b
    out = torch.zeros(len(left), len(right), dtype=torch.float64)
    for first in range(0, left.shape[1], 128):
        k = slice(first, first + 128)
        out += (left[:, k] @ right[:, k].T) * left_scale[:, first, None] * right_scale[None, :, first]
    return out


def transposed(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].T, pair[1].T


def three_products(x: Tensor, weight: Tensor, dy: Tensor, recipe: Fp8Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dw) of `fp8_linear`."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = fp8_linear(x, weight, recipe=recipe)
    torch.autograd.backward(y, dy)
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
def test_each_product_is_the_loop_over_blocks(tokens: int, inputs: int, outputs: int, power_of_two: bool) -> None:
    x, weight, dy = randn(tokens, inputs), randn(outputs, inputs), randn(tokens, outputs)
    x[0, 0], dy[-1, 0] = 900.0, -300.0
    y, dx, dw = three_products(x, weight, dy, Fp8Recipe(power_of_two))

    x_rows, blocks = formula(x, ROW_TILE, power_of_two), formula(weight, WEIGHT_BLOCK)
    cached = (x_rows[0] * x_rows[1]).float()
    x_columns, dy_columns = formula(cached, COLUMN_TILE, power_of_two), formula(dy, COLUMN_TILE)
    expected = (
        (y, x_rows, blocks),
        (dx, formula(dy, ROW_TILE), transposed(blocks)),
        (dw, transposed(dy_columns), transposed(x_columns)),
    )
    for got, left, right in expected:
        size = block_loop((left[0].abs(), left[1]), (right[0].abs(), right[1]))
        assert ((got.double() - block_loop(left, right)).abs() / size.clamp(min=1e-30)).max() < 3e-6


def test_all_codes_multiply_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)[None]
    one = torch.ones(1, 2)
    for index in range(256):
        value = codes[0, index].float()
        row = torch.zeros(1, 256, dtype=torch.uint8).view(FP8)
        row[0, index] = torch.tensor(1.0).to(FP8)
        alone = torch.where(torch.arange(256) == index, codes.float(), 0.0).to(FP8)
        got = scaled_product(alone, one * 0.5, row, one * 4.0)[0, 0]
        assert torch.isnan(got) if torch.isnan(value) else got == value * 2.0


def test_codes_quantise_to_themselves() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    finite = codes[~torch.isnan(codes.float())].float()[None]
    quantised, scale = quantize_tiles(finite, ROW_TILE, True, SMALLEST_AMAX)
    assert torch.equal(reference_fp8.dense(quantised, scale), finite)


@pytest.mark.parametrize("recipe", [Fp8Recipe(), Fp8Recipe(False), Fp8Recipe(tensorwise=True)])
def test_near_the_exact_products(recipe: Fp8Recipe) -> None:
    x, weight, dy = randn(96, 320), randn(200, 320), randn(96, 200)
    exact = (x @ weight.T, dy @ weight, dy.T @ x)
    for got, expected in zip(three_products(x, weight, dy, recipe), exact, strict=True):
        assert (got - expected).norm() / expected.norm() < 0.05
        assert torch.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.998


def test_one_scale_for_all_loses_what_is_far_below_an_outlier() -> None:
    x, weight, dy = randn(128, 256), randn(64, 256), randn(128, 64)
    x[3, 7] = 1e6
    exact = (x @ weight.T)[4:]
    blockwise = three_products(x, weight, dy, Fp8Recipe())[0][4:]
    tensorwise = three_products(x, weight, dy, Fp8Recipe(tensorwise=True))[0][4:]
    assert (blockwise - exact).norm() / exact.norm() < 0.05
    assert (tensorwise - exact).norm() / exact.norm() > 0.5


def test_zero_blocks_and_zero_gradients() -> None:
    x, weight = randn(130, 300), randn(140, 300)
    x[:, 128:256], weight[:128] = 0.0, 0.0
    y, dx, dw = three_products(x, weight, torch.zeros(130, 140), Fp8Recipe())
    assert torch.equal(y[:, :128], torch.zeros(130, 128))
    assert not dx.any()
    assert not dw.any()


def test_tiny_gradients_are_not_flushed() -> None:
    x, weight, dy = randn(64, 128), randn(32, 128), randn(64, 32)
    _, dx, dw = three_products(x, weight, dy, Fp8Recipe())
    _, tiny_dx, tiny_dw = three_products(x, weight, dy * 2.0**-60, Fp8Recipe())
    assert torch.equal(tiny_dx, dx * 2.0**-60)
    assert torch.equal(tiny_dw, dw * 2.0**-60)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_visible(bad: float) -> None:
    x, weight, dy = randn(3, 300), randn(5, 300), randn(3, 5)
    broken = x.clone()
    broken[1, 140] = bad
    y, _, dw = three_products(broken, weight, dy, Fp8Recipe())
    assert torch.isnan(y[1]).all()
    assert torch.isfinite(y[[0, 2]]).all()
    assert torch.isnan(dw[:, 140]).all()
    assert torch.isnan(three_products(x, weight, torch.full_like(dy, bad), Fp8Recipe())[1]).all()


def test_powers_of_two_make_tiling_again_free() -> None:
    x = randn(256, 256)
    errors = []
    for recipe in (Fp8Recipe(power_of_two=True), Fp8Recipe(power_of_two=False)):
        rows = recipe.quantize(x, ROW_TILE, recipe.power_of_two)
        before = reference_fp8.dense(*rows)
        errors.append(float((reference_fp8.dense(*retile(*rows, recipe)) - before).norm() / before.norm()))
    assert errors[0] < 1e-6
    assert 0.01 < errors[1] < 0.05


def test_what_waits_for_the_backward_pass_is_a_byte_a_number() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, weight = randn(256, 256).requires_grad_(), randn(256, 256).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        fp8_linear(x, weight)
    assert sum(t.numel() for t in kept if t.element_size() == 1) == 2 * 256 * 256
    assert sum(t.numel() for t in kept if t.element_size() > 1) == 2 * 256 + 2 * 2


def test_bf16_bias_and_leading_dimensions() -> None:
    x, weight, bias = randn(2, 3, 40).bfloat16().requires_grad_(), randn(7, 40), randn(7).requires_grad_()
    y = fp8_linear(x, weight.requires_grad_(), bias)
    torch.autograd.backward(y.float().sum())
    assert y.shape == (2, 3, 7)
    assert y.dtype is torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype is torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype is torch.float32
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((7,), 6.0))


def test_no_tokens() -> None:
    y, dx, dw = three_products(torch.empty(0, 130), randn(5, 130), torch.empty(0, 5), Fp8Recipe())
    assert y.shape == (0, 5)
    assert dx.shape == (0, 130)
    assert torch.equal(dw, torch.zeros(5, 130))


@settings(max_examples=10)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300), st.booleans())
def test_padding_for_a_card_changes_nothing(rows: int, depth: int, outputs: int, tiles: bool) -> None:
    left = quantize_tiles(randn(rows, depth), ROW_TILE, False, SMALLEST_AMAX)
    right = quantize_tiles(randn(outputs, depth), ROW_TILE if tiles else WEIGHT_BLOCK, False, SMALLEST_AMAX)
    a, a_scale, b, b_scale = fp8_hopper.padded(*left, *right)
    assert (a.shape[0] % 16, a.shape[1] % 128, b.shape[0] % 128, b.shape[1] % 128) == (0, 0, 0, 0)
    got = scaled_product(a, a_scale, b, b_scale)[:rows, :outputs]
    torch.testing.assert_close(got, scaled_product(*left, *right), rtol=1e-5, atol=1e-4)
    tiles = tiles and outputs > 1
    left_scale, right_scale = fp8_hopper.torch_scales(a_scale, b_scale, not tiles)
    assert left_scale.stride(0) == 1
    assert right_scale.stride(0) == 1
    wanted = (b.shape[0], b.shape[1] // 128) if tiles else (-(-b.shape[1] // 512) * 4, b.shape[0] // 128)
    assert right_scale.shape == wanted
    a, a_scale, b, b_scale = (tensor.to("meta") for tensor in (a, a_scale, b, b_scale))
    accepted = fp8_hopper.torch_product(a, a_scale, b, b_scale, not tiles, torch.float32)
    assert accepted.shape == (a.shape[0], b.shape[0])


@pytest.mark.parametrize("recipe", [Fp8Recipe(), Fp8Recipe(power_of_two=False), Fp8Recipe(tensorwise=True)])
def test_given_codes_are_the_ones_it_would_make(recipe: Fp8Recipe) -> None:
    gradients: list[list[Tensor]] = []
    data, weights, dy = randn(3, 50, 200), (randn(130, 200), randn(130, 200)), randn(3, 50, 130)
    for is_shared in (False, True):
        x, gate, up = (one.clone().requires_grad_() for one in (data, *weights))
        codes = fp8_codes(x, recipe) if is_shared else None
        y = fp8_linear(x, gate, None, recipe, codes) * fp8_linear(x, up, None, recipe, codes)
        torch.autograd.backward(y, dy)
        gradients.append([y.detach(), *(one.grad for one in (x, gate, up) if one.grad is not None)])
    assert len(gradients[0]) == 4
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [*SHAPES, (640, 1024, 768), (4096, 7168, 2048)])
def test_the_three_products_on_a_card(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Against the emulation: the same codes, but sums that tensor cores keep with about 14 bits within a block."""
    x, weight, dy = randn(tokens, inputs).to(dtype), randn(outputs, inputs), randn(tokens, outputs).to(dtype)
    x[0, 0], dy[-1, 0] = 900.0, -300.0
    on_card = three_products(x.cuda(), weight.cuda(), dy.cuda(), Fp8Recipe())
    for got, expected in zip(on_card, three_products(x, weight, dy, Fp8Recipe()), strict=True):
        assert got.dtype is expected.dtype
        error = (got.cpu().double() - expected.double()).norm() / expected.double().norm()
        assert error < (2e-3 if dtype is torch.float32 else 4e-3), float(error)
