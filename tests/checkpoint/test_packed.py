"""The file of packed weights: written once, mapped afterwards, never trusted when it does not fit."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvern.checkpoint import packed as packed_file
from kvern.checkpoint.convert import convert
from kvern.checkpoint.load import load
from kvern.checkpoint.packed import FOOTER, MAGIC, packed_transformer
from kvern.errors import CheckpointError, KvernError
from kvern.model import ForwardBatch, MLAForm, PackedTransformer
from kvern.model.packed import PackedNow
from kvern.ops import packed

from .layout import tiny_config, write_folder

pytestmark = pytest.mark.skipif(not packed.available(), reason="the kernels were not built")

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
SCRIPT = Path(__file__).with_name("packing_processes.py")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that are packed during the test."""
    shapes: list[tuple[int, ...]] = []
    pack = packed.pack

    def counted(weight: torch.Tensor, *args: Any, **options: Any) -> packed.Packed:
        shapes.append(tuple(weight.shape))
        return pack(weight, *args, **options)

    monkeypatch.setattr(packed, "pack", counted)
    return shapes


def pack(folder: Path, *, mtp: bool = False) -> PackedTransformer:
    return packed_transformer(load(folder, mtp=mtp), folder)


def in_memory(folder: Path) -> PackedTransformer:
    return PackedTransformer(load(folder), PackedNow())


def bin_of(folder: Path) -> Path:
    return folder / f"packed-{packed.order()}.kvern"


def leftovers(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("packed-*") if file.suffix != ".kvern")


@torch.no_grad()
def logits(model: PackedTransformer) -> torch.Tensor:
    return model(ForwardBatch.of(IDS))


@pytest.fixture
def folder(copied: Callable[[Path], Path], tiny_folder: Path) -> Path:
    """A checkpoint of the test's own, not packed yet whatever other tests did with the original."""
    copy = copied(tiny_folder)
    for file in copy.glob("packed-*"):
        file.unlink()
    return copy


# --- written once


@pytest.mark.parametrize("name", ["tiny_folder", "tiny_bf16", "tiny_fp8"])
def test_the_first_use_writes_and_the_second_maps(
    name: str, request: pytest.FixtureRequest, copied: Callable[[Path], Path], made: list[tuple[int, ...]]
) -> None:
    folder = copied(request.getfixturevalue(name))
    first = logits(pack(folder))
    written = bin_of(folder).read_bytes()
    assert written.startswith(MAGIC)
    assert made
    made.clear()
    second = logits(pack(folder))
    assert not made
    assert torch.equal(first, second)
    assert torch.equal(first, logits(in_memory(folder)))
    assert bin_of(folder).read_bytes() == written
    assert not leftovers(folder)


def kept(folder: Path) -> dict[str, Any]:
    data = bin_of(folder).read_bytes()
    start, length, _ = FOOTER.unpack(data[-FOOTER.size :])
    weights: dict[str, Any] = json.loads(data[start : start + length])["weights"]
    return weights


def kinds(folder: Path) -> set[packed.Kind]:
    return {packed.Kind(entry["kind"]) for entry in kept(folder).values()}


def test_4_bit_weights_come_back_as_they_were(tiny_bf16: Path, tmp_path: Path) -> None:
    folder = tmp_path / "int4"
    convert(tiny_bf16, folder, dtype="int4", group_size=32)
    first, second = logits(pack(folder)), logits(pack(folder))
    assert packed.Kind.INT4 in kinds(folder)
    assert torch.equal(first, second)
    assert torch.equal(first, logits(in_memory(folder)))


@torch.no_grad()
def test_the_heads_of_kv_b_stay_4_bit_both_ways_round(tiny_bf16: Path, tmp_path: Path) -> None:
    folder = tmp_path / "int4"
    convert(tiny_bf16, folder, dtype="int4", group_size=32)
    model = load(folder, activation_dtype=torch.float32)
    for form in MLAForm:
        batch = ForwardBatch.of(IDS, form=form)
        got = packed_transformer(model, folder)(batch)
        torch.testing.assert_close(got, model(batch).float(), rtol=1e-3, atol=1e-3)
    entries, head = kept(folder), "model.layers.0.self_attn.kv_b_proj"
    wanted = {"values": packed.Kind.INT4, "keys": packed.Kind.INT4, "absorb": packed.Kind.INT4_TURNED}
    assert {part: entries[f"{head}.{part}.0"]["kind"] for part in wanted} == wanted


