"""Block quantisation against the formula written as a loop, and against torch's own reader of the official layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

from kvern.checkpoint import quantize as module
from kvern.checkpoint.quantize import FP8, dequantize, quantize, scale_shape
from kvern.errors import CheckpointError

from .layout import linear_shapes, quantize_by_loop, tiny_config

SHAPES = [(576, 1024), (192, 256), (128, 128), (130, 250), (1, 1), (5, 300)]


def normal(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return 0.06 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_loop(shape: tuple[int, int]) -> None:
    weight = normal(shape)
    quantized, scale = quantize(weight)
    expected, expected_scale = quantize_by_loop(weight)
    assert same_bytes(quantized, expected)
    assert torch.equal(scale, expected_scale)
    assert scale.shape == scale_shape(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantises_exactly(shape: tuple[int, int]) -> None:
    quantized, scale = quantize(normal(shape))
    found = dequantize(quantized, scale)
    for row in range(0, shape[0], 7):
        for column in range(0, shape[1], 13):
            assert found[row, column] == quantized[row, column].float() * scale[row // 128, column // 128]


@pytest.mark.parametrize("shape", SHAPES)
def test_requantising_is_a_fixed_point(shape: tuple[int, int]) -> None:
    quantized, scale = quantize(normal(shape, seed=1))
    again, scale_again = quantize(dequantize(quantized, scale))
    assert same_bytes(again, quantized)
    assert torch.equal(scale_again, scale)


def test_power_of_two_scales() -> None:
    weight = normal((300, 200))
    quantized, scale = quantize(weight, ue8m0=True)
    exponent = scale.log2()
    assert torch.equal(exponent, exponent.round())
    assert torch.equal(exponent, quantize(weight)[1].log2().ceil())
    values = dequantize(quantized, scale)
    assert torch.equal(dequantize(*quantize(values, ue8m0=True)), values)


def test_large_matrices_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal((700, 200))
    quantized, scale = quantize(weight)
    values = dequantize(quantized, scale)
    monkeypatch.setattr(module, "PART_ELEMENTS", 256 * 200)
    assert same_bytes(quantize(weight)[0], quantized)
    assert torch.equal(dequantize(quantized, scale), values)


def test_every_code_is_dequantised() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).view(2, 128)
    found = dequantize(codes, torch.tensor([[2.0]]))
    assert torch.equal(found, codes.float() * 2) or torch.equal(found.isnan(), codes.float().isnan())
    assert found.isnan().sum() == 2
    finite = ~found.isnan()
    assert torch.equal(found[finite], 2 * codes.float()[finite])


def test_blocks_of_zeros_stay_zero() -> None:
    weight = torch.zeros(200, 200)
    weight[150, 150] = 1.0
    quantized, scale = quantize(weight)
    assert torch.equal(dequantize(quantized, scale) > 0.99, weight > 0)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


def test_rows_scaled_by_an_import_keep_every_bit() -> None:
    weight, delta = normal((256, 256)), 2.0**-24
    quantized, scale = quantize(weight * delta)
    assert same_bytes(quantized, quantize(weight)[0])
    assert torch.equal(scale, quantize(weight)[1] * delta)


def test_error_is_what_the_docstring_says() -> None:
    weight = normal((512, 512))
    error = dequantize(*quantize(weight)) - weight
    assert error.pow(2).mean().sqrt() / weight.pow(2).mean().sqrt() == pytest.approx(0.026, abs=0.001)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(value: float) -> None:
    weight = normal((130, 130))
    weight[129, 129] = value
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        quantize(weight)


def test_refuses_other_shapes_and_dtypes() -> None:
    quantized, scale = quantize(normal((130, 130)))
    for weight, scales in ((quantized, scale[:1]), (quantized.float(), scale), (quantized, scale.bfloat16())):
        with pytest.raises(CheckpointError):
            dequantize(weight, scales)
    with pytest.raises(CheckpointError, match="only matrices"):
        quantize(torch.ones(3))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_the_same_weights_from_an_fp8_folder(tiny_fp8: Path, tiny_tensors: dict[str, torch.Tensor]) -> None:
    """Ragged blocks included: torch.distributed.checkpoint has a reader of this layout."""
    names = [f"{name}.weight" for name in linear_shapes(tiny_config())]
    state = {name: torch.empty(tiny_tensors[name].shape) for name in names}
    reader = QuantizedHuggingFaceStorageReader(str(tiny_fp8), target_dtype=torch.float32)
    dcp.load(state, storage_reader=reader, no_dist=True)  # type: ignore[attr-defined]
    for name in names:
        assert torch.equal(state[name], dequantize(*quantize(tiny_tensors[name]))), name
