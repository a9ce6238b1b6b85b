"""Updates become text: stop strings, scores that leave with their text, ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvern.engine import SamplingParams, TokenLogprob, Update
from kvern.errors import KvernError
from kvern.llm import Piece, Prepared, TextStream
from kvern.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.load(tiny_folder)


def run(
    tokenizer: Tokenizer, text: str, *, stop: tuple[str, ...] = (), min_tokens: int = 0, end: bool = False
) -> list[Piece]:
    """Push the text token by token, scored; the last token ends the answer."""
    ids = tokenizer.encode(text, allow_special=True)
    params = SamplingParams(
        max_tokens=99, min_tokens=min_tokens, logprobs=0, stop_token_ids=tuple(ids[-1:] if end else ())
    )
    stream = TextStream(tokenizer, Prepared((1,), params, stop))
    pieces = []
    for index, token in enumerate(ids):
        last = index == len(ids) - 1
        finish = ("stop" if end else "length") if last else None
        score = TokenLogprob(token, -float(index), ())
        pieces.append(stream.push(Update(0, (token,), (score,), finish)))  # type: ignore[arg-type]
        if pieces[-1].finish_reason:
            break
    return pieces


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def scored(pieces: list[Piece]) -> str:
    return "".join(score.text for piece in pieces for score in piece.scores if not score.ends)


@pytest.mark.parametrize(
    ("given", "shown", "reason"),
    [("one two three", "one ", "stop"), ("one tw", "one tw", "length"), ("xtwtwo", "xtw", "stop")],
)
def test_scores_leave_with_their_text(tokenizer: Tokenizer, given: str, shown: str, reason: str) -> None:
    pieces = run(tokenizer, given, stop=("two",))
    assert (text(pieces), pieces[-1].finish_reason) == (shown, reason)
    assert scored(pieces) == shown
    so_far = scores = ""
    for piece in pieces:
        so_far, scores = so_far + piece.text, scores + "".join(score.text for score in piece.scores)
        assert so_far.startswith(scores)
    offsets = [score.offset for piece in pieces for score in piece.scores]
    assert offsets == sorted(offsets)


def test_a_stop_string_that_begins_inside_a_token_keeps_the_token(tokenizer: Tokenizer) -> None:
    pieces = run(tokenizer, "the cat", stop=("e c",))
    assert text(pieces) == "th"
    assert scored(pieces).startswith("th")


def test_the_token_that_ends_is_scored_and_does_not_show(tokenizer: Tokenizer) -> None:
    pieces = run(tokenizer, "no<|end|>", end=True)
    assert (text(pieces), pieces[-1].finish_reason) == ("no", "stop")
    last = pieces[-1].scores[-1]
    assert (last.text, last.ends) == ("<|end|>", True)


def test_stop_strings_count_from_min_tokens_on(tokenizer: Tokenizer) -> None:
    assert text(run(tokenizer, "two xtwo", stop=("two",), min_tokens=4)) == "two x"


def test_parts_of_a_character_are_scored_as_bytes(tokenizer: Tokenizer) -> None:
    pieces = run(tokenizer, "\N{CRAB}a")
    raw = b"".join(score.raw for piece in pieces for score in piece.scores)
    assert raw.decode() == text(pieces) == "\N{CRAB}a"


def test_errors_come_out(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, Prepared((1,), SamplingParams(max_tokens=1), ()))
    with pytest.raises(KvernError, match="broken"):
        stream.push(Update(0, finish="error", error=KvernError("broken")))
    with pytest.raises(KvernError, match="cancelled"):
        stream.push(Update(0, finish="cancelled"))
