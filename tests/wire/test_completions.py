from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.test_chat import JSON

from kvern.errors import BadRequestError
from kvern.text.messages import ScoredToken, TokenScore
from kvern.text.options import SamplingOptions
from kvern.wire.completions import CompletionLogprobs, parse_completion_request


def parse(**changes: Any) -> Any:
    return parse_completion_request(json.dumps({"model": "m", "prompt": "hi", **changes}).encode())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("hi", ["hi"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_the_four_forms_of_a_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert parse(prompt=prompt).prompts == prompts


def test_echo_scores_the_prompt_where_logprobs_are_asked_for() -> None:
    assert parse().to_options() == SamplingOptions(max_tokens=16)
    assert parse(logprobs=3).to_options() == SamplingOptions(max_tokens=16, logprobs=3)
    assert parse(logprobs=1, echo=True).to_options() == SamplingOptions(16, logprobs=1, prompt_logprobs=True)
    assert parse(max_tokens=0, echo=True).to_options() == SamplingOptions(0, logprobs=0, prompt_logprobs=True)


def test_a_suffix_that_is_empty_asks_for_nothing() -> None:
    assert parse(suffix="", best_of=1) == parse(suffix=None) == parse()
    assert parse(suffix="x").suffix == "x"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": [1, "a"]}, "prompt.1"),
        ({"prompt": ["a", 1]}, "prompt.1"),
        ({"prompt": [True]}, "prompt.0"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [2**31]}, "prompt.0"),
        ({"prompt": [1.5]}, "prompt.0"),
        ({"prompt": [[1], ["a"]]}, "prompt.1.0"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a", "b"], "n": 65}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": 1}, "suffix"),
        ({"suffix": "x", "prompt": [1]}, "suffix"),
        ({"suffix": "x", "prompt": ["a", "b"]}, "suffix"),
        ({"suffix": "x", "echo": True}, "echo"),
        ({"suffix": "x", "allow_special_tokens": True}, "allow_special_tokens"),
        ({"suffix": "x", "best_of": 2}, "best_of"),
        ({"messages": []}, "messages"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
def test_bad_fields_are_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse(**changes)
    assert caught.value.param == param


def test_the_older_logprobs() -> None:
    best = (TokenScore("a", b"a", -0.1), TokenScore("\ufffd", b"\xe4\xbd", float("-inf")))
    scores = (ScoredToken("p", b"p", None, (), 0), ScoredToken("b", b"b", -3.0, best, 1))
    assert CompletionLogprobs.of(scores, 10).model_dump() == {
        "tokens": ["p", "b"],
        "token_logprobs": [None, -3.0],
        "top_logprobs": [None, {"a": -0.1, "bytes:\\xe4\\xbd": -9999.0, "b": -3.0}],
        "text_offset": [10, 11],
    }


FIELDS = ["prompt", "suffix", "echo", "logprobs", "stop", "logit_bias", "n", "best_of", "max_tokens", "stream", "x"]


@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_any_json_is_read_or_refused(changes: dict[str, Any]) -> None:
    with suppress(BadRequestError):
        parse(**changes)
