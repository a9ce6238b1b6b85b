"""bench.quality: its measures against hand-made distributions, the noise, the bits, and a run over a small model."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.dither import moved, step_sizes, write_dithered
from gguf import GGMLQuantizationType, GGUFReader
from tests.checkpoint.gguf_files import write_gguf
from tests.checkpoint.gqa_models import random_model

from bench import quality
from kvern.checkpoint.convert import convert
from kvern.checkpoint.load import load
from kvern.model import ForwardBatch


def test_measures_of_known_distributions() -> None:
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]).log()
    found = torch.tensor([[0.25, 0.5, 0.25], [0.9, 0.05, 0.05]]).log()
    measured = quality.Measured()
    measured.add(reference, found, torch.tensor([0, 1]))
    row = measured.row("x", (4.5, 16.0))
    kl = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert row.kl_mean == pytest.approx(kl / 2, rel=1e-6)
    assert row.kl_error == pytest.approx(kl / 2, rel=1e-6)
    assert row.kl_p99 == pytest.approx(0.99 * kl, rel=1e-6)
    assert row.top1 == 0.5
    assert row.perplexity_ratio == pytest.approx(math.sqrt(2), rel=1e-6)
    assert "4.50 16.00" in "\n".join(quality.table([row]))


def test_steps_are_those_of_the_grid_and_noise_stays_in_the_cell() -> None:
    generator = np.random.default_rng(0)
    scale = np.array([[0.25], [2.0**-20]], dtype=np.float32)
    values = generator.integers(-8, 8, (2, 64)).astype(np.float32) * scale
    steps = step_sizes(values)
    assert np.isin(np.round(steps / scale), (1, 2)).all()
    assert (steps / scale == 1).mean() > 0.9
    noisy = moved(values, "blk.0.ffn_up.weight")
    assert (np.abs(noisy - values) <= steps / 2).all()
    assert np.array_equal(noisy, moved(values, "blk.0.ffn_up.weight"))
    assert not np.array_equal(noisy, moved(values, "blk.1.ffn_up.weight"))
    assert np.array_equal(moved(np.ones((2, 32), np.float32), "x"), np.ones((2, 32), np.float32))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "model.gguf"
    return write_gguf(path, random_model("qwen2"), "qwen2", type=GGMLQuantizationType.Q5_0)


def test_a_dithered_file_is_a_model_close_by(published: Path, tmp_path: Path) -> None:
    write_dithered(published, tmp_path / "plain.gguf", dither=False)
    write_dithered(published, tmp_path / "dithered.gguf")
    models = {}
    for name in ("plain", "dithered"):
        convert(tmp_path / f"{name}.gguf", tmp_path / name, dtype="f32")
        models[name] = load(tmp_path / name)
    convert(published, tmp_path / "source", dtype="bf16")
    batch = ForwardBatch.of(list(range(16)))
    with torch.inference_mode():
        source, plain, dithered = (m(batch) for m in (load(tmp_path / "source"), models["plain"], models["dithered"]))
    assert float((plain - source).norm() / source.norm()) < 0.02
    assert 0 < float((dithered - plain).norm() / plain.norm()) < 0.3
    kinds = {tensor.tensor_type for tensor in GGUFReader(tmp_path / "dithered.gguf").tensors}
    assert kinds == {GGMLQuantizationType.BF16, GGMLQuantizationType.F32}


def test_bits_of_both_kinds_of_file(published: Path, tmp_path: Path) -> None:
    for name, bits in {"bf16": 16.0, "int4-g32": 4.5}.items():
        convert(published, tmp_path / name, **quality.OURS[name])
        layers, head = quality.checkpoint_bits(tmp_path / name)
        assert layers == pytest.approx(bits, abs=0.02)
        assert head == 16.0
    assert quality.gguf_bits(published)[0] == pytest.approx(5.5)


@pytest.fixture
def workshop(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> quality.Workshop:
    monkeypatch.setattr(quality, "pulled_path", lambda known: published)
    return quality.Workshop("coder-0.5b", tmp_path, Path("llama-quantize"), dither=True)


def test_a_run_from_the_published_file_to_rows(workshop: quality.Workshop) -> None:
    texts = [list(range(start, start + 33)) for start in (0, 50)]
    names = ["bf16", "fp8", "int4-g32", "cache-fp8"]
    rows = {row.format: row for row in quality.measure(workshop, names, texts)}
    assert rows["bf16"].kl_mean == 0
    assert rows["bf16"].top1 == 1
    assert 0 < rows["fp8"].kl_mean < rows["int4-g32"].kl_mean < 1
    assert 0 < rows["cache-fp8"].kl_mean < rows["int4-g32"].kl_mean
    assert not list(workshop.folder.glob("logits-*"))


def test_a_peers_file_comes_from_its_tool(
    workshop: quality.Workshop, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(command: list[str], **options: Any) -> None:
        assert command[0] == "llama-quantize"
        assert command[1] == str(workshop.gguf())
        assert command[3] == "Q4_K_M"
        shutil.copy(published, command[2])

    monkeypatch.setattr(subprocess, "run", fake)
    assert load(workshop.checkpoint("q4_k_m")).config.hidden_size == 128
    assert workshop.bits("q4_k_m")[0] == pytest.approx(5.5)
