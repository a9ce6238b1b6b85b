"""4-bit groups against the layout's formula, against the compressed-tensors library, and the promises of the search."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvern.checkpoint.int4 import (
    FACTORS,
    Int4Weight,
    dequantize_int4,
    int4_layout,
    quantize_int4,
    search_scales,
    squared_error,
    stored_scale,
)
from kvern.errors import CheckpointError
from kvern.ops.reference_int4 import linear_int4, pack_int4, unpack_int4


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(weight: torch.Tensor, group: int) -> float:
    packed, scale = quantize_int4(weight, group)
    return float((dequantize_int4(packed, scale) - weight.float()).norm() / weight.float().norm())


def test_golden_words() -> None:
    """word = sum (q_i + 8) * 16^i, written out: the first value is the lowest nibble, -8 is nibble 0."""
    values = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7], [7, 7, 7, 7, 7, 7, 7, 7], [-8] * 8, [0] * 8])
    words = [0xFEA98710, 0xFFFFFFFF, 0x00000000, 0x88888888]
    expected = torch.tensor([word - (1 << 32) if word >= 1 << 31 else word for word in words], dtype=torch.int32)
    assert torch.equal(pack_int4(values), expected[:, None])
    assert torch.equal(unpack_int4(expected[:, None]), values.to(torch.int8))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_packing_is_undone_by_unpacking(rows: int, words: int, seed: int) -> None:
    values = torch.randint(-8, 8, (rows, 8 * words), generator=torch.Generator().manual_seed(seed))
    packed = pack_int4(values)
    assert packed.dtype is torch.int32
    assert packed.shape == (rows, words)
    assert torch.equal(unpack_int4(packed), values.to(torch.int8))
    by_formula = torch.stack([(values[:, i::8].long() + 8) << (4 * i) for i in range(8)]).sum(0)
    assert torch.equal(packed.long() & 0xFFFFFFFF, by_formula)


@pytest.mark.parametrize("group", [32, 128])
def test_the_library_packs_and_unpacks_the_same(group: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, pack_to_int32
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    weight = normal(24, 256).bfloat16()
    packed, scale = quantize_int4(weight, group)
    assert torch.equal(pack_to_int32(unpack_int4(packed), 4), packed)
    arguments = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    state = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    restored = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(restored, dequantize_int4(packed, scale, torch.bfloat16))
    again = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    assert torch.equal(again["weight_shape"], state["weight_shape"])
    differing = unpack_int4(again["weight_packed"]) != unpack_int4(packed)
    assert differing.float().mean() < 0.02  # the library divides in BF16, which moves near-ties


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.sampled_from([32, 64, 128]), st.integers(0, 2**31), st.floats(-30, 8), st.booleans())
def test_the_search_is_never_worse_than_the_plain_scale(
    count: int, group: int, seed: int, exponent: float, outlier: bool
) -> None:
    groups = normal(count, group, seed=seed) * 2.0**exponent
    if outlier:
        groups[:, 3] *= 40
    found = search_scales(groups)
    assert torch.equal(found, found.bfloat16().float())
    plain = squared_error(groups, stored_scale(groups.abs().amax(-1) / 7))
    assert (squared_error(groups, found) <= plain).all()


def test_the_search_beats_the_plain_scale_and_smaller_groups_beat_larger() -> None:
    weight = normal(64, 512)
    groups = weight.reshape(-1, 32)
    plain = squared_error(groups, stored_scale(groups.abs().amax(-1) / 7)).sum()
    assert squared_error(groups, search_scales(groups)).sum() < 0.75 * plain
    assert relative_error(weight, 32) < 0.085
    assert relative_error(weight, 32) < relative_error(weight, 128) < 0.105
    assert 7.0 in FACTORS


@pytest.mark.parametrize("group", [32, 128])
def test_selection_matrices_are_exact(group: int) -> None:
    for matrix in (torch.eye(256), torch.zeros(8, 256), -torch.eye(256) * 2.0**-24, torch.ones(3, 256)):
        packed, scale = quantize_int4(matrix, group)
        assert torch.equal(dequantize_int4(packed, scale), matrix)


def test_rows_scaled_by_an_import_lose_nothing_to_it() -> None:
    weight = normal(48, 256)
    packed, scale = quantize_int4(weight, 32)
    scaled, small = quantize_int4(weight * 2.0**-24, 32)
    assert torch.equal(scaled, packed)
    assert torch.equal(small.float(), scale.float() * 2.0**-24)


def test_parts_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(37, 128)
    whole = quantize_int4(weight, 32)
    monkeypatch.setattr("kvern.checkpoint.int4.PART_ELEMENTS", 300)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize_int4(weight, 32), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_four_bits_cannot_hold(value: float) -> None:
    weight = normal(4, 64)
    weight[2, 5] = value
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        quantize_int4(weight, 32)
    with pytest.raises(CheckpointError, match=r"a\.b\.weight: weight holds NaN"):
        Int4Weight("a.b", (4, 64), 32, lambda: weight).packed()


@pytest.mark.parametrize("shape", [(4, 48), (64,), (2, 4, 32)])
def test_shapes_without_groups(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="has no groups of 32 columns"):
        quantize_int4(torch.zeros(shape), 32)


def test_a_planned_weight_is_three_tensors_and_lets_its_scales_go() -> None:
    weight = normal(6, 64)
    made: list[int] = []

    def make() -> torch.Tensor:
        made.append(1)
        return weight

    planned = Int4Weight("m.up_proj", (6, 64), 32, make).tensors()
    assert [tensor.name for tensor in planned] == [
        "m.up_proj.weight_packed",
        "m.up_proj.weight_scale",
        "m.up_proj.weight_shape",
    ]
    assert tuple((tensor.dtype, tensor.shape) for tensor in planned) == int4_layout((6, 64), 32)
    tensors = [tensor.make() for tensor in planned]
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
    expected = (*quantize_int4(weight, 32), torch.tensor([6, 64]))
    assert all(torch.equal(found, wanted) for found, wanted in zip(tensors, expected, strict=True))  # type: ignore[arg-type]
    assert len(made) == 1
    planned[1].make()
    assert len(made) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 5)])
def test_the_product_is_that_of_the_dequantised_weight(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    packed, scale = quantize_int4(normal(40, 96), 32)
    x, bias = normal(*leading, 96, seed=1).to(dtype), normal(40, seed=2)
    dense = torch.stack(
        [torch.stack([((packed[n, k // 8] >> (4 * (k % 8))) & 15) - 8 for k in range(96)]) for n in range(40)]
    ).float() * scale.float().repeat_interleave(32, 1)
    expected = torch.nn.functional.linear(x, dense.to(dtype), bias.to(dtype))
    found = linear_int4(x, packed, scale, bias)
    assert found.dtype is dtype
    assert torch.equal(found, expected)
