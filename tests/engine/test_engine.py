"""The engine over a random small model: greedy equals transformers, limits hold, every update is accounted for."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from tests.model.oracle import kvern_model, random_config, transformers_model

from kvern.engine import Engine, EngineSettings, SamplingParams, Update
from kvern.engine.runner import Computed
from kvern.engine.scheduler import Chunk
from kvern.errors import BadRequestError, BusyError, ConfigError

PROMPT = list(range(2, 40))


def engine(seed: int = 0, **settings: Any) -> Engine:
    config = random_config(seed)
    model = kvern_model(config, transformers_model(config, seed))
    return Engine(model, settings=EngineSettings(**{"check_every_step": True, "block_size": 4, **settings}))


def finish(running: Engine) -> dict[int, list[Update]]:
    """Step until nothing is left; the updates of each request."""
    updates = defaultdict(list)
    while running.has_work():
        for update in running.step():
            updates[update.request_id].append(update)
    return updates


def generate(running: Engine, prompt: list[int], **params: Any) -> list[int]:
    number = running.add(prompt, SamplingParams(**params))
    return [token for update in finish(running)[number] for token in update.tokens]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("step_tokens", [7, 512])
def test_greedy_equals_transformers(seed: int, step_tokens: int) -> None:
    config = random_config(seed)
    oracle = transformers_model(config, seed)
    oracle.generation_config.eos_token_id = None
    prompt = torch.tensor([PROMPT])
    expected = oracle.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    running = Engine(kvern_model(config, oracle), settings=EngineSettings(step_tokens=step_tokens, max_running=7))
    assert generate(running, PROMPT, max_tokens=24) == expected[0, len(PROMPT) :].tolist()


def test_stops_at_a_stop_id_which_is_the_last() -> None:
    running = engine()
    free = generate(running, PROMPT, max_tokens=20)
    stop = free[10]
    assert generate(running, PROMPT, max_tokens=20, stop_token_ids=(stop,)) == free[: free.index(stop) + 1]


def test_never_passes_the_context() -> None:
    assert len(generate(engine(max_context=50), PROMPT, max_tokens=1000)) == 50 - len(PROMPT)


def test_the_cache_bounds_the_context() -> None:
    running = engine(cache_tokens=44)
    assert running.max_context == 44
    with pytest.raises(BadRequestError, match=r"44 tokens.*holds 44"):
        running.add([1] * 44, SamplingParams(max_tokens=1))


def test_a_cancelled_request_ends_at_the_next_step() -> None:
    running = engine()
    number, other = (running.add(PROMPT, SamplingParams(max_tokens=50)) for _ in range(2))
    running.step()
    running.cancel(number)
    running.cancel(number)
    running.cancel(12345)
    updates = finish(running)
    assert [update.finish for update in updates[number]] == ["cancelled"]
    assert updates[other][-1].finish == "length"
    assert running.stats().cache_blocks_used == 0


def test_a_request_cancelled_before_its_first_step_gets_its_end() -> None:
    running = engine()
    number = running.add(PROMPT, SamplingParams(max_tokens=5))
    running.cancel(number)
    assert [update.finish for update in finish(running)[number]] == ["cancelled"]


@pytest.mark.parametrize(
    ("prompt", "limit"), [([], 5), ([0] * 50, 5), ([96], 5), ([-1], 5), (PROMPT, 0), (PROMPT, -1)], ids=str
)
def test_impossible_requests_are_refused_before_any_work(prompt: list[int], limit: int) -> None:
    running = engine(max_context=50)
    with pytest.raises(BadRequestError):
        running.add(prompt, SamplingParams(max_tokens=limit))
    assert not running.has_work()


def test_a_full_queue_says_so() -> None:
    running = engine(max_waiting=3)
    for _ in range(3):
        running.add(PROMPT, SamplingParams(max_tokens=1))
    with pytest.raises(BusyError, match="3 requests"):
        running.add(PROMPT, SamplingParams(max_tokens=1))
    finish(running)
    running.add(PROMPT, SamplingParams(max_tokens=1))


@pytest.mark.parametrize("bad", [{"block_size": 0}, {"max_running": 9, "step_tokens": 8}, {"max_context": 1}])
def test_settings_that_cannot_work_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EngineSettings(**bad)


def test_a_shared_prefix_is_computed_once_and_reported() -> None:
    running = engine()
    generate(running, PROMPT, max_tokens=4)
    number = running.add([*PROMPT[:33], 90, 91], SamplingParams(max_tokens=4))
    assert finish(running)[number][0].cached_tokens == 32
    stats = running.stats()
    assert (stats.prefix_hits, stats.prefix_queries) == (32, len(PROMPT) + 35)
    same = running.add(PROMPT, SamplingParams(max_tokens=4))
    assert finish(running)[same][0].cached_tokens == 36  # the last token is computed anew, for its logits


def test_a_prefix_is_invisible_under_another_salt() -> None:
    running = engine()
    generate(running, PROMPT, max_tokens=4)
    number = running.add(PROMPT, SamplingParams(max_tokens=4), salt=b"another tenant")
    assert finish(running)[number][0].cached_tokens == 0


def test_logprobs_of_prompt_and_answer() -> None:
    running = engine()
    params = SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=True)
    for step_tokens in (512, 7):
        running.scheduler.step_tokens = step_tokens
        number = running.add(PROMPT, params)
        updates = finish(running)[number]
        assert len(updates[0].prompt_logprobs) == len(PROMPT)
        assert updates[0].prompt_logprobs[0] is None
        told = [one.token for one in updates[0].prompt_logprobs[1:] if one is not None]
        assert told == PROMPT[1:]
        for update in updates:
            assert [one.token for one in update.logprobs] == list(update.tokens)
            assert all(one.top[0] == (one.token, one.logprob) and len(one.top) == 2 for one in update.logprobs)


def test_a_prompt_alone_can_be_scored() -> None:
    running = engine()
    number = running.add(PROMPT, SamplingParams(max_tokens=0, logprobs=0, prompt_logprobs=True))
    (update,) = finish(running)[number]
    assert (update.finish, update.tokens, len(update.prompt_logprobs)) == ("length", (), len(PROMPT))


def test_a_better_priority_runs_first_and_preempts() -> None:
    running = engine(cache_tokens=64, max_running=2, step_tokens=64)
    slow = [running.add([number, *PROMPT[:20]], SamplingParams(max_tokens=8), priority=5) for number in (50, 51)]
    running.step()
    urgent = running.add([52, *PROMPT[:20]], SamplingParams(max_tokens=2), priority=0)
    order = []
    while running.has_work():
        order += [update.request_id for update in running.step() if update.finish]
    assert order[0] == urgent
    assert sorted(order[1:]) == slow
    assert running.stats().preemptions >= 1


def test_an_update_tells_when_the_request_left_the_queue() -> None:
    running, begun = engine(max_running=1), time.monotonic()
    first, second, gone = (running.add(PROMPT, SamplingParams(max_tokens=3)) for _ in range(3))
    running.cancel(gone)
    updates = finish(running)
    started = {number: [update.started for update in updates[number]] for number in (first, second, gone)}
    assert started[first][1:] == started[second][1:] == [None, None]
    assert started[gone] == [None]
    before, after = started[first][0], started[second][0]
    assert before is not None
    assert after is not None
    assert begun < before < after < time.monotonic()


def test_equal_prompts_that_come_together_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    running, computed = engine(step_tokens=16, max_running=4), Counter[str]()
    run = running.runner.run

    def counting(chunks: Sequence[Chunk]) -> Computed:
        computed["tokens"] += sum(chunk.count for chunk in chunks)
        return run(chunks)

    monkeypatch.setattr(running.runner, "run", counting)
    params = [SamplingParams(max_tokens=6, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(4)]
    numbers = [running.add(PROMPT, one) for one in params]
    updates = finish(running)
    together = [[token for update in updates[number] for token in update.tokens] for number in numbers]
    assert computed["tokens"] == len(PROMPT) + 3 * (len(PROMPT) % 4) + 4 * 5
    alone = [generate(engine(prefix_caching=False), PROMPT, **asdict(one)) for one in params]
    assert together == alone
    assert len({*map(tuple, together)}) == 4


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({}, "shorten the prompt; {limit} tokens are the model's maximum"),
        ({"max_context": 9999}, "shorten the prompt; {limit} tokens are the model's maximum"),
        (
            {"max_context": 44},
            "shorten the prompt, or serve with a larger --max-context; the model's maximum is {limit}",
        ),
        (
            {"cache_tokens": 44},
            "shorten the prompt, or serve with a larger --cache-tokens; the model's maximum is {limit}",
        ),
    ],
    ids=str,
)
def test_a_prompt_too_long_is_told_what_helps(settings: dict[str, int], hint: str) -> None:
    running = engine(**settings)
    with pytest.raises(BadRequestError) as refused:
        running.add([1] * 5000, SamplingParams(max_tokens=1))
    assert refused.value.hint == hint.format(limit=running.model.config.max_position_embeddings)


def test_one_request_alone_leaves_nothing_behind() -> None:
    running = engine()
    expected = generate(running, PROMPT, max_tokens=6)
    assert list(running.generate(PROMPT, SamplingParams(max_tokens=6))) == expected
    abandoned = running.generate(PROMPT, SamplingParams(max_tokens=6))
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    assert not running.has_work()
    assert running.stats().cache_blocks_used == 0
