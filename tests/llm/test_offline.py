from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from tests.scripted import ScriptedEngine
from tests.tiny import CONTEXT, FIM

from kvern.engine import EngineSettings
from kvern.errors import BadRequestError, CheckpointError, ConfigError, KvernError
from kvern.llm import LLM, Piece, collect
from kvern.text.conversation import Conversation
from kvern.text.messages import Message, NamedTool, Tool
from kvern.text.options import SamplingOptions


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, dtype="f32", threads=1)


def scripted(folder: Path, text: str) -> tuple[LLM, ScriptedEngine]:
    engine = ScriptedEngine(max_context=64)
    llm = LLM(folder, engine=engine)
    engine.script = llm.tokenizer.encode(text, allow_special=True)
    return llm, engine


def test_greedy_chat_is_the_same_in_every_form(tiny: LLM) -> None:
    whole = tiny.chat("hi", max_tokens=12, temperature=0)
    pieces = list(tiny.stream([Message("user", "hi")], max_tokens=12, temperature=0))
    assert "".join(pieces) == whole.text
    assert whole.completion_tokens == len(whole.token_ids) == 12
    assert whole.finish_reason == "length"
    assert whole.prompt_tokens == len(tiny.tokenizer.encode("<|start|>user\nhi<|end|><|start|>assistant\n", True))


def test_ids_of_the_padding_are_never_drawn(tiny: LLM) -> None:
    ids = tiny.chat("hi", max_tokens=100, temperature=2.0, seed=1).token_ids
    assert max(ids) < tiny.vocab_limit < 320


def test_generate_takes_one_prompt_or_several(tiny: LLM) -> None:
    one = tiny.generate("a", max_tokens=4, temperature=0)
    assert tiny.generate(["a", "b"], max_tokens=4, temperature=0)[0] == one
    assert tiny.generate("<|end|>", max_tokens=1).prompt_tokens > 1


def test_a_seed_repeats_an_answer(tiny: LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.5}
    assert tiny.chat("hi", seed=5, **options) == tiny.chat("hi", seed=5, **options)
    assert tiny.chat("hi", seed=5, **options) != tiny.chat("hi", seed=6, **options)


def test_an_eos_token_ends_the_answer_and_does_not_show(tiny_folder: Path) -> None:
    llm, _ = scripted(tiny_folder, "yes<|end|>no")
    answer = llm.chat("?")
    assert (answer.text, answer.finish_reason) == ("yes", "stop")
    assert answer.token_ids[-1] == llm.tokenizer.eos_id


@pytest.mark.parametrize(
    ("script", "text", "reason"),
    [
        ("one two three", "one ", "stop"),
        ("one tw", "one tw", "length"),
        ("one tw<|end|>", "one tw", "stop"),
        ("STOP", "", "stop"),
    ],
)
def test_stop_strings(tiny_folder: Path, script: str, text: str, reason: str) -> None:
    llm, engine = scripted(tiny_folder, script)
    answer = llm.chat("?", stop=["two", "STOP"], max_tokens=len(engine.script))
    assert (answer.text, answer.finish_reason) == (text, reason)


def test_pieces_are_whole_characters(tiny_folder: Path) -> None:
    llm, engine = scripted(tiny_folder, "🦀 é")
    assert list(llm.stream("?", max_tokens=len(engine.script))) == ["🦀", " ", "é"]
    assert llm.chat("?", max_tokens=2).text == "\ufffd"


