"""The model that ships in the package is found by name everywhere, and its absence is said."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from tests.tiny import write_tiny_checkpoint

from kvern.checkpoint import bundled
from kvern.checkpoint.bundled import BUNDLED, bundled_folder, is_bundled, models_root
from kvern.checkpoint.local import ensure_imported, work_folder
from kvern.checkpoint.pull import pull
from kvern.cli import main
from kvern.errors import NotFoundError
from kvern.llm import LLM

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package's folder of models, with a tiny model as nano in it."""
    monkeypatch.setenv("KVERN_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "models"
    monkeypatch.setattr(bundled, "models_root", lambda: root)
    write_tiny_checkpoint(root / "nano")
    return root


def test_a_bundled_name_is_its_folder(package: Path) -> None:
    assert ensure_imported("nano") == package / "nano"
    assert pull("nano") == package / "nano"


def test_it_answers_and_the_package_stays_as_it_was(package: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in (package / "nano").iterdir())
    answer = LLM("nano").generate("def", max_tokens=2)
    assert answer.completion_tokens == 2
    assert sorted(path.name for path in (package / "nano").iterdir()) == before
    made = list((tmp_path / "cache" / "models" / "nano-bundled").glob("*"))
    assert all(path.name.startswith("packed-") for path in made)


@pytest.mark.parametrize("command", [["chat", "nano"], ["chat", "--model", "nano"]], ids=" ".join)
def test_chat_names_it_either_way(
    package: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert main([*command, "--max-tokens", "1"]) == 0
    assert "error" not in capsys.readouterr().err


def test_the_list_says_that_it_is_here(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "--list"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("nano\t"))
    assert row.endswith("\tbundled")


def test_its_absence_is_said(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (package / "nano" / "config.json").unlink()
    for find in (ensure_imported, bundled_folder, pull):
        with pytest.raises(NotFoundError, match="nano ships with Kvern, but this installation has no weights"):
            find("nano")
    assert main(["serve", "nano", "--port", "0"]) == 1
    assert "hint: reinstall kvern" in capsys.readouterr().err
    with pytest.raises(NotFoundError) as caught:
        ensure_imported("nanoo")
    assert "did you mean nano" in str(caught.value.hint)


def test_other_folders_keep_what_is_made_of_them(package: Path, tmp_path: Path) -> None:
    assert not is_bundled(tmp_path)
    assert work_folder(tmp_path) == tmp_path


def test_the_folder_is_package_data() -> None:
    assert models_root() == ROOT / "src" / "kvern" / "models"
    for name in BUNDLED:
        assert (models_root() / name / "NOTICE").is_file()
    weights = models_root() / "nano" / "model.safetensors"
    ignored = subprocess.run(["git", "check-ignore", "-q", weights], cwd=ROOT, env=os.environ, check=False)
    assert ignored.returncode != 0, "scikit-build-core leaves out what git ignores"
