from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from kvern import settings
from kvern.errors import ConfigError


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_source_beats_the_next(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.load({}).port == 8000
    (in_empty_folder / "kvern.toml").write_text("[serve]\nport = 1\nhost = 'a'\nmodel = 'm'\n")
    monkeypatch.setenv("KVERN_PORT", "2")
    monkeypatch.setenv("KVERN_HOST", "b")
    loaded = settings.load({"port": 3})
    assert (loaded.port, loaded.host, loaded.model) == (3, "b", "m")


def test_a_named_file_is_read_instead(tmp_path: Path) -> None:
    (tmp_path / "kvern.toml").write_text("[serve]\nport = 1\n")
    other = tmp_path / "other.toml"
    other.write_text("[serve]\nthreads = 2\n")
    loaded = settings.load({}, other)
    assert (loaded.port, loaded.threads) == (8000, 2)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[serve]\nprot = 1\n", "unknown setting 'prot'", "did you mean 'port'?"),
        ("[server]\nport = 1\n", "unknown table or key 'server'", "settings belong under [serve]"),
        ("serve = 1\n", "serve must be a table", None),
        ("[serve\n", "kvern.toml", None),
        ("[serve]\nport = 70000\n", "kvern.toml: port: input should be less than or equal to 65535, not 70000", None),
        ("[serve]\ndtype = 'f8'\n", "dtype", None),
        ("[serve]\nmodel_alias = 'a=b=c'\n", "model_alias", None),
        ("[serve]\nmodel_alias = 'a,,b'\n", "model_alias", None),
    ],
)
def test_bad_files_are_explained(in_empty_folder: Path, text: str, message: str, hint: str | None) -> None:
    (in_empty_folder / "kvern.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        settings.load({})
    assert message in caught.value.message
    assert caught.value.hint == hint


def test_a_missing_file_that_was_named_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: No such file"):
        settings.load({}, Path("nowhere.toml"))


def test_environment_errors_name_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVERN_PORT", "many")
    with pytest.raises(ConfigError, match=r"^KVERN_PORT: "):
        settings.load({})
    monkeypatch.delenv("KVERN_PORT")
    monkeypatch.setenv("KVERN_PROT", "1")
    with pytest.raises(ConfigError) as caught:
        settings.load({})
    assert caught.value.hint == "did you mean KVERN_PORT?"


def test_variables_of_other_parts_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVERN_CACHE", "/x")
    assert settings.load({}).model == "coder-0.5b"


def test_arguments_follow_the_fields() -> None:
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser)
    assert settings.given(parser.parse_args([])) == {}
    args = parser.parse_args(["m", "--port", "1", "--max-context", "64", "--dtype", "f32"])
    assert settings.given(args) == {"model": "m", "port": 1, "max_context": 64, "dtype": "f32"}
    for name in settings.ServeSettings.model_fields:
        assert name in parser.format_help().replace("-", "_")


def test_flag_errors_name_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"^--max-context: "):
        settings.load({"max_context": 1})


def test_switches_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser)
    args = parser.parse_args(["--no-prefix-caching", "--shutdown-timeout", "2.5"])
    assert settings.load(settings.given(args)).prefix_caching is False
    assert settings.load(settings.given(args)).shutdown_timeout == 2.5
    monkeypatch.setenv("KVERN_PREFIX_CACHING", "false")
    assert settings.load({}).prefix_caching is False
    with pytest.raises(ConfigError, match=r"^--shutdown-timeout: "):
        settings.load({"shutdown_timeout": float("nan")})


def test_help_is_grouped() -> None:
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser)
    text = parser.format_help()
    places = [text.index(f"\n{group}:\n") for group in settings.GROUPS]
    assert places == sorted(places)
    for flag, group in {"--dtype": 0, "--port": 1, "--max-waiting": 2}.items():
        assert text.rindex(flag) > places[group]
