"""Generation over a random small model: greedy equals transformers, limits hold, sampling is reproducible."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tests.model.oracle import kvern_model, random_config, transformers_model

from kvern.engine import Engine, SamplingParams
from kvern.engine import engine as engine_module
from kvern.engine.sampler import sample
from kvern.errors import BadRequestError

PROMPT = list(range(2, 40))


def engine(seed: int = 0, **options: int) -> Engine:
    config = random_config(seed)
    return Engine(kvern_model(config, transformers_model(config, seed)), **options)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [7, 512])
def test_greedy_equals_transformers(seed: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PREFILL_ROWS", rows)
    config = random_config(seed)
    oracle = transformers_model(config, seed)
    oracle.generation_config.eos_token_id = None
    prompt = torch.tensor([PROMPT])
    expected = oracle.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    got = Engine(kvern_model(config, oracle)).generate(PROMPT, SamplingParams(max_tokens=24))
    assert list(got) == expected[0, len(PROMPT) :].tolist()


def test_stops_at_a_stop_id_which_is_the_last() -> None:
    free = list(engine().generate(PROMPT, SamplingParams(max_tokens=20)))
    stop = free[10]
    got = list(engine().generate(PROMPT, SamplingParams(max_tokens=20, stop_token_ids=(stop,))))
    assert got == free[: free.index(stop) + 1]


def test_never_passes_the_context() -> None:
    assert len(list(engine(max_context=50).generate(PROMPT, SamplingParams(max_tokens=1000)))) == 50 - len(PROMPT)


def test_a_cancelled_request_ends_within_a_step() -> None:
    got: list[int] = []
    for token in engine().generate(PROMPT, SamplingParams(max_tokens=50), lambda: len(got) >= 3):
        got.append(token)
    assert len(got) == 3


@pytest.mark.parametrize(("prompt", "limit"), [([], 5), ([0] * 50, 5), ([96], 5), ([-1], 5), (PROMPT, 0)], ids=str)
def test_impossible_requests_are_refused_before_any_work(prompt: list[int], limit: int) -> None:
    with pytest.raises(BadRequestError):
        engine(max_context=50).generate(prompt, SamplingParams(max_tokens=limit))


def test_a_too_long_prompt_names_both_lengths() -> None:
    with pytest.raises(BadRequestError, match=r"60 tokens.*50"):
        engine(max_context=50).generate([1] * 60, SamplingParams(max_tokens=1))


def test_the_same_seed_gives_the_same_text_and_another_another() -> None:
    def draw(seed: int) -> list[int]:
        return list(engine().generate(PROMPT, SamplingParams(max_tokens=16, temperature=1.5, seed=seed)))

    assert draw(1) == draw(1) != draw(2)


def test_sampling_follows_the_softmax_within_top_p_and_the_vocabulary() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 9.0])
    params = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.95, vocab_limit=4)
    counts = Counter(sample(logits, params, seed=3, position=p) for p in range(4000))
    kept = logits[:3].softmax(-1)
    assert set(counts) == {0, 1, 2}
    for token, probability in enumerate(kept.tolist()):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_greedy_ignores_ids_above_the_vocabulary() -> None:
    assert sample(torch.tensor([0.0, 1.0, 9.0]), SamplingParams(max_tokens=1, vocab_limit=2), 0, 0) == 1
