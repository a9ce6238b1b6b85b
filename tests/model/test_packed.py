"""The packed model against transformers and against the plain one, step by step over a paged cache too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.model.oracle import fill, kvern_model, random_config, transformers_model
from tests.model.test_parity import LENGTH, PROMPT, distance, tokens

from kvern import ops
from kvern.engine.cache import RECORDS, PagedCache, Span
from kvern.model import ForwardBatch, MLAForm, PackedTransformer, Transformer
from kvern.model.linear import Linear
from kvern.model.packed import PackedNow
from kvern.ops import packed

pytestmark = pytest.mark.skipif(not packed.available(), reason="the kernels were not built")

FP32 = 2e-5
"""Largest difference as a share of the largest logit; BF16 weights meet 16 bits of an FP32 activation's mantissa."""


def pack(model: Transformer) -> PackedTransformer:
    return PackedTransformer(model, PackedNow())


@torch.no_grad()
def step_by_step(
    model: PackedTransformer | Transformer, ids: list[int], form: MLAForm | None, rows: torch.dtype | None = None
) -> torch.Tensor:
    """Logits of every token: a prompt in one pass, then a token at a time; blocks shuffled, a neighbour beside it."""
    cache = PagedCache(model.config, blocks=26, block_size=8, dtype=rows or model.activation_dtype)
    blocks, others = [7, 3, 11, 0, 1, 2, 9, 10, 4, 5, 6, 8], list(range(12, 26))
    parts, computed = [], 0
    for count in [PROMPT] + [1] * (len(ids) - PROMPT):
        view = cache.step([Span(others, computed, count), Span(blocks, computed, count)])
        part = ids[computed : computed + count]
        both = torch.tensor([*reversed(part), *part])
        batch = ForwardBatch(both, view.positions, (0, count, 2 * count), view, form=form)
        parts.append(model(batch)[count:])
        computed += count
    return torch.cat(parts)


@pytest.mark.parametrize("seed", range(24))
@torch.no_grad()
def test_logits_equal_transformers(seed: int) -> None:
    config = random_config(seed)
    oracle = transformers_model(config, seed)
    model, ids = pack(kvern_model(config, oracle)), tokens(seed)
    expected = oracle(torch.tensor([ids])).logits[0]
    for form in (None, *MLAForm):
        assert distance(model(ForwardBatch.of(ids, form=form)), expected) < FP32
        assert distance(step_by_step(model, ids, form), expected) < FP32


def stored_as(seed: int, dtype: torch.dtype, activations: torch.dtype) -> Transformer:
    """A random model whose Linears are stored in `dtype`."""
    config = random_config(seed)
    model = kvern_model(config, transformers_model(config, seed))
    model.activation_dtype = activations
    for module in model.modules():
        if isinstance(module, Linear):
            assert module.weight is not None
            if dtype == torch.float8_e4m3fn:
                module.hold(*ops.quantize_blocks(module.weight.data))
            else:
                module.hold(module.weight.data.to(dtype))
    return model


