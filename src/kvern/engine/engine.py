"""The engine: many requests share every step, token ids in, token ids out.

    step = take what arrived, schedule, draft, run, sample, update

`add` and `cancel` may be called from any thread: they only check and leave a note, which the next step picks up. All
else belongs to the one thread that calls `step`.
"""

from __future__ import annotations

import itertools
import secrets
from collections import deque
from collections.abc import Iterator, Sequence

from kvern.engine.block_manager import BlockManager
from kvern.engine.cache import PagedCache, row_bytes, rows_dtype
from kvern.engine.drawing import Drawing
from kvern.engine.params import SamplingParams
from kvern.engine.prefix_loading import PrefixLoader
from kvern.engine.request import FinishReason, Request, Update
from kvern.engine.runner import Computed, Runner, hold_absorbed_weights, wants_mtp
from kvern.engine.sampler import Row, Sampled, logprobs_of, sample
from kvern.engine.scheduler import Chunk, Scheduler
from kvern.engine.settings import Counts, EngineSettings, EngineStats
from kvern.engine.speculative import speculator
from kvern.engine.spill_opening import open_spill
from kvern.errors import BadRequestError, BusyError, KvernError, NonFiniteLogitsError
from kvern.model import Model
from kvern.plan.hardware import machine

FULL_CONTEXTS = 8
"""Full contexts that the cache holds by default, where memory allows."""

LOADING_SECONDS = 0.02
"""How long a step without anything to compute waits for the disk."""


