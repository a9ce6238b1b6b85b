# ruff: noqa: RUF001 (DeepSeek's tokens contain full-width bars)
"""The tokenizer: a byte-level BPE of 4096 entries of our own, cut and marked up the way DeepSeek-V3's is.

    pieces = digits in threes | words with one character before them | runs of punctuation | line ends | blanks

The control tokens have V3's names, and bos, eos and pad V3's ids 0, 1 and 2, so whatever looks for them (chat
templates, fill-in-the-middle, the parser of calls) finds them. Merges are learnt from the corpus's training side, in a
fixed order; `tokenizers` breaks ties by id, so the file is the same every time.

The chat template is V3.1's without thinking rather than V3-0324's: a call is NAME, a separator and JSON instead of a
fenced block behind the word `function`, which is a dozen tokens less a call and one pattern less to learn, and the
prompt itself says that no reasoning follows. It shows tools itself, which the published template leaves to the client.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
CONTROL = (
    "<think>",
    "</think>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
"""V3's order; not special in its file either, which keeps them visible to a decoder that drops special tokens."""

DIGITS = r"\p{N}{1,3}"
CJK = "[一-龥぀-ゟ゠-ヿ]+"
WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(texts: Iterable[str], vocabulary: int = VOCABULARY) -> tokenizers.Tokenizer:
    """Learn a tokenizer of `vocabulary` entries, control tokens included, from `texts`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (DIGITS, CJK, WORDS)]
    blind = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, blind])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(CONTROL),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in CONTROL])
    return tokenizer


def chat_template() -> str:
    """The source of the model's chat template."""
    return (resources.files(__package__) / "chat_template.jinja").read_text(encoding="utf-8")


def files(tokenizer: tokenizers.Tokenizer, context: int) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json of a checkpoint folder."""
    config = {
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": chat_template(),
    }
    ids = {"bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(EOS)}
    generation = {**ids, "do_sample": True, "temperature": 0.3, "top_p": 0.95}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": _json(config),
        "chat_template.jinja": chat_template().encode(),
        "generation_config.json": _json(generation),
    }


def write(tokenizer: tokenizers.Tokenizer, folder: Path, context: int) -> None:
    """Write the tokenizer's files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files(tokenizer, context).items():
        (folder / name).write_bytes(content)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
