"""Rows are complete and consistent, and the bytes they count are those of the tensors that a step touches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.tiny import CONTEXT

from kvern.bench import engine as bench
from kvern.bench.depth import fill, random_latents
from kvern.bench.engine import Case, EngineBench, cases, why_not
from kvern.bench.stages import STAGES, stopwatches
from kvern.bench.traffic import Traffic, Weights, recorded
from kvern.checkpoint.load import load
from kvern.engine import Engine, SamplingParams
from kvern.engine.settings import EngineSettings
from kvern.model import ForwardBatch, Transformer
from kvern.ops import library
from kvern.plan import hardware
from kvern.plan.memory import account

ROW = 2 * (16 + 8) * 4
"""Bytes of a token in the tiny model's cache: two layers, rank 16 and rope 8, float32."""


@pytest.fixture
def model(tiny_folder: Path) -> Transformer:
    return load(tiny_folder)


def test_the_cases_of_a_command_line() -> None:
    found = cases([512, 4096], 64, [0, 4096, 4100], [1, 8])
    assert [str(case) for case in found[:3]] == [
        "prefill 512, batch 1, depth 0",
        "prefill 512, batch 1, depth 4096",
        "prefill 4096, batch 1, depth 0",
    ]
    assert [(case.batch, case.depth) for case in found[4:]] == [(1, 0), (1, 4096), (8, 0), (8, 4096)]


@pytest.mark.parametrize("case", [Case("prefill", 70, 1, 0), Case("prefill", 40, 1, 96)])
def test_a_prefill_row(model: Transformer, case: Case) -> None:
    row = EngineBench(model, [case], read=10.0).run(case)
    weights = Weights.of(model)
    step = weights.every_step + weights.head + sum(map(sum, weights.experts)) + case.tokens * weights.embedding_row
    assert (
        row.bytes_per_token * case.tokens == step + (case.depth + case.tokens) * ROW
    )  # so many tokens use every expert
    assert row.gb_per_s == pytest.approx(row.bytes_per_token * row.tokens_per_s / 1e9)
    assert row.bandwidth_share == pytest.approx(row.gb_per_s / 10)
    assert row.stages is None


def test_a_row_over_an_fp8_cache_counts_its_bytes(model: Transformer) -> None:
    case = Case("prefill", 40, 1, 96)
    rows = [EngineBench(model, [case], read=10.0, cache_dtype=dtype).run(case) for dtype in ("auto", "fp8")]
    records = 2 * (16 + 4 + 2 * 8)
    assert (rows[0].bytes_per_token - rows[1].bytes_per_token) * 40 == pytest.approx((96 + 40) * (ROW - records))


@pytest.mark.parametrize("case", [Case("decode", 6, 3, 96), Case("decode", 5, 1, 0)])
def test_a_decode_row(model: Transformer, case: Case) -> None:
    row = EngineBench(model, [case], read=10.0).run(case)
    weights = Weights.of(model)
    shared = case.tokens * (weights.every_step + weights.head) + case.tokens * case.batch * weights.embedding_row
    first = case.depth + 1 + 1 + bench.WARM_STEPS
    rows = case.batch * sum(range(first, first + case.tokens))
    experts = row.bytes_per_token * case.tokens * case.batch - shared - rows * ROW
    one = weights.experts[0][0]
    assert experts % one == 0
    assert 2 * case.tokens <= experts // one <= case.tokens * min(4, 2 * case.batch)  # top 2 of 4 experts
    assert row.tokens_per_s > 0


def test_the_weights_are_every_tensor_once(model: Transformer) -> None:
    weights, config = Weights.of(model), model.config
    counted = weights.every_step + weights.head + sum(map(sum, weights.experts))
    counted += config.vocab_size * weights.embedding_row
    assert counted == sum(tensor.nbytes for tensor in model.state_dict().values())
    active = weights.every_step + weights.head + 2 * weights.experts[0][0]
    assert active == 4 * account(config).active_parameters


def test_fp8_counts_as_it_is_stored(model: Transformer) -> None:
    from kvern.config import QuantizationConfig

    quantised = dataclasses.replace(model.config, quantization_config=QuantizationConfig(), torch_dtype="bfloat16")
    weights = Weights.of(Transformer(quantised))
    expert = 3 * (32 * 16 + 4)  # a byte a weight, and one scale for the one block of each of the three
    assert weights.experts == ((expert,) * 4,)


