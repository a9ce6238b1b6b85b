"""Any bytes as the input of a batch: rows, or errors with line numbers, never anything else."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvern.jobs import request_cache
from kvern.jobs.batch_input import Limits, check, with_requests
from kvern.wire.batch_lines import answer_line, error_line

URL = "/v1/chat/completions"
LIMITS = Limits(lines=50, line_bytes=500)
GOOD: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": URL, "body": {"model": "m"}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
LINES = st.one_of(
    st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b"")),
    st.builds(lambda name, value: json.dumps({**GOOD, name: value}).encode(), st.sampled_from(list(GOOD)), JSON),
    st.integers(0, 9).map(lambda n: json.dumps({**GOOD, "custom_id": str(n)}).encode()),
    st.sampled_from([b"", b"  ", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"x" * 501]),
)


@given(st.lists(LINES, max_size=60))
def test_each_line_is_a_row_or_an_error(lines: list[bytes]) -> None:
    rows, errors = check(lines, URL, lambda name: name == "m", LIMITS)
    assert bool(rows) != bool(errors)
    for error in errors:
        assert error.message
        assert error.line is None or lines[error.line - 1].strip()
    if rows:
        assert [row.line for row in rows] == [n for n, line in enumerate(lines, 1) if line.strip()]
        assert len({row.custom_id for row in rows}) == len(rows)
        whole = list(with_requests(rows, lines))
        assert all(json.loads(row.request)["custom_id"] == row.custom_id for row in whole)


def test_too_many_lines() -> None:
    lines = [json.dumps({**GOOD, "custom_id": str(n)}).encode() for n in range(51)]
    assert len(check(lines[:50], URL, lambda _: True, LIMITS)[0]) == 50
    (error,) = check(lines, URL, lambda _: True, LIMITS)[1]
    assert (error.code, error.line) == ("too_many_lines", 51)


@given(st.text(st.characters(), max_size=5), JSON)
def test_output_lines_are_one_line_of_json(custom_id: str, body: Any) -> None:
    for text in (answer_line("r", custom_id, 200, "q", body), error_line("r", custom_id, "c", "m")):
        assert b"\n" not in text
        assert json.loads(text)["custom_id"] == custom_id


def test_requests_that_are_one() -> None:
    greedy = {"model": "m", "temperature": 0, "messages": []}
    one = request_cache.key("r", "o", URL, greedy)
    assert one is not None
    assert request_cache.key("r", "o", URL, dict(reversed({**greedy, "user": "x", "stop": None}.items()))) == one
    others = [
        ("r2", "o", URL, greedy),
        ("r", "o2", URL, greedy),
        ("r", "o", "/v1/completions", greedy),
        ("r", "o", URL, {**greedy, "seed": 1}),
        ("r", "o", URL, {**greedy, "max_tokens": 5}),
    ]
    keys = [request_cache.key(*other) for other in others]
    assert None not in keys
    assert len({one, *keys}) == 6
    assert request_cache.key("r", "o", URL, {"model": "m"}) is None
    assert request_cache.key("r", "o", URL, {"model": "m", "temperature": 0.5}) is None
    assert request_cache.key("r", "o", URL, {"model": "m", "temperature": 0.5, "seed": 0}) is not None
    assert request_cache.key("r", "o", "/v1/responses", greedy) is None
    assert request_cache.key("r", "o", "/v1/responses", {**greedy, "store": False}) is not None


def test_an_answer_that_is_used_again_has_its_own_ids() -> None:
    suffix = "0123456789abcdef01234567"
    for kind in ("chatcmpl-", "cmpl-", "resp_"):
        body = {"id": kind + suffix, "output": [{"id": f"msg_{suffix}o0000"}], "text": "é"}
        again = request_cache.renamed(body)
        new = again["id"].removeprefix(kind)
        assert len(new) == len(suffix)
        assert new != suffix
        assert again == {**body, "id": kind + new, "output": [{"id": f"msg_{new}o0000"}]}
    for strange in ({}, {"id": None}, {"id": "x"}):
        assert request_cache.renamed(strange) == strange
