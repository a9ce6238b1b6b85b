"""Documents from files: a fixed order, and an error with file and line for all that is no document."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvern.data import sources
from kvern.data.files import digest_of, find_files, stamp_of
from kvern.data.options import SourceOptions
from kvern.data.sources import ChatDocument, SourceReader, TextDocument, parse_row
from kvern.data.token_file import Origin
from kvern.errors import DataError
from kvern.text.messages import Message, Tool, ToolCall

ORIGIN = Origin("rows.jsonl", 7)


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def found(folder: Path, **options: object) -> list[str]:
    given = SourceOptions.model_validate({"path": str(folder), **options})
    return [path.relative_to(folder).as_posix() for path in find_files(given)]


def texts(folder: Path, **options: object) -> list[str]:
    given = SourceOptions.model_validate({"path": str(folder), **options})
    documents = SourceReader(find_files(given), given).documents()
    return [document.text for document in documents if isinstance(document, TextDocument)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    names = ["b.py", "a.py", "lib/z.py", "lib/deep/y.py", "lib/test/t.py", "README.md", ".hidden.py", ".git/config.py"]
    folder = write(tmp_path / "tree", dict.fromkeys(names, "x"))
    (folder / "link").symlink_to(folder / "lib")
    return folder


def test_a_folder_gives_its_files_in_order(tree: Path) -> None:
    everything = ["README.md", "a.py", "b.py", "lib/deep/y.py", "lib/test/t.py", "lib/z.py"]
    assert found(tree) == everything
    assert found(tree, include=["*.py"]) == everything[1:]
    assert found(tree, include=["lib/*"], exclude=["test"]) == ["lib/deep/y.py", "lib/z.py"]
    assert found(tree, exclude=["lib/deep", "*.md", "b.*"]) == ["a.py", "lib/test/t.py", "lib/z.py"]


def test_patterns_and_single_files(tree: Path) -> None:
    def names(pattern: str, **options: object) -> list[str]:
        given = SourceOptions.model_validate({"path": f"{tree}/{pattern}", **options})
        return [path.relative_to(tree).as_posix() for path in find_files(given)]

    assert names("*.py") == ["a.py", "b.py"]
    assert names("**/*.py", include=["z.py"]) == ["lib/z.py", "link/z.py"]
    assert names("lib/*", exclude=["deep"]) == ["lib/test/t.py", "lib/z.py"]
    assert names(".hidden.py") == [".hidden.py"]
    assert names(".git") == [".git/config.py"]
    assert names("link") == ["link/deep/y.py", "link/test/t.py", "link/z.py"]


def test_paths_that_give_nothing(tree: Path) -> None:
    with pytest.raises(DataError, match=r"nothing/\*.py: there is no such file or folder"):
        find_files(SourceOptions(path=f"{tree}/nothing/*.py"))
    with pytest.raises(DataError, match="no file is left by include and exclude"):
        find_files(SourceOptions(path=str(tree), include=("*.rs",)))
    os.mkfifo(tree / "pipe")
    with pytest.raises(DataError, match="pipe: not a regular file"):
        find_files(SourceOptions(path=str(tree)))
    (tree / "pipe").unlink()
    (tree / "broken").symlink_to(tree / "nowhere")
    with pytest.raises(DataError, match="broken: not a regular file"):
        find_files(SourceOptions(path=str(tree)))


def test_texts_are_the_characters_of_the_file(tmp_path: Path) -> None:
    content = "naïve 東京 👩‍💻\r\n\tx \n"
    write(
        tmp_path,
        {"a": content, "b": b"\xef\xbb\xbfmarked", "c.jsonl": b'\xef\xbb\xbf{"text": "one"}\n\n {"text":"two\\n"}'},
    )
    assert texts(tmp_path) == [content, "marked", "one", "two\n"]
    assert texts(tmp_path, include=["*.jsonl"], format="text")[0].startswith('{"text": "one"}')


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"a\0b", "not UTF-8 text"),
        (b"caf\xe9", "not UTF-8 text"),
        ("x".encode("utf-16"), "not UTF-8"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes, says: str) -> None:
    write(tmp_path, {"a.txt": "x", "b.txt": content})
    with pytest.raises(DataError, match=rf"b\.txt: {says}") as refused:
        texts(tmp_path)
    assert refused.value.hint == "name it in exclude, or set skip for the source"
    options = SourceOptions(path=str(tmp_path), skip=True)
    reader = SourceReader(find_files(options), options)
    assert len(list(reader.documents())) == 1
    assert reader.skipped == {says.split(maxsplit=1)[0].replace("not", "binary"): 1}


def test_an_empty_file_of_rows_and_one_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a.jsonl": "\n \n"})
    with pytest.raises(DataError, match=r"a\.jsonl: empty"):
        texts(tmp_path)
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 1 << 20)
    large = b"x" * ((1 << 20) + 1)
    write(tmp_path, {"a.jsonl": b'{"text": "a"}\n' + large})
    with pytest.raises(DataError, match=r"a\.jsonl:2: a line has at most 1 MiB"):
        texts(tmp_path)
    write(tmp_path, {"a.jsonl": b'{"text": "a"}', "b": large})
    with pytest.raises(DataError, match="b: a document has at most 1 MiB"):
        texts(tmp_path)
    (tmp_path / "b").write_bytes(b"x")
    (tmp_path / "b").chmod(0)
    if os.geteuid():
        with pytest.raises(DataError, match="b: cannot be read: Permission denied"):
            texts(tmp_path)


WRONG_ROWS = {
    '{"text": "a"': "not JSON: ",
    "nonsense": "not JSON: ",
    '{"text": NaN}': "not JSON: NaN is no JSON number",
    "[" * 100_000: "nested too deeply",
    '["text"]': "a row must be a JSON object, not a list",
    '"text"': "not a string",
    "{}": "has neither text nor messages",
    '{"prompt": "a"}': "has neither text nor messages",
    '{"text": "a", "messages": []}': "has both text and messages",
    '{"text": "a", "meta": {}}': "unknown key 'meta'",
    '{"text": 3}': "text must be a string, not a number",
    '{"text": null}': "text must be a string, not null",
    '{"text": ["a"]}': "text must be a string, not a list",
    '{"text": " \\n"}': "text is empty",
    '{"text": "\\ud83d"}': "half of a surrogate pair",
    '{"messages": []}': "messages: ",
    '{"messages": "a"}': "messages: ",
    '{"messages": [{"role": "bot", "content": "a"}]}': "messages.0.role: ",
    '{"messages": [{"role": "user", "content": 3}]}': "messages.0.content",
    '{"messages": [{"role": "user", "text": "a"}]}': "unknown field 'messages.0.text'",
    '{"messages": [{"role": "user", "content": "a"}], "functions": []}': "unknown field 'functions'",
    '{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}': "tools.0.function is missing",
    '{"messages": [{"role": "assistant", "content": "a", "prefix": true}]}': "prefix belongs into requests",
}


@pytest.mark.parametrize("line", WRONG_ROWS, ids=lambda line: line[:40])
def test_rows_that_are_refused(line: str) -> None:
    with pytest.raises(DataError) as refused:
        parse_row(line.encode(), ORIGIN)
    assert refused.value.message.startswith("rows.jsonl:7: ")
    assert WRONG_ROWS[line] in refused.value.message


KEYS = st.sampled_from(["text", "messages", "tools", "role", "content", "x"])
JSON = st.recursive(
    st.none() | st.text() | st.booleans() | st.floats(),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
)


@given(line=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_line_is_a_document_or_a_data_error(line: bytes) -> None:
    try:
        document = parse_row(line, ORIGIN)
    except DataError:
        return
    assert document.content


def test_a_chat(tmp_path: Path) -> None:
    function = {"name": "clock", "description": "The time", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    row = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "When?"},
            {"role": "assistant", "content": None, "reasoning_content": "A clock.", "tool_calls": [call]},
            {"role": "tool", "content": "noon", "tool_call_id": "1"},
            {"role": "assistant", "content": "Noon."},
        ],
        "tools": [{"type": "function", "function": function}],
    }
    document = parse_row(json.dumps(row).encode(), ORIGIN)
    assert isinstance(document, ChatDocument)
    assert document.conversation.tools == (Tool("clock", "The time", function["parameters"]),)  # type: ignore[arg-type]
    assert document.conversation.messages == (
        Message("system", "Be brief."),
        Message("user", "When?"),
        Message("assistant", None, tool_calls=(ToolCall("1", "clock", "{}"),), reasoning_content="A clock."),
        Message("tool", "noon", tool_call_id="1"),
        Message("assistant", "Noon."),
    )


def test_digests_tell_contents_and_stamps_tell_changes(tmp_path: Path) -> None:
    write(tmp_path, {"a": "one", "b.jsonl": '{"text": "x"}\n\n{"text": "y"}\n'})
    options = SourceOptions(path=str(tmp_path))
    files = find_files(options)
    reader = SourceReader(files, options)
    assert len(list(reader.documents())) == 3
    assert reader.digest == digest_of(files)
    assert reader.bytes_read == sum(file.stat().st_size for file in files)
    before = stamp_of(files), digest_of(files)
    os.utime(files[0], ns=(0, 0))
    assert stamp_of(files) != before[0]
    assert digest_of(files) == before[1]
    write(tmp_path, {"a": "two"})
    assert digest_of(files) != before[1]