class Engine:
    """Runs `model` for many requests at once."""

    def __init__(self, model: Model, *, settings: EngineSettings | None = None, identity: str = "") -> None:
        """`identity` tells which weights the model has; a cache on disk needs to know."""
        self.settings = settings or EngineSettings()
        self.model = model
        self.vocab_size = model.config.vocab_size
        self.stop_ids = frozenset(model.config.eos_token_id)
        blocks = cache_blocks(model, self.settings)
        self.max_context = min(longest_context(model, self.settings), blocks * self.settings.block_size)
        self.longer_context = how_longer(self.max_context, model, self.settings)
        hold_absorbed_weights(model)
        dtype = rows_dtype(model.activation_dtype, self.settings.cache_dtype)
        self.cache = PagedCache(model.config, blocks, self.settings.block_size, dtype)
        self.runner = Runner(model, self.cache, mtp=wants_mtp(model, self.settings))
        self.spill = open_spill(self.settings, self.runner, identity)
        self._loader: PrefixLoader | None = None
        self._ids = itertools.count()
        self.reset()

    def reset(self) -> None:
        """Forget every request and everything cached: how the engine begins, and begins again after a fault."""
        settings = self.settings
        expected = rows_dtype(self.model.activation_dtype, settings.cache_dtype)
        assert self.cache.dtype is expected, "cached prefixes would mix dtypes"
        blocks = len(self.cache.rows[0]) // settings.block_size
        if self._loader is not None:
            self._loader.abandon()
        self.blocks = BlockManager(blocks, settings.block_size, settings.prefix_caching)
        self._loader = None if self.spill is None else PrefixLoader(self.blocks, self.spill)
        self.scheduler = Scheduler(self.blocks, settings.step_tokens, settings.max_running, loader=self._loader)
        self._live: dict[int, Request] = {}
        self._arrived: deque[Request] = deque()
        self._cancelled: deque[int] = deque()
        self._counts = Counts()
        self.speculator = speculator(self.runner, settings)

    def add(self, prompt: Sequence[int], params: SamplingParams, *, priority: int = 0, salt: bytes = b"") -> int:
        """Queue a request and return its id; lower priorities go first, equal `salt`s share their prefixes.

        Raises BadRequestError when it can never be served (empty, an id outside the vocabulary, longer than the
        context) and BusyError when the queue is full.
        """
        check_request(prompt, params, self.vocab_size, self.max_context, self.longer_context)
        if len(self.scheduler.waiting) + len(self._arrived) >= self.settings.max_waiting:
            raise BusyError(f"{self.settings.max_waiting} requests are waiting already", retry_after=1)
        number = next(self._ids)
        self._arrived.append(
            Request(
                id=number,
                params=params,
                prompt_length=len(prompt),
                tokens=list(prompt),
                priority=priority,
                arrival=number,
                salt=salt,
                seed=secrets.randbits(63) if params.seed is None else params.seed,
                limit=min(len(prompt) + params.max_tokens, self.max_context),
                matcher=None if params.grammar is None else params.grammar.matcher(),
            )
        )
        return number

    def cancel(self, request_id: int) -> None:
        """End a request at the next step; unknown and finished ones are none of its business."""
        self._cancelled.append(request_id)

    def step(self) -> list[Update]:
        """Compute one step and return what it did for each request it touched."""
        updates = self._take_notes()
        chunks = self.scheduler.schedule()
        if chunks:
            if self.speculator is not None:
                chunks = self.speculator.extend(chunks, self.scheduler, self.runner)
            updates += self._advance(chunks, self.runner.run(chunks))
            self._counts.steps += 1
        elif self._loader is not None:
            self._loader.wait(LOADING_SECONDS)
        if self.settings.check_every_step:
            self.check()
        return updates

    def generate(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[int]:
        """The answer to one request, id by id, for an engine that serves nobody else meanwhile."""
        number = self.add(prompt, params)
        return self._alone(number)

    def _alone(self, number: int) -> Iterator[int]:
        try:
            while number in self.live():
                for update in self.step():
                    if update.error is not None:
                        raise update.error
                    yield from update.tokens
        finally:
            self.cancel(number)
            self.step_cancelled()

    def step_cancelled(self) -> list[Update]:
        """Only pick up what arrived and end what was cancelled, without computing."""
        return self._take_notes()

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._live or self._arrived or self._cancelled)

    def live(self) -> list[int]:
        """Ids of the requests that have not finished."""
        return [*self._live, *(request.id for request in list(self._arrived))]

    def stats(self) -> EngineStats:
        """A snapshot for metrics."""
        scheduler, counts, drafts = self.scheduler, self._counts, self.speculator and self.speculator.counts
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._arrived),
            cache_blocks=self.blocks.blocks,
            cache_blocks_used=self.blocks.blocks - self.blocks.free_blocks,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
            prompt_tokens=counts.prompt_tokens,
            generated_tokens=counts.generated_tokens,
            steps=counts.steps,
            finished=dict(counts.finished),
            drafts=drafts.drafts if drafts else 0,
            draft_tokens=drafts.tokens if drafts else 0,
            accepted_by_position=tuple(drafts.accepted) if drafts else (),
            disk=None if self.spill is None else self.spill.stats(),
        )

    def check(self) -> None:
        """Raise AssertionError unless every block is accounted for."""
        loading = () if self._loader is None else self._loader.owned()
        self.blocks.check([*(request.blocks for request in self._live.values()), *loading])

    def close(self) -> None:
        """Finish what is being written to the disk. The engine computes on, but keeps nothing there any more."""
        if self.spill is not None:
            self.spill.close()

    def _take_notes(self) -> list[Update]:
        """Move what other threads left into the queues."""
        cancelled = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
        for _ in range(len(self._arrived)):
            request = self._arrived.popleft()
            self._live[request.id] = request
            self.scheduler.add(request)
            self._counts.prompt_tokens += request.prompt_length
        requests = [self._live[number] for number in cancelled if number in self._live]
        return [self._finish(request, "cancelled") for request in dict.fromkeys(requests)]

    def _advance(self, chunks: Sequence[Chunk], computed: Computed) -> list[Update]:
        """Draw the next tokens of each request that has all its latents, account for the chunks, report."""
        drawings = [self._drawing(chunk, computed, rows) for chunk, rows in zip(chunks, computed.rows, strict=True)]
        going = [one for one in drawings if one.rows and one.finish is None]
        while going:
            rows = [one.rows[len(one.drawn)] for one in going]
            logits = computed.logits if rows == list(range(len(computed.logits))) else computed.logits[rows]
            drawn = sample(logits, [self._row(one.chunk.request) for one in going])
            going = [one for one, token in zip(going, drawn, strict=True) if self._take(one, token)]
        for one in drawings:
            self.scheduler.computed(Chunk(one.chunk.request, one.count))
        if self.speculator is not None:
            self.speculator.learn(drawings, computed, self.runner)
        if self.spill is not None:
            for one in drawings:
                if one.finish != "error":
                    self.spill.offer(one.chunk.request)
        return [update for one in drawings for update in self._updates(one)]

    def _drawing(self, chunk: Chunk, computed: Computed, rows: range) -> Drawing:
        """A chunk that was computed: rows to draw from where its request has no token left, or the end that it met."""
        request = chunk.request
        error = self._keep_prompt_logprobs(chunk, computed, rows)
        if error is not None:
            return Drawing(chunk, finish="error", error=error)
        if chunk.count < request.pending:
            return Drawing(chunk)
        finish: FinishReason | None = "length" if len(request.tokens) >= request.limit else None
        return Drawing(chunk, rows[-1 - len(chunk.drafts) :], finish)

    def _take(self, one: Drawing, drawn: Sampled) -> bool:
        """Append a token to its request; whether the next draft is that token, so that one more can be drawn."""
        request = one.chunk.request
        one.drawn.append(drawn)
        if drawn.error is not None:
            one.finish, one.error = "error", drawn.error
            return False
        request.tokens.append(drawn.token)
        self._counts.generated_tokens += 1
        try:
            ended = self._ends(request, drawn.token)
        except KvernError as error:
            one.finish, one.error = "error", error
            return False
        if ended:
            one.finish = "stop"
        elif len(request.tokens) >= request.limit:
            one.finish = "length"
        return one.finish is None and one.confirmed

    def _ends(self, request: Request, token: int) -> bool:
        """Whether an answer ends with its newest token: a stop id, or the last one that its grammar can take."""
        if token in self._stops(request):
            return True
        if request.matcher is None:
            return False
        request.matcher.advance(token)
        return request.matcher.is_done

    def _updates(self, one: Drawing) -> list[Update]:
        """What happened to a request: nothing, tokens, its end; tokens before an error have an update of their own."""
        request, drawn = one.chunk.request, [token for token in one.drawn if token.error is None]
        if one.finish is None:
            return [_report(request, drawn)] if drawn else []
        if one.finish == "error" and drawn:
            return [_report(request, drawn), self._finish(request, "error", error=one.error)]
        return [self._finish(request, one.finish, drawn, one.error)]

    def _row(self, request: Request) -> Row:
        """What the sampler needs to know of a request."""
        stops = self._stops(request)
        return Row(request.params, request.seed, request.tokens, request.prompt_length, stops, request.matcher)

    def _finish(
        self, request: Request, reason: FinishReason, drawn: Sequence[Sampled] = (), error: KvernError | None = None
    ) -> Update:
        del self._live[request.id]
        if reason == "error":
            self.blocks.unseal(request.blocks)
        if self.spill is not None:
            self.spill.ended(request, trusted=reason != "error")
        self.scheduler.remove(request)
        if self.speculator is not None:
            self.speculator.forget(request)
        self._counts.finished[reason] += 1
        return _report(request, drawn, reason, error)

    def _stops(self, request: Request) -> frozenset[int]:
        own = frozenset(request.params.stop_token_ids)
        return own if request.params.ignore_eos else own | self.stop_ids

    def _keep_prompt_logprobs(self, chunk: Chunk, computed: Computed, rows: range) -> KvernError | None:
        """The logits of a prompt token tell the log-probability of the next one. Returns why they could not."""
        request, first = chunk.request, chunk.request.computed
        if not request.params.prompt_logprobs or first >= request.prompt_length:
            return None
        following = request.tokens[first + 1 : min(first + 1 + len(rows), request.prompt_length)]
        logits = computed.logits[rows.start : rows.start + len(following)]
        known = request.prompt_logprobs[: first + 1] or [None]
        try:
            request.prompt_logprobs = [*known, *logprobs_of(logits, following, request.params)]
        except NonFiniteLogitsError as error:
            return error
        return None


