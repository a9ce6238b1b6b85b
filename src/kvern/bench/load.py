"""Requests against a server at a given rate, open loop: arrivals follow a Poisson process and wait for nobody.

    gap between arrivals ~ Exponential(rate);   every latency counts from the scheduled arrival, not from the sending

so a server (or this client) that falls behind shows it, where a closed loop would slow down and hide it. Time to first
token: until the first event with text. Inter-token latency: between two events with text, which hold one token or more.
Tokens are counted by the server's usage; where it sends none, an event counts as one.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvern.bench.raw_http import Address, ProtocolError, request, request_json
from kvern.errors import KvernError, NotFoundError

CHAT = "/v1/chat/completions"
WORDS = """
    time year people way day man thing woman life child world school state family group country problem hand
    part place case week company system program question work number night point home water room mother area
    money story fact month lot right study book eye job word business issue side kind head house service friend
    father power hour game line end member law car city name team minute idea body back parent face level office
    door health person art
"""
"""Words that are one token each, with the space before them, in nearly every tokenizer."""


RULER_WORDS = (4, 20)
"""Lengths of the two prompts from which `measure_prompts` learns how the server counts."""


@dataclass
class Answer:
    """What one request met. Times are of `time.perf_counter`; `due` is when it should have been sent."""

    due: float
    sent: float = 0.0
    first: float | None = None
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str | None = None
    error: str | None = None
    """"429" and the like for a refusal, otherwise what went wrong; None for an answer that is complete."""

    hung_up: bool = False

    @property
    def complete(self) -> bool:
        """Whether the server said how the answer ended."""
        return self.finish is not None and self.error is None


@dataclass(frozen=True)
class Target:
    """Whom to ask for what."""

    address: Address
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 600.0
    ignore_eos: bool = False
    """Ask for answers that end at their longest only: a field of Kvern's and vLLM's, which others may refuse."""


async def find_target(
    address: Address,
    model: str | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    timeout: float = 600.0,
    ignore_eos: bool = False,
) -> Target:
    """The first model that the server lists, unless one is named. Raises KvernError when it lists none."""
    if model is None:
        listed = (await request_json(address, "GET", "/v1/models", headers=headers)).get("data") or []
        if not listed:
            raise NotFoundError(f"{address} lists no model", hint="name one with --model")
        model = str(listed[0]["id"])
    return Target(address, model, headers or {}, timeout, ignore_eos)


async def ask(
    target: Target, prompt: str, max_tokens: int, *, due: float | None = None, hang_up_after: int | None = None
) -> Answer:
    """Ask for one streamed greedy answer. `hang_up_after`: leave after that many events with text. Never raises for
    what the server or the network does; that is in `Answer.error`.
    """
    now = time.perf_counter()
    answer = Answer(due=now if due is None else due, sent=now)
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if target.ignore_eos else {}),
    }
    try:
        async with asyncio.timeout(target.timeout):
            await _stream(target, body, answer, hang_up_after)
    except KvernError as error:
        answer.error = error.message
    except TimeoutError:
        answer.error = f"no end after {target.timeout:g} s"
    answer.ended = time.perf_counter()
    return answer


async def _stream(target: Target, body: dict[str, Any], answer: Answer, hang_up_after: int | None) -> None:
    async with request(target.address, "POST", CHAT, body, target.headers) as response:
        if response.status != 200:
            answer.error = str(response.status)
            return
        last, events = 0.0, 0
        async for data in response.events():
            if data == "[DONE]":
                break
            text = _take(data, answer)
            if answer.error is not None:
                return
            if text:
                now = time.perf_counter()
                if answer.first is None:
                    answer.first = now
                else:
                    answer.gaps.append(now - last)
                last, events = now, events + 1
                if events == hang_up_after:
                    answer.hung_up = True
                    return
        answer.completion_tokens = answer.completion_tokens or events
        if answer.finish is None:
            answer.error = "the stream ended without a finish reason"


def _take(data: str, answer: Answer) -> str:
    """Note what an event says about usage, end and errors; return its text."""
    try:
        event = json.loads(data)
        if event.get("error"):
            answer.error = f"an error in the stream: {event['error'].get('message')}"
            return ""
        if usage := event.get("usage"):
            answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        choice = (event.get("choices") or [{}])[0]
        answer.finish = choice.get("finish_reason") or answer.finish
        return (choice.get("delta") or {}).get("content") or ""
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ProtocolError(f"not an event of a chat completion: {data[:100]!r}") from error


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds after the start at which `count` requests arrive; the first at 0. An infinite rate: all at once."""
    random_ = random.Random(f"{seed} {rate}")
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += random_.expovariate(rate) if rate != float("inf") else 0.0
    return times


