"""`kvern batch run`: from a file to a file, here or at a URL, killed and called again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.scripted import ScriptedEngine
from tests.server.serving import serving, wait_until

from kvern.cli import main
from kvern.llm import LLM
from kvern.store import Store, batch_rows, batches

URL = "/v1/completions"


def line(custom_id: str, prompt: str = "hi", **body: Any) -> dict[str, Any]:
    asked = {"model": "tiny-v3", "max_tokens": 6, "temperature": 0, "prompt": prompt, **body}
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": asked}


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", [line(f"row {n}", f"{'once upon a time ' * (n % 3)}{n}") for n in range(20)])


def check(target: Path, folder: Path) -> None:
    """What `source` asks for is in `target`, in order, and nothing else is left beside it."""
    prompts = [f"{'once upon a time ' * (n % 3)}{n}" for n in range(20)]
    expected = LLM(folder, dtype="f32", threads=1).generate(prompts, max_tokens=6, temperature=0)
    rows = read(target)
    assert [row["custom_id"] for row in rows] == [f"row {n}" for n in range(20)]
    assert [row["response"]["body"]["choices"][0]["text"] for row in rows] == [one.text for one in expected]
    assert sorted(path.name for path in target.parent.glob("out*")) == [target.name]


def test_in_this_process(source: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.with_name("out.jsonl")
    here = ["--model", str(tiny_folder), "--threads", "1", "--dtype", "f32"]
    assert main(["batch", "run", str(source), str(target), *here]) == 0
    check(target, tiny_folder)
    err = capsys.readouterr().err
    assert "rows: 20 of 20 (100 %)" in err
    assert f"{target}: 20 answered, 0 failed; " in err


def test_at_a_url(source: Path, tiny_folder: Path) -> None:
    target = source.with_name("out.jsonl")
    with serving(lambda: LLM(tiny_folder, dtype="f32", threads=1)) as server:
        assert main(["batch", "run", str(source), str(target), "--url", server.url, "--parallel", "4"]) == 0
    check(target, tiny_folder)


def test_rows_that_fail_keep_their_place(tmp_path: Path, tiny_folder: Path) -> None:
    source, target = write(tmp_path / "in", [line("a"), line("b", temperature=9), line("c")]), tmp_path / "out"
    with serving(lambda: LLM(tiny_folder, engine=ScriptedEngine())) as server:
        assert main(["batch", "run", str(source), str(target), "--url", server.url]) == 1
    assert [row["response"]["status_code"] for row in read(target)] == [200, 400, 200]


def test_a_run_that_is_killed_goes_on(source: Path, tiny_folder: Path) -> None:
    """Killed over a slow server, twice; what was done is not asked for again."""
    target, engine = source.with_name("out.jsonl"), ScriptedEngine(pause=0.05)
    with serving(lambda: LLM(tiny_folder, engine=engine)) as server:
        argv = [sys.executable, "-m", "kvern", "batch", "run", str(source), str(target), "--url", server.url]
        for goal in (4, 11):
            with subprocess.Popen([*argv, "--parallel", "2"], stderr=subprocess.DEVNULL) as process:
                wait_until(lambda goal=goal: done(target) >= goal, seconds=60)  # type: ignore[misc]
                process.send_signal(signal.SIGKILL)
        assert not target.exists()
        finished = done(target)
        before = len(engine.asked)
        engine.pause = 0.0
        again = subprocess.run(argv, check=True, stderr=subprocess.PIPE, text=True)
        assert len(engine.asked) - before == 20 - finished
    assert f"going on: {finished} of 20 rows are done" in again.stderr
    assert [row["custom_id"] for row in read(target)] == [f"row {n}" for n in range(20)]
    assert sorted(path.name for path in target.parent.glob("out*")) == ["out.jsonl"]


def done(target: Path) -> int:
    """Rows that are on the disk."""
    if not (path := target.with_name(f"{target.name}.progress")).exists():
        return 0
    store = Store(path)
    with store.read() as connection:
        made = batches.page(connection, "", after=None, limit=1)
        count = len(batch_rows.results(connection, made[0].id, ["output", "error"])) if made else 0
    store.close()
    return count


def test_a_store_that_is_kept_answers_again(
    source: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = source.with_name("kept.sqlite")
    with serving(lambda: LLM(tiny_folder, dtype="f32", threads=1)) as server:
        for name in ("out1", "out2", "out1"):
            argv = [
                "batch",
                "run",
                str(source),
                str(source.with_name(name)),
                "--url",
                server.url,
                "--store",
                str(store),
            ]
            assert main(argv) == 0
    err = capsys.readouterr().err
    assert "out2: 20 answered, 20 of them known already" in err
    assert err.count("out1: 20 answered, 0 failed") == 2
    texts = [[row["response"]["body"]["choices"] for row in read(source.with_name(name))] for name in ("out1", "out2")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("lines", "says", "code"),
    [
        ([], "has no line", 2),
        (["", " "], "has no line", 2),
        (["{"], "the first line is no request", 2),
        (["[]"], "the first line is no request", 2),
        ([{**line("a"), "url": "/v1/embeddings"}], "no batches for '/v1/embeddings'", 2),
        ([line("a"), line("b"), line("a")], "line 3: custom_id is that of line 1 already", 2),
        ([line("a"), "{", *(["["] * 30)], "line 2: this line is no JSON object", 2),
    ],
)
def test_inputs_that_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[Any], says: str, code: int
) -> None:
    source = write(tmp_path / "in", lines)
    assert main(["batch", "run", str(source), str(tmp_path / "out"), "--url", "http://127.0.0.1:1"]) == code
    err = capsys.readouterr().err
    assert says in err
    assert len(err.splitlines()) < 30
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_arguments_that_do_not_fit(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(source.with_name("out"))
    for argv, says in (
        ([str(source), out, "--parallel", "0"], "--parallel must be at least 1"),
        ([str(source), "/none/out"], "there is no folder /none"),
        ([str(source), out, "--url", "http://x", "--threads", "1"], "not with --url"),
        ([str(source), out, "--url", "x"], "'x' is no URL"),
        (["/none", out], "/none: No such file or directory"),
        ([str(source), out], "tiny-v3"),
    ):
        assert main(["batch", "run", *argv]) in (1, 2)
        assert says in capsys.readouterr().err


def test_the_progress_of_another_input_is_left_alone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, other = tmp_path / "out", write(tmp_path / "other", [line("x")])
    progress = Store(tmp_path / "out.progress")
    with progress.write() as connection:
        batches.add(connection, batches.Batch("batch_x", "", "kvern batch run", URL, "file-x", "", 0))
    progress.close()
    assert main(["batch", "run", str(other), str(target), "--url", "http://127.0.0.1:1"]) == 2
    assert "is the progress of another input" in capsys.readouterr().err


def test_one_process_writes_an_output(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    store = Store(tmp_path / "out.progress")
    release = store.claim(f"batch run {target}")
    assert release is not None
    assert main(["batch", "run", str(source), str(target), "--url", "http://127.0.0.1:1"]) == 1
    assert "another process works on" in capsys.readouterr().err
    release()
    store.close()


def test_a_server_that_is_gone_or_wants_a_key(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvern.jobs.http_asking.PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("kvern.jobs.http_asking.PATIENCE_SECONDS", 0.2)
    begun = time.monotonic()
    assert main(["batch", "run", str(source), str(tmp_path / "out"), "--url", "http://127.0.0.1:1"]) == 1
    assert time.monotonic() - begun < 10
    err = capsys.readouterr().err
    assert "nobody answers at http://127.0.0.1:1/v1" in err
    assert "what is done stays done" in err
