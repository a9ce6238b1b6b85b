"""Structured output: whatever a random model would like to write, what it writes has the form that was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tests.structured import random_schema, write_long_checkpoint

from kvern.engine import EngineSettings
from kvern.errors import BadRequestError
from kvern.llm import LLM
from kvern.text.conversation import Conversation
from kvern.text.messages import Completion, Message, NamedTool, Tool
from kvern.text.options import SamplingOptions
from kvern.text.output_format import OutputFormat

ASK = (Message("user", "hi"),)
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = (Tool("get_weather", "The weather", CITY, strict=True), Tool("clock", None, {}))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Many small steps: threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_checkpoint(tmp_path_factory.mktemp("models") / "tiny-long")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, dtype="f32", settings=EngineSettings(drafts="ngram", max_running=64))


def ask_all(llm: LLM, chats: Sequence[Conversation], **sampling: Any) -> list[Completion]:
    options = [SamplingOptions.of(seed=index, **sampling) for index, _ in enumerate(chats)]
    return llm._complete([llm.prepare_chat(chat, one) for chat, one in zip(chats, options, strict=True)])


def of_schemas(llm: LLM, seeds: range) -> None:
    """At temperature 1: every answer that ends by itself matches its schema."""
    schemas = [random_schema(seed) for seed in seeds]
    chats = [Conversation(ASK, format=OutputFormat.json_schema(schema)) for schema in schemas]
    answers = ask_all(llm, chats, temperature=1.0, top_p=1.0, max_tokens=700)
    finished = 0
    for schema, answer in zip(schemas, answers, strict=True):
        if answer.finish_reason == "stop":
            jsonschema.Draft202012Validator(schema).validate(json.loads(answer.content))
            finished += 1
    assert finished >= 0.7 * len(schemas), finished


def test_answers_match_random_schemas(llm: LLM) -> None:
    of_schemas(llm, range(40))


@pytest.mark.slow
def test_answers_match_200_random_schemas(llm: LLM) -> None:
    of_schemas(llm, range(1000, 1200))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        (OutputFormat.regex(r"a{3}\d{2,4}/[x-z]é"), r"a{3}[0-9]{2,4}/[x-z]é"),
        (OutputFormat.choice(["yes", "yes, of course", 'no "way"\n']), 'yes|yes, of course|no "way"\n'),
        (OutputFormat.grammar('start: "<" word ("," word)? ">"\nword: /[a-z]{2}/'), r"<[a-z]{2}(,[a-z]{2})?>"),
        (OutputFormat.grammar('root ::= "+" digits\ndigits ::= [0-9] [0-9] [0-9]'), r"\+[0-9]{3}"),
    ],
)
def test_patterns_choices_and_grammars(llm: LLM, form: OutputFormat, pattern: str, temperature: float) -> None:
    answers = ask_all(llm, [Conversation(ASK, format=form)] * 4, temperature=temperature, max_tokens=60)
    for answer in answers:
        assert answer.finish_reason == "stop"
        assert re.fullmatch(pattern, answer.content), answer.content


def test_any_json_object(llm: LLM) -> None:
    chats = [Conversation(ASK, format=OutputFormat.json_object())] * 8
    answers = ask_all(llm, chats, temperature=1.0, max_tokens=400)
    finished = [json.loads(answer.content) for answer in answers if answer.finish_reason == "stop"]
    assert finished
    assert all(isinstance(value, dict) for value in finished)


def test_drafts_change_nothing(folder: Path, llm: LLM) -> None:
    plain = LLM(folder, dtype="f32", settings=EngineSettings(drafts="off"))
    chat = Conversation(ASK, format=OutputFormat.regex(r"(the cat [ab]\n){12}"))
    for temperature in (0.0, 1.0):
        one, other = (ask_all(model, [chat], temperature=temperature, max_tokens=200)[0] for model in (llm, plain))
        assert one.token_ids == other.token_ids
        assert one.finish_reason == "stop"
    assert sum(llm.engine.stats().accepted_by_position) > 0


def test_a_request_that_is_preempted_goes_on_where_it_was(folder: Path, llm: LLM) -> None:
    chats = [Conversation(ASK, format=OutputFormat.regex("((alpha|beta),){9}"))] * 4
    small = LLM(folder, dtype="f32", settings=EngineSettings(cache_tokens=160, block_size=8, check_every_step=True))
    sampling: dict[str, Any] = {"temperature": 1.0, "max_tokens": 80}
    answers = ask_all(small, chats, **sampling)
    assert small.engine.stats().preemptions > 0
    assert [one.token_ids for one in answers] == [one.token_ids for one in ask_all(llm, chats, **sampling)]
    assert all(answer.finish_reason == "stop" for answer in answers)


def test_the_grammar_wins_over_min_tokens_bias_and_stop_ids(llm: LLM) -> None:
    chat = Conversation(ASK, format=OutputFormat.choice(["cat"]))
    end = llm.tokenizer.control["<|end|>"]
    cases: list[dict[str, Any]] = [
        {"min_tokens": 50},
        {"logit_bias": {end: 100.0}},
        {"ignore_eos": True},
        {"stop_token_ids": llm.tokenizer.encode("d")},
    ]
    for case in cases:
        (answer,) = ask_all(llm, [chat], temperature=1.0, max_tokens=60, **case)
        assert (answer.content, answer.finish_reason) == ("cat", "stop")
        assert end not in answer.token_ids


def test_a_stop_id_that_the_grammar_needs_is_an_error_and_no_wrong_answer(llm: LLM) -> None:
    stops = tuple(
        token for token in range(llm.vocab_limit) if "a" in llm.tokenizer.token_bytes(token).decode("latin-1")
    )
    chat = Conversation(ASK, format=OutputFormat.choice(["aa"]))
    with pytest.raises(BadRequestError, match="leave no token"):
        ask_all(llm, [chat], stop_token_ids=stops)


def test_special_tokens_are_never_part_of_a_text(llm: LLM) -> None:
    """Also where the grammar's text spells them."""
    chat = Conversation(ASK, format=OutputFormat.regex(r"<\|end\|>(.|\n){20}"))
    for answer in ask_all(llm, [chat] * 8, temperature=1.0, max_tokens=200):
        assert not set(answer.token_ids) & set(llm.tokenizer.control.values())
        assert answer.content.startswith("<|end|>")


