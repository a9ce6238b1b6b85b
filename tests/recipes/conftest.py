"""A tokenizer of kvern-nano's kind, learnt from one module."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tokenizers
from recipes.nano import tokenizer as nano_tokenizer

from kvern.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def trained() -> tokenizers.Tokenizer:
    return nano_tokenizer.train([Path(os.__file__).read_text(encoding="utf-8")], 700)


@pytest.fixture(scope="session")
def tokenizer_folder(trained: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    nano_tokenizer.write(trained, folder, 2048)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)
