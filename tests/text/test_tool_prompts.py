# ruff: noqa: RUF001 (DeepSeek's tokens contain full-width bars)
"""Tools in prompts: the checkpoint's own template, DeepSeek's published formats, plain turns; text is never markup."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.text.test_template import CHATML, DEEPSEEK, control_ids, oracle, published

from kvern.errors import BadRequestError
from kvern.text.conversation import Conversation
from kvern.text.formats import BARE, HERMES, THINK, V3, V31
from kvern.text.messages import Message, NamedTool, Tool, ToolCall
from kvern.text.template import ChatTemplate
from kvern.text.tokenizer import Tokenizer

__all__ = ["published"]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = Tool("get_weather", "The weather", SCHEMA)
CLOCK = Tool("clock", None, {})
CALLS = (ToolCall("id0", "get_weather", '{"city": "Rome"}'), ToolCall("id1", "clock", "{}"))
TURNS = (
    Message("system", "Be brief."),
    Message("user", "hi"),
    Message("assistant", None, tool_calls=CALLS),
    Message("tool", "rain", tool_call_id="id0"),
    Message("tool", "noon", tool_call_id="id1"),
)
AFTER = (*TURNS, Message("assistant", "It rains."), Message("user", "And now?"))
AGAIN = (*AFTER, Message("assistant", "I look.", tool_calls=CALLS[:1]), Message("tool", "sun", tool_call_id="id0"))

# Templates that know tools, as small as can be: Qwen's way, Llama 3's way, and DeepSeek-V3.1's calls.
QWEN = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = QWEN.replace("<tool_call>\n", "").replace("\n</tool_call>", "").replace('"arguments"', '"parameters"')
SWITCHED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜></think>{{ m.content or '' }}{% for c in m.tool_calls %}"
    "<｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>{{ c.function.arguments }}<｜tool▁call▁end｜>{% endfor %}"
    "{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
R1 = DEEPSEEK.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\n' }}")
KNOWN = {"v3": (DEEPSEEK, V3), "r1": (R1, V3), "v31": (SWITCHED, V31)}
OTHERS = {"qwen": (QWEN, HERMES), "llama": (LLAMA, BARE), "plain": (CHATML, HERMES)}

V3_TOOLS = (
    "## Tools\nYou have access to the following tools:\n\n### get_weather\nDescription: The weather\n\n"
    'Parameters: {"type": "object", "properties": {"city": {"type": "string"}}}\n\n'
    "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
)
V3_CALLS = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Rome"}\n```'
    "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{}\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜><|im_end|>"
)
V3_ONE = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Rome"}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜><|im_end|>"
)
V3_RESULTS = (
    "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜tool▁output▁begin｜>noon"
    "<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
)
V31_ONE = '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜>'
V31_CALLS = (
    f"<｜tool▁calls▁begin｜>{V31_ONE}<｜tool▁call▁begin｜>clock<｜tool▁sep｜>{{}}<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜><|im_end|>"
)
V31_RESULTS = "<｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜tool▁output▁begin｜>noon<｜tool▁output▁end｜>"


@pytest.fixture(scope="module")
def tokenizer(byte_level: Tokenizer) -> Tokenizer:
    """With the tokens of both families' tools."""
    definition = json.loads(byte_level._definition)
    last = max(token["id"] for token in definition["added_tokens"])
    marks = [*V3.markup, "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", *HERMES.call]
    marks += ["<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<tool_response>", "</tool_response>"]
    for number, mark in enumerate(dict.fromkeys(marks)):
        token = {**definition["added_tokens"][-1], "id": last + 1 + number, "content": mark}
        definition["added_tokens"].append(token)
    return Tokenizer(json.dumps(definition), byte_level.config)


@pytest.fixture(scope="module")
def qwen_tokenizer(byte_level: Tokenizer) -> Tokenizer:
    """Without DeepSeek's tokens."""
    definition = json.loads(byte_level._definition)
    last = max(token["id"] for token in definition["added_tokens"])
    for number, mark in enumerate((*HERMES.call, "<tool_response>", "</tool_response>")):
        token = {**definition["added_tokens"][-1], "id": last + 1 + number, "content": mark}
        definition["added_tokens"].append(token)
    return Tokenizer(json.dumps(definition), byte_level.config)


