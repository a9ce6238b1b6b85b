"""Every answer beside OpenAI's own document of its interface: bodies, events of streams, errors, files, batches.

The document is cut down to what our routes answer (cut_openai_spec.py). What differs knowingly is in `DIFFERS`, and
all of it must be seen; anything else fails.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from tests.scripted import ScriptedEngine
from tests.server import test_tools
from tests.server.cut_openai_spec import cut
from tests.server.openai_spec import SPEC, findings
from tests.server.serving import serving, wait_until
from tests.server.test_tools import CALL, CLOCK, SECOND, WEATHER, Writing

from kvern.llm import LLM

DIFFERS: dict[str, str] = {
    "null where nothing has happened yet, as in the document's own examples": """
        Batch: errors output_file_id error_file_id
        Batch: in_progress_at finalizing_at completed_at failed_at expired_at cancelling_at cancelled_at
        Response: usage user
        CreateCompletionResponse: choices[].finish_reason""",
    "null, where OpenAI's server says so: an echoed prompt's first token has no score": """
        CreateCompletionResponse: choices[].logprobs.token_logprobs[] choices[].logprobs.top_logprobs[]""",
    "null, as the description of include_usage says of all chunks but the last": """
        CreateCompletionResponse: usage""",
    "DeepSeek's names, which its clients read": """
        CreateChatCompletionResponse: usage.prompt_cache_hit_tokens usage.prompt_cache_miss_tokens
        CreateChatCompletionResponse: choices[].message.tool_calls[].index
        CreateChatCompletionStreamResponse: usage.prompt_cache_hit_tokens usage.prompt_cache_miss_tokens
        CreateCompletionResponse: usage.prompt_cache_hit_tokens usage.prompt_cache_miss_tokens""",
    "reasoning, for which the document has no place": """
        CreateChatCompletionResponse: choices[].message.reasoning_content choices[].message.reasoning
        CreateChatCompletionStreamResponse: choices[].delta.reasoning_content choices[].delta.reasoning""",
    "what the Open Responses schema demands and the document only shows in its examples": """
        Response: frequency_penalty presence_penalty store""",
    "the same scores as in the item, where the document declares bytes": """
        ResponseStreamEvent: logprobs[].bytes logprobs[].top_logprobs[].bytes""",
    "the code by which Codex knows that it must shorten the conversation": """
        Response: error.code""",
    "what a client may want to know of a served model": """
        Model: capabilities context_length max_model_len""",
    "rows that an equal earlier request had answered": """
        Batch: reused_requests""",
}
"""Why, and where: schema and paths."""

KNOWN = {
    f"{schema.strip()} {path}"
    for text in DIFFERS.values()
    for schema, _, paths in (line.partition(":") for line in text.strip().splitlines())
    for path in paths.split()
}
model, thinker = test_tools.model, test_tools.thinker
HI: list[Any] = [{"role": "user", "content": "hi"}]
MODEL = "tiny-v3"
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
WHOLE = {
    CHAT: "CreateChatCompletionResponse",
    COMPLETIONS: "CreateCompletionResponse",
    RESPONSES: "Response",
}
STREAMED = {
    CHAT: "CreateChatCompletionStreamResponse",
    COMPLETIONS: "CreateCompletionResponse",
    RESPONSES: "ResponseStreamEvent",
}
LOGPROBS = ["message.output_text.logprobs"]
SHAPE = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"max_tokens": 4}),
    "chat with choices": (CHAT, {"max_tokens": 3, "n": 2, "stop": ["x"], "seed": 1}),
    "chat with logprobs": (CHAT, {"max_tokens": 3, "logprobs": True, "top_logprobs": 2}),
    "chat with usage": (CHAT, {"max_tokens": 3, "stream_options": {"include_usage": True}}),
    "chat with a schema": (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SHAPE, "strict": True}}},
    ),
    "completion": (COMPLETIONS, {"max_tokens": 4}),
    "completion of prompts": (COMPLETIONS, {"max_tokens": 3, "prompt": ["a", "b"], "n": 2}),
    "completion of ids": (COMPLETIONS, {"max_tokens": 3, "prompt": [65, 66]}),
    "completion with logprobs": (COMPLETIONS, {"max_tokens": 3, "logprobs": 2}),
    "completion with echo": (COMPLETIONS, {"max_tokens": 3, "echo": True}),
    "completion with scored echo": (COMPLETIONS, {"max_tokens": 3, "echo": True, "logprobs": 1}),
    "prompt alone": (COMPLETIONS, {"max_tokens": 0, "echo": True, "logprobs": 1}),
    "completion in the middle": (COMPLETIONS, {"max_tokens": 3, "suffix": "b"}),
    "completion with usage": (COMPLETIONS, {"max_tokens": 3, "stream_options": {"include_usage": True}}),
    "response": (RESPONSES, {"max_output_tokens": 20}),
    "response not stored": (RESPONSES, {"max_output_tokens": 20, "store": False, "instructions": "Be.", "user": "u"}),
    "response with logprobs": (RESPONSES, {"max_output_tokens": 20, "include": LOGPROBS, "top_logprobs": 2}),
    "response with a schema": (
        RESPONSES,
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": SHAPE, "strict": True}}},
    ),
    "response in the background": (RESPONSES, {"max_output_tokens": 20, "background": True, "metadata": {"a": "b"}}),
}
FUNCTIONS: list[Any] = [{"type": "function", **tool["function"]} for tool in (WEATHER, CLOCK)]
WRITTEN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "chat with calls": (CHAT, f"I look.\n{CALL}\n{SECOND}", {"tools": [WEATHER, CLOCK]}),
    "chat with reasoning": (CHAT, "hm</think>so", {}),
    "response with reasoning": (RESPONSES, "hm</think>so", {}),
    "response with a summary": (
        RESPONSES,
        "hm</think>so",
        {"reasoning": {"effort": "high", "summary": "auto"}, "include": ["reasoning.encrypted_content"]},
    ),
    "response with calls": (RESPONSES, f"I look.\n{CALL}\n{SECOND}", {"tools": FUNCTIONS}),
    "response that ends": (RESPONSES, "so", {"tools": FUNCTIONS, "tool_choice": "none", "temperature": 0}),
    "response with a choice": (
        RESPONSES,
        CALL,
        {"tools": FUNCTIONS, "tool_choice": {"type": "function", "name": "clock"}, "parallel_tool_calls": False},
    ),
}
GIVEN: dict[str, dict[str, Any]] = {CHAT: {"messages": HI}, COMPLETIONS: {"prompt": "hi"}, RESPONSES: {"input": "hi"}}


def asked(path: str, fields: dict[str, Any], stream: bool) -> dict[str, Any]:
    options = {name: value for name, value in fields.items() if stream or name != "stream_options"}
    return {"model": MODEL, **GIVEN[path], **options, "stream": stream}


def ask(http: httpx.Client, path: str, fields: dict[str, Any], stream: bool) -> list[tuple[str, Any]]:
    answer = http.post(path, json=asked(path, fields, stream))
    assert answer.status_code == 200, answer.text
    return events(path, answer.text) if stream else [(WHOLE[path], answer.json())]


def events(path: str, text: str) -> list[tuple[str, Any]]:
    """The data of a stream; an error ends it, as OpenAI's do."""
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    bodies = [json.loads(one) for one in found if one != "[DONE]"]
    assert bodies
    return [("ErrorResponse" if "error" in body else STREAMED[path], body) for body in bodies]


