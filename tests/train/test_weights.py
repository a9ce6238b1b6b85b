"""First values: the same bits for any world and grouping; the real configuration in a rank's share of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
import torch
from tests.tiny import tiny_config, tiny_model
from torch import Tensor

from kvern.checkpoint.convert import convert
from kvern.checkpoint.sparse import write_sparse
from kvern.config import ModelConfig
from kvern.model import Transformer
from kvern.train.experts import checkpoint_state
from kvern.train.model import make_trainable
from kvern.train.start import master_config, open_masters, open_stored
from kvern.train.weights import DRAWN, Piece, _draw, fill, initialise, pieces


def fresh(seed: int = 0, grouped: bool = True) -> dict[str, Tensor]:
    """Under the checkpoint's names."""
    model = tiny_model(tiny_config(num_nextn_predict_layers=0))
    if grouped:
        make_trainable(model)
    initialise(model, seed, 0.5)
    return {name: tensor.detach().clone() for name, tensor in checkpoint_state(model).items()}


def test_names_and_the_seed_decide() -> None:
    whole, grouped, other = fresh(grouped=False), fresh(), fresh(seed=1)
    assert whole.keys() == grouped.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, grouped[name]), name
        if tensor.dim() == 2:
            assert not torch.equal(tensor, other[name]), name
            assert abs(float(tensor.std()) - 0.5) < 0.1
        else:
            assert torch.equal(tensor, torch.full_like(tensor, float("norm" in name)))
    experts = [tensor for name, tensor in whole.items() if name.endswith("gate_proj.weight")]
    assert not any(torch.equal(experts[0], one) for one in experts[1:])


@pytest.mark.parametrize(("first", "rows"), [(0, 1), (5, DRAWN), (DRAWN - 1, 2), (2 * DRAWN, 44), (100, 0)])
def test_a_rank_draws_its_rows_of_the_whole(first: int, rows: int) -> None:
    whole, share = torch.empty(300, 7), torch.empty(rows, 7)
    _draw(Piece("a", 0, whole), 3, 1.0)
    _draw(Piece("a", first, share), 3, 1.0)
    assert torch.equal(share, whole[first : first + rows])


@pytest.mark.parametrize("dtype", ["fp8", "f32"])
def test_a_checkpoint_fills_what_trains(tiny_folder: Path, tmp_path: Path, dtype: str) -> None:
    convert(tiny_folder, tmp_path / "stored", dtype=dtype)  # type: ignore[arg-type]
    stored = open_stored(tmp_path / "stored")
    model = Transformer(master_config(stored.config), device="meta")
    make_trainable(model)
    model.to_empty(device="cpu")
    fill(model, stored)
    expected = open_masters(stored).state_dict()
    for name, tensor in checkpoint_state(model).items():
        assert torch.equal(tensor, expected[name]), name
    assert {piece.name for piece in pieces(model)} <= expected.keys()


BEGIN = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from kvern.train.config import load
from kvern.train.mesh import DATA, EXPERT, Ranks
from kvern.train.trainer import build_model

rank, world, expert = int(sys.argv[2]), 512, 64
dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
mesh = init_device_mesh("cpu", (world // expert, expert), mesh_dim_names=(DATA, EXPERT))
everyone = init_device_mesh("cpu", (world,))
model = build_model(load(Path(sys.argv[1])), Ranks(rank, world, torch.device("cpu"), mesh, everyone))
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "whole": sum(p.numel() for p in model.parameters()),
    "held": sum(p.to_local().numel() for p in model.parameters()),
    "anonymous": int(status["RssAnon"].split()[0]) * 1024,
}))
"""
"""One rank of 512; torch's fake process group answers for the others."""


REST = """
[[data.sources]]
path = "nothing"
[batch]
rows = 2048
length = 4096
[precision]
fp8 = "blockwise"
"""


def begin_671b(tmp_path: Path, model: str, rank: int) -> None:
    path = tmp_path / "671b.toml"
    path.write_text(f"steps = 1\n{model}{REST}")
    command = [sys.executable, "-c", BEGIN, str(path), str(rank)]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert said["whole"] > 680e9
    assert said["held"] < 1.1 * said["whole"] / 512
    assert said["anonymous"] < 4 * said["held"] + 3e9


@pytest.mark.slow
def test_671b_begins_in_a_ranks_share_of_memory(tmp_path: Path) -> None:
    config = replace(ModelConfig.named("deepseek-v3"), quantization_config=None).to_dict()
    table = {key: value for key, value in config.items() if value is not None and key not in ("torch_dtype", "dtype")}
    begin_671b(tmp_path, tomli_w.dumps({"model": table}), rank=1)


@pytest.mark.slow
def test_671b_begins_from_the_official_layout(tmp_path: Path) -> None:
    write_sparse(tmp_path / "V3", ModelConfig.named("deepseek-v3"), token_ids=(0, 1))
    begin_671b(tmp_path, tomli_w.dumps({"model": {"folder": str(tmp_path / "V3")}}), rank=300)
