"""What a checkpoint of the recipe can do: `python -m recipes.nano measure FOLDER`.

    bits per byte on held-out files, by kind; tasks with one right answer; MTP's drafts against none on the real engine;
    and samples, all greedy. As JSON and as Markdown.

Drafts are measured as `bench.drafts` does: the same work with drafts off and on, in alternating pairs, prompts untimed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from bench.drafts import Run, run

from kvern.config import ModelConfig
from kvern.engine import EngineSettings
from kvern.llm import LLM
from kvern.llm.prepare import Prepared
from kvern.model import ForwardBatch
from kvern.plan.memory import account
from kvern.text.conversation import Conversation
from kvern.text.messages import Message, Tool
from kvern.text.options import SamplingOptions
from recipes.nano import corpus, docs
from recipes.nano.code_rows import rename_it
from recipes.nano.corpus import Document
from recipes.nano.functions import Function, functions
from recipes.nano.held_out import cost_of
from recipes.nano.rows import seeded
from recipes.nano.skills import World
from recipes.nano.tasks import scores

SAMPLES = {
    "completion": 'def is_palindrome(text):\n    """Return True if text reads the same backwards."""\n',
    "gap": ("def mean(values):\n    total = 0\n", "    return total / len(values)\n"),
    "chat": "Write a Python function `count_words(text)`. Return how many words the text has.",
    "question": "What does the module `shutil` do?",
}
WEATHER = Tool(
    "get_weather",
    "The weather in a city",
    {"type": "object", "properties": {"city": {"type": "string", "description": "The city"}}, "required": ["city"]},
)
CONTINUED = 128
"""Tokens of a continuation whose drafts are measured."""

KINDS: tuple[Literal["mtp", "auto"], ...] = ("mtp", "auto")


@dataclass(frozen=True)
class Drafted:
    """Answers with drafts of one kind beside the same without: medians over pairs."""

    tokens_per_step: float
    tokens_per_s: float
    ratio: float
    equal: bool


@dataclass(frozen=True)
class Drafts:
    """right: how often the MTP layer's first draft is the token that comes, whether or not it was worth verifying."""

    work: str
    answers: int
    right: float
    off_tokens_per_s: float
    mtp: Drafted
    auto: Drafted


def measure(folder: Path, data: Path, *, pairs: int = 3, count: int = 50, most: int | None = 300_000) -> dict[str, Any]:
    """Everything about the checkpoint in `folder`, with the corpus in `data`."""
    held_out = corpus.read(data / "corpus", "held-out")
    config = ModelConfig.load(folder)
    costs = cost_of(folder, held_out, config.max_position_embeddings, most=most)
    llm = LLM(folder, settings=EngineSettings(drafts="auto"))
    known = list(functions(held_out))
    counted = account(config)
    return {
        "parameters": counted.parameters,
        "active": counted.active_parameters,
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "held_out": [{**asdict(cost), "bits_per_byte": cost.bits_per_byte} for cost in costs],
        "tasks": [asdict(score) for score in scores(llm, known, _world(data), count)],
        "drafts": [asdict(one) for one in drafts(folder, held_out, known, pairs)] if _drafts(config) else [],
        "samples": samples(llm),
    }


def drafts(folder: Path, held_out: Sequence[Document], known: Sequence[Function], pairs: int) -> list[Drafts]:
    """MTP's drafts: continuing held-out code, and returning functions with a variable renamed."""
    llm = LLM(folder, settings=EngineSettings(drafts="auto"))
    options = SamplingOptions.of(temperature=0.0, max_tokens=CONTINUED)
    texts = [one.text[:1500] for one in held_out if one.kind == "library" and len(one.text) > 3000][:8]
    rows = (rename_it(function, seeded("drafts", function.key)) for function in known)
    asks = [row["messages"][0]["content"] for row in rows if row is not None][:8]
    work = {
        "continue code": [llm.prepare_text(text, options) for text in texts],
        "rename a variable": [llm.prepare_chat(ask, options) for ask in asks],
    }
    return [_drafted(llm, name, prepared, pairs) for name, prepared in work.items() if prepared]


