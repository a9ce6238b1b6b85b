"""From sources to rows: made once, made anew when anything changed, the same whoever asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.data.test_sources import write
from tests.text.conftest import byte_fallback, byte_level
from tests.text.test_fim import tokenizer_with
from tests.text.test_template import CHATML

from kvern.data import fim
from kvern.data.build import Corpus, TextSide, build
from kvern.data.encode import Encoder
from kvern.data.options import DataOptions
from kvern.data.sources import TextDocument
from kvern.data.token_file import Origin, TokenFile
from kvern.errors import ConfigError, DataError
from kvern.text.fim import FAMILIES, FillInTheMiddle
from kvern.text.template import ChatTemplate
from kvern.text.tokenizer import Tokenizer

__all__ = ["byte_fallback", "byte_level"]
END = "<|end of text|>"
NUMBERED = {f"{number:03}.py": f"x{number} = {number}\n" * (1 + number % 7) for number in range(60)}


@pytest.fixture(scope="module")
def text(byte_level: Tokenizer) -> TextSide:
    """Bytes and FIM tokens; chats by ChatML."""
    bytes_alone = tokenizer_with(*FAMILIES[1], END, "<|im_start|>", "<|im_end|>")
    own = Tokenizer(bytes_alone._definition, {"eos_token": END})
    return TextSide(own, ChatTemplate(CHATML, own))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus", dict(NUMBERED))


def options(*paths: Path | dict[str, object], **more: object) -> DataOptions:
    sources = [path if isinstance(path, dict) else {"path": str(path)} for path in paths]
    return DataOptions.model_validate({"sources": sources, **more})


def documents(file: TokenFile | None) -> dict[str, list[int]]:
    """By where they came from."""
    assert file is not None
    read = {str(file.origin(n)): file.read(n, 0, int(file.lengths[n]))[0].tolist() for n in range(len(file))}
    assert len(read) == len(file)
    return read


def shown(text: TextSide, ids: list[int]) -> str:
    return b"".join(text.tokenizer.token_bytes(one) for one in ids).decode()


def test_texts_end_with_the_end_of_text(corpus: Path, text: TextSide, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    built = build(options(corpus, fim_rate=0), text, tmp_path / "data", lambda *values: seen.append(values))
    found = documents(built.sources[0].train)
    assert list(found) == [str(corpus / name) for name in NUMBERED]
    for name, content in NUMBERED.items():
        assert found[str(corpus / name)] == [*text.tokenizer.encode(content), text.tokenizer.eos_id]
    size = sum(map(len, NUMBERED.values()))
    assert built.sources[0].train.utf8_bytes == size
    assert seen[-1] == (size, size, str(corpus))
    assert str(built.sources[0]) == f"{corpus}: 60 documents, {size + 60} tokens"
    assert built.held_out(16) is None


def test_fill_in_the_middle(corpus: Path, text: TextSide, tmp_path: Path) -> None:
    found = documents(build(options(corpus, fim_rate=0.5), text, tmp_path / "data").sources[0].train)
    begin, hole, end = FAMILIES[1]
    rearranged = 0
    for name, content in NUMBERED.items():
        got = shown(text, found[str(corpus / name)]).removesuffix(END)
        if got.startswith(begin):
            prefix, rest = got.removeprefix(begin).split(hole)
            suffix, middle = rest.split(end)
            assert prefix + middle + suffix == content
            rearranged += 1
        else:
            assert got == content
    assert 20 < rearranged < 40


def test_a_rate_of_the_source_comes_first(corpus: Path, text: TextSide, tmp_path: Path) -> None:
    given = options({"path": str(corpus), "fim_rate": 0}, fim_rate=1.0)
    found = documents(build(given, text, tmp_path / "data").sources[0].train)
    assert not any(text.tokenizer.control[FAMILIES[1][0]] in ids for ids in found.values())


@given(content=st.text(min_size=1))
def test_batches_give_the_ids_that_single_texts_give(
    byte_level: Tokenizer, byte_fallback: Tokenizer, content: str
) -> None:
    texts = [content, f"{content}<|im_end|>{content}", "<|im_start|><s>", "def f():\n"]
    for one in (byte_level, byte_fallback):
        assert one.encode_batch(texts) == [one.encode(part) for part in texts]


def test_a_gap_is_asked_for_as_serving_asks(byte_level: Tokenizer) -> None:
    definition = json.loads(byte_level._definition)
    last = max(token["id"] for token in definition["added_tokens"])
    for number, name in enumerate(FAMILIES[1], last + 1):
        definition["added_tokens"].append({**definition["added_tokens"][-1], "id": number, "content": name})
    own = Tokenizer(json.dumps(definition), {**byte_level.config, "add_bos_token": True})
    tokens, content = FillInTheMiddle.of(own), "def add(a, b):\n    return a + b<|im_end|>\n" * 3
    assert tokens is not None
    (one,) = Encoder(own, None, fim_rate=1.0).encode([TextDocument(content, Origin("a"))])
    prefix, middle, suffix = fim.cut(content, 1.0) or ("", "", "")
    asked = tokens.arrange(own.encode(prefix), own.encode(suffix))
    assert one.ids == [own.bos_id, *asked, *own.encode(middle), own.eos_id]


def test_texts_begin_as_prompts_do(byte_level: Tokenizer) -> None:
    starting = Tokenizer(byte_level._definition, {**byte_level.config, "add_bos_token": True})
    (one,) = Encoder(starting, None).encode([TextDocument("a<|im_end|>", Origin("a"))])
    assert one.ids == [starting.bos_id, *starting.encode("a<|im_end|>"), starting.eos_id]
    assert one.ids.count(starting.eos_id or -1) == 1


def test_held_out_documents_are_chosen_by_content(corpus: Path, text: TextSide, tmp_path: Path) -> None:
    first = build(options(corpus, held_out=0.3, fim_rate=1), text, tmp_path / "data").sources[0]
    train, held = documents(first.train), documents(first.held_out)
    assert not train.keys() & held.keys()
    assert len(train) + len(held) == 60
    assert 8 < len(held) < 28
    for path, ids in held.items():  # as they are, so that bits per byte mean something
        assert shown(text, ids) == NUMBERED[Path(path).name] + END
    assert first.held_out is not None
    assert first.held_out.utf8_bytes == sum(len(NUMBERED[Path(path).name]) for path in held)
    moved = write(tmp_path / "moved", {f"sub/{99 - number}": one for number, one in enumerate(NUMBERED.values())})
    again = build(options(moved, held_out=0.3, fim_rate=1), text, tmp_path / "data").sources[0]
    assert sorted(documents(again.held_out).values()) == sorted(held.values())


def chat(*turns: str) -> str:
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    return json.dumps({"messages": messages})


def test_chats_stay_whole_beside_texts(corpus: Path, text: TextSide, tmp_path: Path) -> None:
    write(tmp_path, {"chats.jsonl": "\n".join(chat(f"say {n}", str(n) * (n + 1)) for n in range(8))})
    given = options(corpus, {"path": str(tmp_path / "chats.jsonl"), "weight": 2})
    built = build(given, text, tmp_path / "data")
    stream = built.train(100, 1)
    said = []
    for row in map(stream.row, range(len(stream))):
        start = 0
        for length in row.lengths:
            ids = row.tokens[start : start + length].tolist()
            if row.learned is not None and text.tokenizer.control["<|im_start|>"] in ids:
                said.append(
                    shown(text, [i for i, m in zip(ids, row.learned[start : start + length], strict=True) if m])
                )
            start += length
    assert sorted(said) == sorted(f"{str(n) * (n + 1)}<|im_end|>" for n in range(8) for _ in range(2))
    assert built.sources[1].train.utf8_bytes == sum(range(1, 9))
    with pytest.raises(DataError, match=r"chats\.jsonl:8: \d+ tokens, and a row holds 20 \(\d more") as refused:
        built.train(20)
    assert refused.value.hint
    cut = options({"path": str(tmp_path / "chats.jsonl"), "whole": False})
    assert len(build(cut, text, tmp_path / "data").train(20)) > 8


def modified(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tokens")}


def test_files_are_made_once_and_anew_when_something_changed(corpus: Path, text: TextSide, tmp_path: Path) -> None:
    data = tmp_path / "data"
    given = options(corpus, held_out=0.2)
    first = build(given, text, data).train(32, 1)
    made = modified(data)
    assert len(made) == 2
    again = build(given, text, data)
    assert modified(data) == made
    assert again.train(32, 1).fingerprint == first.fingerprint
    for name in NUMBERED:
        os.utime(corpus / name)  # touched, but the same
    build(given, text, data)
    assert modified(data) == made
    for path in data.glob("*.tokens"):
        path.unlink()
    assert build(given, text, data).train(32, 1).fingerprint == first.fingerprint  # times and places are no content
    made = modified(data)
    build(given.model_copy(update={"sources": (given.sources[0].model_copy(update={"weight": 2.0}),)}), text, data)
    assert modified(data) == made
    write(corpus, {"000.py": "y0 = 0\n"})
    changed = build(given, text, data)
    assert modified(data).keys() == made.keys()
    assert modified(data) != made
    assert changed.train(32, 1).fingerprint != first.fingerprint
    build(given.model_copy(update={"fim_rate": 0.2}), text, data)
    other = Tokenizer(text.tokenizer._definition, {**text.tokenizer.config, "add_bos_token": True})
    build(given, TextSide(other, text.template), data)
    assert len(modified(data)) == 6
    build(given, TextSide(text.tokenizer, ChatTemplate(f"{CHATML} ", text.tokenizer)), data)
    assert len(modified(data)) == 8


@pytest.mark.parametrize("which", ["train", "held-out"])
@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "other"])
def test_damaged_files_are_never_read(corpus: Path, text: TextSide, tmp_path: Path, which: str, damage: str) -> None:
    given, data = options(corpus, held_out=0.2), tmp_path / "data"
    before = build(given, text, data).train(32).fingerprint
    (path,) = data.glob(f"*.{which}.tokens")
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "other":
        (another,) = {*data.glob("*.tokens")} - {path}
        path.write_bytes(another.read_bytes())
    else:
        path.write_bytes(whole[:-9] if damage == "cut" else whole[:100] + bytes([whole[100] ^ 4]) + whole[101:])
    after = build(given, text, data)
    assert path.read_bytes() == whole
    assert after.train(32).fingerprint == before


def test_a_build_that_fails_leaves_nothing_half(corpus: Path, text: TextSide, tmp_path: Path) -> None:
    write(corpus, {"999.py": b"\0"})
    with pytest.raises(DataError, match=r"999\.py: not UTF-8 text"):
        build(options(corpus, held_out=0.2), text, tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["lock"]
    built = build(options({"path": str(corpus), "skip": True}, held_out=0.2), text, tmp_path / "data")
    assert str(built.sources[0]).endswith("; left out: 1 binary")


BUILDS = """
import sys
from pathlib import Path
from kvern.data.build import TextSide, build
from kvern.data.options import DataOptions
from kvern.text.tokenizer import Tokenizer
text = TextSide(Tokenizer.load(Path(sys.argv[1])))
options = DataOptions.model_validate({"sources": [{"path": sys.argv[2]}], "fim_rate": 0})
print(build(options, text, Path(sys.argv[3])).train(32).fingerprint)
"""


def test_processes_that_build_at_once_wait_for_one(corpus: Path, text: TextSide, tmp_path: Path) -> None:
    write(
        tmp_path,
        {"tokenizer.json": text.tokenizer._definition, "tokenizer_config.json": json.dumps({"eos_token": END})},
    )
    command = [sys.executable, "-c", BUILDS, str(tmp_path), str(corpus), str(tmp_path / "data")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(said) == 1
    assert len(said.pop()) == 65


def test_what_is_refused(corpus: Path, text: TextSide, tmp_path: Path) -> None:
    def refuse(given: DataOptions, side: TextSide = text) -> str:
        with pytest.raises((DataError, ConfigError)) as refused:
            build(given, side, tmp_path / "data")
        return refused.value.message

    plain = TextSide(Tokenizer(tokenizer_with(END)._definition, {"eos_token": END}))
    assert refuse(options(corpus), plain) == "the tokenizer has no fill-in-the-middle tokens"
    assert build(options(corpus, fim_rate=0), plain, tmp_path / "data")
    endless = TextSide(Tokenizer(text.tokenizer._definition, {}))
    assert "names no eos_token" in refuse(options(corpus), endless)
    write(
        tmp_path,
        {"chats.jsonl": chat("a", "b"), "texts.jsonl": '{"text": "a"}\n' + chat("a", "b"), "open.jsonl": chat("a")},
    )
    assert refuse(options(tmp_path / "chats.jsonl"), plain).endswith(
        "chats.jsonl:1: a chat, but the tokenizer comes without a chat template"
    )
    assert refuse(options(tmp_path / "texts.jsonl")).endswith(
        "texts.jsonl:2: one of chats in a source that began with texts"
    )
    assert refuse(options(tmp_path / "open.jsonl")).endswith(
        "open.jsonl:1: messages.0: a chat must end with the assistant's answer"
    )
    assert "there is no such file" in refuse(options(tmp_path / "nothing"))
    assert "at a share of 1e-06" in refuse(options(corpus, held_out=1e-6))
    assert refuse(options(corpus / "000.py", held_out=0.999999)).endswith("000.py: all of its documents are held out")
    write(tmp_path / "empty", {"a": "", "b": b"\0"})
    given = options({"path": str(tmp_path / "empty"), "skip": True})
    assert refuse(given).endswith("empty: there is no document (1 binary, 1 empty left out)")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file: cannot be written"):
        build(options(corpus), text, tmp_path / "file")


@pytest.mark.parametrize(
    ("table", "place"),
    [
        ({"sources": []}, "sources"),
        ({"sources": [{"path": ""}]}, "path"),
        ({"sources": [{"path": "a", "weight": 0}]}, "weight"),
        ({"sources": [{"path": "a", "wieght": 1}]}, "wieght"),
        ({"sources": [{"path": "a", "format": "csv"}]}, "format"),
        ({"sources": [{"path": "a"}], "fim_rate": 1.5}, "fim_rate"),
        ({"sources": [{"path": "a"}], "held_out": 1}, "held_out"),
        ({"sources": [{"path": "a", "weight": float("inf")}]}, "weight"),
    ],
)
def test_options_that_are_refused(table: dict[str, object], place: str) -> None:
    with pytest.raises(ValidationError, match=place):
        DataOptions.model_validate(table)


def test_the_guide_shows_options_that_exist() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "training-data.md").read_text()
    shown = tomllib.loads(guide.split("```toml\n")[1].split("```")[0])
    assert len(DataOptions.model_validate(shown["data"]).sources) == 2


def test_held_out_rows_hold_every_document_once(corpus: Path, text: TextSide, tmp_path: Path) -> None:
    built: Corpus = build(options({"path": str(corpus), "weight": 0.5}, held_out=0.3), text, tmp_path / "data")
    stream = built.held_out(32)
    assert stream is not None
    (held,) = [one.held_out for one in built.sources]
    assert held is not None
    assert sum(len(stream.row(index).tokens) for index in range(len(stream))) == held.tokens
    assert stream.utf8_bytes == held.utf8_bytes
