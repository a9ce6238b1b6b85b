"""The comparison with static batches: what is run and counted, not how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench.batch import (
    Row,
    WarmRow,
    come_and_go,
    compare,
    even,
    first_token,
    missed,
    one_by_one,
    requests,
)
from bench.transformers_peer import Static, Work

from bench import batch
from kvern.checkpoint.load import load
from kvern.engine import Engine, EngineSettings, SamplingParams


@pytest.fixture
def engine(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(batch, "IDS", 256)
    monkeypatch.setattr(batch, "PROMPT", (4, 40))
    monkeypatch.setattr(batch, "ANSWER", (2, 12))
    return Engine(load(tiny_folder), settings=EngineSettings(max_running=4, cache_tokens=1024))


@pytest.fixture(scope="module")
def qwen() -> Static:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Static(Qwen2ForCausalLM(config).eval())


def test_lengths_are_seeded_apart_from_contents() -> None:
    first, second = requests(20, 0, 1), requests(20, 0, 2)
    assert [(len(one.prompt), one.tokens) for one in first] == [(len(one.prompt), one.tokens) for one in second]
    assert [one.prompt for one in first] != [one.prompt for one in second]
    assert len({len(one.prompt) for one in first}) > 5
    same = even(first, 3, 0)
    assert len({(len(one.prompt), one.tokens) for one in same}) == 1
    assert abs(len(same[0].prompt) - sum(len(one.prompt) for one in first) / 20) <= 0.5


def test_places_stay_taken_until_nobody_comes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []
    step = engine.step

    def spy() -> Any:
        updates = step()
        running.append(len(engine.live()))
        return updates

    monkeypatch.setattr(engine, "step", spy)
    work = requests(12, 0, 1)
    assert come_and_go(engine, work, 4, to_the_end=True) > 0
    assert engine.stats().finished == {"length": 12}
    assert engine.stats().generated_tokens == sum(one.tokens for one in work)
    assert max(running) <= 4
    assert come_and_go(engine, requests(12, 0, 2), 4) > 0
    assert engine.stats().finished == {"length": 24}
    assert one_by_one(engine, requests(3, 0, 3)) > 0
    assert engine.stats().generated_tokens == 2 * sum(one.tokens for one in work) + sum(one.tokens for one in work[:3])


def test_the_second_time_a_prompt_is_cached(engine: Engine) -> None:
    prompt = list(range(100))
    first_token(engine, prompt)
    assert engine.stats().prefix_hits == 0
    first_token(engine, prompt)
    assert engine.stats().prefix_hits == 96


def test_a_padded_batch_answers_as_each_request_alone(qwen: Static) -> None:
    work = [Work(tuple(range(3, 3 + length)), tokens) for length, tokens in ((5, 7), (11, 3), (8, 9))]
    together = qwen.generate(work)
    assert [len(answer) for answer in together] == [7, 3, 9]
    assert together == [qwen.generate([one])[0] for one in work]
    for one, answer in zip(work, together, strict=True):
        ids = torch.tensor([[*one.prompt, *answer]])
        greedy = qwen.model(ids).logits[0, len(one.prompt) - 1 : -1].argmax(-1).tolist()
        assert answer == greedy
    assert qwen.run(work) > 0
    assert qwen.run_all(work, 2) > 0


def test_ratios_and_bars() -> None:
    ours, theirs = iter([9.0, 1.0, 2.0, 3.0]), iter([9.0, 2.0, 2.0, 2.0])
    row = compare("single stream", lambda: next(ours), lambda: next(theirs), 3)
    assert (row.kvern, row.transformers, row.ratio, row.bar) == (2.0, 2.0, 1.0, 1.0)
    slow = Row("16 come and go", 1, 2, 0.5, 0.9, ())
    assert missed([row, slow], WarmRow(1, 0.05, 0.05, ())) == ["16 come and go: 0.50 of 0.9"]
    assert missed([], WarmRow(1, 0.1, 0.1, ())) == ["warm prefix: 0.10 of 0.1"]


def test_the_greedy_params_of_a_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SamplingParams] = []
    add = engine.add

    def spy(prompt: tuple[int, ...], params: SamplingParams) -> int:
        seen.append(params)
        return add(prompt, params)

    monkeypatch.setattr(engine, "add", spy)
    one_by_one(engine, [Work((1, 2), 3)])
    assert seen == [SamplingParams(max_tokens=3, ignore_eos=True)]
