"""The choice of dtypes: what is measured, what is left out, which form wins."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from kvern.config import Int4Config, ModelConfig
from kvern.engine import dtype
from kvern.engine.dtype import FORMS, Form, Measurement, choose

V3 = ModelConfig.named("deepseek-v3")
MOONLIGHT = ModelConfig.named("moonlight-16b-a3b")


def small() -> ModelConfig:
    """Moonlight cut to a size whose every form fits into memory."""
    return dataclasses.replace(MOONLIGHT, vocab_size=1000, num_hidden_layers=2, n_routed_experts=8)


def timed(monkeypatch: pytest.MonkeyPatch, times: dict[Form, tuple[float, float]]) -> None:
    """Let `choose` see these times instead of measuring."""

    def fake(config: ModelConfig, form: Form, available: int) -> Measurement:
        one, sixteen = times[form]
        return Measurement(form, 1, 1, one, sixteen)

    monkeypatch.setattr(dtype, "_measure", fake)


STORED_F32, F32, STORED_BF16, BF16 = FORMS


def test_the_fastest_wins_over_both_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {STORED_F32: (9, 9), F32: (4, 100), STORED_BF16: (5, 5), BF16: (1, 900)})
    choice = choose(V3)
    assert (choice.activation_dtype, choice.weight_dtype) == (torch.bfloat16, None)


def test_a_tie_goes_to_the_more_exact_form(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {STORED_F32: (10, 10), F32: (50, 50), STORED_BF16: (9.5, 9.5), BF16: (50, 50)})
    assert choose(V3).activation_dtype is torch.float32


def test_forms_that_do_not_fit_are_left_out_with_the_numbers() -> None:
    choice = choose(V3)
    assert choice.weight_dtype is None
    left_out = [one for one in choice.measurements if one.left_out]
    assert {one.form for one in left_out} == {F32, BF16}
    assert all("GiB available" in str(one.left_out) for one in left_out)


def test_weights_are_not_converted_into_what_they_are() -> None:
    forms = {one.form for one in choose(small()).measurements}
    assert forms == {STORED_F32, F32, STORED_BF16}


def test_it_measures_in_about_a_second() -> None:
    start = time.perf_counter()
    choose(small())
    assert time.perf_counter() - start < 5  # bounded to 1 s of products; a busy machine also waits for memory


def test_four_bit_weights_are_measured_as_stored_and_converted() -> None:
    config = dataclasses.replace(small(), quantization_config=Int4Config(32))
    assert dtype.stored_dtype(config) is torch.int32
    choice = choose(config)
    assert {one.form for one in choice.measurements} == set(FORMS)
    assert all(one.one_row is not None for one in choice.measurements)


def test_four_bits_that_do_not_fit_the_width_are_floats() -> None:
    config = dataclasses.replace(small(), hidden_size=2000, quantization_config=Int4Config(128))
    assert dtype.stored_dtype(config) is torch.bfloat16
