"""The loaded model is the file, mapped: transformers' numbers, no copies, and every mismatch refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from kvern.checkpoint.convert import convert
from kvern.checkpoint.load import load
from kvern.checkpoint.reader import CheckpointReader
from kvern.errors import CheckpointError
from kvern.model import ForwardBatch
from kvern.model.linear import Linear

from .layout import quantize_by_loop, quantized_tensors, tiny_config, write_folder

Tensors = dict[str, torch.Tensor]
TOKENS = [5, 17, 300, 2, 2, 99, 151]
MLP = "model.layers.0.mlp.gate_proj.weight"


@torch.no_grad()
def logits(folder: Path, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
    found: torch.Tensor = load(folder, dtype=dtype)(ForwardBatch.of(TOKENS))
    return found


@torch.no_grad()
def transformers_logits(folder: Path) -> torch.Tensor:
    oracle = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found: torch.Tensor = oracle(torch.tensor([TOKENS])).logits[0]
    return found


def test_logits_equal_transformers_on_the_same_folder(tiny_bf16: Path) -> None:
    expected = transformers_logits(tiny_bf16)
    assert (logits(tiny_bf16) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_fp8_logits_equal_transformers_on_the_dequantised_weights(tiny_fp8: Path, tmp_path: Path) -> None:
    """transformers itself cannot dequantise ragged blocks, so it reads our conversion to float32."""
    convert(tiny_fp8, tmp_path / "f32", dtype="f32")
    expected = transformers_logits(tmp_path / "f32")
    assert (logits(tiny_fp8) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_weights_are_views_of_the_file(tiny_fp8: Path) -> None:
    mapped = _mapped_ranges(tiny_fp8)
    assert not mapped
    model = load(tiny_fp8, mtp=True)
    mapped = _mapped_ranges(tiny_fp8)
    for name, parameter in model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in mapped), name
        assert not parameter.requires_grad
    assert not model.training


def test_stored_dtypes_are_kept_or_converted(tiny_fp8: Path) -> None:
    stored = load(tiny_fp8).state_dict()
    assert stored[MLP].dtype is torch.float8_e4m3fn
    assert stored["model.norm.weight"].dtype is torch.bfloat16
    for dtype in (torch.float32, torch.bfloat16):
        model = load(tiny_fp8, dtype=dtype)
        linears = [module for module in model.modules() if isinstance(module, Linear)]
        assert {module.dtype for module in linears} == {dtype}
        assert all(module.weight_scale_inv is None for module in linears)
        assert model.activation_dtype is dtype


def test_mtp_layers_only_when_asked_for(tiny_fp8: Path) -> None:
    with_mtp, without = load(tiny_fp8, mtp=True), load(tiny_fp8)
    assert set(with_mtp.state_dict()) == set(CheckpointReader(tiny_fp8).names())
    assert not any(name.startswith("model.layers.3.") for name in without.state_dict())


def test_a_head_in_fp8_is_loaded_as_one(tmp_path: Path, tiny_tensors: Tensors) -> None:
    tensors = quantized_tensors(tiny_config(), tiny_tensors)
    tensors["lm_head.weight"], tensors["lm_head.weight_scale_inv"] = quantize_by_loop(tiny_tensors["lm_head.weight"])
    model = load(write_folder(tmp_path, tiny_config(fp8=True), tensors))
    assert model.lm_head.dtype is torch.float8_e4m3fn
    assert model.lm_head.weight_scale_inv is not None


def test_derived_rope_frequencies_are_ignored(tmp_path: Path, tiny_tensors: Tensors) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    load(write_folder(tmp_path, tiny_config(), tiny_tensors | extra))


Change = Callable[[Tensors], None]


def without(*names: str) -> Change:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def added(name: str, tensor: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


SCALE = f"{MLP}_scale_inv"
NORM = "model.norm.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(NORM), f"{NORM}: tensor is missing"),
        (without(BIAS, NORM), f"{BIAS}: tensor is missing, and so is {NORM}"),
        (without(MLP, SCALE, NORM), f"{MLP}: tensor is missing, and so is {NORM}"),
        (without(SCALE), f"{SCALE}: tensor is missing"),
        (added("model.extra.weight", torch.ones(2)), "model.extra.weight: tensor is not part of the model"),
        (added("lm_head.bias", torch.ones(2)), "lm_head.bias: tensor is not part of the model"),
        (changed(MLP, lambda t: t[:-1]), f"{MLP}: shape is [319, 192], config.json implies [320, 192]"),
        (changed(MLP, lambda t: t.view(torch.uint8).float().half()), f"{MLP}: a weight is stored as"),
        (changed(MLP, lambda t: t.view(torch.uint8).bfloat16()), f"{MLP}: torch.bfloat16 weight has {SCALE}"),
        (changed(SCALE, lambda t: t[:-1]), f"{SCALE}: expected scales float32 [3, 2], found torch.float32 [2, 2]"),
        (changed(SCALE, lambda t: t.bfloat16()), f"{SCALE}: expected scales float32"),
        (changed(NORM, lambda t: t.half()), f"{NORM}: stored as bfloat16 or float32 only"),
        (changed(NORM, lambda t: t[:5]), f"{NORM}: shape is [5]"),
        (changed(BIAS, lambda t: t.to(torch.int32)), f"{BIAS}: stored as bfloat16 or float32 only"),
        (changed("model.embed_tokens.weight", lambda t: t[1:]), "model.embed_tokens.weight: shape is [319, 192]"),
    ],
)
def test_mismatches_name_the_tensor(tmp_path: Path, tiny_tensors: Tensors, change: Change, said: str) -> None:
    tensors = quantized_tensors(tiny_config(), tiny_tensors)
    change(tensors)
    with pytest.raises(CheckpointError) as caught:
        load(write_folder(tmp_path, tiny_config(fp8=True), tensors))
    assert said in caught.value.message
    assert str(tmp_path) in caught.value.message


def test_fp8_weights_need_a_quantization_config(tmp_path: Path, tiny_tensors: Tensors) -> None:
    folder = write_folder(tmp_path, tiny_config(), quantized_tensors(tiny_config(), tiny_tensors))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_a_proj\.weight: .* no quantization_config"):
        load(folder)


def test_many_missing_tensors_are_counted(tmp_path: Path, tiny_tensors: Tensors) -> None:
    config = replace(tiny_config(), num_hidden_layers=4, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"tensor is not part of the model .* more"):
        load(write_folder(tmp_path / "a", config, tiny_tensors))
    config = replace(tiny_config(), num_hidden_layers=5, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"layers\.4\..*: tensor is missing, and so are .* and \d+ more"):
        load(write_folder(tmp_path / "b", config, tiny_tensors))


def _mapped_ranges(folder: Path) -> list[tuple[int, int]]:
    """Address ranges of this process that map files of `folder`."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            start, end = line.split()[0].split("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges
