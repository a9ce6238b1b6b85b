"""Engines with a tiny cache in memory and one on the disk: every answer is the one it has alone, whatever happens.

A case is several lives of a server over one folder. Between two lives it was stopped or killed, and the folder may have
been damaged.
"""

from __future__ import annotations

import errno
import logging
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.test_properties import BASES, KINDS, Job, alone, same_prefix, served
from tests.tiny import tiny_config, tiny_model

from kvern.engine import Engine, EngineSettings, SamplingParams, Update, spill
from kvern.engine.disk_cache import HEADER, PAGE, DiskCache
from kvern.engine.runner import Computed, Runner
from kvern.engine.scheduler import Chunk
from kvern.errors import ConfigError
from kvern.model import PackedTransformer
from kvern.model.packed import PackedNow
from kvern.ops import packed

SIZE = 4
CHOSEN = EngineSettings(max_context=40, cache_tokens=48, block_size=SIZE, step_tokens=8, max_running=3)
CHOSEN = replace(CHOSEN, check_every_step=True, cache_disk_bytes=30 * PAGE)
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(folder: Path, identity: str = "tiny", **changes: Any) -> Engine:
    return Engine(served(), settings=replace(CHOSEN, cache_dir=folder, **changes), identity=identity)


def records(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "rows").rglob("*") if path.is_file())


def run(engine: Engine, jobs: Sequence[Job]) -> list[list[Update]]:
    """All updates of each job; they arrive and are cancelled as they say."""
    ids: dict[int, int] = {}
    updates: dict[int, list[Update]] = {}
    deadline, step = time.monotonic() + 60, 0
    while len(ids) < len(jobs) or engine.has_work():
        assert time.monotonic() < deadline, "somebody starves"
        for index, job in enumerate(jobs):
            if job.arrives == step:
                ids[index] = engine.add(job.prompt, job.params, priority=job.priority, salt=job.salt)
                updates[ids[index]] = []
            if index in ids and job.cancelled is not None and job.arrives + job.cancelled == step:
                engine.cancel(ids[index])
        for update in engine.step():
            updates[update.request_id].append(update)
        step += 1
    return [updates[ids[index]] for index in range(len(jobs))]


def judge(jobs: Sequence[Job], told: Sequence[Sequence[Update]], before: Sequence[Job]) -> None:
    """`before`: the jobs of all lives up to here, these included."""
    for job, updates in zip(jobs, told, strict=True):
        answer, reason = alone(job.prompt, job.params, 40)
        got = tuple(token for update in updates for token in update.tokens)
        if updates[-1].finish == "cancelled":
            assert job.cancelled is not None
            assert got == answer[: len(got)]
        else:
            assert (got, updates[-1].finish) == (answer, reason)
        shared = [
            same_prefix(job.prompt, (*other.prompt, *alone(other.prompt, other.params, 40)[0]))
            for other in before
            if other.salt == job.salt
        ]
        cached = updates[0].cached_tokens
        assert cached % SIZE == 0
        assert cached <= min(len(job.prompt) - 1, max(shared))


