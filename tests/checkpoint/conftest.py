"""Small checkpoints in the official layout, written once a session; tests that damage one take a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from .layout import quantized_tensors, random_tensors, tiny_config, write_folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of these sizes only lose time to threads, most of it when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_tensors() -> dict[str, torch.Tensor]:
    return random_tensors(tiny_config())


@pytest.fixture(scope="session")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory, tiny_tensors: dict[str, torch.Tensor]) -> Path:
    """A BF16 checkpoint of three shards."""
    return write_folder(tmp_path_factory.mktemp("tiny") / "bf16", tiny_config(), tiny_tensors)


@pytest.fixture(scope="session")
def tiny_fp8(tmp_path_factory: pytest.TempPathFactory, tiny_tensors: dict[str, torch.Tensor]) -> Path:
    """The same in FP8, quantised block by block, with a scale and its weight in different shards."""
    config = tiny_config(fp8=True)
    return write_folder(tmp_path_factory.mktemp("tiny") / "fp8", config, quantized_tensors(config, tiny_tensors))


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a checkpoint folder, without packed weights, so that a test may damage it."""

    unpacked = shutil.ignore_patterns("packed-*")

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy-of-{folder.name}", ignore=unpacked))

    return copy