def test_the_checkpoint_recommends_and_the_caller_decides(tiny_folder: Path, tmp_path: Path) -> None:
    llm, engine = scripted(tiny_folder, "x")
    llm.chat("?")
    llm.chat("?", temperature=0, top_p=0.3, seed=4, max_tokens=1)
    first, second = engine.asked[:2]
    assert (first.temperature, first.top_p, first.seed) == (0.7, 0.8, None)
    assert (second.temperature, second.top_p, second.seed, second.max_tokens) == (0.0, 0.3, 4, 1)
    assert first.max_tokens == 64 - llm.chat("?", max_tokens=1).prompt_tokens
    greedy = shutil.copytree(tiny_folder, tmp_path / "greedy")
    (greedy / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": [3, 4]}))
    llm, engine = scripted(greedy, "x")
    llm.chat("?")
    assert engine.asked[0].temperature == 0.0
    assert {3, 4, llm.tokenizer.eos_id} <= set(engine.asked[0].stop_token_ids)


def test_an_answer_may_hold_calls(tiny_folder: Path) -> None:
    llm, engine = scripted(tiny_folder, 'Yes.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|end|>')
    engine.max_context = llm.max_context = 2000
    chat = Conversation((Message("user", "hi"),), (Tool("f", None, {}),))
    answer = llm.chat(chat)
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [("f", '{"a": 1}')]
    assert (answer.content, answer.reasoning, answer.finish_reason) == ("Yes.", "", "tool_calls")
    assert answer.text.endswith("</tool_call>")
    assert list(llm.stream(chat)) == ["Y", "e", "s", "."]
    engine.script = llm.tokenizer.encode(' {"a": 2}}')
    forced = llm.chat(replace(chat, tool_choice=NamedTool("f")), min_tokens=3, max_tokens=len(engine.script))
    assert [(call.name, call.arguments) for call in forced.tool_calls] == [("f", '{"a": 2}')]


def test_too_long_names_both_lengths(tiny: LLM) -> None:
    with pytest.raises(BadRequestError, match=rf"the prompt has \d+ tokens, and the context holds {CONTEXT}"):
        tiny.stream("word " * 200)
    with pytest.raises(BadRequestError, match=r"has \d+ tokens and max_tokens is 256, but the context holds 256") as e:
        tiny.chat("hi", max_tokens=256)
    assert e.value.param == "max_tokens"


def test_answers_end_with_the_context(tiny: LLM) -> None:
    answer = tiny.chat("hi", temperature=0)
    assert answer.finish_reason == "stop" or answer.prompt_tokens + answer.completion_tokens == CONTEXT


def test_closing_a_stream_cancels_the_request(tiny_folder: Path) -> None:
    llm, engine = scripted(tiny_folder, "a")
    pieces = llm.run(llm.prepare_chat("hi", SamplingOptions(max_tokens=30)))
    assert [next(pieces).text, next(pieces).text] == ["a", "a"]
    pieces.close()  # type: ignore[attr-defined]
    engine.step()
    assert not engine.live()
    with pytest.raises(RuntimeError, match="finish reason"):
        collect([Piece("a", (64,))], 1)


def test_streams_side_by_side_share_steps(tiny: LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
    one, two = tiny.stream("hi", **options), tiny.stream("the cat", **options)
    texts = ["", ""]
    for first, second in zip_longest(one, two, fillvalue=""):
        texts[0] += first
        texts[1] += second
    assert texts == [tiny.chat("hi", **options).text, tiny.chat("the cat", **options).text]


def test_many_prompts_run_together_and_give_what_each_gives_alone(tiny_folder: Path) -> None:
    llm = LLM(tiny_folder, dtype="f32", threads=1, settings=EngineSettings(max_waiting=2, max_running=4))
    prompts = ["a", "def add", "the cat sat", "x y z", "return", "on the mat", "b"]
    together = llm.generate(prompts, max_tokens=9, temperature=0)
    steps = llm.engine.stats().steps
    assert [answer.text for answer in together] == [llm.generate(p, max_tokens=9, temperature=0).text for p in prompts]
    assert steps < len(prompts) * 9
    assert llm.engine.stats().running == llm.engine.stats().waiting == 0


def test_scores_are_of_the_text(tiny: LLM) -> None:
    answer = tiny.generate("def add", max_tokens=6, temperature=0, logprobs=3, prompt_logprobs=True)
    assert len(answer.scores) == 6
    assert all(score.top[0].logprob == score.logprob and len(score.top) == 3 for score in answer.scores)
    assert [score.offset for score in answer.scores] == sorted(score.offset for score in answer.scores)
    assert "".join(score.text for score in answer.prompt_scores) == "def add"
    assert [score.logprob is None for score in answer.prompt_scores] == [True] + [False] * (answer.prompt_tokens - 1)


def test_only_the_prompt_may_be_scored(tiny: LLM) -> None:
    answer = tiny.generate("def add", max_tokens=0, logprobs=0, prompt_logprobs=True)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", (), "length")
    assert len(answer.prompt_scores) == answer.prompt_tokens


def test_the_middle_is_asked_for_with_the_models_own_tokens(tiny: LLM, tiny_folder: Path) -> None:
    assert tiny.fim is not None
    prepared = tiny.prepare_middle("def <|fim_suffix|>", "return", SamplingOptions(max_tokens=4))
    begin, hole, end = (tiny.tokenizer.control[name] for name in FIM)
    assert [prepared.prompt.count(token) for token in (begin, hole, end)] == [1, 1, 1]
    assert (prepared.prompt[0], prepared.prompt[-1]) == (begin, end)
    assert {begin, hole, end} <= set(prepared.params.stop_token_ids)
    assert tiny.fill("def add(", "return a", max_tokens=4, temperature=0).completion_tokens > 0


def test_ids_outside_the_vocabulary_are_refused_by_field(tiny: LLM) -> None:
    for field, value in {
        "logit_bias": {400: 1.0},
        "stop_token_ids": [-1],
        "max_tokens": 10**9,
        "min_tokens": 256,
    }.items():
        with pytest.raises(BadRequestError) as caught:
            tiny.generate("a", **{field: value})
        assert caught.value.param == field
    with pytest.raises(BadRequestError, match="the prompt is empty"):
        tiny.generate("")


@pytest.mark.parametrize("options", [{"dtype": "f8"}, {"model": "no-such-model"}])
def test_wrong_arguments_are_explained(tiny_folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(KvernError):
        LLM(**{"model": tiny_folder, **options})


def test_a_model_without_a_template_can_only_generate(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "bare")
    (folder / "tokenizer_config.json").unlink()
    llm = LLM(folder)
    assert llm.generate("a", max_tokens=1).completion_tokens == 1
    with pytest.raises(BadRequestError, match="bare has no chat template"):
        llm.chat("hi")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not JSON"):
        LLM(folder)


def test_dtype_names_are_checked(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="dtype must be one of auto, bf16, f32"):
        LLM(tiny_folder, dtype="f8")  # type: ignore[arg-type]