def median_distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the tokens; a few are far off where rounding moved a choice of experts."""
    return ((got - expected).abs().amax(1) / expected.abs().max()).median().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_stored_dtypes_give_the_plain_models_logits(seed: int, dtype: torch.dtype) -> None:
    plain, ids = stored_as(seed, dtype, torch.float32), tokens(seed)
    expected = plain(ForwardBatch.of(ids))
    assert distance(pack(plain)(ForwardBatch.of(ids)), expected) < 3e-5
    plain.activation_dtype = torch.bfloat16
    rounded, reference = pack(plain)(ForwardBatch.of(ids)), plain(ForwardBatch.of(ids))
    assert median_distance(rounded, expected) < 2e-3
    assert median_distance(rounded, expected) < median_distance(reference, expected)


@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_row_does_not_depend_on_the_rest_of_the_batch(activations: torch.dtype) -> None:
    model = pack(stored_as(3, torch.bfloat16, activations))
    sequences = [tokens(seed)[: 3 + 11 * seed] for seed in range(5)]
    together = model(ForwardBatch.of(*sequences, form=MLAForm.ABSORBED))
    alone = [model(ForwardBatch.of(one, form=MLAForm.ABSORBED)) for one in sequences]
    assert torch.equal(together, torch.cat(alone))
    ids = tokens(9)
    assert torch.equal(step_by_step(model, ids, MLAForm.ABSORBED), model(ForwardBatch.of(ids, form=MLAForm.ABSORBED)))


@torch.no_grad()
def in_one_pass(model: PackedTransformer | Transformer, ids: list[int], form: MLAForm) -> torch.Tensor:
    """Logits of every token over an FP8 cache of its own."""
    view = PagedCache(model.config, 12, 8, RECORDS).step([Span(range(12), 0, len(ids))])
    logits: torch.Tensor = model(ForwardBatch(torch.tensor(ids), view.positions, (0, len(ids)), view, form=form))
    return logits


@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_row_over_an_fp8_cache_depends_on_its_own_context_alone(activations: torch.dtype) -> None:
    model, ids = pack(stored_as(3, torch.bfloat16, activations)), tokens(9)
    stepped = step_by_step(model, ids, MLAForm.ABSORBED, RECORDS)
    assert torch.equal(stepped, in_one_pass(model, ids, MLAForm.ABSORBED))
    assert not torch.equal(stepped, step_by_step(model, ids, MLAForm.ABSORBED))


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_an_fp8_cache_gives_the_plain_models_logits(seed: int) -> None:
    plain, ids = stored_as(seed, torch.float32, torch.float32), tokens(seed)
    exact = plain(ForwardBatch.of(ids))
    for form in MLAForm:
        expected, found = (in_one_pass(model, ids, form) for model in (plain, pack(plain)))
        # a latent on the border of two codes may go either way, and then differs by a step of E4M3
        assert median_distance(found, expected) < 5e-3
        assert 1e-4 < median_distance(expected, exact) < 0.1
    plain.activation_dtype = torch.bfloat16
    assert median_distance(in_one_pass(pack(plain), ids, MLAForm.ABSORBED), exact) < 0.1


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_mtp_gives_the_plain_models_logits(seed: int) -> None:
    model = Transformer(random_config(seed), device="cpu")
    fill(model, torch.Generator().manual_seed(seed))
    ids = tokens(seed)
    batch, following = ForwardBatch.of(ids[:-1]), ForwardBatch.of(ids[1:])
    states, logits = model.mtp(model.hidden(batch), following)
    packed_states, packed_logits = pack(model).mtp(pack(model).hidden(batch), following)
    assert distance(packed_states, states) < FP32
    assert distance(packed_logits, logits) < FP32


@pytest.mark.parametrize("wanted", [None, [0, 1, 2, 3], [3], [1, 2], []])
@torch.no_grad()
def test_hidden_states_come_with_the_same_logits(wanted: list[int] | None) -> None:
    model = pack(stored_as(0, torch.bfloat16, torch.float32))
    batch = ForwardBatch.of(tokens(0)[:4])
    batch = replace(batch, logits_at=None if wanted is None else torch.tensor(wanted, dtype=torch.int64))
    states, logits = model.with_hidden(batch)
    assert torch.equal(logits, model(batch))
    assert torch.equal(states, model.hidden(batch))


@torch.no_grad()
def test_only_the_wanted_logits_are_computed_and_counted() -> None:
    model = pack(stored_as(0, torch.bfloat16, torch.float32))
    batch = ForwardBatch.of(list(range(12)))
    model.counters = torch.zeros(len(packed.COUNTERS), dtype=torch.int64)
    some = model(replace(batch, logits_at=torch.tensor([11, 4])))
    assert torch.equal(some, model(batch)[[11, 4]])
    counted = dict(zip(packed.COUNTERS, model.counters.tolist(), strict=True))
    rows = 12 * model.config.latent_dim * 4 * model.config.num_hidden_layers
    assert counted["cache_bytes"] == 2 * rows
    assert all(counted[name] > 0 for name in packed.COUNTERS)


@torch.no_grad()
def test_a_step_whose_books_are_wrong_is_refused() -> None:
    model = pack(stored_as(0, torch.bfloat16, torch.float32))
    cache = PagedCache(model.config, blocks=2, block_size=8, dtype=torch.float32)
    view = cache.step([Span([0, 1], 0, LENGTH // 9)])
    batch = ForwardBatch(torch.arange(10), view.positions, (0, 10), view)
    view.tables[0, 1] = 2
    with pytest.raises(IndexError, match="a block outside the cache"):
        model(batch)