def prompts(words: int, seed: int) -> Iterator[str]:
    """Different texts of so many words, the same ones for the same seed; no two share a prefix worth caching."""
    random_ = random.Random(seed)
    while True:
        yield " ".join(random_.choices(WORDS.split(), k=max(1, words)))


@dataclass(frozen=True)
class Ruler:
    """tokens of a prompt = fixed (the template) + words * per_word, as the server counts."""

    fixed: float
    per_word: float

    def words(self, tokens: int) -> int:
        """How many words make a prompt of about so many tokens; at least one."""
        return max(1, round((tokens - self.fixed) / self.per_word))


async def measure_prompts(target: Target) -> Ruler:
    """From the usage of two short answers; one token a word where the server sends none.

    Raises KvernError when the server does not answer them.
    """
    counts = []
    for words in RULER_WORDS:
        answer = await ask(target, next(prompts(words, words)), 1)
        if answer.error is not None:
            raise KvernError(f"{target.address} does not answer: {answer.error}")
        counts.append(answer.prompt_tokens)
    if counts[1] <= counts[0]:
        return Ruler(0, 1)
    per_word = (counts[1] - counts[0]) / (RULER_WORDS[1] - RULER_WORDS[0])
    return Ruler(counts[0] - RULER_WORDS[0] * per_word, per_word)


async def run_rate(target: Target, times: Sequence[float], texts: Iterator[str], max_tokens: int) -> list[Answer]:
    """Send one request at each of `times`, whatever became of the earlier ones; return when all have ended."""
    start = time.perf_counter() + 0.01

    async def one(at: float, text: str) -> Answer:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        return await ask(target, text, max_tokens, due=start + at)

    return await asyncio.gather(*(one(at, next(texts)) for at in times))


Percentiles = dict[str, float | None]


@dataclass(frozen=True)
class RateRow:
    """One request rate. Latencies in milliseconds as {p50, p90, p99}, of answers that are complete."""

    rate: float
    requests: int
    complete: int
    errors: dict[str, int]
    seconds: float
    requests_per_s: float
    tokens_per_s: float
    prompt_tokens: float
    completion_tokens: float
    time_to_first_token_ms: Percentiles
    inter_token_ms: Percentiles
    end_to_end_ms: Percentiles
    client_late_ms: float
    """The most that this client was late in sending; more than a few milliseconds: it was starved of a core."""


def summarise(rate: float, answers: Sequence[Answer]) -> RateRow:
    """The row of one rate."""
    done = [answer for answer in answers if answer.complete]
    seconds = max(answer.ended for answer in answers) - min(answer.due for answer in answers)
    return RateRow(
        rate=rate,
        requests=len(answers),
        complete=len(done),
        errors=dict(Counter(answer.error for answer in answers if answer.error is not None)),
        seconds=seconds,
        requests_per_s=len(done) / seconds,
        tokens_per_s=sum(answer.completion_tokens for answer in done) / seconds,
        prompt_tokens=_mean([answer.prompt_tokens for answer in done]),
        completion_tokens=_mean([answer.completion_tokens for answer in done]),
        time_to_first_token_ms=percentiles([answer.first - answer.due for answer in done if answer.first is not None]),
        inter_token_ms=percentiles([gap for answer in done for gap in answer.gaps]),
        end_to_end_ms=percentiles([answer.ended - answer.due for answer in done]),
        client_late_ms=1e3 * max(answer.sent - answer.due for answer in answers),
    )


def percentiles(seconds: Sequence[float]) -> Percentiles:
    """{p50, p90, p99} in milliseconds, linear between neighbours; None where nothing was measured."""
    ordered = sorted(seconds)

    def at(share: float) -> float | None:
        if not ordered:
            return None
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return 1e3 * (ordered[low] + (ordered[high] - ordered[low]) * (place - low))

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99)}


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0
