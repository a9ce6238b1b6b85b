"""What to train on, as a configuration says it: the same names in TOML and in Python."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FileFormat = Literal["auto", "text", "jsonl"]


class Options(BaseModel):
    """Unknown keys and numbers out of range are errors (pydantic's ValidationError)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SourceOptions(Options):
    """Documents of one kind: texts, or chats.

    path: a file, a folder, or a pattern such as `corpus/**/*.md`. A file that ends in .jsonl holds a document a line,
    any other file is one document; `format` says otherwise. include, exclude: patterns for files of folders, matched
    against the name and the path below the folder; exclude also takes folders. skip: leave out files that are empty
    or no UTF-8 text, and count them, instead of refusing. weight: how often an epoch takes each token. fim_rate None:
    that of DataOptions. whole: rows never cut a document (None: for chats).
    """

    path: str = Field(min_length=1)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    format: FileFormat = "auto"
    skip: bool = False
    weight: float = Field(default=1.0, gt=0)
    fim_rate: float | None = Field(default=None, ge=0, le=1)
    whole: bool | None = None


class DataOptions(Options):
    """All sources. fim_rate: share of texts that are rearranged for fill-in-the-middle. held_out: share of documents
    that are never trained on, chosen by their content."""

    sources: tuple[SourceOptions, ...] = Field(min_length=1)
    fim_rate: float = Field(default=0.1, ge=0, le=1)
    held_out: float = Field(default=0.0, ge=0, lt=1)
