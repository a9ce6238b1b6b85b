"""Files and batches through the official SDK, unchanged, against a real server and a real (tiny, random) model."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from tests.server.serving import serving

from kvern.llm import LLM

URL: Literal["/v1/chat/completions"] = "/v1/chat/completions"
GREEDY: dict[str, Any] = {"model": "tiny-v3", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def sdk(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    settings = {
        "max_body_bytes": 1 << 16,
        "max_file_bytes": 1 << 18,
        "store": str(tmp_path_factory.mktemp("store") / "s"),
    }
    with (
        serving(lambda: LLM(tiny_folder, dtype="f32", threads=1), settings=settings) as server,
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
        ) as client,
    ):
        yield client


def line(custom_id: str, text: str = "hi", url: str = URL, **body: Any) -> dict[str, Any]:
    asked = {**GREEDY, **body}
    given = {"prompt": text} if url == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**asked, **given}}


def upload(sdk: openai.OpenAI, lines: Sequence[Any], **said: Any) -> openai.types.FileObject:
    text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
    return sdk.files.create(file=("in.jsonl", text.encode()), purpose="batch", **said)


def start(sdk: openai.OpenAI, lines: Sequence[Any], endpoint: Any = URL, window: Any = "24h", **more: Any) -> str:
    file = upload(sdk, lines)
    return sdk.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window=window, **more).id


def wait(sdk: openai.OpenAI, batch_id: str, until: Callable[[Any], bool] | None = None) -> openai.types.Batch:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        batch = sdk.batches.retrieve(batch_id)
        if until(batch) if until else batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.05)
    raise AssertionError(f"timed out: {batch}")


def rows(sdk: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(text) for text in sdk.files.content(file_id).text.splitlines()]


def test_files_go_up_and_down(sdk: openai.OpenAI) -> None:
    content = bytes(range(256)) * 512
    before = time.time()
    file = sdk.files.create(
        file=("a b.bin", io.BytesIO(content)),
        purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (file.bytes, file.filename, file.purpose, file.status) == (len(content), "a b.bin", "user_data", "processed")
    assert file.id.startswith("file-")
    assert file.expires_at == file.created_at + 3600
    assert before - 1 <= file.created_at <= time.time()
    assert sdk.files.retrieve(file.id) == file
    assert sdk.files.content(file.id).content == content
    gone = sdk.files.delete(file.id)
    assert (gone.id, gone.deleted) == (file.id, True)
    for again in (sdk.files.retrieve, sdk.files.content, sdk.files.delete):
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            again(file.id)


def test_files_are_listed_in_pages(sdk: openai.OpenAI) -> None:
    made = [sdk.files.create(file=(f"{n}.txt", b"x"), purpose="user_data").id for n in range(5)]
    assert [file.id for file in sdk.files.list(purpose="user_data", limit=2)][:5] == made[::-1]
    page = sdk.files.list(purpose="user_data", order="asc", limit=3)
    assert page.has_more
    first = sdk.files.list(purpose="user_data", limit=2, after=made[4])
    assert [file.id for file in first.data] == made[3:1:-1]
    assert made[0] not in [file.id for file in sdk.files.list(purpose="batch")]


@pytest.mark.parametrize("url", [URL, "/v1/completions"])
def test_a_batch_answers_every_row_in_order(sdk: openai.OpenAI, url: Any) -> None:
    texts = {f"row-{n}": f"{'the cat sat ' * 30 if n % 3 else 'def add '}{n}" for n in range(24)}
    asked = [line(name, text, url) for name, text in texts.items()]
    batch_id = start(sdk, asked, url, metadata={"who": "me"})
    batch = wait(sdk, batch_id)
    assert batch.status == "completed", batch
    assert batch.metadata == {"who": "me"}
    assert (batch.model, batch.endpoint, batch.errors, batch.error_file_id) == ("tiny-v3", url, None, None)
    stamps = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert stamps == sorted(stamps, key=lambda stamp: stamp or 0)
    assert batch.expires_at == batch.created_at + 86400
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (24, 24, 0)
    found = rows(sdk, batch.output_file_id)
    assert [row["custom_id"] for row in found] == list(texts)
    for row, text in zip(found, texts.values(), strict=True):
        assert row["id"].startswith("batch_req_")
        assert row["error"] is None
        assert row["response"]["status_code"] == 200
        assert row["response"]["request_id"]
        assert row["response"]["body"]["choices"] == alone(sdk, url, text)["choices"]
    assert len({row["id"] for row in found}) == len({row["response"]["body"]["id"] for row in found}) == 24
    usage = batch.usage
    assert usage is not None
    used = [row["response"]["body"]["usage"] for row in found]
    assert usage.input_tokens == sum(one["prompt_tokens"] for one in used)
    assert usage.output_tokens == sum(one["completion_tokens"] for one in used)
    assert usage.input_tokens_details.cached_tokens > usage.input_tokens // 2
    output = sdk.files.retrieve(batch.output_file_id or "")
    assert output.purpose == "batch_output"
    assert output.bytes == len(sdk.files.content(output.id).content)


def alone(sdk: openai.OpenAI, url: str, text: str) -> dict[str, Any]:
    """The answer to the same request, asked directly."""
    if url == "/v1/completions":
        continued: dict[str, Any] = sdk.completions.create(prompt=text, **GREEDY).model_dump()
        return continued
    answer = sdk.chat.completions.create(messages=[{"role": "user", "content": text}], **GREEDY)
    whole: dict[str, Any] = json.loads(answer.model_dump_json(exclude_unset=True))
    return whole


def test_rows_that_fail_are_in_the_error_file(sdk: openai.OpenAI) -> None:
    asked = [
        line("good"),
        line("bad", temperature=9),
        line("long", "x" * 5000),
        line("unknown", tempreature=1),
        line("also good", "ho"),
    ]
    batch = wait(sdk, start(sdk, asked))
    assert batch.status == "completed"
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (5, 2, 3)
    assert [row["custom_id"] for row in rows(sdk, batch.output_file_id)] == ["good", "also good"]
    failed = rows(sdk, batch.error_file_id)
    assert [row["custom_id"] for row in failed] == ["bad", "long", "unknown"]
    assert [row["response"]["status_code"] for row in failed] == [400] * 3
    errors = [row["response"]["body"]["error"] for row in failed]
    assert [error["param"] for error in errors] == ["temperature", "messages", "tempreature"]
    assert "did you mean 'temperature'?" in errors[2]["message"]


WRONG: list[tuple[Any, str, str | None]] = [
    ("{", "invalid_json_line", None),
    ("[]", "invalid_json_line", None),
    ('{"custom_id": NaN}', "invalid_json_line", None),
    ("\x00", "invalid_json_line", None),
    ("[" * 9000, "invalid_json_line", None),
    ("x" * 70_000, "line_too_long", None),
    ({**line("x"), "extra": 1}, "unknown_parameter", "extra"),
    ({**line("x"), "custom_id": None}, "missing_required_parameter", "custom_id"),
    ({**line("x"), "custom_id": 7}, "invalid_custom_id", "custom_id"),
    ({**line("x"), "custom_id": ""}, "invalid_custom_id", "custom_id"),
    ({**line("x"), "custom_id": "\ud800"}, "invalid_custom_id", "custom_id"),
    ({**line("x"), "custom_id": "y" * 513}, "invalid_custom_id", "custom_id"),
    ({**line("x"), "method": "GET"}, "invalid_method", "method"),
    ({**line("x"), "url": "/v1/completions"}, "mismatched_endpoint", "url"),
    ({**line("x"), "url": ["/v1/chat/completions"]}, "mismatched_endpoint", "url"),
    ({**line("x"), "body": []}, "invalid_body", "body"),
    ({**line("x"), "body": "x"}, "invalid_body", "body"),
    ({**line("x"), "body": {}}, "missing_required_parameter", "body.model"),
    (line("x", model="gpt-4"), "model_not_found", "body.model"),
    (line("x", model=["tiny-v3"]), "missing_required_parameter", "body.model"),
    (line("x", stream=True), "invalid_body", "body.stream"),
    (line("first"), "duplicate_custom_id", "custom_id"),
]


def test_lines_that_are_wrong_fail_the_batch_with_their_numbers(sdk: openai.OpenAI) -> None:
    batch = wait(sdk, start(sdk, [line("first"), "", *(wrong for wrong, _, _ in WRONG)]))
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert batch.errors is not None
    assert batch.errors.data is not None
    found = [(error.line, error.code, error.param) for error in batch.errors.data]
    assert found == [(number, code, param) for number, (_, code, param) in enumerate(WRONG, 3)]
    assert all(error.message for error in batch.errors.data)


def test_only_so_many_errors_are_told(sdk: openai.OpenAI) -> None:
    batch = wait(sdk, start(sdk, ["{"] * 150))
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert len(batch.errors.data) == 101
    assert batch.errors.data[-1].message == "50 more lines are wrong"


def test_a_file_without_lines_fails_the_batch(sdk: openai.OpenAI) -> None:
    batch = wait(sdk, start(sdk, ["", "  "]))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [error.code for error in batch.errors.data] == ["empty_file"]


def test_what_cannot_be_a_batch_is_refused_at_once(sdk: openai.OpenAI) -> None:
    good = upload(sdk, [line("x")])
    plain = sdk.files.create(file=("x.jsonl", b"{}"), purpose="user_data")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"input_file_id": plain.id}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "24 hours"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"extra_body": {"priority": 1}}, "priority"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds"),
    ]
    for change, param in cases:
        asked: Any = {"input_file_id": good.id, "endpoint": URL, "completion_window": "24h", **change}
        with pytest.raises(openai.APIStatusError) as caught:
            sdk.batches.create(**asked)
        assert caught.value.status_code in (400, 404)
        assert caught.value.param == param, change


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"purpose": "fine-tune", "file": ("x.jsonl", b"{}")}, "purpose"),
        ({"purpose": "batch", "file": ("x.txt", b"{}")}, "file"),
        ({"purpose": "batch", "file": ("x.jsonl", b"")}, "file"),
        ({"purpose": "batch", "file": ("x" * 600 + ".jsonl", b"{}")}, "filename"),
        ({"purpose": "user_data", "file": ("x", b"{}"), "extra_body": {"colour": "red"}}, "colour"),
        ({"purpose": "batch", "file": ("x.jsonl", b"{}"), "expires_after": {"seconds": 60}}, "expires_after.anchor"),
    ],
)
def test_uploads_that_are_refused(sdk: openai.OpenAI, said: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.files.create(**said)
    assert caught.value.param == param


def test_an_upload_that_is_too_large(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="larger than") as caught:
        sdk.files.create(file=("x", b"x" * 400_000), purpose="user_data")
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    ("call", "param"), [({"limit": 0}, "limit"), ({"limit": 101}, "limit"), ({"after": "x"}, "after")]
)
def test_lists_check_what_they_are_asked(sdk: openai.OpenAI, call: Any, param: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        sdk.batches.list(**call)
    assert caught.value.param == param


def test_batches_are_listed_in_pages(sdk: openai.OpenAI) -> None:
    made = [start(sdk, [line("x")]) for _ in range(3)]
    assert [batch.id for batch in sdk.batches.list(limit=2)][:3] == made[::-1]
    for batch_id in made:
        wait(sdk, batch_id)


def test_a_batch_that_runs_can_be_read_and_cancelled(sdk: openai.OpenAI) -> None:
    lines = 1500  # more than the fastest machine ends while it is read
    file = upload(sdk, [line(str(n), f"{n} and so on", max_tokens=40, ignore_eos=True) for n in range(lines)])
    batch_id = sdk.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h").id
    wait(sdk, batch_id, lambda b: b.status != "validating")
    sdk.files.delete(file.id)  # its lines were read
    running = wait(sdk, batch_id, lambda b: b.request_counts.completed > 3)
    early = rows(sdk, running.output_file_id)
    assert 3 < len(early) < lines
    assert [int(row["custom_id"]) for row in early] == sorted(int(row["custom_id"]) for row in early)
    with pytest.raises(openai.ConflictError, match="a batch still needs"):
        sdk.files.delete(running.output_file_id or "")
    assert sdk.batches.cancel(batch_id).status in ("cancelling", "cancelled")
    batch = wait(sdk, batch_id)
    assert batch.status == "cancelled"
    assert batch.cancelling_at is not None
    assert batch.cancelled_at is not None
    good, failed = rows(sdk, batch.output_file_id), rows(sdk, batch.error_file_id)
    assert sorted(int(row["custom_id"]) for row in good + failed) == list(range(lines))
    assert {row["error"]["code"] for row in failed} == {"batch_cancelled"}
    assert {row["id"] for row in early} <= {row["id"] for row in good}
    assert sdk.batches.cancel(batch_id).status == "cancelled"
    sdk.files.delete(batch.output_file_id or "")


def test_a_batch_that_has_ended_cannot_be_cancelled(sdk: openai.OpenAI) -> None:
    batch_id = start(sdk, [line("x")])
    assert wait(sdk, batch_id).status == "completed"
    with pytest.raises(openai.BadRequestError, match="a batch that is completed cannot be cancelled"):
        sdk.batches.cancel(batch_id)


def test_a_batch_expires(sdk: openai.OpenAI) -> None:
    asked = [line(str(n), f"{n}", max_tokens=200, ignore_eos=True) for n in range(300)]
    batch = wait(sdk, start(sdk, asked, window="1s"))
    assert batch.status == "expired"
    assert batch.expired_at is not None
    failed = rows(sdk, batch.error_file_id)
    assert failed[-1]["response"] is None
    assert failed[-1]["error"] == {
        "code": "batch_expired",
        "message": "This request could not be executed before the completion window expired.",
    }
    good = rows(sdk, batch.output_file_id) if batch.output_file_id else []
    assert sorted(int(row["custom_id"]) for row in good + failed) == list(range(300))


def test_responses_of_a_batch_are_stored_on_request_alone(sdk: openai.OpenAI) -> None:
    url = "/v1/responses"
    said: dict[str, dict[str, Any]] = {"unsaid": {}, "null": {"store": None}, "no": {"store": False}}
    said["yes"] = {"store": True}
    body = {"model": "tiny-v3", "input": "hi", "max_output_tokens": 4, "temperature": 0}
    asked = [{"custom_id": name, "method": "POST", "url": url, "body": {**body, **more}} for name, more in said.items()]
    batch = wait(sdk, start(sdk, asked, url))
    found = {row["custom_id"]: row["response"]["body"] for row in rows(sdk, batch.output_file_id)}
    assert {name: one["store"] for name, one in found.items()} == {
        "unsaid": False,
        "null": False,
        "no": False,
        "yes": True,
    }
    for ids in ({one["id"] for one in found.values()}, {one["output"][0]["id"] for one in found.values()}):
        assert len(ids) == 4, "also where one answer serves equal rows"
    assert sdk.responses.retrieve(found.pop("yes")["id"]).status == "incomplete"
    for one in found.values():
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve(one["id"])


def test_equal_requests_are_computed_once(sdk: openai.OpenAI) -> None:
    greedy, drawn = line("a", "once upon"), line("b", "once upon", temperature=1, seed=7)
    free = line("c", "once upon", temperature=1)
    first = wait(sdk, start(sdk, [greedy, drawn, free]))
    renamed = [{**one, "custom_id": f"again {one['custom_id']}"} for one in (greedy, drawn, free)]
    renamed[0]["body"] = dict(reversed({**greedy["body"], "user": "somebody else"}.items()))
    second = wait(sdk, start(sdk, renamed))
    assert first.model_dump()["reused_requests"] == 0
    assert second.model_dump()["reused_requests"] == 2
    before, after = rows(sdk, first.output_file_id), rows(sdk, second.output_file_id)
    for one, two in zip(before[:2], after[:2], strict=True):
        assert one["response"]["body"]["choices"] == two["response"]["body"]["choices"]
        assert one["response"]["body"]["id"] != two["response"]["body"]["id"]
