"""`kvern doctor`: the numbers of the report, its JSON form, and the advice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kvern.cli import doctor, main
from kvern.ops import library
from kvern.plan.hardware import Machine, machine

AVX2 = ("avx2", "fma", "f16c")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512vl", "avx512vbmi")


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["doctor", "--json", *arguments]) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def test_deepseek_v3_in_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "--model", "deepseek-v3")
    assert found["parameters"] == 671_026_419_200
    assert abs(found["active_parameters"] / 36.6e9 - 1) < 0.005
    assert found["latent_bytes_per_token"] == 70_272
    assert found["latent8_bytes_per_token"] == 40_016
    assert found["mha_bytes_per_token"] == 3_997_696
    assert found["checkpoint_bytes"] == 688_574_839_360


def test_a_folder(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    found = report(capsys, "--model", str(tiny_folder))
    assert found["fits_in_memory"] is True
    chosen = [one for one in found["dtype"]["measured"] if one["chosen"]]
    assert len(chosen) == 1
    assert chosen[0]["one_row_us"] > 0


def test_all_known_models_by_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVERN_CACHE", str(tmp_path))
    found = report(capsys)
    assert {"deepseek-v3", "moonlight-16b-a3b", "kimi-k2"} <= set(found["models"])
    assert "parameters" not in found
    assert found["kernels"]["ops"]["linear"] == ("native" if library.library() else "reference")
    assert found["machine"]["usable_cores"] >= 1


def test_the_text_names_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "deepseek-v3"]) == 0
    text = capsys.readouterr().out
    for expected in ("671,026,419,200", "70,272", "3,997,696", "56.9 times", "linear", "GiB available", "chosen"):
        assert expected in text


def test_an_unknown_model_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "deepsek-v3"]) == 1
    assert "deepseek-v3" in capsys.readouterr().err


def described(**changes: Any) -> Machine:
    same = {"usable_cores": library.threads(), "logical_cores": library.threads(), "isa": AVX512}
    return dataclasses.replace(machine(), **{**same, **changes})


def test_advice_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "why_absent", lambda: "the library was not built")
    assert any("install g++" in line for line in doctor.advice(described()))


def test_advice_on_cores_and_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "why_absent", lambda: None)
    monkeypatch.setattr(library, "isa", lambda: "avx512")
    monkeypatch.setattr(library, "library", object)
    monkeypatch.setattr(library, "threads", lambda: 2)
    assert doctor.advice(described(usable_cores=2, logical_cores=2)) == []
    assert "2 of 8 cores" in doctor.advice(described(usable_cores=8, logical_cores=8))[0]
    assert "limit leaves 2 of 8" in doctor.advice(described(usable_cores=2, logical_cores=8))[0]
    bf16 = described(usable_cores=2, logical_cores=2, isa=(*AVX512, "avx512_bf16"))
    assert "could run avx512bf16" in doctor.advice(bf16)[0]
    tiles = described(usable_cores=2, logical_cores=2, isa=(*AVX512, "avx512_bf16", "amx_bf16", "amx_tile"))
    assert "could run amx" in doctor.advice(tiles)[0]
    monkeypatch.setattr(library, "isa", lambda: "avx2")
    assert "unset KVERN_ISA" in doctor.advice(described(usable_cores=2, logical_cores=2))[0]
    assert "no AVX-512" in doctor.advice(described(usable_cores=2, logical_cores=2, isa=AVX2))[0]
