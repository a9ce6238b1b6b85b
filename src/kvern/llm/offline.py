"""The offline Python API: a model in this process, its engine stepped by whoever waits for an answer.

Prompts given together are computed together. Answers that are streamed side by side advance together as well: a step
serves every request that was started, and each reader finds its own updates. Threads must take turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from kvern.checkpoint.local import ensure_imported
from kvern.checkpoint.packed import checkpoint_state
from kvern.checkpoint.progress import progress_bar
from kvern.checkpoint.reader import CheckpointReader
from kvern.checkpoint.save import Progress
from kvern.config import ModelConfig
from kvern.engine import Engine, EngineSettings
from kvern.engine.request import Update
from kvern.engine.threads import use_threads
from kvern.errors import BusyError
from kvern.llm.opening import Dtype, open_model
from kvern.llm.prepare import Prepared, TextSide
from kvern.llm.text_stream import TextStream
from kvern.text.conversation import ConversationLike
from kvern.text.events import CallArguments, CallStart, Content, Event, Piece, Reasoning
from kvern.text.messages import Completion, ToolCall
from kvern.text.options import SamplingOptions, TemperatureMapping

PATIENCE = 1.0
"""Seconds of silent work before progress is shown."""


class LLM(TextSide):
    """A model in memory. `model` is a checkpoint folder or the name of a model that was pulled.

    Parameters: dtype, "auto" (as stored; chosen for this machine), "bf16" or "f32"; max_context, prompt and answer
    together in tokens; threads, default all cores this process may use; settings, the engine's (its max_context
    gives way to the argument); engine, one to use instead of loading the weights (the text files still come from
    `model`); progress(done, total, what), called with bytes while the model is imported or packed for the first time,
    default a bar on stderr when that takes more than a second; temperature_mapping, "deepseek_api" where temperatures
    mean what they mean to DeepSeek's service. Raises KvernError with a hint.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: Dtype = "auto",
        max_context: int | None = None,
        threads: int | None = None,
        settings: EngineSettings | None = None,
        engine: Engine | None = None,
        progress: Progress | None = None,
        temperature_mapping: TemperatureMapping = "none",
    ) -> None:
        chosen = settings or EngineSettings(drafts="auto")
        if max_context is not None:
            chosen = replace(chosen, max_context=max_context)
        use_threads(threads)
        with progress_bar(after=PATIENCE) as bar:
            folder = resolve(model, progress or bar)
            super().__init__(folder, served_name(model))
            if engine is None:
                opened = open_model(folder, dtype, mtp=_has_mtp(folder, chosen), progress=progress or bar)
                engine = Engine(opened, settings=chosen, identity=checkpoint_state(folder))
        self.engine = engine
        self.temperature_mapping = temperature_mapping
        self.max_context, self.longer_context = self.engine.max_context, self.engine.longer_context
        self.vocab_size = self.engine.vocab_size
        self._driver = _Driver(self.engine)

    @overload
    def generate(self, prompts: str, **sampling: Any) -> Completion: ...
    @overload
    def generate(self, prompts: Sequence[str], **sampling: Any) -> list[Completion]: ...
    def generate(self, prompts: str | Sequence[str], **sampling: Any) -> Completion | list[Completion]:
        """Continue one prompt, or several at once, without a chat template. Options: those of SamplingOptions."""
        options = SamplingOptions.of(**sampling)
        if isinstance(prompts, str):
            return self._complete([self.prepare_text(prompts, options)])[0]
        return self._complete([self.prepare_text(prompt, options) for prompt in prompts])

    def fill(self, prefix: str, suffix: str, **sampling: Any) -> Completion:
        """Write what belongs between the two. Raises BadRequestError for a model without fill-in-the-middle tokens."""
        return self._complete([self.prepare_middle(prefix, suffix, SamplingOptions.of(**sampling))])[0]

    def chat(self, messages: ConversationLike, **sampling: Any) -> Completion:
        """Answer a conversation (or one user message). Options: those of SamplingOptions."""
        return self._complete([self.prepare_chat(messages, SamplingOptions.of(**sampling))])[0]

    def stream(self, messages: ConversationLike, **sampling: Any) -> Iterator[str]:
        """Answer a conversation piece by piece. The request is checked at once, not at the first piece."""
        prepared = self.prepare_chat(messages, SamplingOptions.of(**sampling))
        events = (event for piece in self.run(prepared) for event in piece.events)
        return (event.text for event in events if isinstance(event, Content))

    def run(self, prepared: Prepared) -> Iterator[Piece]:
        """Generate piece by piece; closing the iterator cancels the request."""
        return self._pieces(self._driver.start(prepared), prepared)

    def close(self) -> None:
        """Finish what is being written to the engine's cache_dir, where it has one, and free that for others."""
        self.engine.close()

    def _complete(self, prepared: Sequence[Prepared]) -> list[Completion]:
        started = [(self._driver.start(one), one) for one in prepared]
        return [collect(self._pieces(request_id, one), len(one.prompt)) for request_id, one in started]

    def _pieces(self, request_id: int, prepared: Prepared) -> Iterator[Piece]:
        stream = TextStream(self.tokenizer, prepared)
        try:
            for update in self._driver.updates(request_id):
                piece = stream.push(update)
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self._driver.drop(request_id)


