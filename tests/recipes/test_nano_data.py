# ruff: noqa: RUF001 (DeepSeek's tokens contain full-width bars)
"""The corpus and the tokenizer of kvern-nano."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tokenizers
from recipes.nano import corpus
from recipes.nano import tokenizer as nano_tokenizer
from recipes.nano.corpus import Document

from kvern.text.conversation import Conversation
from kvern.text.fim import FillInTheMiddle
from kvern.text.formats import V31
from kvern.text.messages import Message, Tool, ToolCall
from kvern.text.template import ChatTemplate
from kvern.text.tokenizer import Tokenizer

WEATHER = Tool("get_weather", "The weather", {"type": "object", "properties": {"city": {"type": "string"}}})
CLOCK = Tool("clock", None, {"type": "object", "properties": {}})
V31_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜></think>{{ m.content or '' }}{% for c in m.tool_calls %}"
    "{% if loop.first %}<｜tool▁calls▁begin｜>{% endif %}<｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>"
    "{{ c.function.arguments }}<｜tool▁call▁end｜>{% if loop.last %}<｜tool▁calls▁end｜>{% endif %}{% endfor %}"
    "{{ eos_token }}{% elif m.role == 'tool' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜></think>{% endif %}"
)
"""The published template, as far as it goes: it leaves definitions of tools to the client."""


def module(name: str) -> str:
    return "".join(
        f"def {name}_number_{number}(argument):\n    return {name}_{number} + argument\n" for number in range(20)
    )


def test_the_corpus_is_what_teaches_and_is_there_once(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    files: dict[str, str | bytes] = {
        "a.py": module("a"),
        "copy_of_a.py": module("a"),
        "nearly_a.py": module("a") + "x = 1\n",
        "test/test_a.py": module("t"),
        "broken.py": "def (:\n",
        "latin.py": b"# -*- coding: latin-1 -*-\nname = '\xe4'\n",
        "pydoc_data/topics.py": module("p"),
        "encodings/cp1.py": "# generated from 'x' with gencodec.py.\n" + module("c"),
        "site-packages/other.py": module("o"),
        "empty.py": "",
    }
    for name, content in files.items():
        path = library / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = list(corpus.library(library))
    assert [(one.kind, one.path) for one in corpus.without_copies(found)] == [
        ("library", "a.py"),
        ("library", "latin.py"),
        ("tests", "test/test_a.py"),
    ]
    assert "ä" in next(one.text for one in found if one.path == "latin.py")
    assert "test/test_a.py" not in {one.path for one in corpus.library(library, tests=False)}


def test_the_split_is_a_matter_of_the_text_alone() -> None:
    documents = [Document("library", f"{number}.py", f"x = {number}\n") for number in range(2000)]
    held = [one for one in documents if one.split == "held-out"]
    assert 20 < len(held) < 90
    assert all(Document("docs", "elsewhere", one.text).split == "held-out" for one in held)


def test_a_corpus_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, docs = tmp_path / "lib", tmp_path / "docs"
    for folder, name in ((library, "m.py"), (docs, "library/m.rst.txt")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(module(folder.name))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    manifest = corpus.collect(tmp_path / "corpus", docs=docs)
    read = corpus.read(tmp_path / "corpus", "train") + corpus.read(tmp_path / "corpus", "held-out")
    assert {(one.kind, one.path, one.text) for one in read} == {
        ("library", "m.py", module("lib")),
        ("docs", "library/m.rst", module("docs")),
    }
    assert manifest["documentation"] is True
    assert json.loads((tmp_path / "corpus" / "manifest.json").read_text()) == manifest
    assert corpus.collect(tmp_path / "again", docs=docs)["sha256"] == manifest["sha256"]


def test_without_documentation_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.version_info", (9, 99, 0))
    assert corpus.find_documentation(tmp_path) is None
    assert "python9.99-doc" in capsys.readouterr().err
    assert list(corpus.documentation(None)) == []


def test_no_corpus_is_said_and_not_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"recipes\.nano data"):
        corpus.read(tmp_path, "train")


def test_the_tokenizer_is_the_same_every_time(trained: tokenizers.Tokenizer) -> None:
    again = nano_tokenizer.train([Path(os.__file__).read_text(encoding="utf-8")], 700)
    assert again.to_str() == trained.to_str()
    assert trained.get_vocab_size() == 700


def test_ids_and_names_are_v3s(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert set(nano_tokenizer.CONTROL) < set(tokenizer.control)
    assert FillInTheMiddle.of(tokenizer) is not None


@pytest.mark.parametrize("text", ["x = 1234567", "naïve 字 😀\r\n\t  y", "    return self._x[0:10]\n\n\n"])
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_cut_in_threes_and_words_take_one_character_along(trained: tokenizers.Tokenizer) -> None:
    cut = [piece for piece, _ in trained.pre_tokenizer.pre_tokenize_str("a.bcd(x) == 1234567\n    return")]
    assert cut == ["a", ".bcd", "(x", ")", "Ġ==", "Ġ", "123", "456", "7", "Ċ", "ĠĠĠ", "Ġreturn"]


@pytest.mark.parametrize("system", [(), (Message("system", "Be brief."),)], ids=["none", "system"])
@pytest.mark.parametrize("tools", [(), (WEATHER,), (WEATHER, CLOCK)], ids=len)
def test_the_template_writes_what_kvern_writes_for_v31(
    tokenizer: Tokenizer, system: tuple[Message, ...], tools: tuple[Tool, ...]
) -> None:
    ours, published = ChatTemplate(nano_tokenizer.chat_template(), tokenizer), ChatTemplate(V31_TEMPLATE, tokenizer)
    calls = (ToolCall("1", "get_weather", '{"city": "Rome"}'), ToolCall("2", "clock", "{}"))
    turns = (*system, Message("user", "hi"), Message("assistant", None, tool_calls=calls[: len(tools)] or calls[:1]))
    results = [Message("tool", "rain", tool_call_id="1"), Message("tool", "noon", tool_call_id="2")]
    turns += tuple(results[: len(tools) or 1])
    whole = (*turns, Message("assistant", "It rains."), Message("user", "And now?"))
    for chat in (turns, whole, whole[: len(system) + 1]):
        conversation = Conversation(chat, tools)
        assert ours.render(conversation) == published.render(conversation)
        assert ours.encode(conversation) == published.encode(conversation)


def test_calls_are_v31s_and_thinking_is_not_offered(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(nano_tokenizer.chat_template(), tokenizer)
    assert template.format.calls is V31
    assert not template.can_think
    ids, parsing = template.prompt(Conversation((Message("user", "hi"),), (WEATHER,)))
    assert parsing.thinks == "never"
    assert ids[0] == tokenizer.bos_id
