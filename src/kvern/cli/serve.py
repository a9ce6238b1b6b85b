"""`kvern serve`: one model over HTTP, from a name or a folder to a URL and a curl line that can be pasted.

The port is taken first and the memory is counted before any weight is read, so what cannot work fails at once. Until
the model is there no garbage is collected: of some 380,000 objects two thirds stay, and looking through them again and
again takes a seventh of the start's processor time.
"""

from __future__ import annotations

import argparse
import copy
import errno
import gc
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvern import settings
from kvern.errors import ConfigError, KvernError, NotEnoughMemoryError
from kvern.settings import ServeSettings

if TYPE_CHECKING:
    from kvern.engine import EngineSettings
    from kvern.llm import LLM

HELP = "Serve a model over HTTP, as OpenAI's API. Settings also come from KVERN_* variables and kvern.toml."
EXAMPLES = """\
kvern serve                                  coder-0.5b on http://127.0.0.1:8000
kvern serve ./my-model --port 9000 --max-context 8192
kvern serve --cache-tokens 200000 --max-running 16 --max-waiting 64
kvern serve --shutdown-timeout 120           long answers may end after SIGTERM
KVERN_HOST=0.0.0.0 kvern serve --config team.toml
"""
CLOSING_SECONDS = 5
"""For connections that are still open when no answer runs any more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line: the settings."""
    settings.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM, then let the running answers end."""
    chosen = settings.load(settings.given(args), args.config)
    with _listen(chosen.host, chosen.port) as listener, _collector_paused():
        folder = _model_folder(chosen.model)
        print(check_memory(folder, chosen), file=sys.stderr, flush=True)
        _say_what_is_missing()
        spread_memory(chosen)
        return _serve(chosen, listener)


def check_memory(folder: Path, chosen: ServeSettings) -> str:
    """Say what the model needs at least (one full context) and what there is.

    The cache grows with use, up to eight contexts and half of what is free, and is FP32 unless dtype is bf16 or
    cache_dtype is fp8. Raises
    NotEnoughMemoryError with the numbers when not even the least fits.
    """
    from kvern.config import ModelConfig
    from kvern.plan.hardware import machine
    from kvern.plan.memory import account

    config = ModelConfig.load(folder)
    counted, fp8 = account(config), chosen.cache_dtype == "fp8"
    token = counted.cache_bytes(1, fp8=fp8) * (1 if fp8 or chosen.dtype == "bf16" else 2)
    in_memory = {"auto": counted.checkpoint_bytes, "bf16": 2 * counted.parameters, "f32": 4 * counted.parameters}
    weights = in_memory[chosen.dtype]
    context = min(chosen.max_context or config.max_position_embeddings, config.max_position_embeddings)
    context = chosen.cache_tokens or context
    cache, available = token * context, machine().memory_available
    line = (
        f"memory: {_gib(weights)} weights + {_gib(cache)} cache for {context:,} tokens "
        f"= {_gib(weights + cache)} of {_gib(available)} available"
    )
    if weights + cache > available:
        room = (available - weights) // token
        hint = f"--max-context {room} would fit" if room >= 2 else "a machine with more memory, or a smaller model"
        raise NotEnoughMemoryError(f"{chosen.model} does not fit: {line}", hint=hint)
    return line


def spread_memory(chosen: ServeSettings, root: Path = Path("/")) -> None:
    """Have new pages dealt out to all memory nodes, where there are several and `numa` is auto; say what came of it.

    To be called before other threads start: they inherit it.
    """
    from kvern.plan import numa

    nodes = numa.nodes(root)
    if chosen.numa == "off" or len([node for node in nodes if node.has_memory]) < 2:
        return
    reason = numa.interleave(nodes)
    text = "weights and cache are spread over all" if reason is None else f"one of them may hold everything: {reason}"
    print(f"memory nodes: {len(nodes)}, {text}", file=sys.stderr, flush=True)


def pinned(llm: LLM, chosen: ServeSettings) -> LLM:
    """The model, its threads kept on cores of their own where that was asked for."""
    if chosen.pin_threads:
        from kvern.engine.threads import pin_workers
        from kvern.ops import library
        from kvern.plan import numa

        count = library.threads()
        cores = numa.spread(numa.nodes(), count)
        if not cores and hasattr(os, "sched_getaffinity"):
            cores = tuple(sorted(os.sched_getaffinity(0)))
        print(f"threads: {pin_workers(cores)} of {count} pinned", file=sys.stderr, flush=True)
    return llm


def banner(url: str, name: str) -> str:
    """What to do with a server that is ready."""
    body = {"model": name, "messages": [{"role": "user", "content": "Write a Python function that reverses a list."}]}
    return (
        f"{name} is ready on {url}/v1 (Ctrl-C stops it). Try:\n\n"
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"  -d '{json.dumps({**body, 'temperature': 0})}'\n"
    )


@contextmanager
def _collector_paused() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _say_what_is_missing() -> None:
    from kvern.ops import library

    if (reason := library.why_absent()) is not None:
        print(f"slower than need be: {reason} (kvern doctor tells more)", file=sys.stderr, flush=True)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            hint = f"another program listens there; try --port {port + 1 if port < 65535 else 0}"
            raise KvernError(f"port {port} of {host} is in use", hint=hint) from error
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}") from error


def _model_folder(model: str) -> Path:
    from kvern.checkpoint.progress import progress_bar
    from kvern.llm import resolve

    with progress_bar() as progress:
        return resolve(model, progress)


def _serve(chosen: ServeSettings, listener: socket.socket) -> int:
    import uvicorn

    from kvern.llm import LLM
    from kvern.server.app import create_app
    from kvern.server.draining import DrainingServer

    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    failures: list[KvernError] = []

    def loaded(result: LLM | KvernError) -> None:
        gc.freeze()  # what is here now stays: later collections need not look at it
        gc.enable()
        if isinstance(result, KvernError):
            failures.append(result)
            server.should_exit = True
        else:
            print(banner(url, result.name), flush=True)

    engine = engine_settings(chosen)
    app = create_app(
        lambda: pinned(
            LLM(
                chosen.model,
                dtype=chosen.dtype,
                threads=chosen.threads,
                settings=engine,
                temperature_mapping=chosen.temperature_mapping,
            ),
            chosen,
        ),
        chosen,
        loaded,
    )
    config = uvicorn.Config(app, log_config=log_config(chosen.access_log), timeout_graceful_shutdown=CLOSING_SECONDS)
    server = DrainingServer(config, app.state.host, chosen.shutdown_timeout)
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
    return 0


def log_config(access_log: bool) -> dict[str, Any]:
    """For `logging.config.dictConfig`: warnings and, if wanted, uvicorn's line for every request, on standard error."""
    from uvicorn.config import LOGGING_CONFIG

    made = copy.deepcopy(LOGGING_CONFIG)
    made["handlers"]["access"]["stream"] = "ext://sys.stderr"
    for name, logger in made["loggers"].items():
        logger["level"] = "INFO" if access_log and name == "uvicorn.access" else "WARNING"
    return made


def engine_settings(chosen: ServeSettings) -> EngineSettings:
    """The engine's part of the settings. Raises ConfigError where they contradict each other."""
    from kvern.engine import EngineSettings

    return EngineSettings(
        max_context=chosen.max_context,
        cache_tokens=chosen.cache_tokens,
        cache_dtype=chosen.cache_dtype,
        step_tokens=chosen.step_tokens,
        max_running=chosen.max_running,
        max_waiting=chosen.max_waiting,
        prefix_caching=chosen.prefix_caching,
        drafts=chosen.drafts,
        draft_tokens=chosen.draft_tokens,
        cache_dir=None if chosen.cache_dir is None else Path(chosen.cache_dir).expanduser(),
        cache_disk_bytes=chosen.cache_disk_bytes,
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
