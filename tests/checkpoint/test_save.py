"""Writing is atomic and resumable, refuses what is not its own, and is read back by the safetensors library."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kvern.checkpoint import save
from kvern.checkpoint.header import read_header
from kvern.checkpoint.load import load
from kvern.checkpoint.reader import CheckpointReader
from kvern.checkpoint.save import (
    PlannedTensor,
    plan_shards,
    planned_from_model,
    save_model,
    total_size,
    write_checkpoint,
)
from kvern.config import ModelConfig
from kvern.errors import CheckpointError
from kvern.model import Transformer

from .layout import official_layout, tiny_config

CONFIG = tiny_config()
FILES = {"tokenizer.json": b"{}", "LICENSE": b"MIT"}


def planned(count: int = 6) -> list[list[PlannedTensor]]:
    """Tensors of every awkward kind, two a shard."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 5 + i, generator=generator).to(dtype) for i, dtype in enumerate(KINDS[:count])]
    shards: list[list[PlannedTensor]] = [[] for _ in range(count // 2)]
    for i, tensor in enumerate(tensors):
        shards[i // 2].append(PlannedTensor(f"t{i}", tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor))  # type: ignore[misc]
    return shards


KINDS = (torch.float8_e4m3fn, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float8_e4m3fn)


def write(dst: Path, shards: list[list[PlannedTensor]], **changes: object) -> None:
    arguments: dict[str, object] = {"files": FILES, "source": "s", "options": {"dtype": "x"}, **changes}
    write_checkpoint(dst, CONFIG, shards, **arguments)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def failing(shards: list[list[PlannedTensor]], at: str) -> list[list[PlannedTensor]]:
    def fail() -> torch.Tensor:
        raise KeyboardInterrupt

    return [[PlannedTensor(t.name, t.dtype, t.shape, fail) if t.name == at else t for t in s] for s in shards]


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    shards = planned()
    write(tmp_path / "out", shards)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total_size(t for shard in shards for t in shard)
    for tensor in (t for shard in shards for t in shard):
        with safe_open(tmp_path / "out" / index["weight_map"][tensor.name], "pt") as stream:
            assert torch.equal(stream.get_tensor(tensor.name).float(), tensor.make().float())  # type: ignore[union-attr]
    assert (tmp_path / "out/tokenizer.json").read_bytes() == b"{}"
    assert ModelConfig.load(tmp_path / "out") == CONFIG


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    write(tmp_path / "out", planned())
    for file in CheckpointReader(tmp_path / "out").files():
        assert all(spec.start % spec.dtype.itemsize == 0 for spec in read_header(file))


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    write(tmp_path / "out", planned(2))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["LICENSE", "config.json", "conversion.json", "model.safetensors", "tokenizer.json"]
    )


def test_bytes_are_written_as_they_come(tmp_path: Path) -> None:
    data = bytes(range(24))
    write(tmp_path / "out", [[PlannedTensor("raw", torch.float32, (2, 3), lambda: memoryview(data))]])
    assert bytes(CheckpointReader(tmp_path / "out").raw("raw")) == data


def test_shards_are_filled_up_and_scales_stay_with_their_weight() -> None:
    sizes = [("a", 60), ("b", 50), ("b_scale_inv", 10), ("c", 300), ("d", 10), ("e", 90)]
    tensors = [PlannedTensor(name, torch.uint8, (size,), lambda: torch.empty(0)) for name, size in sizes]
    names = [[tensor.name for tensor in shard] for shard in plan_shards(tensors, 100)]
    assert names == [["a"], ["b", "b_scale_inv"], ["c"], ["d", "e"]]


@pytest.mark.parametrize("at", ["t0", "t1", "t2", "t5"])
def test_an_interrupted_write_resumes_to_the_same_bytes(tmp_path: Path, at: str) -> None:
    write(tmp_path / "whole", planned())
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", failing(planned(), at))
    with pytest.raises(CheckpointError, match="interrupted"):
        CheckpointReader(tmp_path / "cut")
    finished = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cut").glob("*.safetensors")}
    write(tmp_path / "cut", planned())
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    for name, written in finished.items():
        assert (tmp_path / "cut" / name).stat().st_mtime_ns == written


def test_a_shard_of_another_size_is_written_again(tmp_path: Path) -> None:
    write(tmp_path / "whole", planned())
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", failing(planned(), "t5"))
    first = next((tmp_path / "cut").glob("*-00001-*"))
    first.write_bytes(first.read_bytes()[:-1])
    write(tmp_path / "cut", planned())
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_finished_checkpoint_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "out", planned())
    write(tmp_path / "out", failing(planned(), "t0"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"source": "other"}, "of another source"), ({"options": {"dtype": "y"}}, "with another dtype than y")],
)
def test_another_conversion_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    write(tmp_path / "out", planned())
    before = contents(tmp_path / "out")
    with pytest.raises(CheckpointError, match=said) as caught:
        write(tmp_path / "out", planned(), **changes)
    assert caught.value.hint is not None
    assert contents(tmp_path / "out") == before


