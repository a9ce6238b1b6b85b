"""Conversions to and from 4 bits: layout, what is left out, the way back, damage, and the logits of the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvern.checkpoint.convert import convert, plan_conversion
from kvern.checkpoint.int4 import dequantize_int4, int4_layout, quantize_int4
from kvern.checkpoint.load import load
from kvern.checkpoint.quantize import dequantize
from kvern.checkpoint.reader import CheckpointReader
from kvern.config import Int4Config, ModelConfig
from kvern.errors import CheckpointError, ConfigError, KvernError, UnsupportedModelError
from kvern.model import ForwardBatch, Transformer
from kvern.plan.memory import account

from .gqa_models import random_model
from .layout import linear_shapes, other_shapes, random_tensors, tiny_config, write_folder

GROUP = 32


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config()
    return write_folder(tmp_path_factory.mktemp("source") / "bf16", config, random_tensors(config))


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "int4"
    convert(source, out, dtype="int4", group_size=GROUP)
    return out


def packed_modules(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The Linears whose columns groups of 32 divide: all but q_b_proj, which has 80."""
    return {name: shape for name, shape in linear_shapes(config).items() if shape[1] % GROUP == 0}


def logits(model: Transformer) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(ForwardBatch.of([3, 1, 4, 1, 5, 9, 2, 6]))
    return found


def test_layout_and_values(source: Path, written: Path) -> None:
    before, after = CheckpointReader(source), CheckpointReader(written)
    config = before.config
    expected = {name: spec.shape for name in before.names() if (spec := before.spec(name))}
    for module, shape in packed_modules(config).items():
        del expected[f"{module}.weight"]
        packed, scale = quantize_int4(before.tensor(f"{module}.weight"), GROUP)
        assert torch.equal(after.tensor(f"{module}.weight_packed"), packed)
        assert torch.equal(after.tensor(f"{module}.weight_scale"), scale)
        assert after.tensor(f"{module}.weight_shape").tolist() == list(shape)
        names = ("weight_packed", "weight_scale", "weight_shape")
        specs = [after.spec(f"{module}.{name}") for name in names]
        assert tuple((spec.dtype, spec.shape) for spec in specs) == int4_layout(shape, GROUP)
        expected |= {spec.name: spec.shape for spec in specs}
    assert {spec.name: spec.shape for spec in after.specs()} == expected
    for name in other_shapes(config):
        assert bytes(after.raw(name)) == bytes(before.raw(name))


def test_config_json_is_what_compressed_tensors_writes(written: Path) -> None:
    found = json.loads((written / "config.json").read_text())["quantization_config"]
    assert found == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "ignore": [
            "lm_head",
            r"re:model\.layers\.\d+\.shared_head\.head$",
            r"re:model\.layers\.\d+\.mlp\.gate$",
            r"re:model\.layers\.\d+\.eh_proj$",
            r"re:model\.layers\.\d+\.self_attn\.q_b_proj$",
        ],
        "kv_cache_scheme": None,
    }


