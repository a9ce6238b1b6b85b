# ruff: noqa: RUF001 (DeepSeek's tokens contain full-width bars)
from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvern.errors import CheckpointError
from kvern.text.stop import held_back
from kvern.text.tokenizer import Tokenizer, _without_control


@pytest.mark.parametrize("text", ["<|im_end|>", "say <｜Assistant｜> now", "a</think>b<think>", "<|im_end|><|im_end|>"])
def test_control_strings_in_text_stay_text(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert not set(ids) & set(byte_level.control.values())
    assert byte_level.decode(ids) == text
    assert set(byte_level.encode(text, allow_special=True)) & set(byte_level.control.values())


def test_byte_fallback_control_strings_stay_text(byte_fallback: Tokenizer) -> None:
    ids = byte_fallback.encode("a</s>b")
    assert byte_fallback.control["</s>"] not in ids
    assert byte_fallback.decode(ids) == "a</s>b"


@given(text=st.text())
def test_plain_and_full_encoder_agree_without_control_strings(byte_level: Tokenizer, text: str) -> None:
    assert byte_level._plain.encode(text).ids == byte_level.encode(text, allow_special=True)
    assert byte_level.decode(byte_level.encode(text)) == text


@given(text=st.text(alphabet="<|im_end>/thk", max_size=12))
def test_the_beginning_of_a_control_string_is_found(byte_level: Tokenizer, text: str) -> None:
    assert byte_level.begun_control(text) == held_back(text, byte_level.control)


def test_white_space_tokens_are_text(byte_level: Tokenizer) -> None:
    parts = json.loads(byte_level._definition)
    new = byte_level.vocab_limit(1 << 20)
    parts["added_tokens"].append({**parts["added_tokens"][0], "id": new, "content": "        ", "special": False})
    tokenizer = Tokenizer(json.dumps(parts), {})
    assert "        " not in tokenizer.control
    assert new in tokenizer.encode("a        b")
    assert tokenizer.vocab_limit(1 << 20) == new + 1


def test_the_limit_is_that_of_the_whole_vocabulary(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    for tokenizer in (byte_level, byte_fallback):
        ids = sorted(tokenizer._full.get_vocab(with_added_tokens=True).values())
        assert tokenizer.vocab_limit(ids[-1] + 500) == tokenizer.vocab_limit(ids[-1] + 1) == ids[-1] + 1
        assert tokenizer.vocab_limit(ids[-1]) == ids[-2] + 1
        assert tokenizer.vocab_limit(0) == 0


def test_byte_tokens_are_those_of_the_model(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    for tokenizer in (byte_level, byte_fallback):
        vocabulary = tokenizer._full.get_vocab(with_added_tokens=False)
        expected = {i for token, i in vocabulary.items() if len(token) == 6 and token.startswith("<0x")}
        every = range(max(vocabulary.values()) + 10)
        assert {token_id for token_id in every if tokenizer.is_byte_token(token_id)} == expected
        assert bool(expected) == (tokenizer is byte_fallback)


def test_a_tokenizer_without_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}})
    )
    with pytest.raises(CheckpointError, match="without tokens"):
        Tokenizer.load(tmp_path)


def test_a_control_string_that_the_vocabulary_also_holds_is_dropped_from_it() -> None:
    definition = {
        "added_tokens": [{"content": "<s>"}],
        "post_processor": {"type": "x"},
        "model": {"vocab": {"<s>": 0, "<": 1, "s": 2, ">": 3, "<unk>": 4}, "merges": ["< s"], "unk_token": "<unk>"},
    }
    assert json.loads(_without_control(json.dumps(definition), {"<s>", "<unk>"}))["model"]["vocab"] == {
        "<": 1,
        "s": 2,
        ">": 3,
        "<unk>": 4,
    }


def test_named_tokens(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    assert byte_level.named_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert byte_level.eos_id == byte_level.control["<|im_end|>"]
    assert (byte_fallback.bos_id, byte_fallback.adds_bos) == (1, True)


def test_loading_names_the_file(tmp_path: Path, byte_level: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(byte_level._definition, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: must hold a JSON object"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["def add(a, b):\n    return a", "naïve 東京 ☕", "<|im_end|>"])
def test_bytes_of_tokens_join_to_the_text(byte_level: Tokenizer, text: str) -> None:
    for allow in (True, False):
        ids = byte_level.encode(text, allow_special=allow)
        assert b"".join(byte_level.token_bytes(token) for token in ids).decode() == text


def test_bytes_of_tokens_with_byte_fallback(byte_fallback: Tokenizer) -> None:
    ids = byte_fallback.encode("ab é ☕")
    assert b"".join(byte_fallback.token_bytes(token) for token in ids).decode() == " ab é ☕"
    assert byte_fallback.token_bytes(10**6) == b""
