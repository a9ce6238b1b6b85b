"""The reference ops against their formulas, written out."""

from __future__ import annotations

import math

import pytest
import torch

from kvern.ops import reference

SHAPES = [(128, 128), (576, 256), (130, 250), (192, 256), (1, 1), (7, 300)]


def random_weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantise_is_the_formula_block_by_block(shape: tuple[int, int]) -> None:
    quantised, scale = reference.quantize_blocks(random_weight(*shape))
    dense = reference.dequantize(quantised, scale)
    assert scale.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    for row in range(0, shape[0], 37):
        for column in range(0, shape[1], 41):
            expected = quantised[row, column].float() * scale[row // 128, column // 128]
            assert dense[row, column] == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_requantising_is_a_fixed_point(shape: tuple[int, int], power_of_two: bool) -> None:
    quantised, scale = reference.quantize_blocks(random_weight(*shape), power_of_two)
    again, scale_again = reference.quantize_blocks(reference.dequantize(quantised, scale), power_of_two)
    assert torch.equal(again.view(torch.uint8), quantised.view(torch.uint8))
    assert torch.equal(scale_again, scale)


def test_power_of_two_scales_are_powers_of_two() -> None:
    _, scale = reference.quantize_blocks(random_weight(300, 300), power_of_two=True)
    assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))


def test_a_block_of_zeros_stays_zero_and_finite() -> None:
    quantised, scale = reference.quantize_blocks(torch.zeros(130, 130))
    assert torch.equal(reference.dequantize(quantised, scale), torch.zeros(130, 130))
    assert scale[0, 0] == torch.tensor(1e-4) / 448


def test_quantising_errs_by_at_most_half_a_step() -> None:
    weight = random_weight(256, 256)
    error = (reference.dequantize(*reference.quantize_blocks(weight)) - weight).abs()
    assert (error / weight.abs()).median() < 2**-4
    assert error.max() <= weight.abs().max() / 448 * 16


def test_route_keeps_the_bias_out_of_the_weights_and_masks_with_minus_infinity() -> None:
    x, weight = torch.eye(1, 4), torch.zeros(8, 4)
    weight[:, 0] = torch.tensor([2.0, 1.0, 0.5, 0.1, -3.0, -4.0, 3.0, -9.0])
    bias = torch.tensor([-2.0, -2.0, -2.0, -2.0, -2.5, -2.5, -2.5, -2.5])
    weights, experts = reference.route(x, weight, bias, 3, 2, 1, True, 2.5)
    assert sorted(experts[0].tolist()) == [0, 1, 2]
    scores = torch.sigmoid(weight[experts[0], 0])
    torch.testing.assert_close(weights[0], scores / scores.sum() * 2.5)


def test_ties_between_groups_and_experts_choose_distinct_experts() -> None:
    weights, experts = reference.route(torch.ones(3, 4), torch.zeros(16, 4), torch.zeros(16), 4, 4, 2, True, 1.0)
    for row in experts:
        assert len(set(row.tolist())) == 4
        assert len({expert // 4 for expert in row.tolist()}) <= 2
    torch.testing.assert_close(weights, torch.full((3, 4), 0.25))


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_latent_attention_is_multi_query_attention(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(tokens, 3, 12, generator=generator)
    latent = torch.randn(20, 12, generator=generator)
    expected = torch.empty(tokens, 3, 8)
    for t in range(tokens):
        seen = latent[: 20 - tokens + t + 1]
        expected[t] = (q[t] @ seen.T * 0.3).softmax(-1) @ seen[:, :8]
    torch.testing.assert_close(reference.latent_attention(q, latent, 8, 0.3), expected)
    monkeypatch.setattr(reference, "QUERY_ROWS", 1)
    torch.testing.assert_close(reference.latent_attention(q, latent, 8, 0.3), expected)


@pytest.mark.parametrize(("tokens", "key", "value"), [(20, 12, 8), (20, 8, 12), (6, 12, 8), (1, 8, 8)])
def test_causal_attention_sees_the_last_rows(tokens: int, key: int, value: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(tokens, 3, key, generator=generator)
    k, v = torch.randn(20, 3, key, generator=generator), torch.randn(20, 3, value, generator=generator)
    expected = torch.empty(tokens, 3, value)
    for t in range(tokens):
        last = 20 - tokens + t + 1
        scores = torch.einsum("hk,chk->hc", q[t], k[:last]) * 0.3
        expected[t] = torch.einsum("hc,chv->hv", scores.softmax(-1), v[:last])
    torch.testing.assert_close(reference.causal_attention(q, k, v, 0.3), expected)
