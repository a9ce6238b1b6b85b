"""The load generator: arrivals, what an answer's numbers are, and every way in which a request can fail."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from itertools import islice, pairwise
from statistics import mean
from typing import Any

import pytest
from tests.bench.chat_server import Reply, answer, chat_server, chunk, event, head, piece

from kvern.bench.load import (
    Answer,
    Target,
    arrivals,
    ask,
    find_target,
    measure_prompts,
    percentiles,
    prompts,
    run_rate,
    summarise,
)
from kvern.bench.raw_http import Address
from kvern.errors import KvernError

START = head("200 OK", "Transfer-Encoding: chunked")


def target(url: str, timeout: float = 10) -> Target:
    return Target(Address.of(url), "m", timeout=timeout)


def asked(reply: Reply, *, timeout: float = 10, hang_up_after: int | None = None) -> Answer:
    with chat_server(lambda _: reply) as url:
        return asyncio.run(ask(target(url, timeout), "hello", 8, hang_up_after=hang_up_after))


def test_arrivals_are_a_seeded_poisson_process() -> None:
    times = arrivals(4.0, 4000, seed=1)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert times[0] == 0
    assert mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert mean(gap**2 for gap in gaps) == pytest.approx(2 * 0.25**2, rel=0.1)
    assert times == arrivals(4.0, 4000, seed=1)
    assert times != arrivals(4.0, 4000, seed=2)
    assert arrivals(float("inf"), 3, seed=1) == [0.0, 0.0, 0.0]


def test_prompts_differ_and_repeat_with_the_seed() -> None:
    first = list(islice(prompts(8, 0), 50))
    assert len(set(first)) == 50
    assert first == list(islice(prompts(8, 0), 50))
    assert all(len(text.split()) == 8 for text in first)


def test_an_answer_in_numbers() -> None:
    result = asked(answer(4, prompt_tokens=9, pause=0.05))
    assert (result.finish, result.error, result.complete) == ("length", None, True)
    assert (result.prompt_tokens, result.completion_tokens) == (9, 4)
    assert len(result.gaps) == 3
    assert all(0.03 < gap < 1 for gap in result.gaps)
    assert result.first is not None
    assert result.due <= result.sent < result.first < result.ended


def test_what_is_sent() -> None:
    bodies: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> Reply:
        bodies.append(body)
        return answer(1, 1)

    with chat_server(reply) as url:
        found = asyncio.run(find_target(Address.of(url)))
        asyncio.run(ask(found, "hello", 8))
        asyncio.run(ask(replace(found, ignore_eos=True), "hello", 8))
    assert bodies[0]["model"] == "m"
    assert bodies[0]["messages"] == [{"role": "user", "content": "hello"}]
    assert (bodies[0]["max_tokens"], bodies[0]["stream"]) == (8, True)
    assert ("ignore_eos" in bodies[0], bodies[1]["ignore_eos"]) == (False, True)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ([head("429 Too Many Requests", "Retry-After: 1", "Content-Length: 2"), b"{}"], "429"),
        ([head("500 Oh", "Content-Length: 0")], "500"),
        ([START, chunk(piece("a"))], "the connection ended before the response did"),
        ([START, chunk(piece("a")), chunk(b"")], "the stream ended without a finish reason"),
        ([START, chunk(event({"error": {"message": "broke"}})), chunk(b"")], "an error in the stream: broke"),
        ([START, chunk(event("no json")), chunk(b"")], "not an event of a chat completion: 'no json'"),
        ([START, chunk(event({"choices": ["x"]})), chunk(b"")], "not an event of a chat completion"),
        ([START, chunk(piece("a")), 2.0], "no end after 0.2 s"),
    ],
)
def test_failures_are_counted_not_raised(reply: Reply, error: str) -> None:
    result = asked(reply, timeout=0.2 if "no end" in error else 10)
    assert result.error is not None
    assert result.error.startswith(error)
    assert not result.complete


def test_nobody_there_is_a_failure_too() -> None:
    with chat_server(lambda _: []) as url:
        pass
    assert "nobody answers" in str(asyncio.run(ask(target(url), "hello", 1)).error)


def test_hanging_up_midway() -> None:
    result = asked(answer(50, 1, pause=0.02), hang_up_after=2)
    assert result.hung_up
    assert (result.finish, result.error, len(result.gaps)) == (None, None, 1)


def test_an_answer_without_usage_counts_its_events() -> None:
    reply: Reply = [START, chunk(piece("a") + piece("b") + piece(finish="stop") + event("[DONE]")), chunk(b"")]
    result = asked(reply)
    assert (result.complete, result.completion_tokens) == (True, 2)


def test_words_are_calibrated_against_the_server() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return answer(1, prompt_tokens=30 + 2 * len(body["messages"][0]["content"].split()))

    with chat_server(reply) as url:
        assert asyncio.run(measure_prompts(target(url))).words(256) == 113
        assert asyncio.run(measure_prompts(target(url))).words(10) == 1
    with chat_server(lambda _: answer(1, 0)) as url:
        assert asyncio.run(measure_prompts(target(url))).words(256) == 256
    broken = head("500 Oh", "Content-Length: 0")
    with chat_server(lambda _: [broken]) as url, pytest.raises(KvernError, match="does not answer: 500"):
        asyncio.run(measure_prompts(target(url)))


def test_the_loop_is_open() -> None:
    """Each answer takes 0.4 s; twelve at 50 a second overlap, so all end long before 12 * 0.4 s."""
    with chat_server(lambda _: [START, 0.4, *answer(2, 3)[1:]]) as url:
        start = time.perf_counter()
        answers = asyncio.run(run_rate(target(url), arrivals(50.0, 12, 0), prompts(4, 0), 8))
        assert time.perf_counter() - start < 4.5
    assert all(-0.002 < one.sent - one.due < 1 for one in answers)
    spread = [one.due - answers[0].due for one in answers]
    assert spread == pytest.approx(arrivals(50.0, 12, 0))
    row = summarise(50.0, answers)
    assert (row.requests, row.complete, row.errors) == (12, 12, {})
    assert row.time_to_first_token_ms["p50"] == pytest.approx(900, abs=600)
    assert row.tokens_per_s == pytest.approx(24 / row.seconds)


def test_latency_counts_from_the_arrival_not_from_the_sending() -> None:
    late = Answer(due=1.0, sent=3.0, first=3.5, ended=4.0, gaps=[0.25], completion_tokens=2, finish="stop")
    row = summarise(1.0, [late, Answer(due=1.5, sent=1.5, ended=1.6, error="429")])
    assert row.time_to_first_token_ms == {"p50": 2500.0, "p90": 2500.0, "p99": 2500.0}
    assert row.end_to_end_ms["p50"] == 3000.0
    assert (row.client_late_ms, row.errors, row.complete) == (2000.0, {"429": 1}, 1)
    assert (row.seconds, row.requests_per_s, row.tokens_per_s) == (3.0, 1 / 3, 2 / 3)


def test_percentiles() -> None:
    assert percentiles([]) == {"p50": None, "p90": None, "p99": None}
    found = percentiles([one / 1000 for one in range(101)])
    assert {name: round(value or 0, 6) for name, value in found.items()} == {"p50": 50, "p90": 90, "p99": 99}
