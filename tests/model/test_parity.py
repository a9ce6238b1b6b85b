"""Kvern's model against transformers' DeepseekV3ForCausalLM and its MTP layer, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.model.oracle import kvern_model, random_config, transformers_model, transformers_mtp

from kvern import ops
from kvern.config import ModelConfig, RopeScaling
from kvern.engine.cache import PagedCache, Span
from kvern.model import ForwardBatch, MLAForm, Transformer
from kvern.ops import reference

SEEDS = range(24)
LENGTH, PROMPT = 90, 60
TOLERANCE = 1e-5


def tokens(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 96, (LENGTH,), generator=generator).tolist()


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest logit."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def step_by_step(model: Transformer, ids: list[int], form: MLAForm) -> torch.Tensor:
    """Logits of every token: a prompt in one pass, then a token at a time over a paged cache, its blocks shuffled."""
    cache = PagedCache(model.config, blocks=12, block_size=8, dtype=torch.float32)
    blocks = [7, 3, 11, 0, 1, 2, 9, 10, 4, 5, 6, 8]
    parts, computed = [], 0
    for count in [PROMPT] + [1] * (len(ids) - PROMPT):
        view = cache.step([Span(blocks, computed, count)])
        tokens = torch.tensor(ids[computed : computed + count])
        parts.append(model(ForwardBatch(tokens, view.positions, (0, count), view, form=form)))
        computed += count
    return torch.cat(parts)


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_logits_equal_transformers(seed: int) -> None:
    config = random_config(seed)
    oracle = transformers_model(config, seed)
    model, ids = kvern_model(config, oracle), tokens(seed)
    expected = oracle(torch.tensor([ids])).logits[0]
    for form in MLAForm:
        assert distance(model(ForwardBatch.of(ids, form=form)), expected) < TOLERANCE
        assert distance(step_by_step(model, ids, form), expected) < TOLERANCE


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_sequences_of_one_batch_do_not_see_each_other(seed: int) -> None:
    config = random_config(seed)
    oracle = transformers_model(config, seed)
    model, ids = kvern_model(config, oracle), tokens(seed)
    both = model(ForwardBatch.of(ids[:50], ids[50:]))
    assert distance(both[:50], oracle(torch.tensor([ids[:50]])).logits[0]) < TOLERANCE
    assert distance(both[50:], oracle(torch.tensor([ids[50:]])).logits[0]) < TOLERANCE


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_sequences_of_a_cached_batch_mix_prefill_and_decoding(seed: int) -> None:
    """Three sequences in one step: the middle of a prompt, a single token, a whole prompt; forms chosen by cost."""
    config = random_config(seed)
    oracle = transformers_model(config, seed)
    model, ids = kvern_model(config, oracle), tokens(seed)
    cache = PagedCache(config, blocks=40, block_size=8, dtype=torch.float32)
    blocks = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
    first = [Span(blocks[:12], 0, 30), Span(blocks[12:24], 0, 50)]
    second = [Span(blocks[:12], 30, 60), Span(blocks[12:24], 50, 1), Span(blocks[24:36], 0, 20)]
    logits = []
    for spans in (first, second):
        view = cache.step(spans)
        chosen = [token for span in spans for token in ids[span.computed : span.computed + span.count]]
        batch = ForwardBatch(torch.tensor(chosen), view.positions, tuple(view.starts.tolist()), view)
        logits.append(model(batch))
    expected = oracle(torch.tensor([ids])).logits[0]
    assert distance(torch.cat([logits[0][:30], logits[1][:60]]), expected) < TOLERANCE
    assert distance(logits[1][60:61], expected[50:51]) < TOLERANCE
    assert distance(logits[1][61:], expected[:20]) < TOLERANCE


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_mtp_equals_transformers(seed: int) -> None:
    config = random_config(seed)
    oracle = transformers_model(config, seed)
    mtp = transformers_mtp(oracle, seed)
    model, ids = kvern_model(config, oracle, mtp), tokens(seed)
    hidden = oracle.model(torch.tensor([ids])).last_hidden_state[:, :-1]
    positions = torch.arange(1, LENGTH)[None]
    states = mtp.forward_layer(0, hidden, positions, None, input_ids=torch.tensor([ids[1:]]))
    expected = mtp._project_to_logits(states)[0]
    ours = model.hidden(ForwardBatch.of(ids))[:-1]
    batch = ForwardBatch(torch.tensor(ids[1:]), positions[0], (0, LENGTH - 1))
    _, logits = model.mtp(ours, batch)
    assert distance(logits, expected) < TOLERANCE


def half_split(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return reference.apply_rope(torch.stack([first, second], -1).flatten(-2), rotation)


def without_bias(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *rest: Any) -> Any:
    return reference.route(x, weight, torch.zeros_like(bias), *rest)


def without_groups(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, top_k: int, *rest: Any) -> Any:
    return reference.route(x, weight, bias, top_k, 1, 1, *rest[2:])


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "half-split rope": lambda patch: patch.setattr(ops, "apply_rope", half_split),
    "no m^2": lambda patch: patch.setattr(ModelConfig, "softmax_scale", property(lambda c: c.qk_head_dim**-0.5)),
    "bias dropped": lambda patch: patch.setattr(ops, "route", without_bias),
    "no group limit": lambda patch: patch.setattr(ops, "route", without_groups),
}


def golden_config() -> ModelConfig:
    """A configuration in which every mutated part matters: YaRN, gate bias, groups."""
    scaling = RopeScaling("yarn", 40.0, 64, mscale=1.0, mscale_all_dim=1.0)
    drawn = replace(random_config(0), hidden_size=64, n_group=4, topk_group=2, num_experts_per_tok=4)
    return replace(drawn, first_k_dense_replace=0, norm_topk_prob=True, routed_scaling_factor=2.5, rope_scaling=scaling)


@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
@torch.no_grad()
def test_each_classic_mistake_is_caught(mutation: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = golden_config()
    oracle = transformers_model(config, seed=0)
    model, ids = kvern_model(config, oracle), tokens(0)
    expected = oracle(torch.tensor([ids])).logits[0]
    if mutation is None:
        assert distance(model(ForwardBatch.of(ids)), expected) < TOLERANCE
    else:
        MUTATIONS[mutation](monkeypatch)
        assert distance(model(ForwardBatch.of(ids)), expected) > 1000 * TOLERANCE
