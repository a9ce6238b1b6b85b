# ruff: noqa: RUF001 (DeepSeek's tokens contain full-width bars)
from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from kvern.text.fim import FAMILIES, FillInTheMiddle
from kvern.text.tokenizer import Tokenizer


def tokenizer_with(*control: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_tokens(list(control))
    return Tokenizer(model.to_str(), {})


@pytest.mark.parametrize("family", FAMILIES, ids=["qwen", "deepseek"])
def test_prefix_hole_suffix_end(family: tuple[str, str, str]) -> None:
    tokenizer = tokenizer_with(*family, "<|file_sep|>")
    fim = FillInTheMiddle.of(tokenizer)
    assert fim is not None
    begin, hole, end = (tokenizer.control[name] for name in family)
    assert fim.arrange([1, 2], [3]) == [begin, 1, 2, hole, 3, end]
    assert set(fim.ends) == {begin, hole, end, tokenizer.control["<|file_sep|>"]}


def test_a_model_without_all_three_has_none() -> None:
    assert FillInTheMiddle.of(tokenizer_with("<|fim_prefix|>", "<|fim_suffix|>", "<｜fim▁end｜>")) is None
