"""Settings, declared once: flags > environment (KVERN_PORT) > TOML ([serve] of kvern.toml) > defaults.

`add_arguments` derives the command line from the fields, so a name, a type, a default and a help text are each written
in one place. Unknown names are errors that mention the nearest known one. An environment variable that starts with
KVERN_ and resembles no setting is left alone: other commands and the build have their own.
"""

from __future__ import annotations

import argparse
import difflib
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import Field, JsonValue, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from kvern.errors import ConfigError

PREFIX = "KVERN_"
TABLE = "serve"
DEFAULT_FILE = Path("kvern.toml")


GROUPS = ("model", "server", "engine")
"""Of `kvern serve --help`, in this order; each field says to which it belongs."""
MODEL: dict[str, JsonValue] = {"group": "model"}
SERVER: dict[str, JsonValue] = {"group": "server"}
ENGINE: dict[str, JsonValue] = {"group": "engine"}


class ServeSettings(BaseSettings):
    """How `kvern serve` serves."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(
        default="coder-0.5b",
        min_length=1,
        description="the name of a pulled or bundled model, or a checkpoint folder",
        json_schema_extra=MODEL,
    )
    dtype: Literal["auto", "bf16", "f32"] = Field(
        default="auto", description="weights in memory; auto suits this machine", json_schema_extra=MODEL
    )
    max_context: int | None = Field(
        default=None,
        ge=2,
        description="tokens of prompt and answer together; default: the model's",
        json_schema_extra=MODEL,
    )
    temperature_mapping: Literal["none", "deepseek_api"] = Field(
        default="none",
        description="deepseek_api: temperatures of requests mean what they mean to DeepSeek's service (1 is 0.3)",
        json_schema_extra=MODEL,
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="threads to compute with; default: every usable core",
        json_schema_extra=MODEL,
    )
    numa: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: on a machine with several memory nodes, spread weights and cache over all",
        json_schema_extra=MODEL,
    )
    pin_threads: bool = Field(
        default=False,
        description="keep each thread on a core of its own; for a machine that serves nothing else",
        json_schema_extra=MODEL,
    )
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="address to listen on; 0.0.0.0 opens it to the network",
        json_schema_extra=SERVER,
    )
    port: int = Field(
        default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one", json_schema_extra=SERVER
    )
    model_alias: str = Field(
        default="claude-*,deepseek-chat,deepseek-reasoner",
        pattern=r"^\s*([^\s,=]+(=[^\s,=]+)?\s*(,\s*[^\s,=]+(=[^\s,=]+)?\s*)*)?$",
        description="other names under which clients may ask, as PATTERN or PATTERN=MODEL, with commas between",
        json_schema_extra=SERVER,
    )
    max_body_bytes: int = Field(
        default=8 * 2**20, ge=1024, description="largest request body", json_schema_extra=SERVER
    )
    run_batches: bool = Field(
        default=True, description="work on the batches of this model, not only take them in", json_schema_extra=SERVER
    )
    max_file_bytes: int = Field(
        default=200 * 2**20, ge=1024, description="largest file of /v1/files", json_schema_extra=SERVER
    )
    store: str | None = Field(
        default=None,
        min_length=1,
        description="where files and batches are kept, a path or postgresql://...; "
        "default: kvern/store.sqlite in ~/.local/share",
        json_schema_extra=SERVER,
    )
    shutdown_timeout: float = Field(
        default=30.0,
        ge=0,
        allow_inf_nan=False,
        description="seconds that running answers get to end after SIGTERM",
        json_schema_extra=SERVER,
    )
    stream_keep_alive: float = Field(
        default=15.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds of silence after which a stream gets a comment line, for proxies that cut idle ones",
        json_schema_extra=SERVER,
    )
    access_log: bool = Field(
        default=False, description="one line for every request, on standard error", json_schema_extra=SERVER
    )
    response_ttl: float = Field(
        default=30 * 86400.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds for which answers of /v1/responses stay stored",
        json_schema_extra=SERVER,
    )
    max_running: int = Field(
        default=64, ge=1, description="requests that are computed together", json_schema_extra=ENGINE
    )
    max_waiting: int = Field(
        default=256, ge=1, description="requests that may queue; the next one gets 429", json_schema_extra=ENGINE
    )
    step_tokens: int = Field(
        default=512, ge=1, description="tokens computed in one step, prompts included", json_schema_extra=ENGINE
    )
    cache_tokens: int | None = Field(
        default=None,
        ge=2,
        description="tokens that the cache holds; default: up to 8 full contexts in half the free memory",
        json_schema_extra=ENGINE,
    )
    cache_dtype: Literal["auto", "fp8"] = Field(
        default="auto",
        description="of the latent cache; auto: the activations'; fp8: about half of BF16, for a little quality",
        json_schema_extra=ENGINE,
    )
    prefix_caching: bool = Field(
        default=True, description="keep the cache of prompts that may come again", json_schema_extra=ENGINE
    )
    cache_dir: str | None = Field(
        default=None,
        min_length=1,
        description="folder where that cache outlives a restart, for one server at a time; default: it does not",
        json_schema_extra=ENGINE,
    )
    cache_disk_bytes: int = Field(
        default=16 * 2**30, ge=1, description="most bytes in --cache-dir", json_schema_extra=ENGINE
    )
    drafts: Literal["auto", "off", "ngram", "mtp"] = Field(
        default="auto",
        description="guess tokens and verify several at once, where it pays; answers stay the same",
        json_schema_extra=ENGINE,
    )
    draft_tokens: int = Field(
        default=16, ge=1, description="most tokens guessed for one answer in one step", json_schema_extra=ENGINE
    )


def load(flags: dict[str, Any], config: Path | None = None) -> ServeSettings:
    """Read the settings from all sources. `config` None: kvern.toml of the working folder, if there is one.

    Raises ConfigError naming the setting and where it came from.
    """
    _check_environment(os.environ)
    path = config or (DEFAULT_FILE if DEFAULT_FILE.exists() else None)
    table = {} if path is None else _read_table(path)

    class WithFile(ServeSettings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=table)

    try:
        return WithFile(**flags)
    except ValidationError as error:
        raise _as_config_error(error, flags, table, path) from error


def add_arguments(parser: argparse.ArgumentParser, positional: str = "model") -> None:
    """Add one argument for every field, in its group, and --config. What is not given stays out of the namespace."""
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for name, field in ServeSettings.model_fields.items():
        flag = [name] if name == positional else [f"--{name.replace('_', '-')}"]
        extra: dict[str, Any] = {"nargs": "?", "metavar": name.upper()} if name == positional else {}
        arguments = {**extra, **_argument_type(field), "default": argparse.SUPPRESS, "help": _help(field)}
        groups[_group(field)].add_argument(*flag, **arguments)
    file_help = f"TOML file with a [{TABLE}] table (default: {DEFAULT_FILE} of the working folder, if there is one)"
    parser.add_argument("--config", type=Path, metavar="FILE", help=file_help)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings among parsed arguments, for `load`."""
    return {name: value for name, value in vars(args).items() if name in ServeSettings.model_fields}