def test_selections_come_back_as_they_were(tiny_tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    tensors = dict(tiny_tensors)
    name = "model.layers.1.self_attn.q_b_proj.weight"
    chosen = torch.zeros_like(tensors[name])
    chosen[torch.arange(len(chosen)), torch.arange(len(chosen)) % chosen.shape[1]] = 0.5
    folder = write_folder(tmp_path / "picks", tiny_config(), {**tensors, name: chosen})
    first, second = logits(pack(folder)), logits(pack(folder))
    assert packed.Kind.PICKS in kinds(folder)
    assert torch.equal(first, second)
    assert torch.equal(first, logits(in_memory(folder)))


def test_a_forced_conversion_into_the_folder_is_packed_anew(tiny_bf16: Path, tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    convert(tiny_bf16, folder, dtype="bf16")
    before = logits(pack(folder))
    convert(tiny_bf16, folder, dtype="fp8", force=True)
    after = logits(pack(folder))
    assert not torch.equal(before, after)
    assert torch.equal(after, logits(in_memory(folder)))


def test_progress_ends_with_the_last_weight(folder: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    packed_transformer(load(folder), folder, lambda done, total, name: calls.append((done, total, name)))
    assert calls[-1][2] == "lm_head"
    assert all(0 < done <= total for done, total, _ in calls)
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)


def test_a_weight_is_let_go_before_the_next_is_packed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    original = packed.pack

    def counted(*args: Any, **options: Any) -> packed.Packed:
        alive.append(sum(one() is not None for one in made))
        one = original(*args, **options)
        assert one.tiles is not None
        made.append(weakref.ref(one.tiles))
        return one

    monkeypatch.setattr(packed, "pack", counted)
    pack(folder)
    assert len(alive) > 20
    assert set(alive) == {0}


@pytest.mark.parametrize("section", [mmap.PAGESIZE, 16 * mmap.PAGESIZE])
def test_the_hashes_made_on_the_way_are_those_of_the_file(
    folder: Path, section: int, made: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_file, "SECTION", section)
    first = logits(pack(folder))
    data = bin_of(folder).read_bytes()
    start, length, _ = FOOTER.unpack(data[-FOOTER.size :])
    hashes = json.loads(data[start : start + length])["hashes"]
    expected = [data[at : min(at + section, start)] for at in range(0, start, section)]
    assert len(expected) > 1
    assert hashes == [packed.content_hash(torch.frombuffer(bytearray(one), dtype=torch.uint8)) for one in expected]
    made.clear()
    assert torch.equal(first, logits(pack(folder)))
    assert not made


def test_mtp_layers_have_a_file_of_their_own(copied: Callable[[Path], Path], tiny_bf16: Path) -> None:
    folder = copied(tiny_bf16)
    plain, with_mtp = logits(pack(folder)), pack(folder, mtp=True)
    assert torch.equal(plain, logits(with_mtp))
    names = sorted(file.name for file in folder.glob("packed-*"))
    assert names == [f"packed-{packed.order()}-mtp.kvern", f"packed-{packed.order()}.kvern"]
    states = with_mtp.hidden(ForwardBatch.of(IDS))
    again = pack(folder, mtp=True)
    for one, other in zip(
        with_mtp.mtp(states, ForwardBatch.of(IDS)), again.mtp(states, ForwardBatch.of(IDS)), strict=True
    ):
        assert torch.equal(one, other)


# --- written anew


def test_another_state_of_the_checkpoint_is_packed_anew(folder: Path, made: list[tuple[int, ...]]) -> None:
    before = logits(pack(folder))
    made.clear()
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4000:] = bytes(4000)
    stat = weights.stat()
    weights.write_bytes(data)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = logits(pack(folder))
    assert made
    assert not torch.equal(before, after)
    assert torch.equal(after, logits(in_memory(folder)))
    made.clear()
    pack(folder)
    assert not made


def test_another_size_of_the_configuration_is_packed_anew(folder: Path, made: list[tuple[int, ...]]) -> None:
    pack(folder)
    made.clear()
    config = folder / "config.json"
    stat = config.stat()
    config.write_text(config.read_text() + "\n")
    os.utime(config, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    pack(folder)
    assert made


def test_another_version_is_packed_anew(
    folder: Path, made: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(folder)
    written = bin_of(folder).read_bytes()
    made.clear()
    monkeypatch.setattr(packed_file, "VERSION", 99)
    pack(folder)
    assert made
    assert bin_of(folder).read_bytes() != written


def test_a_copy_of_another_checkpoints_file_is_packed_anew(folder: Path, tmp_path: Path) -> None:
    pack(folder)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    expected = bin_of(other).read_bytes()
    weights = other / "model.safetensors"
    os.utime(weights, ns=(0, 1))
    pack(other)
    assert bin_of(other).read_bytes() != expected


# --- damaged


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A packed checkpoint and its file's bytes."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("packed") / "whole"))
    pack(folder)
    return folder, bin_of(folder).read_bytes()


def repaired(folder: Path, damaged: bytes, whole: bytes) -> None:
    """Opening a damaged file writes the whole one again."""
    bin_of(folder).write_bytes(damaged)
    pack(folder)
    assert bin_of(folder).read_bytes() == whole
    assert not leftovers(folder)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found(whole: tuple[Path, bytes], where: int, bit: int) -> None:
    folder, data = whole
    damaged = bytearray(data)
    damaged[where % len(data)] ^= 1 << bit
    repaired(folder, bytes(damaged), data)


def test_a_flipped_bit_in_each_byte_of_magic_footer_and_both_ends_of_the_index_is_found(
    whole: tuple[Path, bytes],
) -> None:
    folder, data = whole
    start, length, _ = FOOTER.unpack(data[-FOOTER.size :])
    ends = len(data) - FOOTER.size
    for where in (*range(len(MAGIC)), len(MAGIC), start - 1, start, start + length - 1, *range(ends, len(data))):
        damaged = bytearray(data)
        damaged[where] ^= 0x80
        repaired(folder, bytes(damaged), data)


@settings(max_examples=25)
@given(length=st.one_of(st.integers(0, 200), st.integers(0, 10**9)))
def test_a_truncated_file_is_found(whole: tuple[Path, bytes], length: int) -> None:
    folder, data = whole
    repaired(folder, data[: length % len(data)], data)


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b"\xff" * 4096, MAGIC * 100])
def test_a_file_of_something_else_is_written_over(whole: tuple[Path, bytes], damage: bytes) -> None:
    repaired(whole[0], damage, whole[1])


def test_bytes_appended_are_found(whole: tuple[Path, bytes]) -> None:
    repaired(whole[0], whole[1] + b"\0", whole[1])


# --- forged: the hashes fit, the shapes do not


def forge(folder: Path, change: Callable[[dict[str, Any]], None], *, mtp: bool = False) -> None:
    """Rewrite the index of a packed file, hashes and all."""
    path = bin_of(folder) if not mtp else folder / f"packed-{packed.order()}-mtp.kvern"
    data = path.read_bytes()
    start, length, _ = FOOTER.unpack(data[-FOOTER.size :])
    index = json.loads(data[start : start + length])
    change(index["weights"])
    text = json.dumps(index).encode()
    path.write_bytes(data[:start] + text + FOOTER.pack(start, len(text), packed_file._hash(text)))


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.self_attn.kv_b_proj.keys.1",
        "model.layers.1.mlp.experts.2.up_proj",
        "model.layers.1.mlp.gate",
        "model.layers.3.eh_proj",
    ],
)
def test_a_weight_of_another_shape_is_refused(name: str, copied: Callable[[Path], Path], tiny_bf16: Path) -> None:
    folder = copied(tiny_bf16)
    pack(folder, mtp=True)

    def change(weights: dict[str, Any]) -> None:
        weights[name] = weights["model.layers.2.self_attn.q_a_proj"]

    forge(folder, change, mtp=True)
    with pytest.raises(KvernError, match="packed"):
        pack(folder, mtp=True)


