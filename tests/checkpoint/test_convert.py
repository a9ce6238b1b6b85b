"""Conversions against the formulas, byte for byte where nothing is to change, and across a real kill -9."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvern.checkpoint.convert import convert, plan_conversion
from kvern.checkpoint.load import load
from kvern.checkpoint.reader import CheckpointReader
from kvern.checkpoint.target import DType
from kvern.config import ModelConfig, QuantizationConfig
from kvern.errors import CheckpointError, ConfigError, KvernError, UnsupportedModelError

from .layout import (
    linear_shapes,
    official_layout,
    other_shapes,
    quantize_by_loop,
    quantized_tensors,
    random_tensors,
    tiny_config,
    write_folder,
)

Tensors = dict[str, torch.Tensor]
LINEARS = [f"{name}.weight" for name in linear_shapes(tiny_config())]
OTHERS = list(other_shapes(tiny_config()))
HEADS = ("lm_head.weight", "model.layers.3.shared_head.head.weight")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def same(a: CheckpointReader, b: CheckpointReader, names: list[str]) -> bool:
    return all(bytes(a.raw(name)) == bytes(b.raw(name)) and a.spec(name).dtype is b.spec(name).dtype for name in names)


def converted(src: Path, dst: Path, dtype: DType | None, **options: bool) -> CheckpointReader:
    convert(src, dst, dtype=dtype, **options)  # type: ignore[arg-type]
    load(dst, mtp=True)
    return CheckpointReader(dst)


def test_bf16_to_fp8(tiny_bf16: Path, tmp_path: Path, tiny_tensors: Tensors) -> None:
    source, found = CheckpointReader(tiny_bf16), converted(tiny_bf16, tmp_path / "out", "fp8")
    for name in LINEARS:
        weight, scale = quantize_by_loop(tiny_tensors[name])
        assert torch.equal(found.tensor(name).view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(found.tensor(f"{name}_scale_inv"), scale)
    assert same(found, source, OTHERS)
    assert {spec.name: (spec.shape, spec.dtype) for spec in found.specs()} == official_layout(found.config)
    assert found.config == tiny_config(fp8=True)


@pytest.mark.parametrize(("dtype", "target"), [("bf16", torch.bfloat16), ("f32", torch.float32)])
def test_fp8_to_floats(tiny_fp8: Path, tmp_path: Path, dtype: DType, target: torch.dtype) -> None:
    source, found = CheckpointReader(tiny_fp8), converted(tiny_fp8, tmp_path / "out", dtype)
    assert set(found.names()) == {*LINEARS, *OTHERS}
    for name in LINEARS:
        weight, scale = source.tensor(name), source.tensor(f"{name}_scale_inv")
        rows, columns = torch.arange(weight.shape[0]) // 128, torch.arange(weight.shape[1]) // 128
        assert torch.equal(found.tensor(name), (weight.float() * scale[rows][:, columns]).to(target))
    for name in OTHERS:
        assert torch.equal(found.tensor(name).float(), source.tensor(name).float())
    assert found.config.quantization_config is None
    assert {found.spec(name).dtype for name in OTHERS if "bias" not in name} == {target}


def test_through_f32_and_back_every_byte_is_the_same(tiny_fp8: Path, tmp_path: Path) -> None:
    converted(tiny_fp8, tmp_path / "f32", "f32")
    source, back = CheckpointReader(tiny_fp8), converted(tmp_path / "f32", tmp_path / "fp8", "fp8")
    assert set(back.names()) == set(source.names())
    assert same(back, source, source.names())
    assert back.config == source.config


@pytest.mark.parametrize("dtype", ["fp8", None])
def test_fp8_stays_as_it_is(tiny_fp8: Path, tmp_path: Path, dtype: DType | None) -> None:
    source, found = CheckpointReader(tiny_fp8), converted(tiny_fp8, tmp_path / "out", dtype)
    assert same(found, source, source.names())
    assert [
        {spec.name for spec in reader.specs() if spec.file == file} for reader in (found,) for file in reader.files()
    ] == [{spec.name for spec in source.specs() if spec.file == file} for file in source.files()]


def test_one_shard_for_one_shard(tiny_bf16: Path, tmp_path: Path) -> None:
    source, found = CheckpointReader(tiny_bf16), converted(tiny_bf16, tmp_path / "out", "fp8")
    for before, after in zip(source.files(), found.files(), strict=True):
        names = {spec.name for spec in source.specs() if spec.file == before}
        assert {s.name.removesuffix("_scale_inv") for s in found.specs() if s.file == after} == names


def test_head_in_fp8(tiny_bf16: Path, tiny_fp8: Path, tmp_path: Path, tiny_tensors: Tensors) -> None:
    for src in (tiny_bf16, tiny_fp8):
        found = converted(src, tmp_path / src.name, "fp8", head_fp8=True)
        for head in HEADS:
            weight, scale = quantize_by_loop(tiny_tensors[head])
            assert torch.equal(found.tensor(head).view(torch.uint8), weight.view(torch.uint8))
            assert torch.equal(found.tensor(f"{head}_scale_inv"), scale)
        back = converted(tmp_path / src.name, tmp_path / f"{src.name}-back", "bf16")
        assert {back.spec(head).dtype for head in HEADS} == {torch.bfloat16}


def test_power_of_two_scales_are_written_and_declared(tiny_bf16: Path, tmp_path: Path) -> None:
    found = converted(tiny_bf16, tmp_path / "out", "fp8", ue8m0=True)
    assert found.config.quantization_config == QuantizationConfig(scale_fmt="ue8m0")
    for name in LINEARS:
        exponent = found.tensor(f"{name}_scale_inv").log2()
        assert torch.equal(exponent, exponent.round())


def test_modules_not_to_convert_keep_their_dtype(tmp_path: Path, tiny_tensors: Tensors) -> None:
    kept = "kv_a_proj_with_mqa"
    config = replace(tiny_config(), quantization_config=QuantizationConfig(modules_to_not_convert=(kept,)))
    folder = write_folder(tmp_path / "src", config, tiny_tensors)
    found = converted(folder, tmp_path / "out", "fp8")
    for name in LINEARS:
        assert found.spec(name).dtype is (torch.bfloat16 if kept in name else torch.float8_e4m3fn)
    assert found.config == config


def test_an_imported_model_does_not_mix_scaled_and_plain_rows_in_a_block(tmp_path: Path) -> None:
    config = replace(tiny_config(), qk_nope_head_dim=0)
    src = write_folder(tmp_path / "src", config, random_tensors(config))
    found = converted(src, tmp_path / "out", "fp8")
    assert found.config.quantization_config == QuantizationConfig(modules_to_not_convert=("kv_a_proj_with_mqa",))
    assert found.spec("model.layers.0.self_attn.kv_a_proj_with_mqa.weight").dtype is torch.bfloat16


def test_f32_latent_norms_and_gate_bias_stay_f32(tmp_path: Path, tiny_tensors: Tensors) -> None:
    config = replace(tiny_config(), torch_dtype="float32")
    src = write_folder(tmp_path / "src", config, {name: t.float() + 1e-7 for name, t in tiny_tensors.items()})
    for dtype in ("bf16", "fp8"):
        source, found = CheckpointReader(src), converted(src, tmp_path / dtype, dtype)
        kept = [name for name in OTHERS if re.search(r"(q_a|kv_a)_layernorm|e_score", name)]
        assert same(found, source, kept)
        assert {found.spec(name).dtype for name in OTHERS if name not in kept} == {torch.bfloat16}
        assert found.config.torch_dtype == "bfloat16"


def test_files_beside_the_weights_go_along(tiny_fp8: Path, copied: Callable[[Path], Path], tmp_path: Path) -> None:
    src = copied(tiny_fp8)
    carried = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE-MODEL", "merges.txt"}
    for name in (*carried, "pytorch_model.bin", "modeling.py", "README.md", "pytorch_model.bin.index.json"):
        (src / name).write_text(name)
    convert(src, tmp_path / "out", dtype="bf16")
    new = {file.name for file in (tmp_path / "out").iterdir() if not file.name.endswith("safetensors")}
    assert new == carried | {"config.json", "conversion.json", "model.safetensors.index.json"}
    assert all((tmp_path / "out" / name).read_text() == name for name in carried)


def test_memory_is_bounded_by_a_tensor(tmp_path: Path) -> None:
    config = replace(tiny_config(), intermediate_size=64 * 1024, first_k_dense_replace=3, num_nextn_predict_layers=0)
    tensors = random_tensors(config)
    total = sum(tensor.nbytes for tensor in tensors.values())
    src = write_folder(tmp_path / "src", config, tensors)
    largest = max(tensor.nbytes for tensor in tensors.values())
    del tensors
    before, peak = _anonymous_bytes(), 0

    def watch(done: int, total: int, tensor: str) -> None:
        nonlocal peak
        peak = max(peak, _anonymous_bytes())

    convert(src, tmp_path / "out", dtype="f32", progress=watch)
    assert total > 8 * largest
    assert peak - before < 4 * largest


@pytest.mark.parametrize("place", ["", "inside", "inside/deep"])
def test_a_destination_in_the_source_is_refused(tiny_bf16: Path, copied: Callable[[Path], Path], place: str) -> None:
    src = copied(tiny_bf16)
    before = sorted(src.iterdir())
    with pytest.raises(ConfigError, match="is the source or lies inside it"):
        convert(src, src / place, dtype="fp8", force=True)
    assert sorted(src.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, "'int8' is not one of fp8, bf16, f32, int4"),
        ({"dtype": "bf16", "head_fp8": True}, "head_fp8 needs dtype fp8"),
        ({"ue8m0": True}, "ue8m0 needs dtype fp8"),
    ],
)
def test_options_that_contradict_each_other(tiny_bf16: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_conversion(tiny_bf16, **options)


def test_power_of_two_scales_for_a_source_that_has_others(tiny_fp8: Path) -> None:
    with pytest.raises(ConfigError, match="FP8 already"):
        plan_conversion(tiny_fp8, dtype="fp8", ue8m0=True)


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2", "deepseek_v2"])
def test_other_models_are_refused_by_name(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=model_type):
        plan_conversion(tmp_path, dtype="fp8")


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        plan_conversion(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        plan_conversion(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"neither a folder nor a \.gguf file"):
        plan_conversion(tmp_path / "model.bin")


def test_a_damaged_source_is_refused_before_anything_is_written(tmp_path: Path, tiny_tensors: Tensors) -> None:
    tensors = dict(tiny_tensors)
    del tensors["model.norm.weight"]
    src = write_folder(tmp_path / "src", tiny_config(), tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: tensor is missing"):
        convert(src, tmp_path / "out", dtype="fp8")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, tiny_tensors: Tensors) -> None:
    bad = tiny_tensors[LINEARS[5]].clone()
    bad[0, 0] = float("nan")
    src = write_folder(tmp_path / "src", tiny_config(), tiny_tensors | {LINEARS[5]: bad})
    with pytest.raises(CheckpointError, match=re.escape(LINEARS[5]) + ": weight holds NaN"):
        convert(src, tmp_path / "out", dtype="fp8")


def test_a_checkpoint_without_its_mtp_tensors_is_converted_without(tmp_path: Path, tiny_tensors: Tensors) -> None:
    """transformers' save_pretrained drops the MTP layer and keeps num_nextn_predict_layers."""
    tensors = {name: t for name, t in tiny_tensors.items() if ".layers.3." not in name}
    convert(write_folder(tmp_path / "src", tiny_config(), tensors), tmp_path / "out", dtype="fp8")
    load(tmp_path / "out")


