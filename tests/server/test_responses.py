"""/v1/responses through the official SDK, strictly validated, against a real server and a real (tiny, random) model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response
from tests.scripted import ScriptedEngine
from tests.server.serving import Serving, serving, wait_until
from tests.wire.test_responses import CODEX
from tests.wire.test_responses_stream import read_back

from kvern.engine import EngineSettings
from kvern.llm import LLM
from kvern.store import Store, responses
from kvern.store.responses import StoredResponse
from kvern.text.conversation import Conversation
from kvern.text.messages import Message

MODEL = "tiny-v3"


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Serving]:
    engine = EngineSettings(step_tokens=64, max_running=16, check_every_step=True)
    with serving(
        lambda: LLM(tiny_folder, dtype="f32", threads=1, settings=engine), settings={"max_body_bytes": 1 << 20}
    ) as running:
        yield running


@pytest.fixture(scope="module")
def sdk(server: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture(scope="module")
def expected(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, dtype="f32", threads=1)


def ask(sdk: openai.OpenAI, text: Any = "hi", **more: Any) -> Response:
    response = sdk.responses.create(model=MODEL, input=text, **{"max_output_tokens": 9, "temperature": 0, **more})
    assert isinstance(response, Response)
    return response


def data(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line.startswith("data: ")]


def test_a_response(sdk: openai.OpenAI, expected: LLM) -> None:
    there = expected.chat([Message("system", "be brief"), Message("user", "hi")], max_tokens=9, temperature=0)
    here = ask(sdk, instructions="be brief", metadata={"a": "b"}, user="u", prompt_cache_key="k")
    assert here.output_text == there.content
    assert (here.status, here.incomplete_details and here.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert here.usage is not None
    assert (here.usage.input_tokens, here.usage.output_tokens) == (there.prompt_tokens, 9)
    assert here.usage.total_tokens == there.prompt_tokens + 9
    assert (here.metadata, here.user, here.prompt_cache_key) == ({"a": "b"}, "u", "k")
    assert (here.temperature, here.instructions, here.truncation) == (0, "be brief", "disabled")


def test_a_stream_is_the_same_response(sdk: openai.OpenAI) -> None:
    whole = ask(sdk)
    with sdk.responses.stream(model=MODEL, input="hi", max_output_tokens=9, temperature=0) as stream:
        events = list(stream)
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert sdk.responses.retrieve(last.response.id).model_dump() == last.response.model_dump()


def test_every_field_that_open_responses_demands_is_there(server: Serving) -> None:
    body = {"model": MODEL, "input": "hi", "max_output_tokens": 2}
    fields = httpx.post(f"{server.url}/v1/responses", json=body).json()
    assert sorted(REQUIRED - set(fields)) == []


REQUIRED = {
    name
    for line in (
        "id object created_at completed_at status incomplete_details model previous_response_id instructions output",
        "error tools tool_choice truncation parallel_tool_calls text top_p presence_penalty frequency_penalty user",
        "top_logprobs temperature reasoning usage max_output_tokens max_tool_calls store background service_tier",
        "metadata safety_identifier prompt_cache_key",
    )
    for name in line.split()
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "items",
    [
        [("user", "Say hello in exactly 3 words.")],
        [("user", "Count from 1 to 5.")],
        [("system", "You are a pirate. Always respond in pirate speak."), ("user", "Say hello.")],
        [("user", "My name is Alice."), ("assistant", "Hello Alice!"), ("user", "What is my name?")],
    ],
    ids=["basic-response", "streaming-response", "system-prompt", "multi-turn"],
)
def test_open_responses(server: Serving, items: list[tuple[str, str]], stream: bool) -> None:
    """The text cases of its compliance suite; those with tools are below, and images are refused by name."""
    messages = [{"type": "message", "role": role, "content": text} for role, text in items]
    body = {"model": MODEL, "input": messages, "max_output_tokens": 12, "stream": stream}
    answer = httpx.post(f"{server.url}/v1/responses", json=body)
    response = data(answer)[-1]["response"] if stream else answer.json()
    assert response["output"][0]["type"] == "message"
    assert response["status"] in ("completed", "incomplete")
    assert sorted(REQUIRED - set(response)) == []
    if stream:
        read_back(data(answer))


def test_turns_by_id_and_by_items_are_the_same(sdk: openai.OpenAI, expected: LLM) -> None:
    first = ask(sdk, instructions="not carried over")
    second = ask(sdk, "and now?", previous_response_id=first.id)
    items: list[Any] = [{"role": "user", "content": "hi"}, *first.output, {"role": "user", "content": "and now?"}]
    replayed = ask(sdk, [item if isinstance(item, dict) else item.to_dict() for item in items])
    referenced = ask(sdk, [items[0], {"type": "item_reference", "id": first.output[0].id}, items[2]])
    turns = (Message("user", "hi"), Message("assistant", first.output_text), Message("user", "and now?"))
    there = expected.chat(Conversation(turns), max_tokens=9, temperature=0)
    for answer in (second, replayed, referenced):
        assert answer.output_text == there.content
        assert answer.usage is not None
        assert answer.usage.input_tokens == there.prompt_tokens
    assert second.previous_response_id == first.id
    third = ask(sdk, "again", previous_response_id=second.id)
    listed = list(sdk.responses.input_items.list(third.id, order="asc", limit=2))
    assert [item.id for item in listed][1::2] == [first.output[0].id, second.output[0].id]
    assert len(listed) == 5
    assert [item.id for item in sdk.responses.input_items.list(third.id)] == [item.id for item in reversed(listed)]


def test_what_is_not_there(sdk: openai.OpenAI) -> None:
    unstored = ask(sdk, store=False)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        sdk.responses.retrieve(unstored.id)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(sdk, previous_response_id=unstored.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")
    with pytest.raises(openai.BadRequestError, match="there is no item") as caught:
        ask(sdk, [{"type": "item_reference", "id": unstored.output[0].id}])
    assert caught.value.param == "input.0.id"
    gone = ask(sdk)
    following = ask(sdk, previous_response_id=gone.id)
    sdk.responses.delete(gone.id)
    for call in (sdk.responses.retrieve, sdk.responses.delete, sdk.responses.cancel, sdk.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            call(gone.id)
    assert len(list(sdk.responses.input_items.list(following.id))) == 3, "what was made from it stays whole"


def test_pages_and_paths_with_strange_values(server: Serving, sdk: openai.OpenAI) -> None:
    known = ask(sdk).id
    with httpx.Client(base_url=server.url) as http:
        for question, param in (
            ("limit=0", "limit"),
            ("limit=101", "limit"),
            ("limit=x", "limit"),
            ("limit=" + "9" * 5000, "limit"),
            ("limit=-1", "limit"),
            ("limit=%D9%A3", "limit"),
            ("order=up", "order"),
            ("after=msg_x", "after"),
        ):
            refused = http.get(f"/v1/responses/{known}/input_items?{question}")
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        for question, param in (
            ("stream=maybe", "stream"),
            ("stream=true", "stream"),
            ("stream=true&starting_after=x", "starting_after"),
        ):
            refused = http.get(f"/v1/responses/{known}?{question}")
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        for strange in ("%00", "x" * 5000, "%ff", "resp_", "'; drop table responses; --"):
            for call in (http.get, http.delete):
                assert call(f"/v1/responses/{strange}").status_code in (404, 405)
            assert http.post(f"/v1/responses/{strange}/cancel").status_code == 404
        assert (
            http.post(f"/v1/responses/{known}/cancel").json()["error"]["message"].startswith("the response has ended")
        )


def test_too_long_a_conversation(sdk: openai.OpenAI, server: Serving) -> None:
    """As a body it is an error; in a stream it is an event, where Codex looks for it."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(sdk, "x " * 500)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    body = {"model": MODEL, "input": "x " * 500, "stream": True}
    events = data(httpx.post(f"{server.url}/v1/responses", json=body))
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "error",
        "response.failed",
    ]
    assert events[-1]["response"]["error"]["code"] == "context_length_exceeded"


