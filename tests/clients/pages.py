"""The pages docs/clients/NAME.md as tests run them: what a user would copy is what runs.

A file is the block behind a line that begins with its path in backquotes and ends with a colon. Commands are the blocks
marked `sh` (each a turn of the conversation; variables hold for the later ones too) or one block marked `python`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "clients"
INSTALLED = Path(os.environ.get("KVERN_CLIENTS", Path.home() / ".cache" / "kvern" / "clients"))
URL, CONTEXT = "http://127.0.0.1:8000", 32768
"""Of the server on the pages."""

BLOCK = re.compile(
    r"(?:^`(?P<path>[^`]+)`[^\n]*:\n\n)?^```(?P<mark>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
RUN = {"sh not-run needs-client": ["bash", "-euo", "pipefail", "-c"], "python not-run needs-client": ["python", "-c"]}
PLAIN = {"LANG": "C.UTF-8", "TERM": "dumb"}
GIT = "[user]\nname = Test\nemail = test@example.com\n[init]\ndefaultBranch = main\n"


@dataclass(frozen=True)
class Page:
    """files: paths (under ~ or the working folder) and contents. turns: (argv, script)."""

    files: tuple[tuple[str, str], ...]
    turns: tuple[tuple[tuple[str, ...], str], ...]


def read_page(name: str) -> Page:
    """The page of a client."""
    blocks = list(BLOCK.finditer((FOLDER / f"{name}.md").read_text(encoding="utf-8")))
    commands = [(tuple(RUN[block["mark"]]), block["body"]) for block in blocks if block["mark"] in RUN]
    settings = "".join(line for _, body in commands for line in body.splitlines(True) if line.startswith("export "))
    turns = [(argv, body if argv[0] == "python" else settings + body) for argv, body in commands]
    return Page(tuple((block["path"], block["body"]) for block in blocks if block["path"]), tuple(turns))


@dataclass(frozen=True)
class Desk:
    """Where a client works: a home of its own, a folder, an environment with nothing in it, and a server."""

    home: Path
    folder: Path
    url: str
    context: int

    @property
    def temporary(self) -> Path:
        """Some clients keep conversations in the folder for temporary files."""
        return self.home / "tmp"

    @classmethod
    def set_up(cls, parent: Path, page: Page, url: str, context: int = CONTEXT) -> Desk:
        """Make the folders and write the page's files."""
        desk = cls(parent / "home", parent / "work", url, context)
        for path, content in (("~/.gitconfig", GIT), *page.files):
            whole = desk.home / path[2:] if path.startswith("~/") else desk.folder / path
            whole.parent.mkdir(parents=True, exist_ok=True)
            whole.write_text(desk.here(content), encoding="utf-8")
        desk.folder.mkdir(exist_ok=True)
        desk.temporary.mkdir()
        return desk

    def written(self) -> set[tuple[Path, int]]:
        """The files of its folder, each with the time in nanoseconds when it was last written."""
        return {(path, path.stat().st_mtime_ns) for path in self.folder.rglob("*") if path.is_file()}

    def here(self, text: str) -> str:
        """The text with this server's address and context length instead of those on the pages."""
        return text.replace(URL, self.url).replace(str(CONTEXT), str(self.context))

    def run(self, argv: tuple[str, ...], script: str, *, timeout: float) -> subprocess.CompletedProcess[str]:
        """Run one turn of a page, to its end."""
        path = os.pathsep.join((str(INSTALLED / "bin"), "/usr/local/bin", "/usr/bin", "/bin"))
        program = str(INSTALLED / "bin" / "python") if argv[0] == "python" else argv[0]
        with subprocess.Popen(
            [program, *argv[1:], self.here(script)],
            cwd=self.folder,
            env={**PLAIN, "HOME": str(self.home), "TMPDIR": str(self.temporary), "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # what bash has started as well
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)
