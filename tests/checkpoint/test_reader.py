"""The reader maps what the safetensors library wrote, without copies, warnings or memory, and keeps it alive."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvern.checkpoint.header import read_header
from kvern.checkpoint.reader import CheckpointReader, open_safetensors

from .layout import official_layout, random_tensors, tiny_config, write_folder


def test_every_tensor_equals_what_was_written(tiny_bf16: Path, tiny_tensors: dict[str, torch.Tensor]) -> None:
    reader = CheckpointReader(tiny_bf16)
    assert set(reader.names()) == set(tiny_tensors)
    for name, expected in tiny_tensors.items():
        found = reader.tensor(name)
        assert found.dtype is expected.dtype
        assert torch.equal(found, expected)
        assert bytes(reader.raw(name)) == expected.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_fp8_folder_has_the_official_names_shapes_and_dtypes(tiny_fp8: Path) -> None:
    reader = CheckpointReader(tiny_fp8)
    found = {spec.name: (spec.shape, spec.dtype) for spec in reader.specs()}
    assert found == official_layout(reader.config)


def test_single_file_needs_no_index(tmp_path: Path, tiny_tensors: dict[str, torch.Tensor]) -> None:
    folder = write_folder(tmp_path, tiny_config(), tiny_tensors, shards=1)
    assert set(CheckpointReader(folder).names()) == set(tiny_tensors)


def test_any_folder_opens_without_a_config(tmp_path: Path) -> None:
    save_file(
        {"a": torch.arange(6).view(2, 3), "empty": torch.empty(0, 4), "scalar": torch.tensor(2.5)},
        tmp_path / "model.safetensors",
    )
    folder = open_safetensors(tmp_path)
    assert folder.tensor("a").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert folder.tensor("empty").shape == (0, 4)
    assert len(folder.raw("empty")) == 0
    assert folder.tensor("scalar").item() == 2.5


def test_tensors_outlive_the_reader_and_the_folder(tmp_path: Path, tiny_tensors: dict[str, torch.Tensor]) -> None:
    folder = write_folder(tmp_path, tiny_config(), tiny_tensors, shards=1)
    found = CheckpointReader(folder).tensor("lm_head.weight")
    (folder / "model.safetensors").unlink()
    gc.collect()
    assert torch.equal(found, tiny_tensors["lm_head.weight"])


def test_writing_into_a_mapped_tensor_never_changes_the_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tiny_config(), random_tensors(tiny_config(), seed=1), shards=1)
    before = (folder / "model.safetensors").read_bytes()
    CheckpointReader(folder).tensor("model.norm.weight").zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_mapped_pages_are_file_backed(tmp_path: Path) -> None:
    save_file({"big": torch.ones(16 << 20)}, tmp_path / "model.safetensors")
    anonymous = _anonymous_bytes()
    big = open_safetensors(tmp_path).tensor("big")
    assert big.sum().item() == 16 << 20
    assert _anonymous_bytes() - anonymous < 16 << 20


def test_unaligned_tensors_are_read_too(tmp_path: Path) -> None:
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "floats": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    data = b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    found = open_safetensors(tmp_path).tensor("floats")
    assert found.tolist() == [1.5, -2.0]
    assert found.data_ptr() % 4 == 0


def test_specs_come_in_the_order_of_the_data(tiny_bf16: Path) -> None:
    for file in CheckpointReader(tiny_bf16).files():
        starts = [spec.start for spec in read_header(file)]
        assert starts == sorted(starts)


@pytest.mark.parametrize("link", [False, True])
def test_shards_may_be_links_as_in_the_hub_cache(tiny_bf16: Path, tmp_path: Path, link: bool) -> None:
    for file in tiny_bf16.iterdir():
        if link:
            (tmp_path / file.name).symlink_to(file)
        else:
            (tmp_path / file.name).hardlink_to(file)
    assert CheckpointReader(tmp_path).names() == CheckpointReader(tiny_bf16).names()


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024