def _group(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    assert isinstance(extra, dict), "every setting names its group"
    return str(extra["group"])


def _argument_type(field: FieldInfo) -> dict[str, Any]:
    if get_origin(field.annotation) is Literal:
        return {"choices": get_args(field.annotation)}
    if field.annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if field.annotation is float:
        return {"type": float, "metavar": "SECONDS"}
    return {"type": int, "metavar": "N"} if int in (field.annotation, *get_args(field.annotation)) else {}


def _help(field: FieldInfo) -> str:
    return f"{field.description}" if field.default is None else f"{field.description} (default: {field.default})"


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's tables. ConfigError for one that cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # malformed TOML or UTF-8
        raise ConfigError(f"{path}: {error}") from error


def _read_table(path: Path) -> dict[str, Any]:
    content = read_toml(path)
    for name in content:
        if name != TABLE:
            raise ConfigError(f"{path}: unknown table or key {name!r}", hint=f"settings belong under [{TABLE}]")
    table = content.get(TABLE, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {TABLE} must be a table")
    return table


def _check_environment(names: Iterable[str]) -> None:
    known = {PREFIX + name.upper() for name in ServeSettings.model_fields}
    for name in names:
        if name.startswith(PREFIX) and name not in known and (near := nearest(name, known, 0.85)):
            raise ConfigError(f"unknown environment variable {name}", hint=f"did you mean {near}?")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that an unknown one was most likely meant to be; None where none is like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def _as_config_error(
    error: ValidationError, flags: dict[str, Any], table: dict[str, Any], path: Path | None
) -> ConfigError:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        near = nearest(name, ServeSettings.model_fields)
        return ConfigError(f"{path}: unknown setting {name!r}", hint=f"did you mean {near!r}?" if near else None)
    env = PREFIX + name.upper()
    flag = name if name == "model" else f"--{name.replace('_', '-')}"
    source = flag if name in flags else env if env in os.environ else f"{path}: {name}" if name in table else name
    return ConfigError(f"{source}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}", param=name)