def test_logprobs(sdk: openai.OpenAI) -> None:
    here = ask(sdk, include=["message.output_text.logprobs"], top_logprobs=2)
    message = here.output[0]
    assert message.type == "message"
    part = message.content[0]
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert bytes(byte for one in part.logprobs for byte in one.bytes).decode(errors="replace") == here.output_text
    assert all(len(one.top_logprobs) == 2 for one in part.logprobs)


def test_in_the_background(sdk: openai.OpenAI) -> None:
    queued = ask(sdk, background=True)
    assert (queued.status, queued.output) == ("queued", [])
    wait_until(lambda: sdk.responses.retrieve(queued.id).status == "incomplete")
    assert sdk.responses.retrieve(queued.id).output_text == ask(sdk).output_text
    assert sdk.responses.cancel(queued.id).status == "incomplete", "what has ended stays as it is"
    streamed = list(
        sdk.responses.create(model=MODEL, input="hi", max_output_tokens=9, temperature=0, background=True, stream=True)
    )
    assert [event.type for event in streamed[:3]] == ["response.created", "response.queued", "response.in_progress"]
    read_back([event.to_dict() for event in streamed])
    made = streamed[0].response.id  # type: ignore[union-attr]
    again = list(sdk.responses.retrieve(made, stream=True, starting_after=4))
    assert [event.to_dict() for event in again] == [event.to_dict() for event in streamed[5:]]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(pause=0.005, max_waiting=4)


