"""Twenty seconds of `bench.soak` against a tiny model, and that its verdict sees what can go wrong."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from bench.soak import Mix, Report, _client, _log_uniform, problems, soak
from tests.bench.chat_server import Reply, answer, chat_server, chunk, head, piece

from kvern.bench.load import Ruler, Target
from kvern.bench.raw_http import Address

FLAGS = ("--max-running", "24", "--max-waiting", "16", "--cache-tokens", "1024", "--dtype", "f32")
MIX = Mix(prompt=(40, 120), answer=(4, 48))


@pytest.mark.timeout(240)
def test_a_server_under_load_loses_nothing(tiny_folder: Path) -> None:
    report = soak(str(tiny_folder), FLAGS, clients=64, seconds=20, warm_up=5, mix=MIX, seed=0)
    assert problems(report) == []
    assert min(report.outcomes[what] for what in ("finished", "hung up", "refused")) > 10
    assert max(report.running) > 8
    assert report.preemptions > 0


def sound() -> Report:
    report = Report(clients=2, seconds=10, warm_up=2, outcomes=Counter({"finished": 5, "hung up": 2}), exit_code=0)
    report.memory = [(float(second), 400 << 20) for second in range(11)]
    report.afterwards = {"vllm:num_requests_running": 0.0}
    return report


def test_a_sound_report_has_no_problems() -> None:
    assert problems(sound()) == []


def test_every_defect_is_a_problem() -> None:
    leaking, lossy, busy, failed, idle = sound(), sound(), sound(), sound(), sound()
    leaking.memory = [(float(second), (400 + 10 * second) << 20) for second in range(11)]
    lossy.lost.append("500")
    busy.afterwards["vllm:num_requests_running"] = 1.0
    failed.exit_code = -9
    idle.outcomes.clear()
    assert problems(leaking) == ["memory grew from 420 to 500 MiB"]
    assert problems(lossy) == ["lost: 500"]
    assert problems(busy) == ["vllm:num_requests_running is 1 afterwards"]
    assert problems(failed) == ["the server ended with -9"]
    assert len(problems(idle)) == 2


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (answer(4, 3), "finished"),
        (answer(3, 3), "lost"),
        ([head("500 Oh", "Content-Length: 0")], "lost"),
        ([head("200 OK", "Transfer-Encoding: chunked"), chunk(piece("a"))], "lost"),
        ([head("429 Busy", "Content-Length: 0")], "refused"),
    ],
)
def test_what_counts_as_lost(reply: Reply, outcome: str) -> None:
    report = Report(clients=1, seconds=0.2, warm_up=0)
    with chat_server(lambda _: reply) as url:
        target = Target(Address.of(url), "m", timeout=5)
        asyncio.run(one_client(report, target, Mix(prompt=(1, 1), answer=(4, 4), hang_up=0)))
    assert set(report.outcomes) == {outcome}
    assert len(report.lost) == report.outcomes["lost"]


async def one_client(report: Report, target: Target, mix: Mix) -> None:

    await _client(report, target, Ruler(0, 1), mix, random.Random(0), time.monotonic() + 1, [])


def test_lengths_reach_both_bounds() -> None:
    random_ = random.Random(0)
    found = {_log_uniform(random_, (4, 9)) for _ in range(500)}
    assert found == set(range(4, 10))