def _report(
    request: Request, drawn: Sequence[Sampled], reason: FinishReason | None = None, error: KvernError | None = None
) -> Update:
    first, request.reported = not request.reported, True
    return Update(
        request_id=request.id,
        tokens=tuple(one.token for one in drawn),
        logprobs=tuple(one.logprob for one in drawn if one.logprob is not None),
        finish=reason,
        error=error,
        cached_tokens=(request.cached_tokens or 0) if first else 0,
        prompt_logprobs=tuple(request.prompt_logprobs) if first else (),
        started=request.started if first else None,
    )


def check_request(
    prompt: Sequence[int], params: SamplingParams, vocab_size: int, max_context: int, longer_context: str
) -> None:
    """Raise BadRequestError, with both numbers, for a request that can never be served."""
    if not prompt:
        raise BadRequestError("the prompt is empty", param="prompt")
    least = 0 if params.prompt_logprobs else 1
    if len(prompt) > max_context - least:
        raise BadRequestError(
            f"the prompt has {len(prompt)} tokens and the context holds {max_context}, answer included",
            hint=f"shorten the prompt{longer_context}",
            param="prompt",
        )
    if params.max_tokens < least:
        raise BadRequestError(f"max_tokens must be at least {least}, not {params.max_tokens}", param="max_tokens")
    outside = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise BadRequestError(f"token id {outside} is outside the vocabulary of {vocab_size}", param="prompt")


def longest_context(model: Model, settings: EngineSettings) -> int:
    """Tokens of prompt and answer: the model's limit, or less where the settings say so."""
    limit = model.config.max_position_embeddings
    return min(settings.max_context or limit, limit)


def how_longer(max_context: int, model: Model, settings: EngineSettings) -> str:
    """What else helps, besides a shorter prompt: a setting, where one is the limit; else the model's own is named."""
    limit = model.config.max_position_embeddings
    if max_context >= limit:
        return f"; {limit} tokens are the model's maximum"
    option = "--max-context" if max_context == settings.max_context else "--cache-tokens"
    return f", or serve with a larger {option}; the model's maximum is {limit}"


def cache_blocks(model: Model, settings: EngineSettings) -> int:
    """Blocks of the cache: as set, or up to eight full contexts within half of the memory that is free."""
    if settings.cache_tokens is not None:
        return max(1, settings.cache_tokens // settings.block_size)
    layers = model.config.num_hidden_layers + model.config.num_nextn_predict_layers
    token_bytes = layers * row_bytes(model.config, rows_dtype(model.activation_dtype, settings.cache_dtype))
    tokens = min(FULL_CONTEXTS * longest_context(model, settings), machine().memory_available // 2 // token_bytes)
    return max(1, -(-tokens // settings.block_size))
