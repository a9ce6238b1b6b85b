"""Runs llama.cpp's own converter on a folder whose tokenizer it does not know.

    python drive_convert.py LLAMA_CPP_SOURCE HF_FOLDER OUT.gguf

The converter recognises a tokenizer by a hash; a dummy one has none, so its name is given here. Everything else, names,
layout and the split of kv_b, is llama.cpp's.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main(source: Path, folder: str, out: str) -> None:
    """Convert to BF16."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    base = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda *_: "deepseek-v3"
    converter = importlib.import_module("convert_hf_to_gguf")
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", "bf16"]
    converter.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
