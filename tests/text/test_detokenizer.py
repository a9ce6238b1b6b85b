from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvern.text.detokenizer import Detokenizer
from kvern.text.tokenizer import Tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@given(ids=st.lists(st.integers(0, 410), max_size=40))
def test_pieces_of_random_ids_add_up(byte_level: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(byte_level, ids)) == byte_level.decode(ids)


@given(ids=st.lists(st.integers(0, 280), max_size=40))
def test_pieces_of_random_byte_fallback_ids_add_up(byte_fallback: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(byte_fallback, ids)) == byte_fallback.decode(ids)


@given(ids=st.lists(st.one_of(st.sampled_from([1, 2, 259, 260, 275]), st.integers(3, 258)), max_size=12))
def test_byte_runs_and_specials_add_up(byte_fallback: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(byte_fallback, ids)) == byte_fallback.decode(ids)


@given(text=st.text(min_size=1))
def test_no_piece_of_real_text_holds_half_a_character(byte_level: Tokenizer, text: str) -> None:
    parts = pieces(byte_level, byte_level.encode(text))
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_a_character_appears_with_its_last_byte(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("🦀!")
    assert [part for part in pieces(byte_level, ids) if part] == ["🦀", "!"]
    assert len(ids) > 2


def test_special_tokens_do_not_show(byte_level: Tokenizer) -> None:
    ids = [
        *byte_level.encode("a"),
        byte_level.control["<|im_end|>"],
        *byte_level.encode("<think>b", allow_special=True),
    ]
    assert "".join(pieces(byte_level, ids)) == "a<think>b"
