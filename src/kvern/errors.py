"""One tree of errors for the whole of Kvern.

Every error carries what a person needs (`message`, without a full stop, and `hint`, what to do about it) and what a
protocol needs (`status` for HTTP, `code` for the body, `param` for the request field, `exit_code` for the shell).
Layers raise these; only `server` and `cli` turn them into responses or lines on stderr.
"""

from __future__ import annotations

from pathlib import Path


class KvernError(Exception):
    """Base of all errors raised on purpose. `status` is the HTTP status, `code` the stable machine-readable name."""

    status = 500
    code = "internal_error"
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param


class ConfigError(KvernError):
    """A configuration (config.json, settings, flags) that is malformed or that contradicts itself."""

    status = 400
    code = "invalid_config"
    exit_code = 2


class UnsupportedModelError(ConfigError):
    """A well-formed model whose maths Kvern does not compute; running it anyway would be silently wrong."""

    code = "unsupported_model"


class CheckpointError(KvernError):
    """A damaged or incomplete checkpoint. The message names the file and, where there is one, the tensor."""

    code = "invalid_checkpoint"

    def __init__(
        self, message: str, *, file: Path | str | None = None, tensor: str | None = None, hint: str | None = None
    ) -> None:
        where = ": ".join(str(part) for part in (file, tensor) if part is not None)
        super().__init__(f"{where}: {message}" if where else message, hint=hint)
        self.file = file
        self.tensor = tensor


class DataError(KvernError):
    """Training data that cannot be used as it is: the message names the file and, where there is one, the line."""

    status = 400
    code = "invalid_data"
    exit_code = 2

    def __init__(
        self, message: str, *, file: Path | str | None = None, line: int | None = None, hint: str | None = None
    ) -> None:
        where = ":".join(str(part) for part in (file, line) if part is not None)
        super().__init__(f"{where}: {message}" if where else message, hint=hint)
        self.file = file
        self.line = line


class DownloadError(KvernError):
    """A model that could not be fetched, or whose bytes are not the pinned ones."""

    status = 502
    code = "download_failed"


class NotEnoughMemoryError(KvernError):
    """A model or a context that cannot fit; the message holds both numbers."""

    status = 507
    code = "not_enough_memory"


class BadRequestError(KvernError):
    """A request that cannot be served as asked; `param` names the field."""

    status = 400
    code = "invalid_request_error"


class ContextLengthError(BadRequestError):
    """A prompt that the context cannot hold: `tokens` long, where `limit` would fit."""

    code = "context_length_exceeded"

    def __init__(self, message: str, *, tokens: int, limit: int, hint: str | None, param: str | None) -> None:
        super().__init__(message, hint=hint, param=param)
        self.tokens = tokens
        self.limit = limit


class NotFoundError(KvernError):
    """A model, route or object that does not exist."""

    status = 404
    code = "not_found"


class TryLaterError(KvernError):
    """Not now; the client may try again after `retry_after` seconds (the Retry-After header)."""

    def __init__(self, message: str, *, retry_after: float, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class BusyError(TryLaterError):
    """The queue is full."""

    status = 429
    code = "rate_limit_exceeded"


class UnavailableError(TryLaterError):
    """The engine is down, or stopping."""

    status = 503
    code = "unavailable"


class NonFiniteLogitsError(KvernError):
    """The model computed NaN or infinity for a request: broken weights, or numbers that overflowed."""

    code = "non_finite_logits"


class UnreachableError(KvernError):
    """A server that the user named and that does not answer."""

    status = 502
    code = "unreachable"


class TrainingError(KvernError):
    """Training that cannot go on: a loss or gradient that is not finite. What was saved before stays as it is."""

    code = "training_failed"
