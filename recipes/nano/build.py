"""Everything that is trained on, made from the interpreter and its documentation: `python -m recipes.nano data`.

OUT/corpus        SPLIT/KIND/PATH, and manifest.json
OUT/tokenizer     tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json
OUT/rows          code.jsonl, docs.jsonl, tools.jsonl: chats; gaps.jsonl: texts for fill-in-the-middle
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from recipes.nano import corpus, docs, rows, tokenizer
from recipes.nano.code_rows import code_rows
from recipes.nano.corpus import Document
from recipes.nano.docs_rows import docs_rows
from recipes.nano.functions import functions
from recipes.nano.gaps import gap_rows
from recipes.nano.skills import World
from recipes.nano.tool_rows import tool_rows

CONTEXT = 2048
"""Tokens of a packed row, and of the model's window."""


def build(out: Path, *, docs_folder: Path | None = None, tests: bool = True) -> None:
    """Make corpus, tokenizer and rows under `out`, and say how much there is of each."""
    manifest = corpus.collect(out / "corpus", tests=tests, docs=docs_folder)
    for split, kinds in manifest["sizes"].items():
        for kind, size in kinds.items():
            print(f"{split:9} {kind:8} {size['files']:5,} files {size['bytes']:11,} bytes")
    print(f"corpus sha256 {manifest['sha256']}")
    documents = corpus.read(out / "corpus", "train")
    tokenizer.write(tokenizer.train(taught(documents)), out / "tokenizer", CONTEXT)
    write_rows(documents, out / "rows")


def taught(documents: Iterable[Document]) -> Iterable[str]:
    """The texts that the tokenizer learns from: the library and the documentation."""
    return (document.text for document in documents if document.kind != "tests")


def write_rows(documents: list[Document], folder: Path) -> None:
    """Generate the rows of all kinds."""
    known = list(functions(documents))
    library = [one for one in known if ".test" not in f".{one.module}"]
    entries = [entry for page in documents if page.kind == "docs" for entry in docs.entries(page)]
    world = World(library, [entry for entry in entries if entry.text])
    made = {
        "code": code_rows(known),
        "docs": docs_rows(documents),
        "tools": tool_rows(world) if world.entries else (),
        "gaps": gap_rows(documents),
    }
    for name, generated in made.items():
        print(f"{name:9} {rows.write(generated, folder / f'{name}.jsonl'):6,} rows")
