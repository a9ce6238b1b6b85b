"""The official SDK, with strict validation of every answer, against a real server and a real (tiny, random) model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.server.serving import serving
from tests.tiny import CONTEXT

from kvern.engine import EngineSettings
from kvern.llm import LLM

HI: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    """FP32: what is computed for a request does not depend on the others."""
    settings = EngineSettings(step_tokens=64, max_running=16, check_every_step=True)
    return LLM(tiny_folder, dtype="f32", threads=1, settings=settings)


@pytest.fixture(scope="module")
def sdk(llm: LLM) -> Iterator[openai.OpenAI]:
    with (
        serving(lambda: llm, settings={"max_body_bytes": 1 << 20}) as server,
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
        ) as client,
    ):
        yield client


def test_models(sdk: openai.OpenAI) -> None:
    (model,) = sdk.models.list().data
    assert (model.id, model.owned_by, model.model_dump()["max_model_len"]) == ("tiny-v3", "kvern", CONTEXT)
    assert sdk.models.retrieve("tiny-v3").id == "tiny-v3"
    with pytest.raises(openai.NotFoundError, match="served here: tiny-v3"):
        sdk.models.retrieve("gpt-4")


@pytest.fixture(scope="module")
def expected(tiny_folder: Path) -> LLM:
    """The same model offline, with an engine of its own: the served one belongs to the server's thread."""
    return LLM(tiny_folder, dtype="f32", threads=1)


@pytest.fixture(scope="module")
def lenient(sdk: openai.OpenAI) -> Iterator[openai.OpenAI]:
    """Without strict validation, for the two nulls that OpenAI sends and its SDK's types do not know: finish_reason in
    chunks of completions, and the log-probability of an echoed prompt's first token.
    """
    with openai.OpenAI(base_url=sdk.base_url, api_key="none", max_retries=0) as client:
        yield client


def test_what_a_model_can_do(sdk: openai.OpenAI) -> None:
    (model,) = sdk.models.list().data
    extra = model.model_dump()
    assert extra["context_length"] == CONTEXT
    assert extra["capabilities"] == {
        "chat": True,
        "completions": True,
        "fill_in_the_middle": True,
        "logprobs": True,
        "prefix_caching": True,
        "embeddings": False,
        "tools": True,
    }


