"""Masters from every stored form: FP8, 4-bit, BF16, F32, an import's scaled rows; what is missing is named."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests.checkpoint.gqa_models import ModelSource, random_model, relative_error
from tests.checkpoint.layout import linear_shapes, random_tensors, tiny_config, write_folder
from torch import Tensor

from kvern.checkpoint.convert import convert
from kvern.checkpoint.floats import read_floats
from kvern.checkpoint.gqa import DELTA, DType, plan_import
from kvern.checkpoint.load import load
from kvern.checkpoint.local import cache_folder
from kvern.checkpoint.reader import CheckpointReader
from kvern.checkpoint.save import plan_shards, write_checkpoint
from kvern.errors import CheckpointError
from kvern.model import ForwardBatch, Transformer
from kvern.text.tokenizer import Tokenizer
from kvern.train.export import ExportOptions, export
from kvern.train.loss import training_loss
from kvern.train.masters import LiveMasters
from kvern.train.model import make_trainable
from kvern.train.optim import AdamW, parameter_groups
from kvern.train.packed_rows import PackedRows
from kvern.train.start import master_config, open_masters

TOKENS = [5, 17, 200, 3, 99, 310, 41, 7, 260, 12, 180, 2]
IMPORTS = ("qwen2", "qwen2 tied, R=128", "llama all biases", "llama yarn")
F32 = torch.float32


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("start") / "bf16", tiny_config(), random_tensors(tiny_config()))


def imported(folder: Path, name: str, dtype: DType = "f32") -> Path:
    config, tensors = plan_import(ModelSource.of(random_model(name)), dtype)
    write_checkpoint(folder, config, plan_shards(tensors), files={}, source=name)
    return folder


def step(model: Transformer, lr: float, steps: int = 1) -> list[float]:
    """Steps of AdamW over one row; returns the losses before each and after the last."""
    make_trainable(model)
    optimizer, row, losses = AdamW(parameter_groups(model), lr=lr), PackedRows.of(TOKENS), []
    for _ in range(steps):
        loss = training_loss(model, row)
        torch.autograd.backward(loss.total)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.main))
    return [*losses, float(training_loss(model, row).main)]


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    out: Tensor = model.eval()(ForwardBatch.of(TOKENS))
    return out


@pytest.mark.parametrize("dtype", ["fp8", "bf16", "f32", "int4"])
def test_masters_are_the_numbers_that_are_stored(bf16: Path, tmp_path: Path, dtype: DType) -> None:
    convert(bf16, tmp_path / "stored", dtype=dtype)
    reader = CheckpointReader(tmp_path / "stored")
    model = open_masters(tmp_path / "stored", activation_dtype=F32)
    state = model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {F32}
    for name in linear_shapes(tiny_config()):
        stored = f"{name}.weight_packed" if f"{name}.weight_packed" in reader else f"{name}.weight"
        assert torch.equal(state[f"{name}.weight"], read_floats(reader, stored).float()), name
    assert "model.layers.3.eh_proj.weight" in state
    assert torch.equal(logits(model), logits(load(tmp_path / "stored", dtype=F32)))
    assert step(model, 1e-3, steps=2)[-1] < step(model, 0.0)[0] + 1


def test_masters_do_not_lie_in_the_file(bf16: Path) -> None:
    before = (bf16 / "model-00001-of-00003.safetensors").read_bytes()
    step(open_masters(bf16), 0.1)
    assert (bf16 / "model-00001-of-00003.safetensors").read_bytes() == before


def test_an_export_begins_a_run_again(bf16: Path, tmp_path: Path) -> None:
    model = open_masters(bf16)
    options = ExportOptions("f32")
    export(master_config(tiny_config()), LiveMasters(model), tmp_path / "out", options, source="a")
    again = open_masters(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_checkpoint_that_lost_its_mtp_layer_is_refused(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in random_tensors(tiny_config()).items() if ".layers.3." not in name}
    write_folder(tmp_path / "lost", tiny_config(), tensors)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3 is not there"):
        open_masters(tmp_path / "lost")


@pytest.mark.parametrize("name", IMPORTS)
def test_an_import_trains_without_its_delta(tmp_path: Path, name: str) -> None:
    folder = imported(tmp_path / "import", name)
    before = logits(load(folder))
    model = open_masters(folder, activation_dtype=F32)
    assert relative_error(logits(model), before) < 2e-5
    export(model.config, LiveMasters(model), tmp_path / "same", ExportOptions("f32"), source="a")
    stored, same = CheckpointReader(folder), CheckpointReader(tmp_path / "same")
    assert {spec.name: bytes(same.raw(spec.name)) for spec in stored.specs()} == {
        spec.name: bytes(stored.raw(spec.name)) for spec in same.specs()
    }
    losses = step(model, 2e-5, steps=4)
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert relative_error(logits(model), before) < 0.5
    export(model.config, LiveMasters(model), tmp_path / "out", ExportOptions("f32"), source="a")
    assert relative_error(logits(load(tmp_path / "out")), logits(model)) < 2e-5


@pytest.mark.parametrize("name", ["qwen2 tied, R=128", "qwen2"])
@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 0.01), ("fp8", 0.06)])
def test_an_import_is_exported_in_its_stored_forms(tmp_path: Path, name: str, dtype: DType, bound: float) -> None:
    """With R = 128 scaled rows have FP8 blocks of their own, else kv_a_proj_with_mqa stays BF16."""
    folder = imported(tmp_path / "stored", name, dtype)
    model = open_masters(folder, activation_dtype=F32)
    export(model.config, LiveMasters(model), tmp_path / "same", ExportOptions(dtype), source="a", start=folder)
    stored, same = CheckpointReader(folder), CheckpointReader(tmp_path / "same")
    assert set(stored.names()) == set(same.names())
    assert all(bytes(same.raw(tensor)) == bytes(stored.raw(tensor)) for tensor in stored.names())
    trained = open_masters(imported(tmp_path / "exact", name), activation_dtype=F32)
    step(trained, 1e-3)
    export(trained.config, LiveMasters(trained), tmp_path / "out", ExportOptions(dtype), source="a")
    assert relative_error(logits(load(tmp_path / "out", activation_dtype=F32)), logits(trained)) < bound


def test_fp8_forgets_a_step_that_is_smaller_than_its_own(tmp_path: Path) -> None:
    """Masters from FP8 lie on its grid: what moves them by less than half a step of it is rounded away again."""
    folder = imported(tmp_path / "stored", "qwen2", "fp8")
    model = open_masters(folder, activation_dtype=F32)
    before = logits(model)
    step(model, 1e-4)
    errors = []
    for dtype in ("fp8", "bf16"):
        export(model.config, LiveMasters(model), tmp_path / dtype, ExportOptions(dtype), source="a")
        errors.append(relative_error(logits(load(tmp_path / dtype, activation_dtype=F32)), logits(model)))
    moved = relative_error(logits(model), before)
    assert errors[0] > 0.5 * moved
    assert errors[1] < 0.2 * moved


def test_a_step_on_scaled_rows_would_destroy_an_import(tmp_path: Path) -> None:
    """What `train.imported` is there for: the rate is far above what rows times 2^-24 hold."""
    folder = imported(tmp_path / "import", "qwen2")
    model = load(folder, dtype=F32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    before = logits(model)
    rows = model.get_parameter("model.layers.0.self_attn.q_a_proj.weight")
    assert float(rows.detach().abs().max()) < 1.0 * DELTA * 16
    step(model, 1e-4)
    assert relative_error(logits(model), before) > 0.5


@pytest.mark.slow
@pytest.mark.weights
def test_the_real_coder_trains() -> None:
    """Qwen2.5-Coder-0.5B: the import's logits before the first step, and a loss that falls at the report's rate."""
    folder = cache_folder() / "models" / "coder-0.5b-bf16"
    if not (folder / "config.json").is_file():
        pytest.skip("coder-0.5b is not here: kvern pull coder-0.5b, and chat with it once")
    batch = ForwardBatch.of(Tokenizer.load(folder).encode("def add(a, b):\n    return a + b\n"))
    with torch.no_grad():
        before = load(folder, activation_dtype=F32)(batch)
        model = open_masters(folder, activation_dtype=F32)
        assert relative_error(model.eval()(batch), before) < 1e-4
    make_trainable(model)
    optimizer, row, losses = AdamW(parameter_groups(model), lr=5e-6), PackedRows.of(batch.tokens.tolist()), []
    for _ in range(2):
        loss = training_loss(model, row)
        torch.autograd.backward(loss.total)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.main))
    assert losses[1] < losses[0]
    with torch.no_grad():
        assert relative_error(model.eval()(batch), before) < 0.6  # 1.4 where scaled rows are trained