def damage(folder: Path, how: str, chance: random.Random) -> None:
    """What a kill, a power failure or a bad disk may leave."""
    found = records(folder)
    for path in chance.sample(found, len(found) // 3):
        content = bytearray(path.read_bytes())
        if how == "flipped":
            for _ in range(chance.randint(1, 3)):
                content[chance.randrange(len(content))] ^= chance.randint(1, 255)
        elif how == "cut":
            del content[chance.randrange(len(content)) :]
        elif how == "swapped":
            content = bytearray(chance.choice(found).read_bytes())
        elif how == "killed":
            path.with_name(f"{path.name}.part").write_bytes(content[: chance.randrange(len(content))])
        elif how == "gone":
            path.unlink()
            continue
        path.write_bytes(content)


DAMAGES = ("none", "none", "flipped", "cut", "swapped", "killed", "gone")


@dataclass
class Life:
    """Jobs, then an end: stopped in order or at once, with or without anything having been written, and damage."""

    jobs: list[Job]
    killed: bool
    damage: str
    disk_blocks: int


@st.composite
def lives(draw: st.DrawFn) -> list[Life]:
    def job() -> Job:
        kind = draw(st.sampled_from(KINDS))
        return Job(
            prompt=draw(st.sampled_from(BASES[:2]))[: draw(st.integers(1, 34))] + draw(st.sampled_from([(), (8,)])),
            params=replace(kind, max_tokens=draw(st.integers(1, 5))),
            arrives=draw(st.integers(0, 8)),
            priority=draw(st.sampled_from([0, 0, 1])),
            salt=draw(st.sampled_from([b"", b"", b"other"])),
            cancelled=draw(st.sampled_from([None, None, None, 0, 3])),
        )

    return [
        Life(
            jobs=[job() for _ in range(draw(st.integers(1, 5)))],
            killed=draw(st.booleans()),
            damage=draw(st.sampled_from(DAMAGES)),
            disk_blocks=draw(st.sampled_from([1, 4, 30, 30])),
        )
        for _ in range(draw(st.integers(2, 4)))
    ]


def live(case: Sequence[Life], folder: Path) -> None:
    before: list[Job] = []
    for number, life in enumerate(case):
        engine = start(folder, cache_disk_bytes=life.disk_blocks * PAGE)
        before += life.jobs
        judge(life.jobs, run(engine, life.jobs), before)
        assert engine.spill is not None
        if life.killed:
            with engine.spill.disk.lock:
                engine.spill._writing.pending.clear()
                engine.spill._writing.touched.clear()
        engine.close()
        found = records(folder)
        assert all(path.stat().st_size < PAGE for path in found)
        assert len(found) <= life.disk_blocks
        damage(folder, life.damage, random.Random(number))


@settings(max_examples=60)
@given(lives())
def test_answers_are_the_same_through_every_life(case: list[Life]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        live(case, Path(folder))


@pytest.mark.slow
@settings(max_examples=1000)
@given(lives())
def test_answers_are_the_same_through_every_life_many_times(case: list[Life]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        live(case, Path(folder))


def once(engine: Engine, prompt: Sequence[int] = BASES[0][:30], salt: bytes = b"") -> int:
    """Answer one prompt, check the answer and return its cached tokens."""
    told = run(engine, [Job(tuple(prompt), GREEDY, salt=salt)])[0]
    assert tuple(token for update in told for token in update.tokens) == alone(tuple(prompt), GREEDY, 40)[0]
    return told[0].cached_tokens


def lived(folder: Path, **changes: Any) -> Path:
    """A folder after one life with one prompt of 30 tokens."""
    engine = start(folder, **changes)
    assert once(engine) == 0
    engine.close()
    return folder


def test_a_prefix_survives_a_restart_and_counts_as_cached(tmp_path: Path) -> None:
    engine = start(lived(tmp_path))
    assert once(engine) == 28
    stats = engine.stats()
    assert stats.disk is not None
    assert (stats.disk.queries, stats.disk.hits, stats.prefix_hits) == (28, 28, 28)
    assert (stats.disk.read_bytes, stats.disk.written_bytes) == (7 * SIZE * 2 * 24 * 4, 0)
    assert stats.cache_blocks_used == 0


def test_what_memory_evicted_comes_back_from_the_disk(tmp_path: Path) -> None:
    engine = start(tmp_path, cache_disk_bytes=100 * PAGE)
    assert [once(engine, base[:34]) for base in BASES] == [0, 0, 0]
    assert engine.spill is not None
    assert engine.spill.flush()
    assert [once(engine, base[:34]) for base in BASES] == [32, 32, 32]


def test_another_salt_finds_nothing(tmp_path: Path) -> None:
    engine = start(lived(tmp_path))
    assert once(engine, salt=b"other") == 0
    assert once(engine, salt=b"") == 28


@pytest.mark.parametrize("changes", [{"identity": "other weights"}, {"block_size": 2}])
def test_what_makes_rows_right_is_in_their_names(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert once(start(lived(tmp_path), **changes)) == 0


def test_other_kernels_find_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lived(tmp_path)
    monkeypatch.setattr("kvern.ops.library.isa", lambda: "another")
    assert once(start(tmp_path)) == 0


def test_a_damaged_block_ends_the_prefix_and_is_written_again(tmp_path: Path) -> None:
    lived(tmp_path)
    engine = start(tmp_path)
    assert engine.spill is not None
    hashes = engine.blocks.hashes(BASES[0][:30], b"", [])
    name = engine.spill._name(hashes[3])
    path = tmp_path / "rows" / name[:2] / name
    content = bytearray(path.read_bytes())
    content[HEADER.size + 9] ^= 1
    path.write_bytes(content)
    assert once(engine) == 12
    assert engine.spill.stats().corrupt == 1
    engine.close()
    assert once(start(tmp_path)) == 28


def test_records_of_an_fp8_cache_are_kept_apart_and_give_the_same_tokens(tmp_path: Path) -> None:
    lived(tmp_path)
    told = []
    for _ in range(2):
        engine = start(tmp_path, cache_dtype="fp8")
        updates = run(engine, [Job(BASES[0][:30], GREEDY)])[0]
        told.append((tuple(token for update in updates for token in update.tokens), updates[0].cached_tokens))
        engine.close()
    assert [cached for _, cached in told] == [0, 28]
    assert told[0][0] == told[1][0]


class NaNRunner(Runner):
    """Gives NaN for all logits from a step on."""

    steps = 0

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Computed:
        computed = super().run(chunks)
        self.steps -= 1
        if self.steps <= 0:
            computed.logits.fill_(torch.nan)
        return computed


def test_blocks_of_a_request_that_failed_are_found_by_nobody(tmp_path: Path) -> None:
    engine = start(tmp_path)
    runner = NaNRunner(engine.model, engine.cache)
    runner.steps, engine.runner = 5, runner
    told = run(engine, [Job(BASES[0][:30], GREEDY)])[0]
    assert told[-1].finish == "error"
    engine.close()
    assert records(tmp_path) == []


def test_a_full_queue_leaves_no_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "QUEUE_BYTES", 1)
    put, gate = DiskCache.put, threading.Event()

    def slow(*args: Any) -> bool:
        assert gate.wait(30)
        return put(*args)

    monkeypatch.setattr(DiskCache, "put", slow)
    engine = start(tmp_path)
    assert once(engine) == 0
    gate.set()
    engine.close()
    written = len(records(tmp_path))  # one that the writer had, and one in the queue if the writer was quick
    assert written in (1, 2)
    assert once(start(tmp_path)) == 4 * written


def test_a_full_disk_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    engine = start(tmp_path)
    with monkeypatch.context() as context, caplog.at_level(logging.WARNING):
        context.setattr("kvern.engine.disk_cache._write", full)
        assert once(engine) == 0
        assert engine.spill is not None
        assert engine.spill.flush()
    assert engine.spill.stats().failures == 1
    assert [record.message for record in caplog.records if "No space left" in record.message]
    assert once(engine) == 28  # from memory
    assert records(tmp_path) == []
    engine.spill._writing.retry_at = 0.0
    assert once(engine) == 28
    assert engine.spill.flush()
    assert records(tmp_path) != []


def test_a_folder_that_cannot_be_used_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert once(start(tmp_path / "file" / "cache")) == 0
    assert "there is no prefix cache on disk" in caplog.text
    assert start(tmp_path / "file" / "cache").stats().disk is None


def test_a_folder_in_use_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = start(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert start(tmp_path).stats().disk is None
    assert "another process uses the folder" in caplog.text
    first.close()


def held_reads(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """From now on reads from the disk wait until the event is set."""
    gate, read = threading.Event(), DiskCache.read

    def held(*args: Any) -> Any:
        assert gate.wait(30)
        return read(*args)

    monkeypatch.setattr(DiskCache, "read", held)
    return gate


def test_a_disk_that_does_not_answer_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lived(tmp_path)
    gate = held_reads(monkeypatch)
    monkeypatch.setattr(spill, "PATIENCE_SECONDS", 0.1)
    engine = start(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert once(engine) == 0
    assert "does not answer" in caplog.text
    gate.set()
    assert once(engine) == 28
    engine.close()


def test_a_fault_while_a_prefix_is_read_leaves_sound_books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lived(tmp_path)
    gate = held_reads(monkeypatch)
    engine = start(tmp_path)
    engine.add(BASES[0][:30], GREEDY)
    assert engine.step() == []
    assert engine.stats().cache_blocks_used == 7
    engine.reset()
    assert engine.stats().cache_blocks_used == 0
    gate.set()
    assert [once(engine, base[:30]) for base in (BASES[1], BASES[0])] == [0, 28]
    engine.check()


def test_others_run_while_a_prefix_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lived(tmp_path)
    gate = held_reads(monkeypatch)
    engine = start(tmp_path, cache_tokens=400)
    first, second = engine.add(BASES[0][:30], GREEDY), engine.add(BASES[1][:5], GREEDY)
    told = [update for _ in range(12) for update in engine.step()]
    assert {update.request_id for update in told} == {second}
    assert told[-1].finish == "length"
    gate.set()
    told = []
    while engine.has_work():
        told += engine.step()
    assert {update.request_id for update in told} == {first}
    assert told[0].cached_tokens == 28


def test_rows_of_the_mtp_layer_are_kept_with_the_others(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=48, max_position_embeddings=64, eos_token_id=(7,), num_nextn_predict_layers=1)
    model = tiny_model(config)
    chosen = replace(CHOSEN, drafts="mtp", cache_dir=tmp_path)
    told = []
    for _ in range(2):
        served = PackedTransformer(model, PackedNow()) if packed.available() else model
        engine = Engine(served, settings=chosen, identity="mtp")
        updates = run(engine, [Job(BASES[0][:30], replace(GREEDY, max_tokens=8))])[0]
        told.append((tuple(t for u in updates for t in u.tokens), updates[0].cached_tokens))
        engine.close()
    assert told[0][0] == told[1][0]
    assert [cached for _, cached in told] == [0, 28]


@pytest.mark.parametrize(
    ("changes", "identity", "message"),
    [
        ({}, "", "needs to know which weights"),
        ({"cache_disk_bytes": 100}, "tiny", "holds not one block of 4096 bytes"),
        ({"prefix_caching": False}, "tiny", "prefix_caching is off"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, Any], identity: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start(tmp_path, identity, **changes)


def test_an_engine_that_is_dropped_ends_its_threads_and_frees_the_folder(tmp_path: Path) -> None:
    engine = start(tmp_path)
    assert once(engine) == 0
    del engine
    assert not [thread for thread in threading.enumerate() if thread.name in ("kvern-spill", "kvern-prefetch")]
    shutil.rmtree(tmp_path)