def test_a_whole_mlp_of_another_width_is_refused(copied: Callable[[Path], Path], tiny_bf16: Path) -> None:
    folder = copied(tiny_bf16)
    pack(folder)

    def change(weights: dict[str, Any]) -> None:
        for part in ("gate_proj", "up_proj", "down_proj"):
            weights[f"model.layers.0.mlp.{part}"] = weights[f"model.layers.1.mlp.shared_experts.{part}"]

    forge(folder, change)
    with pytest.raises(KvernError, match=r"packed weight model\.layers\.0\.mlp\.gate_proj is 160 x 192"):
        pack(folder)


@pytest.mark.parametrize("part", ["tiles", "n"])
def test_a_weight_without_the_bytes_of_its_shape_is_refused(part: str, folder: Path) -> None:
    pack(folder)

    def change(weights: dict[str, Any]) -> None:
        entry = weights["lm_head"]
        if part == "tiles":
            entry["tiles"][1] -= 64
        else:
            entry["n"] += 16

    forge(folder, change)
    with pytest.raises(CheckpointError, match=r"lm_head: packed weight lacks bytes"):
        pack(folder)


def test_a_whole_weight_knows_its_bytes() -> None:
    one = packed.pack(torch.randn(20, 40))
    assert one.is_whole
    assert one.tiles is not None
    assert not replace(one, tiles=one.tiles[:-1]).is_whole
    picks = packed.pack(torch.eye(20), find_picks=True)
    assert picks.kind is packed.Kind.PICKS
    assert picks.is_whole
    assert not replace(picks, factors=None).is_whole


