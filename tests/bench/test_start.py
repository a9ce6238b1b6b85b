"""bench.start: real starts of a tiny model, the table, and the medians."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import start
from kvern.ops import library

needs_kernels = pytest.mark.skipif(library.library() is None, reason="the kernels were not built")


@needs_kernels
def test_both_starts_are_measured_stage_by_stage(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start.main(["--model", str(tiny_folder), "--runs", "1"])
    out = capsys.readouterr().out
    stages = ["interpreter, torch", "kvern's imports", "tokenizer", "weights mapped", "engine", "first token", "all"]
    places = [out.index("\n" + stage) for stage in stages]
    assert places == sorted(places)
    assert "/ready" in out[places[-1] :]


def test_medians_are_taken_stage_by_stage() -> None:
    runs: list[start.Stages] = [{"a": (1.0, 5.0), "b": (9.0, 0.0)}, {"a": (3.0, 4.0), "b": (7.0, 0.0)}]
    runs.append({"a": (2.0, 9.0), "b": (8.0, 0.0)})
    assert start.medians(runs) == {"a": (2.0, 5.0), "b": (8.0, 0.0)}


def test_a_server_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="did not become ready"):
        start.start_server(str(tmp_path / "absent"))
