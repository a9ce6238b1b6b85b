"""From a run's configuration to its rows: the tokenizer, the token files in the run's folder, the stream over them.

The tokenizer is the one that [data] names, else that of the checkpoint to begin from, else bytes. A copy of its files
stays in the run's folder, for what is exported from there.
"""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

from kvern.data.build import Progress, TextSide, build
from kvern.data.options import DataOptions
from kvern.data.row_stream import RowStream
from kvern.errors import ConfigError
from kvern.text import byte_tokenizer
from kvern.text.template import ChatTemplate
from kvern.text.tokenizer import Tokenizer
from kvern.train.config import BYTES, TrainConfig
from kvern.train.mesh import Ranks
from kvern.train.run_folder import RunFolder

STDLIB = "{stdlib}"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def row_stream(
    config: TrainConfig,
    folder: RunFolder,
    ranks: Ranks,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> RowStream:
    """The rows to train on. The first rank tokenises what is not tokenised yet, while the others wait.

    say: is told by the first rank, a line a source, how much there is and what was left out. Raises
    ConfigError where the model's vocabulary is too small, DataError for files that cannot be used.
    """
    if not ranks.is_first:
        ranks.barrier()
        corpus = build(located(config.data), read_text_side(folder.tokenizer), folder.data)
    else:
        place_tokenizer(config, folder.tokenizer)
        text = read_text_side(folder.tokenizer)
        _check_vocabulary(text.tokenizer, config)
        corpus = build(located(config.data), text, folder.data, progress)
        ranks.barrier()
        if say is not None:
            for source in corpus.sources:
                say(str(source))
    return corpus.train(config.batch.length, config.seed)


def located(options: DataOptions) -> DataOptions:
    """The options with `{stdlib}` in paths replaced by the folder of Python's standard library on this machine."""
    library = sysconfig.get_path("stdlib")
    sources = [one.model_copy(update={"path": one.path.replace(STDLIB, library)}) for one in options.sources]
    return options.model_copy(update={"sources": tuple(sources)})


def place_tokenizer(config: TrainConfig, folder: Path) -> None:
    """Put the run's tokenizer into `folder`."""
    source = config.data.tokenizer or (str(config.folder) if config.folder else BYTES)
    folder.mkdir(exist_ok=True)
    if source == BYTES:
        byte_tokenizer.write(folder)
        return
    Tokenizer.load(Path(source))  # its errors name the file that the user gave
    for name in TEXT_FILES:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, folder / name)


def read_text_side(folder: Path) -> TextSide:
    """The tokenizer in `folder`, and its chat template where there is one."""
    tokenizer = Tokenizer.load(folder)
    return TextSide(tokenizer, ChatTemplate.load(folder, tokenizer))


def _check_vocabulary(tokenizer: Tokenizer, config: TrainConfig) -> None:
    size = config.architecture().vocab_size
    if tokenizer.size > size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.size} tokens, and model.vocab_size is {size}",
            hint="a larger vocabulary, or the tokenizer that belongs to the model",
            param="model.vocab_size",
        )
