"""The offline Python API, and the one request path that every interface uses.

    messages -> chat template -> token ids -> engine -> detokenizer -> stop strings -> pieces of text

`prepare` does what can fail because of the request (template, lengths) and `run` what remains, so that a server can
refuse before it has sent a byte. The engine runs one request at a time; calls from several threads must take turns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, overload

import torch

from kvern.checkpoint.load import load
from kvern.checkpoint.pull import ensure_imported
from kvern.checkpoint.save import Progress
from kvern.config import ModelConfig
from kvern.engine import Engine, SamplingParams
from kvern.engine.dtype import choose
from kvern.errors import BadRequestError, CheckpointError, ConfigError
from kvern.model import Transformer
from kvern.ops import native
from kvern.text.detokenizer import Detokenizer
from kvern.text.messages import Completion, FinishReason, MessageLike, SamplingOptions, as_messages
from kvern.text.stop import StopMatcher
from kvern.text.template import ChatTemplate
from kvern.text.tokenizer import Tokenizer

Dtype: TypeAlias = Literal["auto", "bf16", "f32"]
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


class TokenEngine(Protocol):
    """What the request path needs of an engine: token ids in, token ids out."""

    max_context: int

    def generate(
        self, prompt: Sequence[int], params: SamplingParams, cancelled: Callable[[], bool] = ...
    ) -> Iterator[int]:
        """Yield the answer's ids; a stop id, when one is drawn, is the last."""


@dataclass(frozen=True)
class Prepared:
    """A request that passed every check: prompt ids, how to sample, where to stop."""

    prompt: tuple[int, ...]
    params: SamplingParams
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """The effect of one generated token: the text that became certain. The last piece carries the finish reason.

    `token_id` is None where the end alone released held-back text.
    """

    text: str
    token_id: int | None
    finish_reason: FinishReason | None = None


