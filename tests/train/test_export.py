"""An export is the official layout, name for name, and says what the trained model says; round trips and kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.checkpoint.layout import (
    linear_shapes,
    official_layout,
    quantize_by_loop,
    random_tensors,
    tiny_config,
    write_folder,
)
from tests.train.distributed.launch import launch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import Shard, distribute_tensor

from kvern.checkpoint.load import load
from kvern.checkpoint.quantize import dequantize, quantize
from kvern.checkpoint.reader import CheckpointReader
from kvern.checkpoint.save import total_size
from kvern.config import ModelConfig, QuantizationConfig
from kvern.errors import CheckpointError, ConfigError
from kvern.model import ForwardBatch, Transformer
from kvern.train.balance import LoadBalancer, RoutingLog
from kvern.train.experts import checkpoint_state, part
from kvern.train.export import ExportOptions, export, plan_export
from kvern.train.loss import training_loss
from kvern.train.masters import LiveMasters, SavedMasters
from kvern.train.mesh import Ranks
from kvern.train.model import make_trainable
from kvern.train.optim import AdamW, parameter_groups
from kvern.train.packed_rows import PackedRows
from kvern.train.start import master_config, open_masters
from kvern.train.weights import initialise

CONFIG = master_config(tiny_config())
FILES = {"tokenizer.json": b"{}"}
TOKENS = [5, 17, 200, 3, 99, 310, 41, 7, 260, 12, 180, 2]
FP8, BF16, F32 = ExportOptions("fp8"), ExportOptions("bf16"), ExportOptions("f32")


@pytest.fixture(scope="module")
def trained() -> Transformer:
    """Fresh weights, three steps of AdamW."""
    model = Transformer(CONFIG, device="cpu", activation_dtype=torch.float32)
    initialise(model, 0, std=0.06)
    train(model, steps=3)
    return model


def train(model: Transformer, steps: int, lr: float = 1e-2) -> list[float]:
    """Steps over one row; returns the losses before each."""
    make_trainable(model)
    log, balancer, optimizer = RoutingLog(model), LoadBalancer(model), AdamW(parameter_groups(model), lr=lr)
    losses = []
    for _ in range(steps):
        loss = training_loss(model, PackedRows.of(TOKENS), log)
        torch.autograd.backward(loss.total)
        optimizer.step()
        optimizer.zero_grad()
        balancer.count(loss.routings)
        balancer.step()
        losses.append(float(loss.main))
    log.close()
    return losses


def save(model: Transformer, folder: Path) -> SavedMasters:
    state = {"model": model.state_dict(), "optimizer": {"step": torch.tensor(3)}}
    with warnings.catch_warnings(action="ignore"):  # torch tells that there is one process
        dcp_save(state, checkpoint_id=folder, no_dist=True)
    return SavedMasters(folder)


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    out: Tensor = model.eval()(ForwardBatch.of(TOKENS))
    return out


def error(model: Transformer, folder: Path) -> float:
    """Largest difference of the exported model's logits, computed in float32, over the largest logit."""
    wanted = logits(model)
    there = logits(load(folder, activation_dtype=torch.float32))
    return float((there - wanted).abs().max() / wanted.abs().max())


def test_fp8_is_the_official_layout_and_its_bytes_are_the_formula_s(trained: Transformer, tmp_path: Path) -> None:
    masters = save(trained, tmp_path / "step")
    export(CONFIG, masters, tmp_path / "out", FP8, source="a", files=FILES)
    assert ModelConfig.load(tmp_path / "out") == tiny_config(fp8=True)
    there, official = CheckpointReader(tmp_path / "out"), official_layout(tiny_config(fp8=True))
    assert {spec.name: (spec.shape, spec.dtype) for spec in there.specs()} == official
    for name, tensor in checkpoint_state(trained).items():
        if official[name][1] is torch.float8_e4m3fn:
            codes, scale = quantize_by_loop(tensor)
            assert bytes(there.raw(name)) == codes.view(torch.uint8).numpy().tobytes(), name
            assert torch.equal(there.tensor(name + "_scale_inv"), scale), name
        else:
            assert torch.equal(there.tensor(name), tensor.to(official[name][1])), name
    assert (tmp_path / "out/tokenizer.json").read_bytes() == b"{}"
    copies = [there.raw(f"model.layers.3.{part}.weight") for part in ("embed_tokens", "shared_head.head")]
    assert copies == [there.raw("model.embed_tokens.weight"), there.raw("lm_head.weight")]


