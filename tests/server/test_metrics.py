"""/metrics under vLLM's names, parsed with Prometheus' own parser."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.scripted import ScriptedEngine
from tests.server.serving import Serving, serving, wait_until

from kvern.engine import EngineSettings, Update
from kvern.llm import LLM
from kvern.server.metrics import Metrics

CHAT: dict[str, Any] = {"model": "tiny-v3", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


@pytest.fixture
def server(tiny_folder: Path) -> Iterator[Serving]:
    with serving(lambda: LLM(tiny_folder, engine=ScriptedEngine(pause=0.002))) as running:
        yield running


def read(server: Serving) -> dict[tuple[str, str], float]:
    """(sample, reason or bucket) -> value; every sample names the model."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny-v3"
            key = sample.labels.get("finished_reason") or sample.labels.get("le") or sample.labels.get("position") or ""
            found[sample.name, key] = sample.value
    return found


def test_the_engines_counters_are_told(server: Serving) -> None:
    metrics = read(server)
    expected = {
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
        "vllm:kv_cache_usage_perc": 0.4,
        "vllm:prefix_cache_queries_total": 30,
        "vllm:prefix_cache_hits_total": 20,
        "vllm:prompt_tokens_total": 50,
        "vllm:generation_tokens_total": 0,
        "vllm:num_preemptions_total": 1,
        "vllm:spec_decode_num_drafts_total": 4,
        "vllm:spec_decode_num_draft_tokens_total": 9,
        "vllm:spec_decode_num_accepted_tokens_total": 5,
    }
    assert {name: metrics[name, ""] for name in expected} == expected
    by_position = [metrics["vllm:spec_decode_num_accepted_tokens_per_pos_total", place] for place in ("0", "1", "2")]
    assert by_position == [3, 2, 0]
    assert [metrics["vllm:request_success_total", reason] for reason in ("stop", "length", "abort")] == [0, 0, 0]


def test_histograms_follow_requests(server: Serving) -> None:
    for stream in (True, False):
        httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "stream": stream})
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "max_tokens": 900}, timeout=0.2)
    wait_until(lambda: read(server)["vllm:request_success_total", "abort"] == 1)
    metrics = read(server)
    assert metrics["vllm:time_to_first_token_seconds_count", ""] == 3
    assert metrics["vllm:inter_token_latency_seconds_count", ""] > 8
    assert metrics["vllm:e2e_request_latency_seconds_count", ""] == 2
    assert metrics["vllm:e2e_request_latency_seconds_sum", ""] > 2 * 5 * 0.002
    assert metrics["vllm:request_success_total", "length"] == 2


def test_the_queue_time_ends_where_the_first_step_begins(tiny_folder: Path) -> None:
    """With one place, the second of two waits for all of the first."""
    settings = EngineSettings(max_running=1, cache_tokens=1024)
    with serving(lambda: LLM(tiny_folder, settings=settings)) as running:
        httpx.post(f"{running.url}/v1/chat/completions", json={**CHAT, "n": 2, "max_tokens": 40, "ignore_eos": True})
        metrics = read(running)
    assert metrics["vllm:request_queue_time_seconds_count", ""] == 2
    queued, first = (metrics[f"vllm:{name}_seconds_sum", ""] for name in ("request_queue_time", "time_to_first_token"))
    assert 0 < queued < first
    assert queued > 0.4 * metrics["vllm:e2e_request_latency_seconds_sum", ""] / 3


def test_a_request_that_never_ran_has_no_queue_time() -> None:
    metrics = Metrics()
    for number, started in ((0, None), (1, time.monotonic() + 2)):
        metrics.submitted(number)
        metrics.updated(Update(number, finish="cancelled", started=started), time.monotonic() + 3)
    lines = metrics.render().decode().splitlines()
    (count,) = (line for line in lines if line.startswith("vllm:request_queue_time_seconds_count"))
    (total,) = (line for line in lines if line.startswith("vllm:request_queue_time_seconds_sum"))
    assert float(count.split()[-1]) == 1
    assert float(total.split()[-1]) == pytest.approx(2, abs=0.1)


def test_each_application_counts_for_itself(tiny_folder: Path, server: Serving) -> None:
    httpx.post(f"{server.url}/v1/chat/completions", json=CHAT)
    with serving(lambda: LLM(tiny_folder, engine=ScriptedEngine())) as other:
        assert ("vllm:time_to_first_token_seconds_count", "") not in read(other)
    assert read(server)["vllm:time_to_first_token_seconds_count", ""] == 1


def test_the_cache_on_disk_tells_what_it_did(tiny_folder: Path, tmp_path: Path) -> None:
    settings = EngineSettings(cache_tokens=1024, cache_dir=tmp_path)
    asked = {"model": "tiny-v3", "prompt": [65] * 40, "max_tokens": 1}
    cached, told = [], []
    for _ in range(2):
        with serving(lambda: LLM(tiny_folder, settings=settings)) as running:
            answer = httpx.post(f"{running.url}/v1/completions", json=asked).json()
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            told.append(read(running))
    assert cached == [0, 32]
    assert told[1]["vllm:external_prefix_cache_queries_total", ""] == 32
    assert told[1]["vllm:external_prefix_cache_hits_total", ""] == 32
    assert told[1]["vllm:prefix_cache_hits_total", ""] == 32
    assert told[1]["kvern:disk_cache_blocks", ""] == 2
    assert told[1]["kvern:disk_cache_bytes", ""] == sum(
        -(-path.stat().st_size // 4096) * 4096 for path in (tmp_path / "rows").rglob("*") if path.is_file()
    )
    numbers = 32 * 2 * 24
    assert told[1]["kvern:disk_cache_read_bytes_total", ""] in (2 * numbers, 4 * numbers)
    for name in ("written_bytes", "evicted_blocks", "corrupt_blocks", "failures"):
        assert told[1][f"kvern:disk_cache_{name}_total", ""] == 0