class _Driver:
    """Steps the engine for whoever waits, and keeps for each request the updates that nobody has read yet.

    Nobody else may step that engine: an update goes to whoever made the step.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._unread: dict[int, deque[Update]] = {}

    def start(self, prepared: Prepared) -> int:
        """Queue a request, stepping until the queue has room."""
        while True:
            try:
                request_id = self._engine.add(prepared.prompt, prepared.params)
            except BusyError:
                self._step()
            else:
                self._unread[request_id] = deque()
                return request_id

    def updates(self, request_id: int) -> Iterator[Update]:
        """The request's updates up to its end. Raises RuntimeError where another thread stepped the engine past it."""
        unread = self._unread[request_id]
        while True:
            while unread:
                yield unread.popleft()
            if not self._engine.has_work():
                raise RuntimeError("the end of an answer went to another thread: an LLM that a server runs is its own")
            self._step()

    def drop(self, request_id: int) -> None:
        """Forget a request; cancels it where it still runs."""
        if self._unread.pop(request_id, None) is not None:
            self._engine.cancel(request_id)

    def _step(self) -> None:
        for update in self._engine.step():
            if update.request_id in self._unread:
                self._unread[update.request_id].append(update)


def collect(pieces: Iterable[Piece], prompt_tokens: int) -> Completion:
    """Join the pieces of a finished answer."""
    parts = list(pieces)
    ids = tuple(token for piece in parts for token in piece.token_ids)
    reason = parts[-1].finish_reason if parts else None
    if reason is None:
        raise RuntimeError("an answer that was not cancelled ended without a finish reason")
    events = [event for piece in parts for event in piece.events]
    return Completion(
        "".join(piece.text for piece in parts),
        ids,
        reason,
        prompt_tokens,
        len(ids),
        cached_tokens=sum(piece.cached_tokens for piece in parts),
        scores=tuple(score for piece in parts for score in piece.scores),
        prompt_scores=tuple(score for piece in parts for score in piece.prompt_scores),
        content="".join(event.text for event in events if isinstance(event, Content)),
        reasoning="".join(event.text for event in events if isinstance(event, Reasoning)),
        tool_calls=_calls(events),
        stopped_by=parts[-1].stopped_by,
    )


def _calls(events: Sequence[Event]) -> tuple[ToolCall, ...]:
    arguments: dict[int, str] = {}
    for event in events:
        if isinstance(event, CallArguments):
            arguments[event.index] = arguments.get(event.index, "") + event.text
    starts = (event for event in events if isinstance(event, CallStart))
    return tuple(ToolCall(start.id, start.name, arguments.get(start.index, "")) for start in starts)


def resolve(model: str | Path, progress: Progress | None = None) -> Path:
    """Return the V3 checkpoint folder of a path or of a pulled model's name. A GGUF file, or a folder of the Llama or
    Qwen2 family, is imported at first use. Reaches no network: raises NotFoundError when the model was not pulled.
    """
    return ensure_imported(model, "bf16", progress)


def served_name(model: str | Path) -> str:
    """The id under which a model is served: its known name, or the folder's."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else str(model)


def _has_mtp(folder: Path, chosen: EngineSettings) -> bool:
    """Whether an MTP layer is to draft and the checkpoint has it: many leave out what their config.json announces."""
    config = ModelConfig.load(folder)
    if chosen.drafts not in ("auto", "mtp") or not config.num_nextn_predict_layers:
        return False
    first = f"model.layers.{config.num_hidden_layers}."
    return any(name.startswith(first) for name in CheckpointReader(folder).names())
