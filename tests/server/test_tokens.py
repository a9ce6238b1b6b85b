from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.scripted import ScriptedEngine
from tests.server.serving import serving

from kvern.llm import LLM
from kvern.text.options import SamplingOptions

HI = [{"role": "user", "content": "hi <|end|>"}]


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, engine=ScriptedEngine())


@pytest.fixture(scope="module")
def http(llm: LLM) -> Iterator[httpx.Client]:
    with serving(lambda: llm) as running, httpx.Client(base_url=running.url, timeout=20) as client:
        yield client


@pytest.mark.parametrize("text", ["", "the cat", "é 你 🙂", "<|end|>"])
def test_there_and_back(http: httpx.Client, llm: LLM, text: str) -> None:
    answer = http.post("/tokenize", json={"model": "tiny-v3", "prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == llm.start_ids + llm.tokenizer.encode(text)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), llm.max_context)
    assert len(answer["token_strs"]) == answer["count"]
    back = http.post("/detokenize", json={"tokens": llm.tokenizer.encode(text)}).json()
    assert back == {"prompt": text}


def test_a_conversation(http: httpx.Client, llm: LLM) -> None:
    answer = http.post("/tokenize", json={"messages": HI}).json()
    assert answer["tokens"] == list(llm.prepare_chat(HI, SamplingOptions()).prompt)
    assert answer["token_strs"] is None
    shown = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"]
    assert shown == "<|start|>user\nhi <|end|><|end|><|start|>assistant\n"
    tool = {"type": "function", "function": {"name": "get"}}
    assert http.post("/tokenize", json={"messages": HI, "tools": [tool]}).json()["count"] > answer["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HI}, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": [{}]}, "tools"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages.0.content"),
        ("/tokenize", {"messages": HI, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "chat_template": "y"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, 300]}, "tokens.1"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [1], "model": "gpt"}, "model"),
    ],
)
def test_what_is_refused(http: httpx.Client, path: str, body: dict[str, object], param: str) -> None:
    assert http.post(path, json=body).json()["error"]["param"] == param