def test_another_layout_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "out", planned())
    with pytest.raises(CheckpointError, match="another layout"):
        write(tmp_path / "out", planned(4))


def test_force_starts_again_and_spares_what_it_did_not_write(tmp_path: Path) -> None:
    write(tmp_path / "out", planned())
    (tmp_path / "out/notes.txt").write_text("mine")
    write(tmp_path / "out", planned(4), source="other", force=True)
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert set(CheckpointReader(tmp_path / "out").names()) == {"t0", "t1", "t2", "t3"}


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_somebody_else_is_never_touched(tmp_path: Path, tiny_bf16: Path, force: bool) -> None:
    theirs = Path(shutil.copytree(tiny_bf16, tmp_path / "theirs"))
    before = contents(theirs)
    with pytest.raises(CheckpointError, match="not empty"):
        write(theirs, planned(), force=force)
    assert contents(theirs) == before


def test_names_that_leave_the_folder_are_not_removed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    write(tmp_path / "out", planned())
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    record["writes"] += ["../precious", str(tmp_path / "precious"), 7]
    (tmp_path / "out/conversion.json").write_text(json.dumps(record))
    write(tmp_path / "out", planned(), force=True)
    assert (tmp_path / "precious").read_text() == "mine"


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    def second() -> torch.Tensor:
        with pytest.raises(CheckpointError, match="another process is writing here"):
            write(tmp_path / "out", planned())
        return torch.zeros(2)

    write(tmp_path / "out", [[PlannedTensor("t", torch.float32, (2,), second)]])


@pytest.mark.parametrize(
    "make",
    [lambda: torch.zeros(3), lambda: torch.zeros(2, dtype=torch.bfloat16), lambda: memoryview(bytes(7))],
)
def test_a_tensor_that_is_not_as_planned(tmp_path: Path, make: Callable[[], torch.Tensor | memoryview]) -> None:
    with pytest.raises(CheckpointError, match=r"odd: planned .* made"):
        write(tmp_path / "out", [[PlannedTensor("odd", torch.float32, (2,), make)]])


def test_too_small_a_disk_is_noticed_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(CheckpointError, match=r"disk is too small: [\d,]+ bytes are needed, 10 are free"):
        write(tmp_path / "out", planned())
    monkeypatch.undo()
    write(tmp_path / "out", planned(), options={"dtype": "smaller"})


def test_a_disk_that_fills_up_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = save.write_file

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def conversion_first(path: Path, content: bytes) -> None:
        real(path, content)
        monkeypatch.setattr(os, "fsync", full)

    monkeypatch.setattr(save, "write_file", conversion_first)
    with pytest.raises(CheckpointError, match="disk is full") as caught:
        write(tmp_path / "out", planned())
    assert caught.value.hint is not None
    assert not (tmp_path / "out/config.json").exists()


def test_killed_while_the_record_was_written(tmp_path: Path) -> None:
    (tmp_path / "conversion.json.part").write_text("{")
    write(tmp_path, planned())
    assert not (tmp_path / "conversion.json.part").exists()


def test_a_destination_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "file", planned())


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write(tmp_path / "out", planned(), progress=lambda done, total, tensor: seen.append((done, total)))
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_model_is_saved_as_it_was_loaded(tmp_path: Path, tiny_fp8: Path) -> None:
    model = load(tiny_fp8, mtp=True)
    save_model(model, tmp_path / "out", config=model.config, max_shard_bytes=500_000)
    before, after = CheckpointReader(tiny_fp8), CheckpointReader(tmp_path / "out")
    assert len(after.files()) > 3
    assert set(after.names()) == set(before.names())
    for name in before.names():
        assert bytes(after.raw(name)) == bytes(before.raw(name))


def test_a_model_that_changed_does_not_pass_for_the_saved_one(tmp_path: Path, tiny_bf16: Path) -> None:
    model = load(tiny_bf16)
    for _ in range(2):
        save_model(model, tmp_path / "out", config=model.config)
    model.model.norm.weight.data.mul_(2)
    with pytest.raises(CheckpointError, match="of another source"):
        save_model(model, tmp_path / "out", config=model.config)


def test_a_model_without_data_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: tensor is on the meta device"):
        save_model(Transformer(CONFIG), tmp_path / "out", config=CONFIG)


def test_the_671b_export_has_the_official_names_dtypes_and_bytes() -> None:
    config = ModelConfig.named("deepseek-v3")
    tensors = planned_from_model(Transformer(config))
    assert len(tensors) == 91_991
    assert total_size(tensors) == 688_574_839_360
    assert {tensor.name: (tensor.shape, tensor.dtype) for tensor in tensors} == official_layout(config)