def test_the_library_reads_the_configuration_and_matches_the_same_modules(written: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    raw = json.loads((written / "config.json").read_text())["quantization_config"]
    theirs, ours = QuantizationConfig.model_validate(raw), CheckpointReader(written).config.quantization_config
    assert isinstance(ours, Int4Config)
    assert theirs.ignore is not None
    modules = [*linear_shapes(tiny_config()), "lm_head", "model.layers.1.mlp.gate", "model.layers.3.eh_proj"]
    for module in modules:
        assert ours.covers(module) is not any(match_name(module, entry) for entry in theirs.ignore), module


def test_logits_are_those_of_the_dequantised_weights(source: Path, written: Path, tmp_path: Path) -> None:
    convert(written, tmp_path / "back", dtype="bf16")
    back = CheckpointReader(tmp_path / "back")
    assert set(back.names()) == set(CheckpointReader(source).names())
    assert back.config == CheckpointReader(source).config
    after = CheckpointReader(written)
    for module in packed_modules(back.config):
        packed, scale = after.tensor(f"{module}.weight_packed"), after.tensor(f"{module}.weight_scale")
        assert torch.equal(back.tensor(f"{module}.weight"), dequantize_int4(packed, scale, torch.bfloat16))
    found = logits(load(written))
    assert torch.equal(found, logits(load(tmp_path / "back")))
    assert torch.equal(found, logits(load(written, dtype=torch.bfloat16)))
    plain = logits(load(source))
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.7


@pytest.mark.parametrize("head_fp8", [False, True])
def test_bytes_are_accounted_for(source: Path, head_fp8: bool) -> None:
    planned = plan_conversion(source, dtype="int4", group_size=GROUP, head_fp8=head_fp8)
    assert account(planned.config).checkpoint_bytes == planned.nbytes


def test_a_model_built_from_the_configuration_has_the_files_layout(written: Path) -> None:
    reader = CheckpointReader(written)
    state = Transformer(reader.config).state_dict()
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    assert found == {spec.name: (spec.dtype, spec.shape) for spec in reader.specs()}


def test_a_head_in_fp8_beside_them(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", dtype="int4", head_fp8=True)
    reader = CheckpointReader(tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert raw["format"] == "mixed-precision"
    assert raw["config_groups"]["group_1"]["targets"] == ["lm_head", r"re:model\.layers\.\d+\.shared_head\.head$"]
    assert raw["config_groups"]["group_1"]["weights"]["block_structure"] == [128, 128]
    assert not {"lm_head"} & set(raw["ignore"])
    assert reader.spec("lm_head.weight").dtype is torch.float8_e4m3fn
    assert reader.spec("lm_head.weight_scale").shape == (3, 2)
    model = load(tmp_path / "out", mtp=True)
    assert model.lm_head.weight_scale_inv is not None
    assert torch.equal(logits(model), logits(load(tmp_path / "out")))
    for again in ("int4", None):
        convert(tmp_path / "out", tmp_path / f"again-{again}", dtype=again, head_fp8=again == "int4")
        other = CheckpointReader(tmp_path / f"again-{again}")
        assert set(other.names()) == set(reader.names())
        assert torch.equal(logits(load(other.folder)), logits(model))
    convert(tmp_path / "out", tmp_path / "back", dtype="f32")
    assert set(CheckpointReader(tmp_path / "back").names()) == set(CheckpointReader(source).names())


def test_the_library_reads_a_head_in_fp8(source: Path, tmp_path: Path) -> None:
    from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    convert(source, tmp_path / "out", dtype="int4", head_fp8=True)
    reader = CheckpointReader(tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(raw).config_groups
    codes, scale = reader.tensor("lm_head.weight"), reader.tensor("lm_head.weight_scale")
    state = {"weight": codes, "weight_scale": scale}
    restored = FloatQuantizationCompressor.decompress(state, groups["group_1"])["weight"]
    assert torch.equal(restored.float(), dequantize(codes, scale).to(restored.dtype).float())


def test_from_fp8_and_to_fp8(tiny_fp8: Path, tmp_path: Path) -> None:
    convert(tiny_fp8, tmp_path / "int4", dtype="int4")
    before, after = CheckpointReader(tiny_fp8), CheckpointReader(tmp_path / "int4")
    module = "model.layers.1.mlp.experts.3.up_proj"
    dense = load(tiny_fp8).get_submodule(module).dense(torch.float32)  # type: ignore[operator]
    assert torch.equal(after.tensor(f"{module}.weight_packed"), quantize_int4(dense, GROUP)[0])
    assert before.config.quantization_config is not None
    convert(tmp_path / "int4", tmp_path / "fp8", dtype="fp8")
    assert set(CheckpointReader(tmp_path / "fp8").names()) == set(before.names())
    assert logits(load(tmp_path / "fp8")).isfinite().all()


def test_resuming_writes_the_same_bytes(source: Path, written: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Stopped(Exception):
        pass

    def stop(done: int, total: int, tensor: str) -> None:
        if done > total // 2:
            raise Stopped

    with pytest.raises(Stopped):
        convert(source, out, dtype="int4", group_size=GROUP, progress=stop)
    assert not (out / "config.json").exists()
    with pytest.raises(CheckpointError, match="another head_fp8 than True"):
        convert(source, out, dtype="int4", head_fp8=True)
    convert(source, out, dtype="int4", group_size=GROUP)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in written.iterdir()}


def test_an_import_keeps_its_selection_matrices_exact(tmp_path: Path) -> None:
    model = tmp_path / "source"
    random_model("qwen2").save_pretrained(model)
    convert(model, tmp_path / "bf16", dtype="bf16")
    convert(model, tmp_path / "int4", dtype="int4")
    plain, packed = CheckpointReader(tmp_path / "bf16"), load(tmp_path / "int4")
    for name, module in packed.named_modules():
        if name.endswith(("q_b_proj", "kv_b_proj")):
            assert torch.equal(module.dense(torch.bfloat16), plain.tensor(f"{name}.weight"))
        if name.endswith("q_a_proj"):
            exact = plain.tensor(f"{name}.weight").float()
            assert (module.dense(torch.float32) - exact).norm() / exact.norm() < 0.11
    convert(tmp_path / "bf16", tmp_path / "by-way-of-bf16", dtype="int4")
    other = CheckpointReader(tmp_path / "by-way-of-bf16")
    assert all(bytes(other.raw(name)) == bytes(CheckpointReader(tmp_path / "int4").raw(name)) for name in other.names())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "fp8", "group_size": 32}, "group_size 32 needs dtype int4"),
        ({"dtype": "int4", "group_size": 64}, "group_size 64 needs dtype int4, and is 32 or 128"),
        ({"dtype": "bf16", "head_fp8": True}, "head_fp8 needs dtype fp8 or int4"),
        ({"dtype": "int4", "ue8m0": True}, "ue8m0 needs dtype fp8"),
        ({"dtype": "int4", "group_size": 128}, "no weight has a multiple of 128 columns"),
    ],
)
def test_options_that_contradict_each_other(source: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_conversion(source, **options)


def test_finer_than_it_is(written: Path, source: Path) -> None:
    with pytest.raises(ConfigError, match="4-bit already, in groups of 32"):
        plan_conversion(written, dtype="int4", group_size=128)
    assert plan_conversion(source, dtype="int4").config == CheckpointReader(written).config


def damaged(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)


MODULE = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("weight_scale", None, f"{MODULE}.weight_scale: "),
        ("weight_shape", None, f"{MODULE}.weight_shape: "),
        ("weight_packed", None, f"{MODULE}.weight_packed: "),
        ("weight_shape", torch.tensor([320, 160]), r"says \[320, 160\], config.json implies \[320, 192\]"),
        ("weight_shape", torch.tensor([320, 192], dtype=torch.int32), "expected torch.int64"),
        ("weight_packed", torch.zeros(320, 23, dtype=torch.int32), r"expected torch.int32 \[320, 24\]"),
        ("weight_scale", torch.ones(320, 6, dtype=torch.float16), "expected torch.bfloat16"),
        ("weight_scale", torch.ones(320, 3, dtype=torch.bfloat16), r"expected torch.bfloat16 \[320, 6\]"),
    ],
)
def test_damage_is_named(
    written: Path, copied: Callable[[Path], Path], part: str, value: torch.Tensor | None, said: str
) -> None:
    folder, name = copied(written), f"{MODULE}.{part}"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            del tensors[name]
            if value is not None:
                tensors[name] = value

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    if value is None:
        del index["weight_map"][name]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    damaged(folder, change)
    with pytest.raises(CheckpointError, match=said):
        load(folder)