@cache
def of(name: str, tokenizer: Tokenizer, qwen_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate((KNOWN | OTHERS)[name][0], tokenizer if name in KNOWN else qwen_tokenizer)


@pytest.mark.parametrize("name", KNOWN | OTHERS)
def test_the_format_is_known_from_the_template_and_the_tokens(
    tokenizer: Tokenizer, qwen_tokenizer: Tokenizer, name: str
) -> None:
    template = of(name, tokenizer, qwen_tokenizer)
    assert template.format.calls is (KNOWN | OTHERS)[name][1]
    assert template.format.think == THINK
    assert template.can_think is (name in ("r1", "v31"))


def test_deepseek_v3_as_published(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(DEEPSEEK, tokenizer)
    start = f"<|im_start|>Be brief.<｜User｜>hi<｜Assistant｜>{V3_CALLS}{V3_RESULTS}"
    assert template.render(TURNS) == start
    assert template.render(AFTER) == f"{start}It rains.<|im_end|><｜User｜>And now?<｜Assistant｜>"
    assert template.render(AGAIN) == (
        f"{start}It rains.<|im_end|><｜User｜>And now?<｜Assistant｜>I look.{V3_ONE}"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>sun<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )
    defined = template.render(Conversation(AFTER[:2], (WEATHER,)))
    assert defined.startswith(f"<|im_start|>Be brief.\n\n{V3_TOOLS}<｜tool▁calls▁begin｜>")
    assert defined.endswith("<｜User｜>hi<｜Assistant｜>")
    assert template.render(Conversation(AFTER[1:2], (WEATHER,))).startswith(f"<|im_start|>{V3_TOOLS}")


def test_r1_opens_the_reasoning_except_after_results(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(R1, tokenizer)
    assert template.render(AFTER).endswith("<｜User｜>And now?<｜Assistant｜><think>\n")
    assert template.render(TURNS).endswith("<｜tool▁outputs▁end｜>")
    thought = [*TURNS, Message("assistant", "<think>hm</think>x"), Message("user", "y")]
    assert "x<|im_end|><｜User｜>y" in template.render(thought)
    assert "hm" not in template.render(thought)


@pytest.mark.parametrize("thinking", [True, False, None])
def test_deepseek_v31_as_published(tokenizer: Tokenizer, thinking: bool | None) -> None:
    template = ChatTemplate(SWITCHED, tokenizer)
    start = f"<|im_start|>Be brief.<｜User｜>hi<｜Assistant｜></think>{V31_CALLS}{V31_RESULTS}"
    end = "<｜Assistant｜><think>" if thinking else "<｜Assistant｜></think>"
    assert template.render(Conversation(TURNS, thinking=thinking)) == start
    assert template.render(Conversation(AFTER, thinking=thinking)) == (
        f"{start}It rains.<|im_end|><｜User｜>And now?{end}"
    )
    defined = template.render(Conversation(AFTER[:2], (WEATHER,), thinking=thinking))
    example = "tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>{additional_tool_calls}"
    assert defined.startswith(
        f"<|im_start|>Be brief.\n\n{V3_TOOLS}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{example}"
    )
    assert defined.endswith(f"<｜User｜>hi{end}")


def test_a_template_that_knows_tools_is_left_alone(qwen_tokenizer: Tokenizer) -> None:
    template = ChatTemplate(QWEN, qwen_tokenizer)
    values = [message.as_template_value() for message in AGAIN]
    for value in values:
        for call in value.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    assert template.render(Conversation(AGAIN, (WEATHER, CLOCK))) == oracle_values(QWEN, qwen_tokenizer, values)


def oracle_values(source: str, tokenizer: Tokenizer, values: list[dict[str, Any]]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    function = {"name": "get_weather", "description": "The weather", "parameters": SCHEMA}
    clock = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}, {"type": "function", "function": clock}]
    rendered, _ = render_jinja_template(
        [values], tools=tools, chat_template=source, add_generation_prompt=True, **tokenizer.named_tokens
    )
    return str(rendered[0])


def test_a_template_that_ignores_tools_gets_plain_turns(qwen_tokenizer: Tokenizer) -> None:
    template = ChatTemplate(CHATML, qwen_tokenizer)
    text = template.render(Conversation(TURNS, (WEATHER,)))
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\n")
    assert json.dumps(SCHEMA) in text
    assert text.endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nnoon\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_no_tools_are_shown_where_none_may_be_called(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(DEEPSEEK, tokenizer)
    assert "get_weather" not in template.render(Conversation(AFTER[:2], (WEATHER,), "none"))


@pytest.mark.parametrize("name", KNOWN | OTHERS)
def test_a_forced_call_is_begun_in_the_prompt(tokenizer: Tokenizer, qwen_tokenizer: Tokenizer, name: str) -> None:
    template, format = of(name, tokenizer, qwen_tokenizer), (KNOWN | OTHERS)[name][1]
    chat = Conversation(AFTER[:2], (WEATHER, CLOCK), NamedTool("clock"))
    ids, parsing = template.prompt(chat)
    closes = "\n</think>\n\n" if name == "r1" else ""
    assert parsing.written == closes + format.force("clock")
    assert parsing.most_calls == 1
    assert ids == template.encode(chat) + template._tokenizer.encode(parsing.written, allow_special=True)
    both = template.prompt(Conversation(AFTER[:2], (WEATHER, CLOCK), "required"))[1]
    assert (both.written, both.most_calls) == (closes + format.force(None), None)


def test_how_an_answer_is_read_follows_from_the_prompt(tokenizer: Tokenizer) -> None:
    def thinks(source: str, turns: tuple[Message, ...] = AFTER, thinking: bool | None = None) -> str:
        return ChatTemplate(source, tokenizer).prompt(Conversation(turns, thinking=thinking))[1].thinks

    assert [thinks(DEEPSEEK), thinks(R1), thinks(R1, TURNS), thinks(SWITCHED)] == ["maybe", "inside", "maybe", "never"]
    assert [thinks(SWITCHED, thinking=True), thinks(SWITCHED, thinking=False)] == ["inside", "never"]
    parsing = ChatTemplate(R1, tokenizer).prompt(Conversation(AFTER, thinking=False))[1]
    assert (parsing.thinks, parsing.written) == ("inside", "\n</think>\n\n")
    with pytest.raises(BadRequestError, match="cannot think") as caught:
        thinks(DEEPSEEK, thinking=True)
    assert caught.value.param == "thinking"


PARTS = [
    "<|im_end|>",
    "<｜Assistant｜>",
    "</think>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "</tool_call>",
    "<tool_call>",
]
NASTY = st.lists(st.sampled_from([*PARTS, "<|im_", "end|>", "a", " ", "\n", '"', "\\", "{", "<"]), max_size=6).map(
    "".join
)


def chat_with(name: str, about: str, key: str, value: str, result: str) -> Conversation:
    schema = {"type": "object", "properties": {f"k{key}": {"type": "string", "enum": [value, about]}}}
    tools = (Tool(name, about, schema), CLOCK)
    calls = (ToolCall("id0", name, json.dumps({f"k{key}": value}, ensure_ascii=False)), CALLS[1])
    turns = [Message("user", "hi"), Message("assistant", f"x{value}", tool_calls=calls)]
    results = [Message("tool", f"r{result}", tool_call_id="id0"), Message("tool", "noon", tool_call_id="id1")]
    return Conversation((*turns, *results, Message("assistant", "x"), Message("user", f"u{about}")), tools)


@pytest.mark.parametrize("name", KNOWN | OTHERS)
@settings(max_examples=50)
@given(texts=st.tuples(NASTY, NASTY, NASTY, NASTY))
def test_definitions_arguments_and_results_cannot_inject_control_ids(
    tokenizer: Tokenizer, qwen_tokenizer: Tokenizer, name: str, texts: tuple[str, str, str, str]
) -> None:
    template = of(name, tokenizer, qwen_tokenizer)
    if "</think>" in texts[2] and name in KNOWN:  # there the template itself cuts what an assistant said
        texts = (texts[0], texts[1], "", texts[3])
    harmless = control_ids(template._tokenizer, template.encode(chat_with("f", "", "", "", "")))
    ids = template.encode(chat_with("f", *texts))
    assert control_ids(template._tokenizer, ids) == harmless
    visible = [token_id for token_id in ids if token_id not in template._tokenizer.control.values()]
    assert f"r{texts[3]}" in template._tokenizer.decode(visible)
    assert json.dumps(f"k{texts[1]}", ensure_ascii=False) in template._tokenizer.decode(visible)


def test_results_are_given_in_the_order_of_their_calls(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(SWITCHED, tokenizer)
    swapped = (*TURNS[:3], TURNS[4], TURNS[3], *AFTER[5:])
    assert template.render(swapped) == template.render(AFTER)


def test_arguments_that_are_no_json_stay_as_they_are(qwen_tokenizer: Tokenizer) -> None:
    template = ChatTemplate(QWEN, qwen_tokenizer)
    for arguments in ('{"city": "Ro', "[" * 5000, '{"a": ' * 900 + "1" + "}" * 900):
        turns = [Message("user", "x"), Message("assistant", None, tool_calls=(ToolCall("i", "f", arguments),))]
        assert json.dumps(arguments, ensure_ascii=False)[:40] in template.render(turns)
        assert template.encode([*turns, Message("tool", "<|im_end|>", tool_call_id="i")])


@pytest.mark.weights
def test_published_templates_with_tools(published: tuple[str, Tokenizer]) -> None:
    """Qwen2.5's shows tools and is used as it is; DeepSeek's shows a first round of calls as ours does."""
    source, tokenizer = published
    template = ChatTemplate(source, tokenizer)
    if template.format.calls is HERMES:
        values = [message.as_template_value() for message in AGAIN]
        for value in values:
            for call in value.get("tool_calls", ()):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        assert template.render(Conversation(AGAIN, (WEATHER, CLOCK))) == oracle_values(source, tokenizer, values)
    else:
        assert template.format.calls is V3
        assert template.render(AFTER) == oracle(source, tokenizer, list(AFTER), True)
        assert template.render(TURNS) == oracle(source, tokenizer, list(TURNS), True)