@pytest.mark.parametrize(("options", "bound"), [(F32, 1e-6), (BF16, 0.005), (FP8, 0.03)])
def test_what_was_exported_says_what_was_trained(
    trained: Transformer, tmp_path: Path, options: ExportOptions, bound: float
) -> None:
    """The largest difference is 0.14 % of the largest logit in BF16 and 1 % in FP8, with weights of 0.06 N(0, 1)."""
    export(CONFIG, LiveMasters(trained), tmp_path / "out", options, source="a")
    assert error(trained, tmp_path / "out") < bound


def test_transformers_loads_the_bf16_export(trained: Transformer, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export(CONFIG, LiveMasters(trained), tmp_path / "out", BF16, source="a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0]
    ours = logits(load(tmp_path / "out", activation_dtype=torch.float32))
    assert (theirs - ours).abs().max() < 2e-5 * ours.abs().max()


def test_torch_s_own_reader_of_quantised_files_reads_the_fp8_export(trained: Transformer, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

    export(CONFIG, LiveMasters(trained), tmp_path / "out", FP8, source="a", max_shard_bytes=500_000)
    there = CheckpointReader(tmp_path / "out")
    names = [f"model.layers.1.self_attn.{name}.weight" for name in ("kv_a_proj_with_mqa", "o_proj")]
    read = {name: torch.empty(there.spec(name).shape) for name in names}
    reader = QuantizedHuggingFaceStorageReader(str(tmp_path / "out"), target_dtype=torch.float32)
    with warnings.catch_warnings(action="ignore"):
        dcp_load(read, storage_reader=reader, no_dist=True)
    for name, tensor in read.items():
        assert torch.equal(tensor, dequantize(there.tensor(name), there.tensor(name + "_scale_inv")))


def test_power_of_two_scales_and_an_fp8_head(trained: Transformer, tmp_path: Path) -> None:
    export(CONFIG, LiveMasters(trained), tmp_path / "out", ExportOptions("fp8", True, True), source="a")
    there = CheckpointReader(tmp_path / "out")
    assert isinstance(there.config.quantization_config, QuantizationConfig)
    assert there.config.quantization_config.scale_fmt == "ue8m0"
    for head in ("lm_head", "model.layers.3.shared_head.head"):
        assert there.spec(f"{head}.weight").dtype is torch.float8_e4m3fn
    scales = torch.cat([there.tensor(name).flatten() for name in there.names() if name.endswith("_scale_inv")])
    assert bool((scales.log2() == scales.log2().round()).all())
    assert error(trained, tmp_path / "out") < 0.15


def saved_by_ranks(ranks: Ranks, folder: Path) -> None:
    """Stacks of experts cut over experts and rows, everything else over all ranks."""
    model = Transformer(CONFIG, device="cpu", activation_dtype=torch.float32)
    initialise(model, 0, std=0.06)
    make_trainable(model)
    assert ranks.mesh is not None
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        stack = tensor.dim() == 3
        mesh, cuts = (ranks.mesh, [Shard(1), Shard(0)]) if stack else (ranks.everyone, [Shard(0)])
        state[f"model.{name}"] = tensor if tensor.dim() < 2 else distribute_tensor(tensor.detach(), mesh, cuts)
    dcp_save(state, checkpoint_id=folder / "step")


def test_what_four_ranks_saved_is_exported_as_one(tmp_path: Path) -> None:
    launch(4, "tests.train.test_export:saved_by_ranks", tmp_path, expert=2, seconds=250.0)
    model = Transformer(CONFIG, device="cpu", activation_dtype=torch.float32)
    initialise(model, 0, std=0.06)
    masters = SavedMasters(tmp_path / "step")
    assert len(list((tmp_path / "step").glob("*.distcp"))) == 4
    export(CONFIG, masters, tmp_path / "out", FP8, source="a")
    export(CONFIG, LiveMasters(model), tmp_path / "alone", FP8, source="a")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "alone/model.safetensors").read_bytes()


def test_options_that_do_not_go_together() -> None:
    for wrong in ({"dtype": "bf16", "ue8m0": True}, {"dtype": "f32", "head_fp8": True}, {"dtype": "int4"}):
        with pytest.raises(ConfigError):
            ExportOptions(**wrong)


def test_a_weight_that_training_left_alone_keeps_its_bytes(tmp_path: Path) -> None:
    """Also where its scales are not those that quantising would give: here they are powers of two."""
    tensors = random_tensors(tiny_config())
    for name in linear_shapes(tiny_config()):
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = quantize(weight, ue8m0=True)
    start = write_folder(tmp_path / "start", tiny_config(fp8=True), tensors)
    before = CheckpointReader(start)
    model = open_masters(start, activation_dtype=torch.float32)
    changed = "model.layers.1.mlp.experts.3.up_proj.weight"
    make_trainable(model)
    stack = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").data
    part(stack, 3, "up_proj").add_(0.01)
    export(master_config(before.config), LiveMasters(model), tmp_path / "out", FP8, source="a", start=start)
    after = CheckpointReader(tmp_path / "out")
    for name in before.names():
        assert (bytes(after.raw(name)) == bytes(before.raw(name))) == (not name.startswith(changed)), name


def test_a_foreign_checkpoint_is_refused_before_anything_is_written(trained: Transformer, tmp_path: Path) -> None:
    masters = LiveMasters(trained)
    other = master_config(ModelConfig.from_dict({**tiny_config().to_dict(), "moe_intermediate_size": 32}))
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj: has the shape \[8, 320, 192\]"):
        export(other, masters, tmp_path / "out", FP8, source="a")
    fewer = master_config(ModelConfig.from_dict({**tiny_config().to_dict(), "num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match=r"tensors of the run are not the model's"):
        export(fewer, masters, tmp_path / "out", FP8, source="a")
    assert not (tmp_path / "out").exists()


def test_incomplete_and_damaged_checkpoints(trained: Transformer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        SavedMasters(tmp_path)
    masters = save(trained, tmp_path / "step")
    file = next((tmp_path / "step").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        export(CONFIG, masters, tmp_path / "out", FP8, source="a")
    (tmp_path / "step" / ".metadata").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        SavedMasters(tmp_path / "step")


KILLED = """
import sys, time
from pathlib import Path
from kvern.train.experts import checkpoint_state, part
from kvern.train.export import ExportOptions, export
from kvern.train.masters import SavedMasters
from kvern.train.start import master_config
from tests.checkpoint.layout import tiny_config

masters, options = SavedMasters(Path(sys.argv[1])), ExportOptions("fp8")
arguments = {"source": masters.fingerprint(), "max_shard_bytes": 200_000, "files": {"tokenizer.json": b"{}"}}
progress = lambda done, total, name: time.sleep(0.05)
export(master_config(tiny_config()), masters, Path(sys.argv[2]), options, progress=progress, **arguments)
"""


def test_an_export_that_was_killed_goes_on(trained: Transformer, tmp_path: Path) -> None:
    save(trained, tmp_path / "step")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    command = [sys.executable, "-c", KILLED, str(tmp_path / "step"), str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment) as process:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "out").glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out/config.json").exists()
    with pytest.raises(CheckpointError, match="was interrupted"):
        load(tmp_path / "out")
    written = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")}
    masters = SavedMasters(tmp_path / "step")
    for out in ("out", "whole"):
        arguments = {"source": masters.fingerprint(), "files": FILES}
        export(CONFIG, masters, tmp_path / out, FP8, max_shard_bytes=200_000, **arguments)  # type: ignore[arg-type]
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time_ns for name, time_ns in written.items())
    weight_map = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == official_layout(tiny_config(fp8=True)).keys()
    for name, file_name in weight_map.items():
        with safe_open(tmp_path / "out" / file_name, "pt") as stream:
            assert name in stream.keys()  # noqa: SIM118


class Stacked:
    """The shapes of a run's tensors, experts in stacks, without the tensors."""

    def __init__(self, config: ModelConfig) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, (shape, _) in official_layout(config).items():
            if name.endswith("_scale_inv"):
                continue
            stack, _, expert = name.partition(".experts.")
            if expert.endswith("down_proj.weight"):
                self._shapes[f"{stack}.experts.down_proj"] = (config.n_routed_experts or 0, *shape)
            elif expert:
                self._shapes[f"{stack}.experts.gate_up_proj"] = (config.n_routed_experts or 0, 2 * shape[0], shape[1])
            else:
                self._shapes[name] = shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def tensor(self, name: str) -> Tensor:
        raise AssertionError

    def row(self, name: str, row: int) -> Tensor:
        raise AssertionError


def test_the_671b_export_is_planned_with_the_official_names_and_bytes() -> None:
    config = ModelConfig.named("deepseek-v3")
    target, tensors = plan_export(master_config(config), Stacked(config), FP8)
    assert target == config
    assert len(tensors) == 91_991
    assert total_size(tensors) == 688_574_839_360
    assert {tensor.name: (tensor.shape, tensor.dtype) for tensor in tensors} == official_layout(config)
