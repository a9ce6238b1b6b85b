"""The official SDK, with strict validation of every answer, against a real server and a real (tiny, random) model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.server.serving import serving
from tests.tiny import CONTEXT

from kvern.llm import LLM

HI: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, threads=1)


@pytest.fixture(scope="module")
def sdk(llm: LLM) -> Iterator[openai.OpenAI]:
    with (
        serving(lambda: llm) as server,
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


def test_a_whole_answer(sdk: openai.OpenAI, llm: LLM) -> None:
    answer = sdk.chat.completions.create(model="tiny-v3", messages=HI, max_tokens=9, temperature=0)
    expected = llm.chat("hi", max_tokens=9, temperature=0)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == 9
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 9
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.system_fingerprint == llm.fingerprint


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream(sdk: openai.OpenAI, llm: LLM, include_usage: bool) -> None:
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
    assert text == llm.chat("hi", max_tokens=9, temperature=0).text
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert (chunks[-1].usage is not None) is include_usage
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]


def test_errors_arrive_typed(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"the prompt has .* tokens, and the context holds 256") as caught:
        sdk.chat.completions.create(model="tiny-v3", messages=[{"role": "user", "content": "x " * 500}], stream=True)
    assert (caught.value.param, caught.value.code) == ("messages", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="gpt-4", messages=HI)
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="tools is not supported yet"):
        sdk.chat.completions.create(
            model="tiny-v3", messages=HI, tools=[{"type": "function", "function": {"name": "f"}}]
        )


async def _answers(client: openai.AsyncOpenAI, count: int) -> list[str | None]:
    import asyncio

    async def one() -> str | None:
        answer = await client.chat.completions.create(model="tiny-v3", messages=HI, max_tokens=20, temperature=0)
        return answer.choices[0].message.content

    return await asyncio.gather(*(one() for _ in range(count)))


def test_clients_at_once_all_get_their_answer(sdk: openai.OpenAI, llm: LLM) -> None:
    import asyncio

    async def run() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=sdk.base_url, api_key="none", max_retries=0) as client:
            return await _answers(client, 5)

    assert asyncio.run(run()) == [llm.chat("hi", max_tokens=20, temperature=0).text] * 5
