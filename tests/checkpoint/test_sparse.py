"""Sparse checkpoints: the real layout, almost no bytes, two layers that are real. The 671B one runs under `-m slow`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.run_671b import layer_difference, run

from kvern.checkpoint.load import load
from kvern.checkpoint.reader import CheckpointReader
from kvern.checkpoint.sparse import apparent_bytes, choosable_experts, disk_bytes, write_sparse
from kvern.config import ModelConfig
from kvern.errors import CheckpointError
from kvern.model import ForwardBatch

from .layout import official_layout, tiny_config

CONFIG = replace(tiny_config(fp8=True), n_routed_experts=16)
IDS = (3, 7, 200, 319)


def test_layout_is_the_official_one(tmp_path: Path) -> None:
    write_sparse(tmp_path, CONFIG, token_ids=IDS, shards=7)
    reader = CheckpointReader(tmp_path)
    assert {spec.name: (spec.shape, spec.dtype) for spec in reader.specs()} == official_layout(CONFIG)
    assert len(reader.files()) == 7
    assert reader.config == CONFIG


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed, shards in (("a", 0, 3), ("b", 0, 5), ("c", 1, 3)):
        write_sparse(tmp_path / name, CONFIG, token_ids=IDS, shards=shards, seed=seed)
    a, b, c = (CheckpointReader(tmp_path / name) for name in "abc")
    assert all(bytes(a.raw(name)) == bytes(b.raw(name)) for name in a.names())
    assert bytes(a.raw("model.norm.weight")) != bytes(c.raw("model.norm.weight"))


def test_only_what_is_said_holds_data(tmp_path: Path) -> None:
    seeded = write_sparse(tmp_path, CONFIG, token_ids=IDS)
    reader = CheckpointReader(tmp_path)
    nonzero = reader.tensor("model.embed_tokens.weight").any(dim=1).nonzero().flatten()
    assert tuple(nonzero.tolist()) == seeded.token_ids
    assert not reader.tensor("model.layers.2.self_attn.o_proj.weight_scale_inv").any()
    for expert in range(16):
        scale = reader.tensor(f"model.layers.1.mlp.experts.{expert}.up_proj.weight_scale_inv")
        assert bool(scale.any()) == (expert in seeded.experts)


@torch.inference_mode()
def test_layers_of_holes_change_nothing(tmp_path: Path) -> None:
    write_sparse(tmp_path, CONFIG, token_ids=IDS)
    model = load(tmp_path)
    batch = ForwardBatch.of([3, 7, 200])
    x = torch.randn(3, CONFIG.hidden_size)
    assert torch.equal(model.model.layers[2](x, model.model.rotation(batch), batch), x)


@torch.inference_mode()
def test_the_gate_chooses_among_known_experts_whatever_it_sees(tmp_path: Path) -> None:
    seeded = write_sparse(tmp_path, CONFIG, token_ids=IDS)
    gate: Any = load(tmp_path).model.layers[seeded.moe_layer].mlp.gate  # type: ignore[union-attr]
    chosen = set(gate(100 * torch.randn(500, CONFIG.hidden_size))[1].flatten().tolist())
    assert chosen <= set(seeded.experts)
    assert len(chosen) > CONFIG.num_experts_per_tok


def test_both_limits_of_the_choice_bite() -> None:
    config = ModelConfig.named("deepseek-v3")
    experts = choosable_experts(config)
    assert len({expert // 32 for expert in experts}) == config.topk_group + 1
    assert len(experts) == 15


def test_the_bench_on_a_small_model(tmp_path: Path) -> None:
    report = run(tmp_path, CONFIG)
    assert len(report.tokens) == 2
    assert report.logits_std > 0.01
    assert set(report.layer_differences) == {0, 1}
    assert max(report.layer_differences.values()) < 1e-5


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    seeded = write_sparse(tmp_path, CONFIG, token_ids=IDS)
    model = load(tmp_path)
    gate: Any = model.model.layers[1].mlp.gate  # type: ignore[union-attr]
    gate.config = replace(CONFIG, routed_scaling_factor=2.4)
    assert layer_difference(model, 1, seeded) > 1e-3


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="layers 1 and 2 are not a dense and a MoE layer"):
        write_sparse(tmp_path, CONFIG, token_ids=IDS, dense_layer=1, moe_layer=2)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        write_sparse(tmp_path, CONFIG, token_ids=IDS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_671b_configuration_runs() -> None:
    """689 GB of files opened in seconds, two tokens within 8 GiB, two layers equal to transformers'."""
    done = subprocess.run([sys.executable, "bench/run_671b.py", "--json"], check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["apparent_bytes"] > 688_574_839_360
    assert report["disk_bytes"] < 500e6
    assert report["open_seconds"] < 20
    assert len(report["tokens"]) == 2
    assert report["anonymous_peak_bytes"] < 8 * 2**30
    assert report["logits_max"] - report["logits_min"] > 1
    assert set(report["layer_differences"]) == {"0", "3"}
    assert max(report["layer_differences"].values()) < 1e-5


def test_sizes_on_disk_and_apparent(tmp_path: Path) -> None:
    config = replace(CONFIG, vocab_size=50_000)
    write_sparse(tmp_path, config, token_ids=IDS)
    assert apparent_bytes(tmp_path) > 4 * 50_000 * config.hidden_size * 2
    assert disk_bytes(tmp_path) < apparent_bytes(tmp_path) / 4
