"""Tools and reasoning through the official SDK: a real server, a model that writes what the test says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.scripted import ScriptedEngine
from tests.server.serving import serving

from kvern.client import Client
from kvern.llm import LLM
from kvern.text.conversation import Conversation
from kvern.text.messages import Message, NamedTool, Tool

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
ASK: Any = [{"role": "user", "content": "How is the weather?"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
THINKING = {"chat_template": "{% for m in messages %}<|start|>{{ m.content }}{% endfor %}<think>\n"}


class Writing:
    """A served model that writes one text."""

    def __init__(self, llm: LLM, engine: ScriptedEngine, url: str) -> None:
        self._llm, self._engine = llm, engine
        self.url = url
        self.sdk = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, _strict_response_validation=True)

    def write(self, text: str) -> None:
        self._engine.script = [*self._llm.tokenizer.encode(text), self._llm.tokenizer.control["<|end|>"]]

    def ask(self, text: str, **fields: Any) -> Any:
        self.write(text)
        return self.sdk.chat.completions.create(model="tiny-v3", messages=ASK, **fields).choices[0]

    def stream(self, text: str, **fields: Any) -> list[Any]:
        self.write(text)
        chunks = self.sdk.chat.completions.create(model="tiny-v3", messages=ASK, stream=True, **fields)
        return [chunk.choices[0] for chunk in chunks]


def serve(folder: Path) -> Iterator[Writing]:
    engine = ScriptedEngine(max_context=4000)
    llm = LLM(folder, engine=engine)
    with serving(lambda: llm, settings={"max_body_bytes": 1 << 20}) as server:
        writing = Writing(llm, engine, server.url)
        with writing.sdk:
            yield writing


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Iterator[Writing]:
    yield from serve(tiny_folder)


@pytest.fixture(scope="module")
def thinker(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writing]:
    """The same with reasoning tokens, and a template that opens the reasoning."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("thinker") / "tiny-v3")
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    last = max(token["id"] for token in tokenizer["added_tokens"])
    for number, text in enumerate(("<think>", "</think>")):
        added = {**tokenizer["added_tokens"][-1], "id": last + 1 + number, "content": text, "special": True}
        tokenizer["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | THINKING), encoding="utf-8")
    yield from serve(folder)


def calls_of(deltas: list[Any]) -> list[tuple[str, str]]:
    """Name and arguments of the calls of a stream, put together as clients do."""
    found: dict[int, list[str]] = {}
    for delta in deltas:
        for part in delta.tool_calls or ():
            name_and_arguments = found.setdefault(part.index, ["", ""])
            name_and_arguments[0] += part.function.name or ""
            name_and_arguments[1] += part.function.arguments or ""
    return [(name, arguments) for name, arguments in found.values()]


def test_calls_of_a_whole_answer(model: Writing) -> None:
    choice = model.ask(f"I look.\n\n{CALL}\n{SECOND}", tools=[WEATHER, CLOCK])
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    assert [(call.type, call.function.name, call.function.arguments) for call in choice.message.tool_calls] == [
        ("function", "get_weather", '{"city": "Rome"}'),
        ("function", "clock", "{}"),
    ]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert model.ask(CALL, tools=[WEATHER]).message.content is None


def test_calls_of_a_stream(model: Writing) -> None:
    choices = model.stream(f"I look.\n\n{CALL}\n{SECOND}", tools=[WEATHER, CLOCK], tool_choice="auto")
    deltas = [choice.delta for choice in choices]
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    assert calls_of(deltas) == [("get_weather", '{"city": "Rome"}'), ("clock", "{}")]
    assert sum(bool(delta.tool_calls) for delta in deltas) > 6  # arguments stream
    starts = [part for delta in deltas for part in delta.tool_calls or () if part.id]
    begun = [(part.index, part.type, part.function.arguments) for part in starts]
    assert begun == [(0, "function", ""), (1, "function", "")]
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [CLOCK]}])
def test_what_is_no_call_is_text(model: Writing, fields: dict[str, Any]) -> None:
    choice = model.ask(CALL, **fields)
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")