@pytest.fixture
def slow(engine: ScriptedEngine, tiny_folder: Path) -> Iterator[Serving]:
    """Its answers take seconds, and the tenant is who the header says."""
    with serving(
        lambda: LLM(tiny_folder, engine=engine),
        settings={"max_waiting": 4, "response_ttl": 1.0, "shutdown_timeout": 0.1},
        salt=lambda request: request.headers.get("tenant", "").encode(),
    ) as running:
        yield running


@pytest.fixture
def http(slow: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=slow.url, timeout=20) as client:
        yield client


BODY = {"model": MODEL, "input": "hi"}


def create(http: httpx.Client, **more: Any) -> dict[str, Any]:
    response = http.post("/v1/responses", json={**BODY, **more})
    assert response.status_code == 200, response.text
    made: dict[str, Any] = response.json()
    return made


def test_a_background_response_is_cancelled(http: httpx.Client, engine: ScriptedEngine) -> None:
    made = create(http, background=True)
    wait_until(lambda: engine.drawn > 3)
    running = http.get(f"/v1/responses/{made['id']}").json()
    assert (running["status"], running["output"][0]["status"]) == ("in_progress", "in_progress")
    assert running["output"][0]["content"][0]["text"]
    refused = http.post("/v1/responses", json={**BODY, "previous_response_id": made["id"]})
    assert (refused.status_code, "is in_progress" in refused.text) == (400, True)
    cancelled = http.post(f"/v1/responses/{made['id']}/cancel").json()
    assert (cancelled["status"], cancelled["output"][0]["status"]) == ("cancelled", "incomplete")
    assert http.get(f"/v1/responses/{made['id']}").json() == cancelled
    wait_until(lambda: engine.finished["cancelled"] == 1)


def test_a_stream_is_cancelled(http: httpx.Client, engine: ScriptedEngine) -> None:
    with http.stream("POST", "/v1/responses", json={**BODY, "stream": True}) as response:
        lines = response.iter_lines()
        first = next(json.loads(line[6:]) for line in lines if line.startswith("data: "))
        made = first["response"]["id"]
        with httpx.Client(base_url=http.base_url) as other:
            assert other.post(f"/v1/responses/{made}/cancel").json()["status"] == "cancelled"
        events = [first, *(json.loads(line[6:]) for line in lines if line.startswith("data: "))]
    read_back(events)
    assert (events[-1]["type"], events[-1]["response"]["status"]) == ("response.incomplete", "cancelled")
    assert http.get(f"/v1/responses/{made}").json()["status"] == "cancelled"


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_ends_it_and_nothing_is_kept(http: httpx.Client, engine: ScriptedEngine, stream: bool) -> None:
    made = ""
    if stream:
        with http.stream("POST", "/v1/responses", json={**BODY, "stream": True}) as response:
            lines = response.iter_lines()
            made = next(json.loads(line[6:]) for line in lines if line.startswith("data: "))["response"]["id"]
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/responses", json=BODY, timeout=0.2)
    wait_until(lambda: engine.finished["cancelled"] == 1)
    if stream:
        wait_until(lambda: http.get(f"/v1/responses/{made}").status_code == 404)


