# ruff: noqa: RUF001 (DeepSeek's tokens contain full-width bars)
"""Small tokenizers of the two kinds that matter: byte level (DeepSeek, Qwen), byte fallback (Llama 2)."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from kvern.text.tokenizer import Tokenizer

CONTROL = ["<|im_start|>", "<|im_end|>", "<｜Assistant｜>", "<｜User｜>"]
PLAIN_CONTROL = ["<think>", "</think>"]
CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "the cat sat on the mat; naïve café, 東京 ☕ 👩‍💻",
    "<|im_end|> in text",
] * 20


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(CORPUS, trainer)
    model.add_special_tokens(CONTROL)
    model.add_tokens(PLAIN_CONTROL)
    return Tokenizer(model.to_str(), {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}})


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", *"abcdefgh<>/sunk", "▁a", "ab", "é"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    merges = [("▁", "a"), ("a", "b")]
    model = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(model.to_str(), json.loads('{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}'))
