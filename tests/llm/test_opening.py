"""open_model: packed where kernels and memory allow it, plain otherwise; what each dtype means."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvern.engine.dtype import Choice
from kvern.errors import ConfigError
from kvern.llm import LLM, offline, opening
from kvern.llm.opening import open_model
from kvern.model import ForwardBatch, PackedTransformer, Transformer
from kvern.ops import packed
from kvern.plan.hardware import machine

needs_kernels = pytest.mark.skipif(not packed.available(), reason="the kernels were not built")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "tiny", ignore=shutil.ignore_patterns("packed-*")))
    assert not list(copy.glob("packed-*"))
    return copy


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" of a plain model, which would be measured."""
    monkeypatch.setattr(opening, "choose", lambda config: Choice(torch.float32, None, ()))


def with_memory(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    described = replace(machine(), memory_available=available)
    monkeypatch.setattr(opening, "machine", lambda: described)


@needs_kernels
@torch.no_grad()
def test_packs_when_it_fits_and_gives_the_plain_models_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 1 << 40)
    model, plain = open_model(folder, "f32"), open_model(folder, "f32", pack=False)
    assert isinstance(model, PackedTransformer)
    assert isinstance(plain, Transformer)
    assert len(list(folder.glob("packed-*.kvern"))) == 1
    batch = ForwardBatch.of([5, 3, 8, 1])
    expected = plain(batch)
    assert (model(batch) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_pack_false_leaves_no_file(folder: Path) -> None:
    assert isinstance(open_model(folder, pack=False), Transformer)
    assert not list(folder.glob("packed-*"))


def test_what_does_not_fit_runs_from_its_own_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 1000)
    assert isinstance(open_model(folder), Transformer)
    assert isinstance(open_model(folder, "f32"), Transformer)
    assert not list(folder.glob("packed-*"))


def test_without_kernels_it_runs_from_its_own_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "available", lambda: False)
    assert isinstance(open_model(folder, "f32"), Transformer)
    assert not list(folder.glob("packed-*"))


@needs_kernels
@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("f32", torch.float32)])
def test_packed_the_dtype_is_the_activations(dtype: Any, expected: torch.dtype, folder: Path) -> None:
    model = open_model(folder, dtype)
    assert model.activation_dtype is expected
    assert isinstance(model, PackedTransformer)
    assert model.model.lm_head.dtype is torch.float32, "weights stay as they are stored"


@needs_kernels
@pytest.mark.parametrize(("order", "expected"), [("pairs", torch.bfloat16), ("singles", torch.float32)])
def test_auto_is_bf16_where_the_cpu_multiplies_pairs(
    order: str, expected: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "order", lambda: order)
    assert open_model(folder).activation_dtype is expected


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("f32", torch.float32)])
def test_plain_the_dtype_is_the_weights_too(dtype: Any, expected: torch.dtype, folder: Path) -> None:
    model = open_model(folder, dtype, pack=False)
    assert isinstance(model, Transformer)
    assert model.activation_dtype is expected
    assert model.lm_head.dtype is expected


@pytest.mark.parametrize("pack", [True, False])
def test_an_unknown_dtype_is_refused(pack: bool, folder: Path) -> None:
    with pytest.raises(ConfigError, match="one of auto, bf16, f32, not 'fp16'"):
        open_model(folder, "fp16", pack=pack)  # type: ignore[arg-type]
    assert not list(folder.glob("packed-*"))


@needs_kernels
def test_packing_for_the_first_time_shows_progress(folder: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    LLM(folder, progress=lambda *call: calls.append(call))
    assert calls[0][2] == "packing model.layers.0.self_attn.q_proj"
    assert calls[-1][0] == calls[-1][1]
    calls.clear()
    LLM(folder, progress=lambda *call: calls.append(call))
    assert not calls


@needs_kernels
def test_progress_goes_to_stderr_where_it_takes_long(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "PATIENCE", 0.0)
    LLM(folder)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("packing lm_head: ")
    assert err.endswith("(100 %)\n")
    LLM(folder)
    assert capsys.readouterr() == ("", "")