def samples(llm: LLM) -> dict[str, str]:
    """What the model writes, greedily, for a few fixed prompts; a call as its JSON."""
    prefix, suffix = SAMPLES["gap"]
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 160}
    called = llm.chat(Conversation((Message("user", "What is the weather in Lisbon?"),), (WEATHER,)), **options)
    return {
        "completion": str(SAMPLES["completion"]) + llm.generate(str(SAMPLES["completion"]), **options).text,
        "gap": f"{prefix}[[{llm.fill(prefix, suffix, **options).text}]]{suffix}",
        "chat": llm.chat(str(SAMPLES["chat"]), **options).content,
        "question": llm.chat(str(SAMPLES["question"]), **options).content,
        "tool call": json.dumps([[call.name, call.arguments] for call in called.tool_calls]) + called.content,
    }


def as_markdown(figures: dict[str, Any]) -> str:
    """The tables and samples of docs/nano.md."""
    lines = [f"{figures['parameters']:,} parameters, {figures['active']:,} active, {figures['bytes']:,} bytes", ""]
    lines += ["| held out | files | bytes | bits per byte |", "|---|---|---|---|"]
    lines += [
        f"| {x['kind']} | {x['files']} | {x['bytes']:,} | {x['bits_per_byte']:.3f} |" for x in figures["held_out"]
    ]
    lines += ["", "| task | right |", "|---|---|"]
    lines += [f"| {x['task']} | {x['right']} of {x['asked']} |" for x in figures["tasks"]]
    lines += ["", "| drafts | MTP's first right | off | `mtp` | `auto` |", "|---|---|---|---|---|"]
    for x in figures["drafts"]:
        kinds = " | ".join(f"{x[kind]['ratio']:.2f} ({x[kind]['tokens_per_step']:.2f})" for kind in ("mtp", "auto"))
        lines.append(f"| {x['work']} | {x['right']:.0%} | {x['off_tokens_per_s']:,.0f} tok/s | {kinds} |")
    for name, text in figures["samples"].items():
        lines += ["", f"{name}:", "", "```text", text, "```"]
    return "\n".join(lines)


def _drafted(llm: LLM, name: str, work: Sequence[Prepared], pairs: int) -> Drafts:
    """One answer at a time, as one user would wait for it."""
    run(llm.engine, [replace(work[0], params=replace(work[0].params, max_tokens=8))], "auto")
    offs: list[float] = []
    ons: dict[str, list[tuple[float, list[Run]]]] = {kind: [] for kind in KINDS}
    for _ in range(pairs):
        off = [run(llm.engine, [one], "off") for one in work]
        offs.append(_rate(off))
        for kind in KINDS:
            on = [run(llm.engine, [one], kind) for one in work]
            ons[kind].append((_rate(on), on))
    found = {kind: _summary(off, offs, runs) for kind, runs in ons.items()}
    hits = [hit for one, ran in zip(work, off, strict=True) for hit in first_drafts(llm, one.prompt, ran.answers[0])]
    return Drafts(name, len(work), sum(hits) / len(hits), median(offs), found["mtp"], found["auto"])


@torch.inference_mode()
def first_drafts(llm: LLM, prompt: Sequence[int], answer: Sequence[int]) -> list[bool]:
    """For each token of an answer from the second on, whether the MTP layer would have drafted it."""
    tokens, begun = [*prompt, *answer], len(prompt)
    hidden = llm.engine.model.hidden(ForwardBatch.of(tokens[:-1]))
    _, logits = llm.engine.model.mtp(hidden, ForwardBatch.of(tokens[1:]))
    drafts = logits.argmax(-1).tolist()  # draft i is for token i + 2
    return [drafts[at - 2] == tokens[at] for at in range(begun + 1, len(tokens))]


def _rate(runs: Sequence[Run]) -> float:
    return sum(one.tokens for one in runs) / sum(one.seconds for one in runs)


def _summary(off: Sequence[Run], offs: Sequence[float], ons: Sequence[tuple[float, list[Run]]]) -> Drafted:
    last = ons[-1][1]
    return Drafted(
        sum(one.tokens for one in last) / sum(one.steps for one in last),
        median(rate for rate, _ in ons),
        median(rate / before for before, (rate, _) in zip(offs, ons, strict=True)),
        [one.answers for one in off] == [one.answers for one in last],
    )


def _world(data: Path) -> World:
    documents = corpus.read(data / "corpus", "train")
    entries = [entry for page in documents if page.kind == "docs" for entry in docs.entries(page)]
    library = functions([one for one in documents if one.kind == "library"])
    return World(list(library), [entry for entry in entries if entry.text])


def _drafts(config: ModelConfig) -> bool:
    return config.num_nextn_predict_layers > 0
