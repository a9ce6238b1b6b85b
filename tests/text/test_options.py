from __future__ import annotations

from typing import Any

import pytest

from kvern.errors import BadRequestError
from kvern.text.options import MAX_BIASES, MAX_STOP_IDS, MAX_STOPS, SamplingOptions


def test_options_are_built_from_what_people_write() -> None:
    options = SamplingOptions.of(stop="x", logit_bias={3: -1.5}, stop_token_ids=[4], seed=None, top_k=5)
    assert options == SamplingOptions(stop=("x",), logit_bias=((3, -1.5),), stop_token_ids=(4,), top_k=5)
    assert options.changes() == {"stop": ("x",), "logit_bias": ((3, -1.5),), "stop_token_ids": (4,), "top_k": 5}
    assert SamplingOptions.of() == SamplingOptions()


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "prompt_logprobs": True}, "max_tokens"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * (MAX_STOPS + 1)}, "stop"),
        ({"stop_token_ids": [1] * (MAX_STOP_IDS + 1)}, "stop_token_ids"),
        ({"logit_bias": dict.fromkeys(range(MAX_BIASES + 1), 0.0)}, "logit_bias"),
        ({"logit_bias": {1: 101.0}}, "logit_bias"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(given: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        SamplingOptions.of(**given)
    assert caught.value.param == param
