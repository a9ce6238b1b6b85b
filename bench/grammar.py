"""What a grammar costs: tokens a second of 16 streams in the engine, free and held to a JSON schema.

    python -m bench.grammar [--model coder-0.5b] [--streams 16] [--tokens 128] [--rounds 3] [--temperature 0]

Both kinds run in turn, `rounds` times, in one process and one engine without drafts, each stream for exactly `tokens`
tokens: the free ones ignore the model's end, the held ones write an array that needs more than that. The first round
arranges the vocabulary and fills the caches of the grammar; it is not counted. Prints the median of each, and the loss.
"""

from __future__ import annotations

import argparse
import statistics
import time

from kvern.engine import EngineSettings
from kvern.llm import LLM, Prepared
from kvern.text.conversation import Conversation
from kvern.text.messages import Message
from kvern.text.options import SamplingOptions
from kvern.text.output_format import OutputFormat

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        "role": {"enum": ["author", "editor", "reader"]},
    },
    "required": ["name", "age", "tags", "role"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 1000}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="coder-0.5b")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    asked = parser.parse_args()
    llm = LLM(asked.model, max_context=1024, settings=EngineSettings(drafts="off"))
    form = OutputFormat.json_schema(PEOPLE)
    kinds = {name: prepared(llm, asked, one) for name, one in (("free", None), ("held", form))}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(asked.rounds + 1):
        for name, requests in kinds.items():
            rate = tokens_a_second(llm, requests)
            if number:
                rates[name].append(rate)
    free, held = (statistics.median(rates[name]) for name in ("free", "held"))
    print(f"free {free:.1f} tokens/s, held to a schema {held:.1f} tokens/s, loss {100 * (1 - held / free):.1f} %")


def prepared(llm: LLM, asked: argparse.Namespace, form: OutputFormat | None) -> list[Prepared]:
    """The requests of one kind, each with another prompt."""
    options = [
        SamplingOptions.of(
            max_tokens=asked.tokens,
            min_tokens=asked.tokens,
            ignore_eos=True,
            temperature=asked.temperature,
            seed=number,
        )
        for number in range(asked.streams)
    ]
    chats = [
        Conversation((Message("user", f"List the people of village {number} as a JSON array."),), format=form)
        for number in range(asked.streams)
    ]
    return [llm.prepare_chat(chat, one) for chat, one in zip(chats, options, strict=True)]


def tokens_a_second(llm: LLM, requests: list[Prepared]) -> float:
    """All tokens of all streams, over the time from the first step on in which every stream decodes to the end."""
    engine = llm.engine
    waiting = {engine.add(one.prompt, one.params) for one in requests}
    tokens, start = 0, 0.0
    while engine.has_work():
        updates = engine.step()
        if start:
            tokens += sum(len(update.tokens) for update in updates)
        waiting -= {update.request_id for update in updates if update.tokens}
        if not waiting and not start:
            start = time.perf_counter()
    return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