def test_at_most_one_call(model: Writing) -> None:
    choice = model.ask(f"{CALL}\n{SECOND}", tools=[WEATHER, CLOCK], parallel_tool_calls=False)
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"]
    assert choice.finish_reason == "tool_calls"


def test_a_forced_call_goes_on_where_the_prompt_ends(model: Writing) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    rest = ' {"city": "Rome"}}\n</tool_call>'
    for text, tools, choice in (
        (rest, [WEATHER, CLOCK], named),
        (rest, [WEATHER], "required"),
        (f'get_weather", "arguments":{rest}', [WEATHER, CLOCK], "required"),
    ):
        fields = {"tools": tools, "tool_choice": choice}
        (call,) = model.ask(text, **fields).message.tool_calls
        assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Rome"}')
        streamed = calls_of([choice.delta for choice in model.stream(text, **fields)])
        assert streamed == [("get_weather", '{"city": "Rome"}')]


def test_stop_strings_and_choices_and_scores_go_with_tools(model: Writing) -> None:
    fields: dict[str, Any] = {"tools": [WEATHER, CLOCK], "n": 2, "logprobs": True}
    model.write(f"{CALL}\nSTOP{SECOND}")
    answer = model.sdk.chat.completions.create(model="tiny-v3", messages=ASK, stop="STOP", **fields)
    for choice in answer.choices:
        assert [call.function.name for call in choice.message.tool_calls or () if call.type == "function"] == [
            "get_weather"
        ]
        assert choice.finish_reason == "tool_calls"
    assert len({call.id for choice in answer.choices for call in choice.message.tool_calls or ()}) == 2
    cut = model.ask(CALL, tools=[WEATHER], max_completion_tokens=40)
    assert cut.finish_reason == "length"


def test_reasoning_under_both_names(thinker: Writing) -> None:
    text = "Let me\nthink.</think>\n\nIt rains."
    thinker._engine.script = [
        *thinker._llm.tokenizer.encode(text, allow_special=True),
        thinker._llm.tokenizer.control["<|end|>"],
    ]
    ask = thinker.sdk.chat.completions.create
    answer = ask(model="tiny-v3", messages=ASK)
    message = answer.choices[0].message.model_dump()
    assert message["content"] == "It rains."
    assert message["reasoning_content"] == message["reasoning"] == "Let me\nthink."
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    counted = answer.usage.completion_tokens_details.reasoning_tokens
    assert counted == len(thinker._llm.tokenizer.encode("Let me\nthink."))
    parts = [chunk.choices[0].delta.model_dump() for chunk in ask(model="tiny-v3", messages=ASK, stream=True)]
    assert (parts[0]["content"], parts[0]["reasoning_content"]) == (None, "")
    assert "".join(part.get("reasoning_content") or "" for part in parts) == "Let me\nthink."
    assert "".join(part["content"] or "" for part in parts) == "It rains."


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "no tool 'x'"),
    ({"tools": [CLOCK, CLOCK]}, "tools.1.function.name", "two tools 'clock'"),
    (
        {"tools": [CLOCK, {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
        *("tools.1.function.parameters/not", "can not be enforced"),
    ),
]


@pytest.mark.parametrize(("fields", "param", "says"), BAD)
def test_bad_tools_are_refused_by_field(model: Writing, fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        model.ask("x", **fields)
    assert caught.value.param == param


def test_the_client_and_the_offline_model_speak_of_the_same_calls(model: Writing) -> None:
    tool = Tool("get_weather", "The weather of a city", WEATHER["function"]["parameters"])
    chat = Conversation((Message("user", "hi"),), (tool,), NamedTool("get_weather"), False)
    model.write(' {"city": "Rome"}}\n</tool_call>')
    with Client(model.url) as client:
        there = client.chat(chat)
    (call,) = there.tool_calls
    assert (call.name, call.arguments, there.finish_reason, there.content) == (
        *("get_weather", '{"city": "Rome"}'),
        *("tool_calls", ""),
    )
    following = Conversation(
        (*chat.messages, Message("assistant", tool_calls=(call,)), Message("tool", "rain", None, (), call.id))
    )
    model.write("It rains.")
    with Client(model.url) as client:
        assert client.chat(following).content == "It rains."