# --- folders that cannot be written to


def test_where_nothing_can_be_written_weights_stay_in_memory(folder: Path, made: list[tuple[int, ...]]) -> None:
    expected = logits(in_memory(folder))
    blocked = bin_of(folder).with_name(bin_of(folder).name + ".part")
    blocked.mkdir()
    assert torch.equal(logits(pack(folder)), expected)
    assert not bin_of(folder).exists()
    made.clear()
    pack(folder)
    assert made


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(folder: Path) -> None:
    expected = logits(in_memory(folder))
    folder.chmod(0o555)
    try:
        assert torch.equal(logits(pack(folder)), expected)
        assert not list(folder.glob("packed-*"))
    finally:
        folder.chmod(0o755)


def test_a_full_disk_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    expected = logits(in_memory(folder))
    monkeypatch.setattr(os, "fsync", full)
    assert torch.equal(logits(pack(folder)), expected)
    assert not list(folder.glob("packed-*"))


def test_an_interrupted_writing_leaves_nothing(folder: Path) -> None:
    def stop(done: int, total: int, tensor: str) -> None:
        if tensor == "lm_head":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed_transformer(load(folder), folder, stop)
    assert not list(folder.glob("packed-*"))


# --- several processes


def run_script(*arguments: str) -> list[int]:
    """What each forked child of the script ended with, as waitpid tells it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=120)
    return [int(line) for line in done.stdout.split()]


def test_a_killed_writer_leaves_no_file_or_a_whole_one(folder: Path, tmp_path: Path) -> None:
    points = ["0", "1", "7", "20", "hashed", "fsync", "synced", "renamed"]
    copies = [Path(shutil.copytree(folder, tmp_path / f"killed-{point}")) for point in points]
    ends = run_script("kill", *(f"{point}={copy}" for point, copy in zip(points, copies, strict=True)))
    assert ends == [signal.SIGKILL] * len(points)
    expected = logits(in_memory(folder))
    for point, copy in zip(points, copies, strict=True):
        assert bin_of(copy).exists() == (point == "renamed")
        assert leftovers(copy) == ([] if point == "renamed" else [bin_of(copy).name + ".part"])
        assert torch.equal(logits(pack(copy)), expected)
        assert bin_of(copy).exists()
        assert not leftovers(copy)


def test_of_processes_that_pack_at_once_one_writes(folder: Path) -> None:
    ends = [os.waitstatus_to_exitcode(end) for end in run_script("race", str(folder), "4")]
    assert sorted(ends) == [0, 0, 0, 1], "1: wrote, 0: mapped"
    assert not leftovers(folder)
    assert torch.equal(logits(pack(folder)), logits(in_memory(folder)))