def test_four_bits_that_config_json_does_not_announce(written: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(written)
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"weight is 4-bit, but config\.json has no quantization_config for that"):
        load(folder)


def test_a_module_that_the_group_does_not_divide(written: Path) -> None:
    config = CheckpointReader(written).config
    with pytest.raises(UnsupportedModelError, match=r"q_b_proj has 80 inputs, no multiple of the group size 32"):
        Transformer(replace(config, quantization_config=Int4Config(32)))


def raw_quantization(**changes: Any) -> dict[str, Any]:
    """A valid field with changes; a key `a__b` reaches into group_0 (`weights__num_bits`)."""
    raw = replace(tiny_config(), quantization_config=Int4Config(32)).to_dict()
    quantization = raw["quantization_config"]
    for key, value in changes.items():
        target: dict[str, Any] = quantization
        *path, last = key.split("__")
        for step in path:
            target = quantization["config_groups"]["group_0"] if step == "group" else target[step]
        target[last] = value
    return dict(raw)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "int-quantized", "group__format": None}, "format 'int-quantized' is not supported"),
        ({"config_groups": None}, "config_groups must be an object"),
        ({"config_groups": {}}, "config_groups must be an object"),
        ({"config_groups": {"a": 1}}, "config_groups must be an object"),
        ({"group__weights": None}, r"group_0\.weights must be an object"),
        ({"group__weights__num_bits": 8}, r"weights\.num_bits 8 is not supported"),
        ({"group__weights__symmetric": False}, r"weights\.symmetric False"),
        ({"group__weights__strategy": "channel"}, r"weights\.strategy 'channel'"),
        ({"group__weights__type": "float"}, r"weights\.type 'float'"),
        ({"group__weights__actorder": "group"}, r"weights\.actorder 'group'"),
        ({"group__weights__group_size": 48}, "group_size 48 is not supported"),
        ({"group__weights__group_size": "32"}, "group_size '32' is not supported"),
        ({"group__targets": ["Conv2d"]}, r"targets must be \['Linear'\]"),
        ({"group__input_activations": {"num_bits": 8}}, r"input_activations .* is not supported"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"transform_config": {"a": 1}}, "transform_config"),
        ({"ignore": "lm_head"}, "ignore must be a list of names"),
        ({"ignore": ["re:("]}, "is no regular expression"),
        ({"quant_method": "gptq"}, "quant_method 'gptq' is not supported"),
    ],
)
def test_other_schemes_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, UnsupportedModelError), match=said):
        ModelConfig.from_dict(raw_quantization(**changes))


