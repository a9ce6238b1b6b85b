"""Damaged, incomplete or hostile checkpoints are refused with the file and the tensor; nothing else ever happens."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvern.checkpoint.header import read_header
from kvern.checkpoint.reader import CheckpointReader, open_safetensors
from kvern.errors import CheckpointError

Copy = Callable[[Path], Path]
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(folder)
    assert caught.value.message == str(caught.value)
    assert not caught.value.message.endswith(".")
    return caught.value.message


def write_header(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start: int, end: int, shape: list[Any] | None = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_truncated_shard(tiny_bf16: Path, copied: Copy) -> None:
    folder = copied(tiny_bf16)
    shard = folder / SHARD
    last = read_header(shard)[-1].name
    shard.write_bytes(shard.read_bytes()[:-100])
    message = refusal(folder)
    assert SHARD in message
    assert last in message
    assert "truncated" in message


def test_shard_truncated_within_the_header(tiny_bf16: Path, copied: Copy) -> None:
    folder = copied(tiny_bf16)
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:50])
    assert SHARD in refusal(folder)


def test_empty_shard(tiny_bf16: Path, copied: Copy) -> None:
    folder = copied(tiny_bf16)
    (folder / SHARD).write_bytes(b"")
    assert "not a safetensors file" in refusal(folder)


def test_bytes_after_the_last_tensor(tiny_bf16: Path, copied: Copy) -> None:
    folder = copied(tiny_bf16)
    with (folder / SHARD).open("ab") as stream:
        stream.write(b"\0" * 3)
    assert "3 bytes after" in refusal(folder)


def test_missing_shard(tiny_bf16: Path, copied: Copy) -> None:
    folder = copied(tiny_bf16)
    (folder / SHARD).unlink()
    message = refusal(folder)
    assert SHARD in message
    assert "1 of 3" in message


def test_index_names_a_tensor_that_no_shard_has(tiny_bf16: Path, copied: Copy) -> None:
    folder = copied(tiny_bf16)
    edit_index(folder, lambda index: index["weight_map"].update({"model.extra.weight": SHARD}))
    message = refusal(folder)
    assert SHARD in message
    assert "model.extra.weight" in message


def test_shard_holds_a_tensor_that_the_index_lacks(tiny_bf16: Path, copied: Copy) -> None:
    folder = copied(tiny_bf16)
    edit_index(folder, lambda index: index["weight_map"].pop("model.norm.weight"))
    assert "model.norm.weight: tensor is not in the index" in refusal(folder)


def test_index_names_another_shard(tiny_bf16: Path, copied: Copy) -> None:
    folder = copied(tiny_bf16)
    edit_index(folder, lambda index: index["weight_map"].update({"lm_head.weight": "model-00003-of-00003.safetensors"}))
    assert "lm_head.weight: the index says that this tensor is in model-00003" in refusal(folder)


@pytest.mark.parametrize(
    "place",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "..",
        "a\\b.safetensors",
        "x.bin",
        "a\0.safetensors",
        7,
    ],
)
def test_path_outside_the_folder(tiny_bf16: Path, copied: Copy, place: Any) -> None:
    folder = copied(tiny_bf16)
    (folder.parent / "outside.safetensors").write_bytes((folder / SHARD).read_bytes())
    edit_index(folder, lambda index: index["weight_map"].update({"lm_head.weight": place}))
    message = refusal(folder)
    assert INDEX in message
    assert "lm_head.weight" in message
    assert "in this folder" in message


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"weight_map": []}', b'{"weight_map": {}}', b"\xff", b"[" * 100_000]
)
def test_bad_index(tiny_bf16: Path, copied: Copy, text: bytes) -> None:
    folder = copied(tiny_bf16)
    (folder / INDEX).write_bytes(text)
    assert INDEX in refusal(folder)


def test_missing_config(tiny_bf16: Path, copied: Copy) -> None:
    folder = copied(tiny_bf16)
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)


def test_interrupted_conversion_says_so(tiny_bf16: Path, copied: Copy) -> None:
    folder = copied(tiny_bf16)
    (folder / "config.json").rename(folder / "conversion.json")
    with pytest.raises(CheckpointError, match="interrupted") as caught:
        CheckpointReader(folder)
    assert caught.value.hint is not None
    assert "again" in caught.value.hint


def test_no_folder_and_no_weights(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    assert "neither" in refusal(tmp_path)
    (tmp_path / "part.safetensors").write_bytes(b"")
    assert "1 other .safetensors" in refusal(tmp_path)


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was loaded')",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(CheckpointError, match="pickle") as caught:
        CheckpointReader(tmp_path)
    assert name in caught.value.message
    assert caught.value.hint is not None


def test_unknown_tensor(tiny_bf16: Path) -> None:
    reader = CheckpointReader(tiny_bf16)
    for read in (reader.spec, reader.tensor, reader.raw):
        with pytest.raises(CheckpointError, match=r"model\.nothing: tensor is not in the checkpoint"):
            read("model.nothing")


@pytest.mark.parametrize(
    ("header", "data", "expected"),
    [
        (b"not json", b"", "header is not JSON"),
        (b"[]", b"", "not a JSON object"),
        (b'{"a": 1}', b"", "a: entry is not a JSON object"),
        (b"\xff\xfe", b"", "header is not JSON"),
        (b"[" * 100_000, b"", "header is not JSON"),
        (b'{"a":{},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1", "a: tensor is listed twice"),
        (b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"1", "a: entry has the fields"),
        ({"a": entry(0, 4) | {"note": 1}}, b"1234", "a: entry has the fields"),
        ({"a": entry(0, 4, dtype="F4")}, b"1234", "a: unknown dtype 'F4'"),
        ({"a": entry(0, 4, dtype=["F32"])}, b"1234", "a: unknown dtype"),
        ({"a": entry(0, 4, [-1])}, b"1234", "a: shape [-1]"),
        ({"a": entry(0, 4, [4.0])}, b"1234", "a: shape [4.0]"),
        ({"a": entry(0, 1, [True])}, b"1", "a: shape [True]"),
        ({"a": entry(0, 1, {})}, b"1", "a: shape []"),  # type: ignore[arg-type]
        ({"a": entry(0, 4, [3])}, b"1234", "a: U8 [3] takes 3 bytes, data_offsets hold 4"),
        ({"a": entry(4, 0, [4])}, b"1234", "a: U8 [4] takes 4 bytes"),
        ({"a": entry(0, 4, [2**62, 4], "F32")}, b"1234", "a: shape [4611686018427387904, 4] is beyond"),
        ({"a": entry(0, 0, [0, 2**70])}, b"", "a: shape [0, 1180591620717411303424] is beyond"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"1", "a: data_offsets [0]"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [-1, 0]}}, b"1", "a: data_offsets [-1, 0]"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", "b: data overlaps"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234", "b: data overlaps"),
        ({"a": entry(0, 2), "b": entry(3, 4)}, b"1234", "b: data leaves a gap"),
        ({"a": entry(0, 4)}, b"123", "a: file is truncated"),
        ({"a": entry(0, 2**60)}, b"123", "a: file is truncated"),
    ],
)  # fmt: skip
def test_bad_headers(tmp_path: Path, header: Any, data: bytes, expected: str) -> None:
    path = write_header(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    assert expected in caught.value.message


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 101])
def test_header_length_beyond_the_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + b" " * 98)
    with pytest.raises(CheckpointError, match=f"header of {length} bytes does not fit"):
        read_header(path)


def test_a_folder_in_the_place_of_a_shard(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(tmp_path / "model.safetensors")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)
likely_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F8_E4M3", "BF16", "?"]) | json_values,
        "shape": st.lists(st.integers(-1, 5) | st.just(2**62), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-2, 40), min_size=2, max_size=2) | json_values,
    }
)
likely_headers = st.dictionaries(st.text(max_size=4), likely_entries, max_size=3).map(
    lambda value: json.dumps(value).encode()
)
lengths = st.none() | st.integers(0, 2**64 - 1)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=likely_headers | json_values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60),
       length=lengths, data=st.binary(max_size=40))  # fmt: skip
def test_any_header_is_read_or_refused(tmp_path: Path, text: bytes, length: int | None, data: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    try:
        folder = open_safetensors(tmp_path)
    except CheckpointError as refused:
        named = "model.safetensors" in refused.message
    else:
        named = all(folder.tensor(name).nbytes == len(folder.raw(name)) for name in folder.names())
    assert named


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_one_flipped_header_byte_is_read_or_refused(tmp_path: Path, position: int, value: int) -> None:
    header = {f"model.layers.{i}.weight": entry(4 * i, 4 * i + 4, [2], "BF16") for i in range(5)}
    file = write_header(tmp_path / "model.safetensors", header, bytes(20))
    content = bytearray(file.read_bytes())
    content[min(position, len(content) - 1)] = value
    file.write_bytes(content)
    try:
        folder = open_safetensors(tmp_path)
    except CheckpointError:
        return
    for name in folder.names():
        assert folder.tensor(name).nbytes == len(folder.raw(name))