def test_log_probabilities_are_those_of_the_model(llm: LLM) -> None:
    (answer,) = ask_all(llm, [Conversation(ASK, format=OutputFormat.choice(["cat"]))], logprobs=2)
    assert "".join(score.text for score in answer.scores) == "cat"
    assert all(score.logprob is not None and score.logprob < 0 for score in answer.scores)


@pytest.mark.parametrize("choice", ["required", NamedTool("get_weather"), NamedTool("clock"), "auto"])
@pytest.mark.parametrize("parallel", [True, False])
def test_calls_match_their_tools(llm: LLM, choice: Any, parallel: bool) -> None:
    chat = Conversation(ASK, TOOLS, choice, parallel)
    answers = ask_all(llm, [chat] * 8, temperature=1.0, top_p=1.0, max_tokens=500)
    for answer in answers:
        complete = answer.tool_calls if answer.finish_reason != "length" else answer.tool_calls[:-1]
        for call in complete:
            schema = CITY if call.name == "get_weather" else {"additionalProperties": False}
            jsonschema.validate(json.loads(call.arguments), schema)
        if choice != "auto":
            assert answer.tool_calls or answer.finish_reason == "length"
            assert not answer.content
        if isinstance(choice, NamedTool):
            assert [call.name for call in answer.tool_calls] == [choice.name]


def test_a_format_beside_tools_leaves_the_choice_between_both(llm: LLM) -> None:
    chat = Conversation(ASK, TOOLS, "auto", format=OutputFormat.json_schema(CITY))
    kinds = set()
    for answer in ask_all(llm, [chat] * 24, temperature=1.8, top_p=1.0, max_tokens=500):
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.content), CITY)
        elif answer.finish_reason == "tool_calls":
            assert not answer.content
        kinds.add(answer.finish_reason)
    assert {"stop", "tool_calls"} <= kinds


BAD: list[tuple[Conversation, str, str]] = [
    (
        Conversation(ASK, format=OutputFormat.json_schema({"properties": {"a": {"not": {}}}})),
        "format/properties/a/not",
        "not",
    ),
    (Conversation(ASK, format=OutputFormat.regex("(?=a)b")), "format", "look-around"),
    (Conversation(ASK, format=OutputFormat.regex("(a")), "format", "unclosed group"),
    (Conversation(ASK, format=OutputFormat.regex("")), "format", "nothing to write"),
    (Conversation(ASK, format=OutputFormat.choice([])), "format", "texts to choose from"),
    (Conversation(ASK, format=OutputFormat.grammar("start: x")), "format", "unknown name"),
    (Conversation(ASK, format=OutputFormat.grammar('root ::= "a')), "format", "no grammar"),
    (
        Conversation(ASK, (Tool("f", None, {"properties": {"a": {"uniqueItems": True}}}, True),)),
        *("tools.0.function.parameters/properties/a/uniqueItems", "uniqueItems"),
    ),
    (Conversation(ASK, (Tool("f", None, {"type": "string"}, True),)), "tools.0.function.parameters/type", "object"),
    (
        Conversation((*ASK, Message("assistant", "{")), continues=True, format=OutputFormat.json_object()),
        *("format", "continued"),
    ),
]


@pytest.mark.parametrize(("chat", "param", "says"), BAD)
def test_what_can_not_be_enforced_is_refused_by_its_place(llm: LLM, chat: Conversation, param: str, says: str) -> None:
    with pytest.raises(BadRequestError, match=says) as caught:
        llm.prepare_chat(chat, SamplingOptions())
    assert caught.value.param == param


def test_a_tool_that_is_not_strict_may_have_any_schema(llm: LLM) -> None:
    loose = Tool("f", None, {"type": "object", "properties": {"a": {"uniqueItems": True}}})
    (answer,) = ask_all(llm, [Conversation(ASK, (loose,), "required", False)], max_tokens=300)
    if answer.finish_reason != "length":
        assert isinstance(json.loads(answer.tool_calls[0].arguments), dict)
