from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from kvern.text.stop import StopMatcher, held_back

TEXT = st.text(alphabet="ab<", max_size=24)
STOPS = st.lists(st.text(alphabet="ab<", min_size=1, max_size=5), max_size=4)


def run(stops: list[str], parts: list[str]) -> tuple[str, str | None]:
    matcher, shown = StopMatcher(stops), ""
    for part in parts:
        shown += matcher.push(part)
        if matcher.matched:
            return shown, matcher.matched
    return shown + matcher.finish(), None


def expected(stops: list[str], text: str) -> tuple[str, str | None]:
    """The rule itself: grow the text; at the first end of a stop string, cut the longest that ends there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@example(stops=["aab<", "ab"], text="aab<", cuts=[])
@example(stops=["ab", "aab"], text="aab", cuts=[2])
@given(stops=STOPS, text=TEXT, cuts=st.lists(st.integers(0, 24)))
def test_every_split_gives_the_same_text(stops: list[str], text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[start:end] for start, end in pairwise(edges)]
    assert run(stops, parts) == expected(stops, text)


@given(stops=STOPS, text=TEXT)
def test_text_is_shown_as_soon_as_it_is_certain(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    shown = matcher.push(text)
    if not matcher.matched:
        assert len(text) - len(shown) == max(
            (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
        )


def test_held_back() -> None:
    assert held_back("abc <|im_", ["<|im_end|>"]) == 5
    assert held_back("<|im_end|>", ["<|im_end|>"]) == 0
    assert held_back("aab", ["aabaa", "b"]) == 3
