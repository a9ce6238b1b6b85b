"""The checkpoint's own tokenizer (tokenizer.json and tokenizer_config.json), with control tokens kept out of user text.

A *control token* is an added token that is more than white space: `<|im_end|>`, `<think>`. It matters little whether
the file calls it special: DeepSeek's file does so for four of 818, and a user who types the assistant's token must not
be able to speak as the assistant. So there are two encoders: the file's own, which turns such strings into control ids,
and a *plain* one without them, in which they are ordinary characters. On text without any control string
both give the same ids. Added tokens made of white space stay in both: they are text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from kvern.errors import CheckpointError

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SENTENCEPIECE_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A tokenizer read from a checkpoint folder. Threads may share it.

    `named_tokens`: the texts of bos_token, eos_token and so on. Nothing here lists the whole vocabulary: that takes a
    quarter of the time in which it is read.
    """

    def __init__(self, definition: str, config: dict[str, Any]) -> None:
        self._definition = definition
        self._full = tokenizers.Tokenizer.from_str(definition)
        added = self._full.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special = {token_id for token_id, token in added.items() if token.special}
        self.control = {token.content: i for i, token in added.items() if token.content.strip()}
        self.named_tokens = _named_tokens(config)
        self.adds_bos = bool(config.get("add_bos_token"))
        self.config = config

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the two files of a checkpoint folder. Raises CheckpointError when one is missing or malformed."""
        path = folder / "tokenizer.json"
        try:
            tokenizer = cls(path.read_text(encoding="utf-8"), _read_config(folder / "tokenizer_config.json"))
        except FileNotFoundError as error:
            raise CheckpointError(
                "there is no tokenizer", file=path, hint="convert the model with its files"
            ) from error
        except CheckpointError:
            raise
        except Exception as error:  # the tokenizers library raises a bare Exception
            raise CheckpointError(f"not a tokenizer: {error}", file=path) from error
        if not tokenizer._full.get_vocab_size():
            raise CheckpointError("a tokenizer without tokens", file=path)
        return tokenizer

    def vocab_limit(self, vocab_size: int) -> int:
        """One more than the largest id below `vocab_size` that stands for a token.

        A model's vocabulary is often padded beyond that, and ids from there on must never be sampled.
        """
        used = (size for size in range(vocab_size, 0, -1) if self._full.id_to_token(size - 1) is not None)
        return next(used, 0)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Return the ids of `text`, nothing added. Strings like `<|im_end|>` become control ids only when allowed."""
        encoder = self._full if allow_special or not self.find_control(text) else self._plain
        return list(encoder.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, nothing added and no control ids: as `encode` does, on all cores."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        return self._full.decode(ids, skip_special_tokens=True)

    def find_control(self, text: str) -> re.Match[str] | None:
        """Return the first control string in `text`, or None."""
        return self.control_pattern.search(text)

    def begun_control(self, text: str) -> int:
        """Return the length of the longest end of `text` that is a proper beginning of a control string."""
        longest = min(self._longest_control - 1, len(text))
        return next((length for length in range(longest, 0, -1) if text[-length:] in self._control_beginnings), 0)

    def is_visible(self, token_id: int) -> bool:
        """Whether this id plays a part in `decode`: it is no special token and there is such a token."""
        return token_id not in self._special and self._full.id_to_token(token_id) is not None

    def is_byte_token(self, token_id: int) -> bool:
        """Whether this id is one byte of a byte-fallback vocabulary."""
        token = self._full.model.id_to_token(token_id)
        return token is not None and BYTE_TOKEN.fullmatch(token) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this id stands for in a text: often whole characters, sometimes part of one."""
        if token_id in self._added:
            return self._added[token_id].encode()
        name = self._full.id_to_token(token_id) or ""
        if self.is_byte_token(token_id):
            return bytes([int(name[3:5], 16)])
        if all(character in self._byte_alphabet for character in name):
            return bytes(self._byte_alphabet[character] for character in name)
        return name.replace(SENTENCEPIECE_SPACE, " ").encode()

    @property
    def bos_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._id_of("eos_token")

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._full.get_vocab_size(), 1 + max(self._added, default=0))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the two files: what ids depend on."""
        return hashlib.sha256(f"{self._definition}\0{json.dumps(self.config, sort_keys=True)}".encode()).hexdigest()

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches every control string, the longest first; matches nothing when there is none."""
        return re.compile(
            "|".join(re.escape(token) for token in sorted(self.control, key=len, reverse=True)) or r"(?!)"
        )

    @cached_property
    def _control_beginnings(self) -> frozenset[str]:
        return frozenset(text[:length] for text in self.control for length in range(1, len(text)))

    @cached_property
    def _longest_control(self) -> int:
        return max(map(len, self.control), default=0)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(_without_control(self._definition, set(self.control)))

    @cached_property
    def _byte_alphabet(self) -> dict[str, int]:
        """Character to byte of a byte-level vocabulary; empty for other vocabularies."""
        decoder = json.loads(self._definition).get("decoder") or {}
        parts = [decoder, *decoder.get("decoders", ())]
        return byte_alphabet() if any(part.get("type") == "ByteLevel" for part in parts) else {}

    def _id_of(self, name: str) -> int | None:
        token = self.named_tokens.get(name)
        return None if token is None else self._full.token_to_id(token)


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise CheckpointError("must hold a JSON object", file=path)
    return config


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    given = {name: config.get(name) for name in NAMED_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in given.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _without_control(definition: str, control: set[str]) -> str:
    """Drop control tokens from a tokenizer.json: the added ones, and their entries in the vocabulary itself.

    An entry that merges produce, or that stands for the unknown, has to stay for the file to remain valid.
    """
    parts = json.loads(definition)
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in control]
    parts["post_processor"] = None
    model = parts["model"]
    if isinstance(model.get("vocab"), dict):
        needed = _merged(model.get("merges", ())) | {model.get("unk_token")}
        model["vocab"] = {t: i for t, i in model["vocab"].items() if t not in control or t in needed}
    return json.dumps(parts)


def _merged(merges: Iterable[str | Sequence[str]]) -> set[str]:
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return {token for left, right in pairs for token in (left, right, left + right)}