def test_what_others_write_is_read() -> None:
    """As found in published configurations: no group format, an observer, actorder, regular expressions."""
    raw = raw_quantization(
        ignore=["lm_head", "re:.*self_attn.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
        group__format=None,
        group__weights__observer="minmax",
        group__weights__observer_kwargs={},
        group__weights__actorder=None,
        group__weights__group_size=64,
        global_compression_ratio=1.9,
    )
    found = ModelConfig.from_dict(raw).quantization_config
    assert isinstance(found, Int4Config)
    assert found.group_size == 64
    assert found.covers("model.layers.1.mlp.experts.0.up_proj")
    assert not found.covers("model.layers.1.self_attn.o_proj")
    assert not found.covers("model.layers.1.mlp.up_proj")


def test_every_refusal_is_one_of_ours() -> None:
    values: tuple[Any, ...] = (1, "x", [], {}, {"quant_method": None}, {"quant_method": "compressed-tensors"}, True)
    for value in values:
        with pytest.raises(KvernError):
            ModelConfig.from_dict(tiny_config().to_dict() | {"quantization_config": value})


def test_configurations_survive_being_written() -> None:
    for quantization in (Int4Config(128), Int4Config(32, ("re:.*x$",), ("lm_head",)), Int4Config(64, ())):
        config = replace(tiny_config(), quantization_config=quantization)
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
