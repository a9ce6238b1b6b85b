"""Commands and code in the README and the guides do what the pages say.

A fenced block marked `sh` or `python` is run, in a temporary folder, with a tiny model under the name that the pages
use. A block marked `sh not-run` or `text` is not; the word after the mark says why, for the reader of the source.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?P<mark>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
REASONS = ("needs-client", "needs-model", "set-up", "long")
MARKS = {
    "sh",
    "python",
    "text",
    "json",
    "toml",
    "yaml",
    *(f"{m} not-run {why}" for m in ("sh", "python") for why in REASONS),
}
RUNNABLE = {"sh", "python"}


def blocks() -> list[tuple[str, str, str]]:
    """(page, mark, body) of every fenced block."""
    return [
        (str(page.relative_to(ROOT)), match["mark"].strip(), match["body"])
        for page in PAGES
        for match in BLOCK.finditer(page.read_text())
    ]


def test_every_block_says_whether_it_runs() -> None:
    assert not [(page, mark) for page, mark, _ in blocks() if mark not in MARKS]


@pytest.mark.parametrize(
    ("page", "mark", "body"), [block for block in blocks() if block[1] in RUNNABLE], ids=lambda text: text[:40]
)
def test_block_runs(page: str, mark: str, body: str, tiny_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "models").mkdir(parents=True)
    (tmp_path / "tiny").symlink_to(tiny_folder)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {
        **os.environ,
        "KVERN_CACHE": str(cache),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["bash", "-euo", "pipefail", "-c", body] if mark == "sh" else [sys.executable, "-c", body]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{page}:\n{body}\n{done.stdout}\n{done.stderr}"


def test_links_to_files_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