def test_a_whole_answer(sdk: openai.OpenAI, expected: LLM) -> None:
    long: list[Any] = [{"role": "user", "content": "the cat sat on the mat " * 6}]
    there = expected.chat(long, max_tokens=9, temperature=0)
    for cached in (0, there.prompt_tokens // 16 * 16):
        answer = sdk.chat.completions.create(model="tiny-v3", messages=long, max_tokens=9, temperature=0)
        assert answer.choices[0].message.content == there.text
        assert answer.choices[0].finish_reason == there.finish_reason
        assert answer.choices[0].logprobs is None
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == there.prompt_tokens
        assert answer.usage.completion_tokens == there.completion_tokens == 9
        assert answer.usage.total_tokens == there.prompt_tokens + 9
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == cached
        extra = answer.usage.model_dump()
        assert extra["prompt_cache_hit_tokens"] == cached
        assert extra["prompt_cache_miss_tokens"] == there.prompt_tokens - cached
        assert answer.system_fingerprint == expected.fingerprint


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream(sdk: openai.OpenAI, expected: LLM, include_usage: bool) -> None:
    chunks = list(
        sdk.chat.completions.create(
            model="tiny-v3",
            messages=HI,
            max_completion_tokens=9,
            temperature=0,
            stream=True,
            stream_options={"include_usage": include_usage},
        )
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == expected.chat("hi", max_tokens=9, temperature=0).text
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert (chunks[-1].usage is not None) is include_usage
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]


def test_several_choices(sdk: openai.OpenAI, expected: LLM) -> None:
    options: dict[str, Any] = {"model": "tiny-v3", "messages": HI, "max_tokens": 8, "temperature": 1.5, "seed": 3}
    texts = [expected.chat("hi", max_tokens=8, temperature=1.5, seed=3 + choice).text for choice in range(3)]
    assert len(set(texts)) == 3
    whole = sdk.chat.completions.create(**options, n=3)
    assert [choice.message.content for choice in whole.choices] == texts
    streamed = ["", "", ""]
    for chunk in sdk.chat.completions.create(**options, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_logprobs_of_a_chat(sdk: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny-v3",
        "messages": HI,
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    choice = sdk.chat.completions.create(**options).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    scores = choice.logprobs.content
    assert bytes(byte for one in scores for byte in one.bytes or ()).decode(errors="replace") == choice.message.content
    assert all(one.logprob == one.top_logprobs[0].logprob <= 0 and len(one.top_logprobs) == 3 for one in scores)
    streamed = [
        score
        for chunk in sdk.chat.completions.create(**options, stream=True)
        for part in chunk.choices
        if part.logprobs is not None
        for score in part.logprobs.content or ()
    ]
    assert streamed == scores


def test_sampling_parameters_reach_the_engine(sdk: openai.OpenAI, expected: LLM) -> None:
    plain: dict[str, Any] = {"max_tokens": 12, "temperature": 1.2, "seed": 7}
    openai_own: dict[str, Any] = {"presence_penalty": 1.5, "frequency_penalty": -1.0, "top_p": 0.9}
    extensions = {"top_k": 20, "min_p": 0.02, "repetition_penalty": 1.3, "min_tokens": 5, "stop_token_ids": [70]}
    there = expected.chat("hi", **plain, **openai_own, **extensions, logit_bias={65: 4.0})
    here = sdk.chat.completions.create(
        model="tiny-v3", messages=HI, **plain, **openai_own, logit_bias={"65": 4}, extra_body=extensions
    )
    assert here.choices[0].message.content == there.text != expected.chat("hi", **plain).text


def test_a_completion(sdk: openai.OpenAI, expected: LLM) -> None:
    ids = expected.tokenizer.encode("def add")
    text = expected.generate("def add", max_tokens=6, temperature=0).text
    prompts: list[tuple[Any, int]] = [("def add", 1), (ids, 1), (["def add", "def add"], 2), ([ids, ids], 2)]
    for prompt, times in prompts:
        answer = sdk.completions.create(model="tiny-v3", prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.text for choice in answer.choices] == [text] * times
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == times * len(ids)
        assert answer.usage.completion_tokens == times * 6
    assert sdk.completions.create(model="tiny-v3", prompt="def add").usage.completion_tokens <= 16  # type: ignore[union-attr]


@pytest.mark.parametrize("echo", [True, False])
def test_a_streamed_completion(lenient: openai.OpenAI, expected: LLM, echo: bool) -> None:
    chunks = list(
        lenient.completions.create(
            model="tiny-v3",
            prompt="def add",
            max_tokens=6,
            temperature=0,
            echo=echo,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == ("def add" if echo else "") + expected.generate("def add", max_tokens=6, temperature=0).text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


def test_a_middle_is_filled(sdk: openai.OpenAI, expected: LLM) -> None:
    answer = sdk.completions.create(
        model="tiny-v3", prompt="def add(", suffix="    return a + b", max_tokens=6, temperature=0
    )
    assert answer.choices[0].text == expected.fill("def add(", "    return a + b", max_tokens=6, temperature=0).text
    assert answer.choices[0].text != expected.generate("def add(", max_tokens=6, temperature=0).text


def test_logprobs_of_a_completion(sdk: openai.OpenAI, expected: LLM) -> None:
    answer = sdk.completions.create(model="tiny-v3", prompt="def add", max_tokens=5, temperature=0, logprobs=2)
    there = expected.generate("def add", max_tokens=5, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == pytest.approx([score.logprob for score in there.scores], abs=1e-4)
    assert logprobs.text_offset == [score.offset for score in there.scores]
    assert [len(top) for top in logprobs.top_logprobs or ()] == [2] * 5


def test_prompts_are_scored_as_evaluations_need_it(lenient: openai.OpenAI, expected: LLM) -> None:
    """max_tokens 0 scores the prompt alone; with 1, the last entry is the drawn token's, even if it ends the answer."""
    prompt, count = "def add(a, b)", len(expected.tokenizer.encode("def add(a, b)"))
    for max_tokens in (0, 1):
        answer = lenient.completions.create(
            model="tiny-v3", prompt=prompt, max_tokens=max_tokens, temperature=0, logprobs=1, echo=True
        )
        choice = answer.choices[0]
        assert choice.text.startswith(prompt)
        assert (choice.text == prompt) is (max_tokens == 0)
        assert choice.logprobs is not None
        found: list[Any] = list(choice.logprobs.token_logprobs or [])
        assert len(found) == len(choice.logprobs.tokens or ()) == count + max_tokens
        assert found[0] is None
        assert all(math.isfinite(one) and one <= 0 for one in found[1:])
        assert "".join((choice.logprobs.tokens or [])[:count]) == prompt
    plain = lenient.completions.create(model="tiny-v3", prompt=prompt, max_tokens=0, echo=True)
    assert (plain.choices[0].text, plain.choices[0].logprobs) == (prompt, None)


def test_control_text_in_a_prompt_stays_text(sdk: openai.OpenAI, expected: LLM) -> None:
    def prompt_tokens(**options: Any) -> int:
        usage = sdk.completions.create(model="tiny-v3", prompt="<|end|>", max_tokens=1, **options).usage
        assert isinstance(usage, openai.types.CompletionUsage)
        return usage.prompt_tokens

    assert prompt_tokens() > 1
    assert prompt_tokens(extra_body={"allow_special_tokens": True}) == 1


def test_errors_arrive_typed(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"the prompt has .* tokens, and the context holds 256") as caught:
        sdk.chat.completions.create(model="tiny-v3", messages=[{"role": "user", "content": "x " * 500}], stream=True)
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="gpt-4", messages=HI)
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="embeddings are not served"):
        sdk.embeddings.create(model="tiny-v3", input="x")


PROMPTS = [f"{word} {count}" for count in range(4) for word in ("hi", "the cat sat", "def add(a, b):", "mat " * 20)]


def test_sixteen_streams_at_once_give_what_each_gives_alone(sdk: openai.OpenAI, expected: LLM) -> None:
    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        text = ""
        stream = await client.chat.completions.create(
            model="tiny-v3",
            messages=[{"role": "user", "content": prompt}],
            max_tokens=40,
            temperature=0,
            stream=True,
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        return text

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=sdk.base_url, api_key="none", max_retries=0, _strict_response_validation=True
        ) as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in PROMPTS))

    together = asyncio.run(run())
    assert len(together) == 16
    assert together == [expected.chat(prompt, max_tokens=40, temperature=0).text for prompt in PROMPTS]