@pytest.fixture(scope="module")
def served(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    settings = {"max_body_bytes": 1 << 16, "store": str(tmp_path_factory.mktemp("store") / "s")}
    with (
        serving(lambda: LLM(tiny_folder, dtype="f32", threads=1), settings=settings) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def seen() -> set[str]:
    """All that was found, by all tests here."""
    return set()


def check(answers: list[tuple[str, Any]], seen: set[str]) -> None:
    found = {key: what for schema, body in answers for key, what in findings(schema, body).items()}
    seen |= set(found)
    assert {key: what for key, what in found.items() if key not in KNOWN} == {}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", REQUESTS)
def test_answers(served: httpx.Client, seen: set[str], name: str, stream: bool) -> None:
    check(ask(served, *REQUESTS[name], stream), seen)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", WRITTEN)
def test_tools_and_reasoning(model: Writing, thinker: Writing, seen: set[str], name: str, stream: bool) -> None:
    path, text, fields = WRITTEN[name]
    writer = thinker if "</think>" in text else model
    writer.write(text)
    with httpx.Client(base_url=writer.url, timeout=60) as http:
        check(ask(http, path, fields, stream), seen)


def test_models(served: httpx.Client, seen: set[str]) -> None:
    check([("ListModelsResponse", get(served, "/v1/models")), ("Model", get(served, f"/v1/models/{MODEL}"))], seen)


def get(http: httpx.Client, path: str) -> Any:
    answer = http.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def post(http: httpx.Client, path: str, body: Any = None) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def upload(http: httpx.Client, content: bytes, **fields: str) -> Any:
    answer = http.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_files(served: httpx.Client, seen: set[str]) -> None:
    lasting = upload(served, b"x\n")
    short = upload(
        served,
        b"x\n",
        **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600", "purpose": "user_data"},
    )
    answers = [("OpenAIFile", lasting), ("OpenAIFile", short), ("OpenAIFile", get(served, f"/v1/files/{short['id']}"))]
    check([*answers, ("ListFilesResponse", get(served, "/v1/files"))], seen)
    check([("DeleteFileResponse", served.delete(f"/v1/files/{short['id']}").json())], seen)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_batches(served: httpx.Client, seen: set[str], path: str) -> None:
    short = {"max_output_tokens": 16} if path == RESPONSES else {"max_tokens": 3}
    bodies = [asked(path, fields, False) for fields in (short, {**short, "temperature": -1})]
    lines = [{"custom_id": str(n), "method": "POST", "url": path, "body": body} for n, body in enumerate(bodies)]
    file = upload(served, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    begun = post(
        served,
        "/v1/batches",
        {"input_file_id": file["id"], "endpoint": path, "completion_window": "24h", "metadata": {"a": "b"}},
    )
    done = ended(served, begun["id"])
    check([("Batch", begun), ("Batch", done), ("ListBatchesResponse", get(served, "/v1/batches"))], seen)
    rows = [served.get(f"/v1/files/{done[name]}/content").json() for name in ("output_file_id", "error_file_id")]
    schemas = (WHOLE[path], "ErrorResponse")
    check([(schema, row["response"]["body"]) for schema, row in zip(schemas, rows, strict=True)], seen)
    check([("OpenAIFile", get(served, f"/v1/files/{done['output_file_id']}"))], seen)


def ended(http: httpx.Client, batch_id: str) -> Any:
    wait_until(lambda: get(http, f"/v1/batches/{batch_id}")["status"] in ("completed", "failed", "cancelled"), 60)
    return get(http, f"/v1/batches/{batch_id}")


def test_batches_that_fail_and_are_cancelled(served: httpx.Client, seen: set[str]) -> None:
    made = {"endpoint": CHAT, "completion_window": "24h"}
    bad = post(served, "/v1/batches", {**made, "input_file_id": upload(served, b"x\n")["id"]})
    body = asked(CHAT, {"max_tokens": 200, "ignore_eos": True}, False)
    lines = [{"custom_id": str(n), "method": "POST", "url": CHAT, "body": body} for n in range(99)]
    file = upload(served, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    long = post(served, "/v1/batches", {**made, "input_file_id": file["id"]})
    cancelled = post(served, f"/v1/batches/{long['id']}/cancel")
    bodies = [ended(served, bad["id"]), cancelled, ended(served, long["id"])]
    assert [one["status"] for one in bodies[::2]] == ["failed", "cancelled"]
    check([("Batch", one) for one in bodies], seen)


def test_stored_responses(served: httpx.Client, seen: set[str]) -> None:
    items = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    fields = {"max_output_tokens": 20, "input": items}
    first = post(served, RESPONSES, asked(RESPONSES, fields, False))
    running = post(served, RESPONSES, asked(RESPONSES, {"background": True, "max_output_tokens": 200}, False))
    second = post(served, RESPONSES, asked(RESPONSES, {"previous_response_id": first["id"]} | fields, False))
    at = f"{RESPONSES}/{second['id']}"
    answers = [first, running, second, get(served, at), post(served, f"{RESPONSES}/{running['id']}/cancel")]
    check([("Response", one) for one in answers], seen)
    check([("ResponseItemList", get(served, f"{at}/input_items"))], seen)


def test_errors(served: httpx.Client, seen: set[str]) -> None:
    refused = [
        served.post(path, json=asked(path, {}, False) | wrong)
        for path in (CHAT, COMPLETIONS, RESPONSES)
        for wrong in ({"model": "gpt-4"}, {"temperature": "hot"}, {"surprise": 1}, {"temperature": 9})
    ]
    refused += [served.post(CHAT, content=b"{"), served.post(CHAT, json={"x": "y" * (1 << 17)})]
    refused += [served.post("/v1/batches", json={}), served.post("/v1/files", data={"purpose": "batch"})]
    names = ("files", "batches", "responses", "models", "nothing")
    refused += [served.get(f"/v1/{name}/no") for name in names]
    assert all(400 <= one.status_code < 500 for one in refused)
    check([("ErrorResponse", one.json()) for one in refused], seen)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_errors_in_the_middle(tiny_folder: Path, seen: set[str], path: str) -> None:
    engine = ScriptedEngine(pause=0.01)
    with (
        serving(lambda: LLM(tiny_folder, engine=engine)) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
        http.stream("POST", path, json=asked(path, {}, True)) as response,
    ):
        parts = response.iter_text()
        text = next(parts)
        engine.fails = True
        found = events(path, text + "".join(parts))
    check(found, seen)
    last = found[-1]
    assert last[0] == "ErrorResponse" or last[1]["type"] == "response.failed"


def test_a_response_that_is_too_long(served: httpx.Client, seen: set[str]) -> None:
    check(ask(served, RESPONSES, {"input": "x " * 20_000}, True), seen)


CHUNK = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
DELTA = {"type": "response.output_text.delta", "item_id": "i", "output_index": 0, "content_index": 0, "delta": "x"}


@pytest.mark.parametrize(
    ("schema", "body", "found"),
    [
        ("CreateChatCompletionStreamResponse", CHUNK, {}),
        ("CreateChatCompletionStreamResponse", CHUNK | {"created": "x"}, {"created": "is not of type 'integer'"}),
        ("CreateChatCompletionStreamResponse", CHUNK | {"x": 1}, {"x": "not declared"}),
        (
            "CreateChatCompletionStreamResponse",
            CHUNK | {"choices": [{"index": 0, "delta": {"y": 1}, "finish_reason": "no"}]},
            {"choices[].delta.y": "not declared", "choices[].finish_reason": "is not one of"},
        ),
        ("ResponseStreamEvent", DELTA | {"logprobs": [], "sequence_number": 0}, {}),
        ("ResponseStreamEvent", DELTA | {"logprobs": []}, {"": "'sequence_number' is a required property"}),
    ],
)
def test_what_a_check_finds(schema: str, body: dict[str, Any], found: dict[str, str]) -> None:
    seen = findings(schema, body)
    assert sorted(seen) == sorted(f"{schema} {path}" for path in found)
    assert all(said in seen[f"{schema} {path}"] for path, said in found.items())


def test_the_document_is_whole_and_as_small_as_it_gets() -> None:
    assert {"x-fields": SPEC["x-fields"], **cut(SPEC)} == SPEC
    for schema in SPEC["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (CHAT, "CreateChatCompletionRequest"),
        (COMPLETIONS, "CreateCompletionRequest"),
        (RESPONSES, "CreateResponse"),
    ],
)
def test_every_field_of_a_request_is_known(served: httpx.Client, path: str, kind: str) -> None:
    """Read, or refused by its name as what is not supported; it is no misspelling."""
    for field in SPEC["x-fields"][kind]:
        answer = served.post(path, json=asked(path, {}, False) | {field: {"no": "such"}})
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["param"].split(".")[0] == field
            assert f"unknown field {field!r}" not in error["message"]


def test_what_is_known_is_still_so(seen: set[str], request: pytest.FixtureRequest) -> None:
    """Only after all others have run."""
    ours = [item for item in request.session.items if item.path == request.path]
    if len(ours) < len(REQUESTS) * 2 + len(WRITTEN) * 2:
        pytest.skip("not all of the answers were looked at")
    assert KNOWN - seen == set()