@torch.inference_mode()
def test_the_recorded_bytes_equal_a_count_over_the_modules_that_ran(model: Transformer) -> None:
    """An independent count: hooks on every module with parameters of its own; kv_b_proj is read without a call."""
    touched: set[int] = set()
    for module in model.modules():
        if own := list(module.parameters(recurse=False)) + list(module.buffers(recurse=False)):
            ids = [tensor.data_ptr() for tensor in own]
            module.register_forward_pre_hook(lambda *_, ids=ids: touched.update(ids))
    batch = ForwardBatch.of([1, 2, 3])
    with recorded(model) as traffic:
        model(batch)
    embedding = model.model.embed_tokens.weight
    read = sum(
        tensor.nbytes
        for name, tensor in model.state_dict().items()
        if tensor is not embedding
        and name != "model.embed_tokens.weight"
        and (tensor.data_ptr() in touched or "kv_b_proj" in name)
    )
    embedded = 3 * embedding.shape[1] * embedding.element_size()
    assert traffic.bytes(Weights.of(model), ROW) == read + embedded + 3 * ROW
    assert (traffic.steps, traffic.heads, traffic.tokens, traffic.visible_rows) == (1, 1, 3, 3)


def test_an_expert_counts_once_a_step() -> None:
    weights = Weights(every_step=1000, head=100, embedding_row=10, experts=((1, 2, 4, 8),))
    traffic = Traffic(2, 1, 3, 7, [(0, torch.tensor([[0, 1], [1, 0]])), (0, torch.tensor([[3, 1]]))])
    assert traffic.bytes(weights, cache_row=5) == 2000 + 100 + 30 + (1 + 2) + (8 + 2) + 35


def test_stages_are_complete_and_add_up(model: Transformer) -> None:
    case = Case("decode", 4, 2, 32)
    row = EngineBench(model, [case, Case("prefill", 8, 1, 0)], read=10.0).run(case, stages=True)
    assert row.stages is not None
    assert tuple(row.stages) == STAGES
    assert all(seconds > 0 for seconds in row.stages.values())
    prefill = EngineBench(model, [Case("prefill", 8, 1, 16)], read=10.0).run(Case("prefill", 8, 1, 16), stages=True)
    assert prefill.stages is not None
    assert tuple(prefill.stages) == STAGES


def test_hooks_and_layers_are_put_back(model: Transformer) -> None:
    from kvern.engine import engine as engine_module

    layers, sample = model.model.layers, vars(engine_module)["sample"]
    with recorded(model), stopwatches(model), random_latents(model, 8):
        assert model.model.layers is not layers
    assert model.model.layers is layers
    assert vars(engine_module)["sample"] is sample
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_filled_prompt_is_a_cached_prefix_of_random_rows(model: Transformer) -> None:
    engine = Engine(model, settings=EngineSettings(cache_tokens=512, max_running=4, step_tokens=24))
    prompts = [[token] * 64 for token in range(3)]
    fill(engine, prompts)
    engine.check()
    rows = engine.cache.rows[:, : 3 * 64].float()
    assert rows.std() == pytest.approx(1, abs=0.1)
    engine.add([*prompts[1], 5], SamplingParams(max_tokens=1))
    assert engine.step()[0].cached_tokens == 64


def test_a_row_of_something_else_is_never_printed(model: Transformer) -> None:
    case = Case("prefill", 8, 1, 32)
    measured = EngineBench(model, [case], read=10.0)
    with pytest.raises(RuntimeError, match="the engine had 0 cached tokens where the case has 32"):
        measured._run_prefill(case, [[1] * 32], False)


def test_what_cannot_run_says_why(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not(Case("decode", 64, 1, 16), model) is None
    assert (
        why_not(Case("prefill", CONTEXT, 1, 0), model)
        == f"needs a context of {CONTEXT + 1} tokens, the model has {CONTEXT}"
    )
    real = hardware.machine()
    monkeypatch.setattr(bench, "machine", lambda: dataclasses.replace(real, memory_available=1000))
    assert why_not(Case("decode", 8, 2, 16), model) == "needs 0.0 GiB of cache, 0.0 GiB are free"


def test_the_read_bandwidth_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.5 < bench.read_gb_s(8_000_000) < 5000
    monkeypatch.setattr(library, "library", lambda: None)
    assert 0.5 < bench.read_gb_s(8_000_000) < 5000
