"""The real coder-0.5b: tokenizer ids, and greedy text against transformers' Qwen2 on the same dequantised weights."""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.pulled import pulled
from tokenizers import Tokenizer
from transformers import AutoTokenizer, DynamicCache, Qwen2Config, Qwen2ForCausalLM

from kvern.checkpoint.convert import convert
from kvern.checkpoint.gguf import GGUFSource
from kvern.checkpoint.load import load
from kvern.engine import Engine, EngineSettings, SamplingParams
from kvern.model.batch import ForwardBatch

pytestmark = pytest.mark.weights

PROMPTS = [
    "def fibonacci(n):\n",
    "<|im_start|>user\nWrite a Python function that reverses a linked list.<|im_end|>\n<|im_start|>assistant\n",
    "#include <stdio.h>\n\nint main(void) {\n",
    "The three laws of thermodynamics are",
    "<|fim_prefix|>def mean(values):\n    <|fim_suffix|>\n    return total / len(values)<|fim_middle|>",
]
TOKENS = 200
LOGIT_TOLERANCE = 5e-5
"""On the second prompt transformers' Qwen2 in fp32 is itself 2.3e-5 of the largest logit away from its float64 logits
(the import: 4e-6); on the other prompts both are within 2e-6."""


@pytest.fixture(scope="module")
def gguf() -> Path:
    return pulled("coder-0.5b")


@pytest.fixture(scope="module")
def source(gguf: Path) -> GGUFSource:
    return GGUFSource(gguf)


@pytest.fixture(scope="module")
def tokenizer(source: GGUFSource) -> Tokenizer:
    return Tokenizer.from_str(source.files["tokenizer.json"].decode())


def standard_library() -> Iterator[str]:
    """Every Python file of the running interpreter, tests included."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts:
            yield path.read_text(encoding="utf-8", errors="replace")


@pytest.mark.parametrize(
    ("first", "step"),
    [
        pytest.param(0, 12, id="150 files"),
        pytest.param(0, 1, id="all files", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_tokenizer_ids_equal_transformers(first: int, step: int, gguf: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    count = 0
    for text in itertools.islice(standard_library(), first, None, step):
        assert tokenizer.encode(text).ids == theirs._tokenizer.encode(text).ids
        count += 1
    assert count > 1500 // step


@pytest.fixture(scope="module")
def qwen2(source: GGUFSource) -> Qwen2ForCausalLM:
    """transformers' Qwen2 holding the dequantised tensors of the file, in fp32."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**source.config))
    state = {name: source.tensor(name) for name in source.names()}
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_greedy_text_equals_transformers(
    gguf: Path,
    qwen2: Qwen2ForCausalLM,
    tokenizer: Tokenizer,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    convert(gguf, tmp_path / "v3", dtype="f32")
    model = load(tmp_path / "v3")
    engine = Engine(model, settings=EngineSettings(max_context=1024))
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        expected_logits, expected = greedy(qwen2, ids)
        with torch.no_grad():
            found_logits = model(ForwardBatch.of(ids))
        difference = float((found_logits - expected_logits).abs().max() / expected_logits.abs().max())
        record_property("logit difference", difference)
        assert difference < LOGIT_TOLERANCE, prompt
        assert list(engine.generate(ids, params)) == expected, prompt


def greedy(model: Qwen2ForCausalLM, prompt: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Logits [prompt, vocabulary] and the next TOKENS tokens, one at a time over transformers' cache."""
    cache = DynamicCache(config=model.config)
    found: list[int] = []
    with torch.no_grad():
        first = last = model(torch.tensor([prompt]), cache=cache).logits[0]
        while len(found) < TOKENS:
            found.append(int(last[-1].argmax()))
            last = model(torch.tensor([[found[-1]]]), cache=cache).logits[0]
    return first, found
