"""The command `kvern`: a table of commands, each a module that is imported only when it is called.

A command may have two words (`train plot`). A command module has HELP, EXAMPLES, `add_arguments(parser)` and
`run(args) -> exit code`. Errors go to stderr as
`error: ...`, an empty line and `hint: ...`; data goes to stdout.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from kvern.errors import ConfigError, KvernError

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("kvern.cli.serve", "answer OpenAI-compatible requests over HTTP"),
    "chat": ("kvern.cli.chat", "talk to a model here, or to any server"),
    "batch": ("kvern.cli.batch", "answer every request of a file"),
    "pull": ("kvern.cli.pull", "download a known model and verify it"),
    "train": ("kvern.cli.train", "train a model, on one machine or many"),
    "train export": ("kvern.cli.train_export", "write what a run trained as a checkpoint"),
    "train plot": ("kvern.cli.train_plot", "draw the curves of training runs"),
    "convert": ("kvern.cli.convert", "convert or import a model into a V3 checkpoint"),
    "bench": ("kvern.cli.bench", "measure the engine here, or any server"),
    "doctor": ("kvern.cli.doctor", "describe this machine, and what would make it faster"),
}
EXAMPLES = """\
kvern pull coder-0.5b            fetch a small coding model, once
kvern serve                      serve it on http://127.0.0.1:8000
kvern chat                       talk to it in this terminal
git diff | kvern chat --system 'Write a commit message for this diff'
"""
INTERRUPTED = 130
BROKEN_PIPE = 141


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are KvernErrors, so that all errors look the same."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise ConfigError(message, hint=f"{self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 well, 1 failed, 2 wrongly called, 130 interrupted."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except KvernError as error:
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone; nothing is left to say, not even when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(_version())
        return 0
    name, rest = _split(argv)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `kvern {near[0]}`?" if near else "kvern --help lists the commands"
        raise ConfigError(f"unknown command {name!r}", hint=hint)
    return _run_command(name, rest)


def _split(argv: list[str]) -> tuple[str, list[str]]:
    """The command's name, which is two words where such a command exists, and its arguments."""
    name = " ".join(argv[:2])
    return (name, argv[2:]) if name in COMMANDS else (argv[0], argv[1:])


def _run_command(name: str, argv: list[str]) -> int:
    command = importlib.import_module(COMMANDS[name][0])
    parser = Parser(
        prog=f"kvern {name}",
        description=command.HELP,
        epilog="examples:\n" + _indent(command.EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    code: int = command.run(parser.parse_args(argv))
    return code


def _overview() -> str:
    commands = "\n".join(f"{name:<13}{help_line}" for name, (_, help_line) in COMMANDS.items())
    return (
        "usage: kvern COMMAND [ARGUMENT ...]\n\nRuns models of the DeepSeek-V3 architecture on your own machine.\n\n"
        f"commands:\n{_indent(commands)}\n\nexamples:\n{_indent(EXAMPLES)}\n\n`kvern COMMAND --help` tells more."
    )


def _indent(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.strip().splitlines())


def _version() -> str:
    from kvern import __version__

    return f"kvern {__version__}"


def _print_error(error: KvernError) -> None:
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"\nhint: {error.hint}", file=sys.stderr)