class LLM:
    """A model in memory. `model` is a checkpoint folder or the name of a model that was pulled.

    Parameters: dtype, "auto" (as stored; chosen for this machine), "bf16" or "f32"; max_context, prompt and answer
    together in tokens; threads, default all cores this process may use; engine, one to use instead of loading the
    weights (the text files still come from `model`). Raises KvernError with a hint.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: Dtype = "auto",
        max_context: int | None = None,
        threads: int | None = None,
        engine: TokenEngine | None = None,
    ) -> None:
        folder = resolve(model)
        self.name = served_name(model)
        self.tokenizer = Tokenizer.load(folder)
        self.template = ChatTemplate.load(folder, self.tokenizer)
        self.recommended = _read_object(folder / "generation_config.json")
        self.stop_ids = _stop_ids(folder, self.recommended, self.tokenizer)
        self.fingerprint = _fingerprint(folder)
        if threads is not None:
            torch.set_num_threads(threads)
            native.set_threads(threads)
        self.engine = engine or Engine(_load(folder, dtype), max_context=max_context)

    @property
    def max_context(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return self.engine.max_context

    @overload
    def generate(self, prompts: str, **sampling: Any) -> Completion: ...
    @overload
    def generate(self, prompts: Sequence[str], **sampling: Any) -> list[Completion]: ...
    def generate(self, prompts: str | Sequence[str], **sampling: Any) -> Completion | list[Completion]:
        """Continue one prompt or several, without a chat template. Options: those of SamplingOptions."""
        options = SamplingOptions.of(**sampling)
        if isinstance(prompts, str):
            return self._complete(self.prepare(self._prompt_ids(prompts), options))
        return [self._complete(self.prepare(self._prompt_ids(prompt), options)) for prompt in prompts]

    def chat(self, messages: str | Sequence[MessageLike], **sampling: Any) -> Completion:
        """Answer a conversation (or one user message). Options: those of SamplingOptions."""
        return self._complete(self.prepare_chat(messages, SamplingOptions.of(**sampling)))

    def stream(self, messages: str | Sequence[MessageLike], **sampling: Any) -> Iterator[str]:
        """Answer a conversation piece by piece. The request is checked at once, not at the first piece."""
        prepared = self.prepare_chat(messages, SamplingOptions.of(**sampling))
        return (piece.text for piece in self.run(prepared) if piece.text)

    def prepare_chat(self, messages: str | Sequence[MessageLike], options: SamplingOptions) -> Prepared:
        """Check a chat request and turn it into ids. Raises BadRequestError naming the field."""
        if self.template is None:
            raise BadRequestError(f"{self.name} has no chat template", hint="use generate, or an instruct model")
        return self.prepare(self.template.encode(as_messages(messages)), options)

    def prepare(self, prompt: Sequence[int], options: SamplingOptions) -> Prepared:
        """Check a request for a prompt of ids. Raises BadRequestError that names both lengths when it cannot fit."""
        options.check()
        room = self.max_context - len(prompt)
        if room < 1:
            raise BadRequestError(
                f"the prompt has {len(prompt)} tokens, and the context holds {self.max_context} with the answer",
                param="messages",
                hint="shorten the messages, or serve with a larger --max-context",
            )
        if options.max_tokens is not None and options.max_tokens > room:
            raise BadRequestError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {options.max_tokens}, but the context holds "
                f"{self.max_context}",
                param="max_tokens",
                hint=f"ask for at most {room}",
            )
        return Prepared(tuple(prompt), self._params(options, room), options.stop)

    def run(self, prepared: Prepared, cancelled: Callable[[], bool] = lambda: False) -> Generator[Piece]:
        """Generate; one piece a token, the last with the finish reason, and none after `cancelled()` became true."""
        detokenizer, matcher = Detokenizer(self.tokenizer), StopMatcher(prepared.stop)
        for token_id in self.engine.generate(prepared.prompt, prepared.params, cancelled):
            if token_id in self.stop_ids:
                yield Piece(matcher.push(detokenizer.finish()) + matcher.finish(), token_id, "stop")
                return
            text = matcher.push(detokenizer.push(token_id))
            if matcher.matched:
                yield Piece(text, token_id, "stop")
                return
            yield Piece(text, token_id)
        if not cancelled():
            rest = matcher.push(detokenizer.finish())
            yield Piece(rest + matcher.finish(), None, "stop" if matcher.matched else "length")

    def _complete(self, prepared: Prepared) -> Completion:
        return collect(self.run(prepared), len(prepared.prompt))

    def _prompt_ids(self, prompt: str) -> list[int]:
        bos = self.tokenizer.bos_id
        start = [bos] if self.tokenizer.adds_bos and bos is not None else []
        return start + self.tokenizer.encode(prompt)

    def _params(self, options: SamplingOptions, room: int) -> SamplingParams:
        greedy = self.recommended.get("do_sample") is False
        temperature = 0.0 if greedy else self.recommended.get("temperature", 1.0)
        top_p = self.recommended.get("top_p", 1.0)
        return SamplingParams(
            max_tokens=room if options.max_tokens is None else options.max_tokens,
            temperature=float(temperature if options.temperature is None else options.temperature),
            top_p=float(top_p if options.top_p is None else options.top_p),
            seed=options.seed,
            stop_token_ids=tuple(sorted(self.stop_ids)),
            vocab_limit=self.tokenizer.vocab_limit,
        )


def collect(pieces: Iterator[Piece], prompt_tokens: int) -> Completion:
    """Join the pieces of a finished answer."""
    parts = list(pieces)
    ids = tuple(piece.token_id for piece in parts if piece.token_id is not None)
    reason = parts[-1].finish_reason if parts else None
    if reason is None:
        raise RuntimeError("an answer that was not cancelled ended without a finish reason")
    return Completion("".join(piece.text for piece in parts), ids, reason, prompt_tokens, len(ids))


def resolve(model: str | Path, progress: Progress | None = None) -> Path:
    """Return the V3 checkpoint folder of a path or of a pulled model's name. A GGUF file, or a folder of the Llama or
    Qwen2 family, is imported at first use. Reaches no network: raises NotFoundError when the model was not pulled.
    """
    return ensure_imported(model, "bf16", progress)


def served_name(model: str | Path) -> str:
    """The id under which a model is served: its known name, or the folder's."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else str(model)


def _load(folder: Path, dtype: str) -> Transformer:
    """Open the weights. "auto" measures which dtypes this machine multiplies fastest (under a second)."""
    if dtype == "auto":
        choice = choose(ModelConfig.load(folder))
        return load(folder, dtype=choice.weight_dtype, activation_dtype=choice.activation_dtype)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of auto, {', '.join(DTYPES)}, not {dtype!r}")
    return load(folder, dtype=DTYPES[dtype])


def _stop_ids(folder: Path, recommended: dict[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    given = recommended.get("eos_token_id")
    named = {given} if isinstance(given, int) else set(given or ())
    own = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    return frozenset({*ModelConfig.load(folder).eos_token_id, *named, *own})


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"not JSON: {error}", file=path) from error
    if not isinstance(value, dict):
        raise CheckpointError("must hold a JSON object", file=path)
    return value


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    return f"fp_{digest.hexdigest()[:12]}"
