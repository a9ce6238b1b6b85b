"""`kvern bench`: its rows in every form, its errors, and that it asks nobody who was not named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.bench.chat_server import Reply, answer, chat_server, head

from kvern.bench import engine, tables
from kvern.cli import main

ENGINE_KEYS = {
    "test", "tokens", "batch", "depth", "tokens_per_s", "bytes_per_token", "gb_per_s", "bandwidth_share", "stages",
}  # fmt: skip
SMALL = ("--prompt", "16", "--decode", "4", "--depth", "0,32", "--batch", "1,2", "--dtype", "f32")


@pytest.fixture(autouse=True)
def _short_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "READ_ROUNDS", 1)
    monkeypatch.setattr(engine.read_gb_s, "__defaults__", (1_000_000,))


def test_engine_rows_as_json(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", str(tiny_folder), *SMALL, "--json", "--stages"]) == 0
    out, err = capsys.readouterr()
    rows: list[dict[str, Any]] = json.loads(out)
    assert [(row["test"], row["batch"], row["depth"]) for row in rows] == [
        ("prefill", 1, 0), ("prefill", 1, 32), ("decode", 1, 0), ("decode", 1, 32), ("decode", 2, 0), ("decode", 2, 32),
    ]  # fmt: skip
    assert all(set(row) == ENGINE_KEYS for row in rows)
    assert all(row["tokens_per_s"] > 0 and row["bandwidth_share"] > 0 for row in rows)
    assert set(rows[0]["stages"]) == {"embedding", "attention", "feed_forward", "head", "sampling", "rest"}
    assert "kernels" in err
    assert "6/6: decode 4, batch 2, depth 32: " in err


def test_engine_rows_as_text_and_chart(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = tmp_path / "engine.png"
    assert main(["bench", "engine", str(tiny_folder), *SMALL, "--png", str(chart)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["test", "tokens", "batch", "depth", "tokens/s", "MB/token", "GB/s", "of", "read"]
    assert len(out) == 7
    assert len({len(line) for line in out}) == 1
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_a_terminal_gets_a_rich_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    tables.show((["test", "rate"], [["decode", "1.5"]]))
    assert capsys.readouterr().out.split() == ["test", "rate", "decode", "1.5"]


def test_cases_that_do_not_fit_are_named(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--prompt", "16", "--decode", "4", "--batch", "1", "--dtype", "f32")
    assert main(["bench", "engine", str(tiny_folder), *words, "--depth", "0,4096", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [row["depth"] for row in json.loads(out)] == [0, 0]
    assert "left out: decode 4, batch 1, depth 4096: needs a context of 4108 tokens, the model has 256" in err
    assert main(["bench", "engine", str(tiny_folder), *words, "--depth", "4096"]) == 1
    assert "error: no case can run here" in capsys.readouterr().err


def test_serve_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return answer(3, prompt_tokens=10 + len(body["messages"][0]["content"].split()), pause=0.002)

    words = ["--rates", "40,inf", "--requests", "6", "--prompt-tokens", "30"]
    with chat_server(reply) as url:
        assert main(["bench", "serve", url, *words, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        chart = tmp_path / "serve.png"
        assert main(["bench", "serve", f"{url}/v1", *words, "--png", str(chart)]) == 0
    out, err = capsys.readouterr()
    assert [(row["rate"], row["complete"], row["errors"]) for row in rows] == [(40, 6, {}), (None, 6, {})]
    assert (rows[0]["prompt_tokens"], rows[0]["completion_tokens"]) == (30, 3)
    assert set(rows[0]["inter_token_ms"]) == {"p50", "p90", "p99"}
    assert rows[0]["time_to_first_token_ms"]["p50"] < rows[0]["end_to_end_ms"]["p50"]
    assert out.splitlines()[1].split()[:2] == ["40", "6/6"]
    assert "40 requests/s: 6 of 6 complete" in err
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_serve_counts_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[int] = []

    def reply(body: dict[str, Any]) -> Reply:
        asked.append(body["max_tokens"])
        return answer(1, 5) if len(asked) <= 2 else [head("429 Busy", "Content-Length: 0")]

    with chat_server(reply) as url:
        assert main(["bench", "serve", url, "--rates", "inf", "--requests", "3", "--max-tokens", "5"]) == 1
    assert asked == [1, 1, 5, 5, 5]
    assert (
        "no request was answered\n\nhint: the server's own log tells more; errors: {'429': 3}"
        in capsys.readouterr().err
    )


def test_a_key_goes_with_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvern.bench import load

    seen: list[dict[str, str]] = []

    async def find(address: object, model: object, headers: dict[str, str], **_: object) -> load.Target:
        seen.append(headers)
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "find_target", find)
    monkeypatch.setenv("KVERN_API_KEY", "sk-1")
    assert main(["bench", "serve", "http://127.0.0.1:1"]) == 130
    assert seen == [{"Authorization": "Bearer sk-1"}]


@pytest.mark.parametrize(
    ("argv", "code", "error"),
    [
        (["serve", "http://models.example.org"], 1, "models.example.org is not this machine\n\nhint: --allow-remote"),
        (["serve", "here"], 1, "'here' is no URL"),
        (["serve", "http://127.0.0.1:9", "--rates", "0"], 2, "argument --rates: '0' are no positive rates"),
        (["serve", "http://127.0.0.1:9", "--rates", "nan"], 2, "argument --rates: 'nan' are no positive rates"),
        (["engine", "m", "--batch", "0,1"], 2, "argument --batch: '0' is no whole number from 1 on"),
        (["engine", "m", "--depth", "1e3"], 2, "argument --depth: '1e3' is no whole number from 0 on"),
        (["engine", "no-such-model"], 1, "no-such-model"),
        (["engine", "m", "--png", "chart.jpg"], 2, "chart.jpg is no .png file"),
        (["engine", "m", "--png", "no/such/folder/chart.png"], 2, "no/such/folder is no folder"),
        (["engin"], 2, "invalid choice: 'engin'"),
        ([], 2, "engine|serve"),
    ],
)
def test_wrong_calls(argv: list[str], code: int, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert error in err


def test_a_chart_without_matplotlib_is_refused_before_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "engine", "m", "--png", "chart.png"]) == 2
    assert "a chart needs matplotlib\n\nhint: pip install 'kvern[bench]'" in capsys.readouterr().err
