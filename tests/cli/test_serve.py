"""`kvern serve` as a process: from the banner to the signal, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.cli.test_main import kvern
from tests.tiny import CONTEXT

from kvern.cli import main, serve
from kvern.cli.serve import banner, check_memory, engine_settings
from kvern.config import ModelConfig
from kvern.errors import ConfigError, NotEnoughMemoryError
from kvern.plan import hardware, numa
from kvern.plan.memory import account
from kvern.settings import ServeSettings


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_until_a_signal(tiny_folder: Path, number: signal.Signals) -> None:
    argv = [sys.executable, "-m", "kvern", "serve", str(tiny_folder), "--port", "0", "--max-context", "64"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            first = process.stdout.readline()
            match = re.fullmatch(r"tiny-v3 is ready on (http://127\.0\.0\.1:\d+)/v1 .*\n", first)
            assert match is not None, process.stderr.read()
            assert httpx.get(f"{match[1]}/ready").status_code == 200
            assert httpx.get(f"{match[1]}/v1/models").json()["data"][0]["max_model_len"] == 64
        finally:
            process.send_signal(number)
        assert process.wait(20) == 0
        assert process.stderr.read().startswith("memory: 0.00 GiB weights + 0.00 GiB cache for 64 tokens = ")


def test_requests_are_logged_when_asked_for(tiny_folder: Path) -> None:
    for flags, expected in (["--access-log"], 1), ([], 0):
        argv = [sys.executable, "-m", "kvern", "serve", str(tiny_folder), "--port", "0", *flags]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            match = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert match is not None
            httpx.get(f"{match[0]}/v1/nothing")
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            assert process.stderr.read().count('"GET /v1/nothing HTTP/1.1" 404') == expected


def test_the_banner_can_be_pasted() -> None:
    command = banner("http://127.0.0.1:1", "m").split("Try:\n\n")[1].replace("\\\n", " ")
    program, url, *_, body = shlex.split(command)
    assert (program, url) == ("curl", "http://127.0.0.1:1/v1/chat/completions")
    assert json.loads(body)["model"] == "m"


def test_a_port_in_use_is_explained(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tiny_folder), "--port", str(port)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: port {port} of 127.0.0.1 is in use\n\nhint: another program listens there")


def test_a_model_that_was_not_pulled_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVERN_CACHE", str(tmp_path))
    assert main(["serve", "--port", "0"]) == 1
    assert capsys.readouterr().err == "error: coder-0.5b has not been pulled\n\nhint: run `kvern pull coder-0.5b`\n"


def test_a_damaged_model_ends_the_process(tiny_folder: Path, tmp_path: Path) -> None:
    for file in tiny_folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:-8] if file.suffix == ".safetensors" else content)
    done = kvern("serve", str(tmp_path), "--port", "0")
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert ".safetensors" in done.stderr


@pytest.mark.parametrize(
    ("tokens", "hint"), [(100, "--max-context 100 would fit"), (0, "a machine with more memory, or a smaller model")]
)
def test_what_cannot_fit_is_refused_with_numbers(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, hint: str
) -> None:
    counted = account(ModelConfig.load(tiny_folder))
    available = counted.checkpoint_bytes + 2 * counted.cache_bytes(tokens)
    real = hardware.machine()
    monkeypatch.setattr(hardware, "machine", lambda: replace(real, memory_available=available))
    with pytest.raises(NotEnoughMemoryError, match=rf"cache for {CONTEXT} tokens = .* GiB available") as caught:
        check_memory(tiny_folder, ServeSettings(model="tiny-v3"))
    assert caught.value.hint == hint
    if tokens:
        assert f"for {tokens} tokens" in check_memory(tiny_folder, ServeSettings(model="tiny-v3", max_context=tokens))
        small = ServeSettings(model="tiny-v3", max_context=tokens * 192 // 76, cache_dtype="fp8")  # bytes: float32, FP8
        assert f"for {tokens * 192 // 76} tokens" in check_memory(tiny_folder, small)
        assert "for 90 tokens" in check_memory(tiny_folder, ServeSettings(model="tiny-v3", cache_tokens=90))


def test_settings_reach_the_engine() -> None:
    chosen = ServeSettings(
        max_context=100,
        cache_tokens=200,
        cache_dtype="fp8",
        step_tokens=30,
        max_running=8,
        max_waiting=5,
        prefix_caching=False,
        drafts="ngram",
        draft_tokens=3,
        cache_disk_bytes=10**9,
    )
    made = engine_settings(chosen)
    for name in chosen.model_fields_set:
        assert getattr(made, name) == getattr(chosen, name)
    assert engine_settings(ServeSettings(cache_dir="~/kept")).cache_dir == Path.home() / "kept"
    with pytest.raises(ConfigError, match="max_running 64 exceeds step_tokens 16"):
        engine_settings(ServeSettings(step_tokens=16))


def test_sigterm_lets_a_running_stream_end(tiny_folder: Path) -> None:
    argv = [sys.executable, "-m", "kvern", "serve", str(tiny_folder), "--port", "0", "--threads", "1"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        match = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert match is not None
        body = {"model": "tiny-v3", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{match[0]}/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert process.wait(20) == 0


def _settings(**values: Any) -> ServeSettings:
    return ServeSettings(model="m", **values)


def test_memory_is_spread_over_nodes_and_a_refusal_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([None, "the system refused: no"])
    monkeypatch.setattr(numa, "interleave", lambda nodes: next(answers))
    for node in (0, 1):
        folder = tmp_path / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "meminfo").write_text(f"Node {node} MemTotal: 5 kB\n")
    serve.spread_memory(_settings(), tmp_path)
    assert "memory nodes: 2, weights and cache are spread over all" in capsys.readouterr().err
    serve.spread_memory(_settings(), tmp_path)
    assert "one of them may hold everything: the system refused: no" in capsys.readouterr().err
    serve.spread_memory(_settings(numa="off"), tmp_path)
    serve.spread_memory(_settings(), tmp_path / "nowhere")
    assert capsys.readouterr().err == ""
