"""From what a caller says to what the engine takes: token ids, sampling parameters, and every check on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kvern.config import ModelConfig
from kvern.engine.grammar import Grammar
from kvern.engine.params import SamplingParams
from kvern.errors import BadRequestError, CheckpointError, ContextLengthError
from kvern.text.answer_grammar import AnswerGrammars
from kvern.text.conversation import ConversationLike, as_conversation
from kvern.text.fim import FillInTheMiddle
from kvern.text.options import SamplingOptions, TemperatureMapping, mapped_temperature
from kvern.text.output_format import OutputFormat
from kvern.text.parser import PLAIN, Parsing
from kvern.text.template import ChatTemplate
from kvern.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """A request that passed every check: prompt ids, how to sample, where to stop, how to read the answer."""

    prompt: tuple[int, ...]
    params: SamplingParams
    stop: tuple[str, ...]
    parsing: Parsing = PLAIN


class TextSide:
    """A checkpoint's text files: tokenizer, chat template, FIM tokens, recommended sampling.

    Whoever inherits sets `max_context` (prompt and answer together, in tokens), `longer_context` (what a hint says
    after "shorten the prompt") and `vocab_size` (of the model).
    """

    max_context: int
    longer_context: str
    vocab_size: int
    temperature_mapping: TemperatureMapping = "none"

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.folder = folder
        self.tokenizer = Tokenizer.load(folder)
        self.template = ChatTemplate.load(folder, self.tokenizer)
        self.fim = FillInTheMiddle.of(self.tokenizer)
        self.recommended = _read_object(folder / "generation_config.json")
        self.stop_ids = _stop_ids(folder, self.recommended, self.tokenizer)
        self.fingerprint = _fingerprint(folder)

    @cached_property
    def vocab_limit(self) -> int:
        """Ids from here on stand for no token: they pad the model's vocabulary."""
        return self.tokenizer.vocab_limit(self.vocab_size)

    @cached_property
    def grammars(self) -> AnswerGrammars:
        """What makes grammars of formats and tools, over this model's ids."""
        return AnswerGrammars(self.tokenizer, self.vocab_limit)

    def prepare_chat(self, conversation: ConversationLike, options: SamplingOptions) -> Prepared:
        """Check a chat request and turn it into ids. Raises BadRequestError naming the field."""
        chat = as_conversation(conversation)
        ids, parsing = self.encode_chat(chat)
        prepared = replace(self.prepare(ids, options, param="messages"), parsing=parsing)
        return self._held_to(prepared, self.grammars.of(chat, parsing))

    def encode_chat(self, conversation: ConversationLike) -> tuple[list[int], Parsing]:
        """The ids of a conversation, however long, and how to read the answer. Raises BadRequestError."""
        chat = as_conversation(conversation)
        chat.check()
        if self.template is None:
            raise BadRequestError(f"{self.name} has no chat template", hint="use generate, or an instruct model")
        return self.template.prompt(chat)

    def prepare_text(self, prompt: str, options: SamplingOptions, *, allow_special: bool = False) -> Prepared:
        """Check a request to continue a text. Strings like `<|im_end|>` stay text unless `allow_special`."""
        return self.prepare(self.start_ids + self.tokenizer.encode(prompt, allow_special), options)

    def prepare_middle(self, prefix: str, suffix: str, options: SamplingOptions) -> Prepared:
        """Check a fill-in-the-middle request. Raises BadRequestError where the model has no tokens for it."""
        if self.fim is None:
            raise BadRequestError(
                f"{self.name} has no fill-in-the-middle tokens",
                hint="use a model that was trained for it",
                param="suffix",
            )
        encode = self.tokenizer.encode
        ids = self.start_ids + self.fim.arrange(encode(prefix), encode(suffix))
        return self.prepare(ids, options, ends=self.fim.ends)

    def prepare(
        self,
        prompt: Sequence[int],
        options: SamplingOptions,
        *,
        param: str = "prompt",
        ends: Iterable[int] = (),
    ) -> Prepared:
        """Check a request for a prompt of ids; `param` is the field that holds it, `ends` more ids that end the answer.

        Raises BadRequestError that names the field, and both lengths when it cannot fit.
        """
        options.check()
        self._check_ids(prompt, param, self.vocab_size)
        self._check_ids(options.stop_token_ids, "stop_token_ids", self.vocab_size)
        self._check_ids([token for token, _ in options.logit_bias], "logit_bias", self.vocab_size)
        room = self._room(prompt, options, param)
        return Prepared(tuple(prompt), self._params(options, room, frozenset(ends)), options.stop)

    def _held_to(self, prepared: Prepared, grammar: Grammar | None) -> Prepared:
        return prepared if grammar is None else replace(prepared, params=replace(prepared.params, grammar=grammar))

    def with_format(self, prepared: Prepared, form: OutputFormat | None) -> Prepared:
        """Hold an answer to a form from its first character on. Raises BadRequestError."""
        return prepared if form is None else self._held_to(prepared, self.grammars.of_format(form))

    def _room(self, prompt: Sequence[int], options: SamplingOptions, param: str) -> int:
        if not prompt:
            raise BadRequestError("the prompt is empty", param=param)
        room = self.max_context - len(prompt)
        if room < (0 if options.max_tokens == 0 else 1):
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens, and the context holds {self.max_context} with the answer",
                tokens=len(prompt),
                limit=self.max_context - 1,
                param=param,
                hint=f"shorten the {param}{self.longer_context}",
            )
        for name in ("max_tokens", "min_tokens"):
            if (asked := getattr(options, name) or 0) > room:
                raise BadRequestError(
                    f"the prompt has {len(prompt)} tokens and {name} is {asked}, but the context holds "
                    f"{self.max_context}",
                    param=name,
                    hint=f"ask for at most {room}",
                )
        return room

    def _check_ids(self, ids: Iterable[int], param: str, limit: int) -> None:
        for token in ids:
            if not 0 <= token < limit:
                raise BadRequestError(f"token id {token} is outside the vocabulary of {limit}", param=param)

    @property
    def start_ids(self) -> list[int]:
        """What every text begins with: one token, or none."""
        bos = self.tokenizer.bos_id
        return [bos] if self.tokenizer.adds_bos and bos is not None else []

    def _params(self, options: SamplingOptions, room: int, ends: frozenset[int]) -> SamplingParams:
        greedy = self.recommended.get("do_sample") is False
        own = frozenset() if options.ignore_eos else self.stop_ids | ends
        return SamplingParams(
            max_tokens=room if options.max_tokens is None else options.max_tokens,
            min_tokens=options.min_tokens,
            temperature=self._temperature(options, greedy),
            top_p=self._choose(options, "top_p", 1.0),
            top_k=int(self._choose(options, "top_k", 0)),
            min_p=self._choose(options, "min_p", 0.0),
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            repetition_penalty=options.repetition_penalty,
            logit_bias=options.logit_bias,
            seed=options.seed,
            logprobs=options.logprobs,
            prompt_logprobs=options.prompt_logprobs,
            stop_token_ids=tuple(sorted(own | frozenset(options.stop_token_ids))),
            ignore_eos=options.ignore_eos,
            vocab_limit=self.vocab_limit,
        )

    def _temperature(self, options: SamplingOptions, greedy: bool) -> float:
        """What callers say is mapped, and so is the 1 that they mean where they and the checkpoint say nothing."""
        if options.temperature is None and (greedy or self.recommended.get("temperature") is not None):
            return self._choose(options, "temperature", 0.0, recommend=not greedy)
        return mapped_temperature(self._choose(options, "temperature", 1.0), self.temperature_mapping)

    def _choose(self, options: SamplingOptions, name: str, default: float, *, recommend: bool = True) -> float:
        """What the caller says, else what the checkpoint recommends, else the default."""
        given = getattr(options, name)
        if given is not None:
            return float(given)
        value = self.recommended.get(name) if recommend else None
        return float(default if value is None else value)


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
