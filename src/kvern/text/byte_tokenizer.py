# ruff: noqa: RUF001 (DeepSeek's tokens contain full-width bars)
"""A tokenizer without training: token b is byte b, and after the 256 bytes come DeepSeek's special tokens.

It reads any text, in four to five times as many tokens as a trained vocabulary: for small models and for trying out.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from kvern.text.fim import FAMILIES
from kvern.text.tokenizer import Tokenizer, byte_alphabet

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIAL = (BOS, EOS, PAD, *FAMILIES[1])
CONFIG = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "add_bos_token": False}
VOCABULARY = 256 + len(SPECIAL)


def byte_tokenizer() -> Tokenizer:
    """The tokenizer; `write` puts it into a folder."""
    return Tokenizer(_definition(), dict(CONFIG))


def write(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_definition(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=1, ensure_ascii=False), encoding="utf-8")


def _definition() -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    text: str = tokenizer.to_str()
    return text
