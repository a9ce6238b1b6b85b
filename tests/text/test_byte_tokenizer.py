"""Bytes as tokens: every text comes back, special tokens have ids of their own."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kvern.text.byte_tokenizer import EOS, VOCABULARY, byte_tokenizer, write
from kvern.text.fim import FillInTheMiddle
from kvern.text.tokenizer import Tokenizer

TOKENIZER = byte_tokenizer()


@given(st.text())
def test_a_token_is_a_byte(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert bytes(ids) == text.encode()
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_follow_the_bytes(tmp_path: Path) -> None:
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id) == (256, 257)
    assert TOKENIZER.vocab_limit(1000) == VOCABULARY == 262
    assert TOKENIZER.encode(EOS) == list(EOS.encode())
    assert TOKENIZER.encode(EOS, allow_special=True) == [257]
    fim = FillInTheMiddle.of(TOKENIZER)
    assert fim is not None
    assert (fim.begin, fim.hole, fim.end) == (259, 260, 261)
    write(tmp_path)
    read = Tokenizer.load(tmp_path)
    assert (read.encode("né\n"), read.eos_id) == ([110, 195, 169, 10], 257)
