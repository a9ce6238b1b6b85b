# ruff: noqa: RUF001 (DeepSeek's tokens contain full-width bars)
"""Answers are learned behind exactly the prompt that serving would ask with, to their end, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.text.conftest import byte_level
from tests.text.test_template import CHATML, control_ids, published
from tests.text.test_tool_prompts import AGAIN, CALLS, CLOCK, KNOWN, OTHERS, WEATHER, of, qwen_tokenizer, tokenizer

from kvern.data.chat_rows import ChatIds, chat_rows
from kvern.errors import BadRequestError
from kvern.text.conversation import Conversation
from kvern.text.messages import Message
from kvern.text.template import ChatTemplate
from kvern.text.tokenizer import Tokenizer

__all__ = ["byte_level", "published", "qwen_tokenizer", "tokenizer"]

# As Qwen3 does: reasoning shows behind the last user turn only.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and "
    "loop.index0 > ns.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ANSWERED = (*AGAIN, Message("assistant", "Sun."))
TEXT = st.lists(
    st.sampled_from(["<|im_end|>", "<｜User｜>", "</think>", "<|im_", "a", "é", " ", "\n", "def f("]), min_size=1
)
WORDS = TEXT.map(lambda parts: "x" + "".join(parts).replace("</think>", "") + "y")


def text(row: ChatIds, tokenizer: Tokenizer) -> str:
    return b"".join(tokenizer.token_bytes(one) for one in row.ids).decode()


def spans(row: ChatIds) -> list[tuple[int, int]]:
    """Where what is learned begins and ends."""
    edges = [0, *(at for at, (one, other) in enumerate(pairwise(row.learned), 1) if one != other), len(row.ids)]
    return [(begin, end) for begin, end in pairwise(edges) if row.learned[begin]]


def learned(rows: list[ChatIds], tokenizer: Tokenizer) -> list[str]:
    return [
        b"".join(tokenizer.token_bytes(one) for one in row.ids[begin:end]).decode()
        for row in rows
        for begin, end in spans(row)
    ]


def check_prompts(chat: Conversation, template: ChatTemplate, tokenizer: Tokenizer) -> list[ChatIds]:
    """Each answer stands behind its prompt, in order; returns the rows."""
    rows = list(chat_rows(chat, template, tokenizer))
    prompts = []
    for index, message in enumerate(chat.messages):
        if message.role == "assistant":
            thinking = bool(message.reasoning_content) if template.can_think else None
            prompts.append(template.prompt(replace(chat, messages=chat.messages[:index], thinking=thinking))[0])
    assert [row.ids[:begin] for row in rows for begin, _ in spans(row)] == prompts
    assert all(row.learned[-1] and len(row.learned) == len(row.ids) for row in rows)
    return rows


@pytest.mark.parametrize("name", KNOWN | OTHERS)
def test_answers_and_calls_with_their_ends(tokenizer: Tokenizer, qwen_tokenizer: Tokenizer, name: str) -> None:
    template, own = of(name, tokenizer, qwen_tokenizer), tokenizer if name in KNOWN else qwen_tokenizer
    rows = check_prompts(Conversation(ANSWERED, (WEATHER, CLOCK)), template, own)
    said = learned(rows, own)
    assert len(said) == 4
    assert said[1] == "It rains.<|im_end|>"
    assert said[3] == "Sun.<|im_end|>"
    assert all(one.endswith("<|im_end|>") and one.count("<|im_end|>") == 1 for one in said)
    assert all(call.name in said[0] and call.arguments.strip("{}") in said[0] for call in CALLS)
    assert said[2].startswith("I look.")
    assert len(rows) == 1 or name == "r1"


@pytest.mark.parametrize("name", ["v3", "v31", "r1", "qwen", "plain"])
@settings(max_examples=25)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_the_prompt_of_every_answer_is_that_of_serving(
    tokenizer: Tokenizer, qwen_tokenizer: Tokenizer, name: str, turns: list[tuple[str, str]]
) -> None:
    template, own = of(name, tokenizer, qwen_tokenizer), tokenizer if name in KNOWN else qwen_tokenizer
    messages = [message for asked, said in turns for message in (Message("user", asked), Message("assistant", said))]
    rows = check_prompts(Conversation(tuple(messages)), template, own)
    end = own.control["<|im_end|>"]
    answers = [row.ids[begin:stop] for row in rows for begin, stop in spans(row)]
    for (_, said), answer in zip(turns, answers, strict=True):
        assert control_ids(own, answer) == [end]  # control strings in messages are characters
        assert answer[-1] == end
        assert b"".join(own.token_bytes(one) for one in answer[:-1]).decode() == said


@pytest.mark.parametrize(
    ("name", "opened", "closed"),
    [("r1", "<think>\n", "\n</think>\n\n"), ("v31", "<think>", "</think>")],
)
def test_reasoning_is_learned_where_the_template_asks_for_it(
    tokenizer: Tokenizer, qwen_tokenizer: Tokenizer, name: str, opened: str, closed: str
) -> None:
    template = of(name, tokenizer, qwen_tokenizer)
    first = Message("assistant", "4<|im_end|>", reasoning_content="2 + 2 </think> is <|im_")
    chat = Conversation((Message("user", "2+2?"), first, Message("user", "3+3?"), Message("assistant", "6")))
    rows = check_prompts(chat, template, tokenizer)
    assert len(rows) == 2  # the second turn no longer shows the reasoning
    said = learned(rows, tokenizer)
    assert said == [f"2 + 2 </think> is <|im_{closed}4<|im_end|><|im_end|>", "6<|im_end|>"]
    assert text(rows[0], tokenizer).split("<｜Assistant｜>")[1].startswith(opened)
    closing = tokenizer.control["</think>"]
    assert rows[0].ids.count(closing) == 1
    assert "2 + 2" not in text(rows[1], tokenizer)


def test_reasoning_that_the_template_shows_itself(byte_level: Tokenizer) -> None:
    template = ChatTemplate(QWEN3, byte_level)
    first = Message("assistant", "4", reasoning_content="sum")
    chat = Conversation((Message("user", "2+2?"), first, Message("user", "3+3?"), Message("assistant", "6")))
    rows = check_prompts(chat, template, byte_level)
    assert learned(rows, byte_level) == ["<think>\nsum\n</think>\n\n4<|im_end|>", "6<|im_end|>"]
    assert text(rows[1], byte_level).endswith("assistant\n<think>\n\n</think>\n\n6<|im_end|>")


def test_an_answer_that_repeats_the_prompt_adds_no_row(byte_level: Tokenizer) -> None:
    template = ChatTemplate(CHATML, byte_level)
    chat = Conversation(
        (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    )
    (row,) = chat_rows(chat, template, byte_level)
    whole = template.encode(chat.messages, add_generation_prompt=False)
    assert row.ids == whole[: len(row.ids)]
    assert byte_level.decode(whole[len(row.ids) :]) == "\n"


WRONG = {
    "no answer": (CHATML, [Message("user", "a")], "must end with the assistant's answer"),
    "no reasoning": (
        CHATML,
        [Message("user", "a"), Message("assistant", "b", reasoning_content="c")],
        "no place for reasoning",
    ),
    "no end": (
        CHATML.replace("<|im_end|>", ""),
        [Message("user", "a"), Message("assistant", "b")],
        "writes no token that ends",
    ),
    "dropped": (
        "{% for m in messages %}<|im_start|>{{ m.content[:1] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}",
        [Message("user", "a"), Message("assistant", "bcd")],
        "not show the whole",
    ),
    "another way": (
        CHATML.replace("'<|im_start|>assistant", "'<|im_start|>model"),
        [Message("user", "a"), Message("assistant", "b")],
        "in another way",
    ),
    "refused": (
        CHATML + "{{ raise_exception('no') }}",
        [Message("user", "a"), Message("assistant", "b")],
        "refuses these messages: no",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_chats_that_are_refused(byte_level: Tokenizer, name: str) -> None:
    source, messages, says = WRONG[name]
    with pytest.raises(BadRequestError, match=says):
        list(chat_rows(Conversation(tuple(messages)), ChatTemplate(source, byte_level), byte_level))


GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def transformers_tokenizer(definition: str) -> Any:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(definition))


@settings(max_examples=30)
@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["user", "assistant"]), st.text(alphabet="ab é\n<", min_size=1)), max_size=4
    )
)
def test_the_mask_equals_that_of_transformers(byte_level: Tokenizer, turns: list[tuple[str, str]]) -> None:
    messages = [Message("user", "hi"), *(Message(role, said) for role, said in turns), Message("assistant", "bye")]  # type: ignore[arg-type]
    rows = list(chat_rows(Conversation(tuple(messages)), ChatTemplate(GENERATION, byte_level), byte_level))
    theirs = transformers_tokenizer(byte_level._definition).apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        chat_template=GENERATION,
        return_assistant_tokens_mask=True,
        return_dict=True,
        tokenize=True,
    )
    assert learned(rows, byte_level) == [f"{m.content}<|im_end|>" for m in messages if m.role == "assistant"]
    if len(rows) == 1 and rows[0].ids == theirs["input_ids"][: len(rows[0].ids)]:
        assert rows[0].learned == [bool(mark) for mark in theirs["assistant_masks"][: len(rows[0].ids)]]


@pytest.mark.weights
def test_published_templates(published: tuple[str, Tokenizer]) -> None:
    source, own = published
    chat = Conversation(tuple(message for message in ANSWERED if message.role != "system"), (WEATHER, CLOCK))
    rows = check_prompts(chat, ChatTemplate(source, own), own)
    said = learned(rows, own)
    end = {"<|im_end|>", "<｜end▁of▁sentence｜>"}
    assert len(said) == 4
    assert all(any(one.endswith(token) for token in end) for one in said)
    assert [one for one in said if one.startswith(("It rains.", "Sun."))] == [said[1], said[3]]