def test_a_background_response_outlives_its_reader(http: httpx.Client, engine: ScriptedEngine) -> None:
    body = {**BODY, "stream": True, "background": True, "max_output_tokens": 60}
    with http.stream("POST", "/v1/responses", json=body) as response:
        lines = response.iter_lines()
        first = next(json.loads(line[6:]) for line in lines if line.startswith("data: "))
    made = first["response"]["id"]
    rest = data(http.get(f"/v1/responses/{made}", params={"stream": "true", "starting_after": 0}))
    read_back([first, *rest])
    assert len(rest[-1]["response"]["output"][0]["content"][0]["text"]) == 60


def test_deleting_ends_it(http: httpx.Client, engine: ScriptedEngine) -> None:
    made = create(http, background=True)
    wait_until(lambda: engine.drawn > 3)
    gone = http.delete(f"/v1/responses/{made['id']}").json()
    assert gone == {"id": made["id"], "object": "response", "deleted": True}
    assert http.get(f"/v1/responses/{made['id']}").status_code == 404
    wait_until(lambda: engine.finished["cancelled"] == 1)
    time.sleep(0.1)
    assert http.get(f"/v1/responses/{made['id']}").status_code == 404


def test_tenants_do_not_see_each_other(http: httpx.Client) -> None:
    ours = http.post("/v1/responses", json={**BODY, "max_output_tokens": 3}, headers={"tenant": "a"}).json()
    running = http.post("/v1/responses", json={**BODY, "background": True}, headers={"tenant": "a"}).json()
    for made in (ours, running):
        path = f"/v1/responses/{made['id']}"
        for tenant, status in (("b", 404), ("", 404)):
            headers = {"tenant": tenant}
            assert http.get(path, headers=headers).status_code == status
            assert http.get(f"{path}/input_items", headers=headers).status_code == status
            assert http.post(f"{path}/cancel", headers=headers).status_code == status
            assert http.delete(path, headers=headers).status_code == status
            following = {**BODY, "previous_response_id": made["id"]}
            assert http.post("/v1/responses", json=following, headers=headers).status_code == 400
        assert http.get(path, headers={"tenant": "a"}).status_code == 200
    reference = [{"type": "item_reference", "id": ours["output"][0]["id"]}]
    for tenant, status in (("b", 400), ("a", 200)):
        body = {**BODY, "input": [*reference, {"role": "user", "content": "x"}], "max_output_tokens": 1}
        assert http.post("/v1/responses", json=body, headers={"tenant": tenant}).status_code == status


def test_responses_expire(http: httpx.Client) -> None:
    made = create(http, max_output_tokens=1)
    assert http.get(f"/v1/responses/{made['id']}").status_code == 200
    wait_until(lambda: http.get(f"/v1/responses/{made['id']}").status_code == 404)