def test_a_changed_source_is_noticed(tiny_bf16: Path, copied: Callable[[Path], Path], tmp_path: Path) -> None:
    src = copied(tiny_bf16)
    convert(src, tmp_path / "out", dtype="fp8")
    convert(src, tmp_path / "out", dtype="fp8")
    os.utime(CheckpointReader(src).files()[0], (1, 1))
    with pytest.raises(CheckpointError, match="another source"):
        convert(src, tmp_path / "out", dtype="fp8")
    with pytest.raises(CheckpointError, match="another dtype than bf16"):
        convert(src, tmp_path / "out", dtype="bf16")


KILLED = """
import sys, time
from pathlib import Path
from kvern.checkpoint.convert import convert
convert(Path(sys.argv[1]), Path(sys.argv[2]), dtype="fp8", progress=lambda done, total, tensor: time.sleep(0.02))
"""


def test_a_killed_conversion_resumes_to_the_same_bytes(tiny_bf16: Path, tmp_path: Path) -> None:
    convert(tiny_bf16, tmp_path / "whole", dtype="fp8")
    cut = tmp_path / "cut"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tiny_bf16), str(cut)])
    deadline = time.monotonic() + 120
    while not (any(cut.glob("*.safetensors")) and any(cut.glob("*.part"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (cut / "config.json").exists()
    for read in (CheckpointReader, load):
        with pytest.raises(CheckpointError, match="was interrupted: the checkpoint is incomplete"):
            read(cut)
    finished = {file: file.stat().st_ino for file in cut.glob("*.safetensors")}
    convert(tiny_bf16, cut, dtype="fp8")
    assert contents(cut) == contents(tmp_path / "whole")
    assert all(file.stat().st_ino == inode for file, inode in finished.items())


def test_every_refusal_is_one_of_ours(tiny_bf16: Path, copied: Callable[[Path], Path], tmp_path: Path) -> None:
    src = copied(tiny_bf16)
    config = json.loads((src / "config.json").read_text())
    for key, value in {"hidden_size": 191, "vocab_size": -1, "kv_lora_rank": "x", "n_group": 3}.items():
        (src / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(KvernError):
            convert(src, tmp_path / "out", dtype="fp8")
    assert ModelConfig.load(tiny_bf16) == tiny_config()


def test_quantised_and_converted_agree(tiny_fp8: Path, tiny_tensors: Tensors) -> None:
    """The fixture itself: what the loop gives is what the folder holds."""
    reader = CheckpointReader(tiny_fp8)
    for name, tensor in quantized_tensors(tiny_config(), tiny_tensors).items():
        assert torch.equal(reader.tensor(name).view(torch.uint8), tensor.view(torch.uint8))


def _anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
