# ruff: noqa: RUF001 (DeepSeek's tokens contain full-width bars)
"""Fill-in-the-middle: the prompt that asks a model for what belongs between a prefix and a suffix.

    [begin] prefix [hole] suffix [end]   and the model writes the middle

Qwen and DeepSeek name the three tokens differently and arrange them alike. Which family it is, the tokenizer tells.
Prefix and suffix are tokenised as plain text. A model that has filled the gap may go on with another of its
file-structure tokens; they end the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvern.text.tokenizer import Tokenizer

FAMILIES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
STRUCTURE = ("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")


@dataclass(frozen=True)
class FillInTheMiddle:
    """The ids of a model's FIM tokens; `ends`: ids that end the middle besides the model's own stop ids."""

    begin: int
    hole: int
    end: int
    ends: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> FillInTheMiddle | None:
        """Find the tokens by name; None for a model that has none."""
        for family in FAMILIES:
            if all(name in tokenizer.control for name in family):
                begin, hole, end = (tokenizer.control[name] for name in family)
                structure = (tokenizer.control[name] for name in STRUCTURE if name in tokenizer.control)
                return cls(begin, hole, end, (begin, hole, end, *structure))
        return None

    def arrange(self, prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        """The ids of the whole prompt."""
        return [self.begin, *prefix, self.hole, *suffix, self.end]
