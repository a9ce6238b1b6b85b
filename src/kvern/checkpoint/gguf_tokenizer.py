"""Writes tokenizer.json and tokenizer_config.json from a GGUF file's metadata, for byte-level BPE vocabularies.

A GGUF file holds tokens, merges, token types and the *name* of its pre-tokenizer; the regular expression behind the
name is in the table below. Ids equal those of transformers' `AutoTokenizer.from_pretrained(gguf_file=...)` and of
llama.cpp, which both read no text normaliser from a GGUF file: text that is not NFC keeps its code points.
Gives up: SentencePiece vocabularies (`llama`, `t5`) and pre-tokenizers that are not in the table.

Source: llama.cpp `src/llama-vocab.cpp`, which names the pre-tokenizers; the tokenizer.json of each family.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from kvern.errors import CheckpointError, UnsupportedModelError

CONTROL, USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type`: markers such as <|im_start|>; words that are never split."""

END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>")
"""Control tokens that end an answer in the families read here, beside the one named by eos_token_id."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST


class Metadata(Protocol):
    """Looks a key of the GGUF metadata up; without a default, a missing key is an error."""

    def __call__(self, key: str, *default: Any) -> Any: ...


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _gpt2_single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "qwen2": lambda: _split(_QWEN2),
    "deepseek-r1-qwen": lambda: _split(_QWEN2),
    "llama-bpe": lambda: _split(_LLAMA3),
    "llama3": lambda: _split(_LLAMA3),
    "llama-v3": lambda: _split(_LLAMA3),
    "smaug-bpe": lambda: _split(_LLAMA3),
    "smollm": _gpt2_single_digits,
    "starcoder": _gpt2_single_digits,
    "refact": _gpt2_single_digits,
    "command-r": _gpt2_single_digits,
    "gpt-2": _gpt2,
}
"""`tokenizer.ggml.pre` -> how text is cut before merges apply."""


def tokenizer_files(metadata: Metadata, context: int) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json` as bytes; `context` is the longest input in tokens.

    Raises UnsupportedModelError, naming the metadata key, for a vocabulary or pre-tokenizer that is not known.
    """
    tokenizer = build_tokenizer(metadata)
    config = json.dumps(_tokenizer_config(metadata, context), indent=2, ensure_ascii=False)
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": config.encode()}


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """The tokenizer that the metadata describes. Token ids are positions in `tokenizer.ggml.tokens`."""
    _refuse_unknown(metadata)
    tokens, merges = metadata("tokenizer.ggml.tokens"), metadata("tokenizer.ggml.merges")
    vocabulary = {_spelled(token): index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # the Rust side raises plain Exception
        raise CheckpointError(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {error}") from error
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[metadata("tokenizer.ggml.pre", "gpt-2")]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_added(metadata, CONTROL)))
    tokenizer.add_tokens(list(_added(metadata, USER_DEFINED)))
    tokenizer.post_processor = _post_processor(metadata)
    return tokenizer


def end_token_ids(metadata: Metadata) -> list[int]:
    """Ids that end an answer, the file's eos_token_id first."""
    tokens = metadata("tokenizer.ggml.tokens", [])
    types = metadata("tokenizer.ggml.token_type", [])
    named = [metadata(f"tokenizer.ggml.{key}_token_id", None) for key in ("eos", "eot")]
    control = {token: index for index, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == CONTROL}
    known = [control[token] for token in END_TOKENS if token in control]
    return list(dict.fromkeys(index for index in named + known if index is not None))


def _refuse_unknown(metadata: Metadata) -> None:
    kind, pre = metadata("tokenizer.ggml.model", None), metadata("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2":
        raise UnsupportedModelError(
            f"tokenizer.ggml.model {kind!r} is not supported",
            hint="convert the Hugging Face folder of the model instead",
        )
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"tokenizer.ggml.pre {pre!r} is not supported",
            hint=f"known are {', '.join(PRE_TOKENIZERS)}; or convert the Hugging Face folder of the model",
        )


def _added(metadata: Metadata, token_type: int) -> Iterator[AddedToken]:
    types = metadata("tokenizer.ggml.token_type", [])
    for token, found in zip(metadata("tokenizer.ggml.tokens"), types, strict=False):
        if found == token_type:
            yield AddedToken(token, normalized=False, special=token_type == CONTROL)


_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
_OTHER = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_SPELLING = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHER)}
"""GPT-2's printable character for each byte: a byte-level vocabulary is written in these 256."""
_ALPHABET = frozenset(BYTE_SPELLING.values())


def _spelled(token: str) -> str:
    """Tokens that are stored as plain text (added ones, in some files) in the byte alphabet of the others."""
    return token if _ALPHABET.issuperset(token) else "".join(BYTE_SPELLING[byte] for byte in token.encode())


def _post_processor(metadata: Metadata) -> processors.PostProcessor:
    """Puts the begin and end tokens around a text where the file says so."""
    bos, eos = _named_token(metadata, "bos"), _named_token(metadata, "eos")
    first = [bos] if bos and metadata("tokenizer.ggml.add_bos_token", False) else []
    last = [eos] if eos and metadata("tokenizer.ggml.add_eos_token", False) else []
    if not first + last:
        return processors.ByteLevel(trim_offsets=False)
    single = [*first, "$A", *last]
    pair = [*single, *[f"{part}:1" for part in (*first, "$B", *last)]]
    ids = {token: metadata("tokenizer.ggml.tokens").index(token) for token in first + last}
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(ids.items()))


def _named_token(metadata: Metadata, key: str) -> str | None:
    index = metadata(f"tokenizer.ggml.{key}_token_id", None)
    tokens = metadata("tokenizer.ggml.tokens")
    if index is None:
        return None
    if index >= len(tokens):
        raise CheckpointError(f"tokenizer.ggml.{key}_token_id {index} is beyond the {len(tokens)} tokens")
    return str(tokens[index])


def _tokenizer_config(metadata: Metadata, context: int) -> dict[str, Any]:
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    config: dict[str, Any] = {field: _named_token(metadata, key) for field, key in names.items()}
    config |= {
        "add_bos_token": bool(metadata("tokenizer.ggml.add_bos_token", False)),
        "add_eos_token": bool(metadata("tokenizer.ggml.add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    template = metadata("tokenizer.chat_template", None)
    return config if template is None else config | {"chat_template": template}