def test_events_are_kept_within_bounds(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvern.server.running_responses.MAX_NOTED_BYTES", 20_000)
    body = {**BODY, "max_output_tokens": 20, "background": True, "stream": True}
    with (
        serving(lambda: LLM(tiny_folder, engine=ScriptedEngine())) as running,
        httpx.Client(base_url=running.url) as client,
    ):
        made = [data(client.post("/v1/responses", json=body))[0]["response"]["id"] for _ in range(6)]
        again = [client.get(f"/v1/responses/{one}", params={"stream": "true"}).status_code for one in made]
        assert again == sorted(again, reverse=True)
        assert set(again) == {200, 400}
        unfollowed = client.post("/v1/responses", json={**body, "stream": False}).json()["id"]
        assert client.get(f"/v1/responses/{unfollowed}", params={"stream": "true"}).status_code == 400


def test_responses_survive_a_restart(tiny_folder: Path, tmp_path: Path) -> None:
    settings = {"store": str(tmp_path / "store.sqlite")}
    body = {**BODY, "max_output_tokens": 3}
    with serving(lambda: LLM(tiny_folder, engine=ScriptedEngine()), settings=settings) as running:
        made = httpx.post(f"{running.url}/v1/responses", json=body).json()
    store, now = Store(settings["store"]), int(time.time())
    interrupted = {**made, "id": "resp_" + "a" * 24, "status": "in_progress"}
    with store.write() as connection:
        responses.save(connection, StoredResponse("", interrupted["id"], now, now + 99, [], interrupted))
    store.close()
    with serving(lambda: LLM(tiny_folder, engine=ScriptedEngine()), settings=settings) as running:
        path = f"{running.url}/v1/responses"
        assert httpx.get(f"{path}/{made['id']}").json() == made
        assert httpx.post(path, json={**body, "previous_response_id": made["id"]}).status_code == 200
        lost = httpx.get(f"{path}/{interrupted['id']}").json()
        assert (lost["status"], lost["error"]["code"]) == ("failed", "server_error")


def test_an_answer_that_can_not_be_stored_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    settings = {"store": str(tmp_path / "store.sqlite")}
    with serving(lambda: LLM(tiny_folder, engine=ScriptedEngine()), settings=settings) as running:
        store = Store(settings["store"])
        with store.write() as connection:  # takes the write lock at once: the server may be writing
            responses.METADATA.drop_all(connection)
        store.close()
        path = f"{running.url}/v1/responses"
        whole = httpx.post(path, json={**BODY, "max_output_tokens": 3}).json()
        assert (whole["status"], whole["store"]) == ("incomplete", False)
        streamed = data(httpx.post(path, json={**BODY, "max_output_tokens": 3, "stream": True}))
        assert (streamed[-1]["type"], streamed[-1]["response"]["store"]) == ("response.incomplete", False)
        refused = httpx.post(path, json={**BODY, "background": True})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_failed")
        assert httpx.get(f"{path}/{whole['id']}").status_code == 503
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_a_fault_in_the_middle(http: httpx.Client, engine: ScriptedEngine) -> None:
    background = create(http, background=True)
    with http.stream("POST", "/v1/responses", json={**BODY, "stream": True}) as response:
        lines = response.iter_lines()
        events = [next(json.loads(line[6:]) for line in lines if line.startswith("data: "))]
        engine.fails = True
        events += [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    engine.fails = False
    read_back(events)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-1]["response"]["error"]["code"] == "server_error"
    assert "secret" not in json.dumps(events)
    wait_until(lambda: http.get(f"/v1/responses/{background['id']}").json()["status"] == "failed")


def test_a_full_queue_is_refused_before_the_stream(http: httpx.Client) -> None:
    for _ in range(4):
        create(http, background=True)
    refused = http.post("/v1/responses", json={**BODY, "stream": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert refused.headers["retry-after"]


def test_a_server_that_stops_ends_what_runs(engine: ScriptedEngine, tiny_folder: Path) -> None:
    with (
        serving(lambda: LLM(tiny_folder, engine=engine), settings={"shutdown_timeout": 0.1}) as running,
        httpx.Client(base_url=running.url) as client,
        client.stream("POST", "/v1/responses", json={**BODY, "stream": True, "background": True}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        running.stop()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert events[-1]["response"]["error"]["message"] == "the server is stopping"


def test_what_codex_sends_is_answered(slow: Serving, http: httpx.Client) -> None:
    body = {**CODEX, "model": MODEL, "tools": [tool for tool in CODEX["tools"] if tool["type"] != "function"]}
    body["max_output_tokens"] = 5
    answer = http.post("/v1/responses", json=body)
    assert answer.status_code == 200
    read_back(data(answer))
