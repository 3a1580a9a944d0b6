"""Paths as users write them, and where the cache lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from evo_hpo.errors import InvalidSettingError
from evo_hpo.models.corpora import is_local
from evo_hpo.models.loading import resolve_folder
from evo_hpo.models.paths import cache_folder, user_path, writable_folder


def test_a_name_longer_than_a_file_system_takes_is_refused_before_it_is_looked_up(tmp_path: Path) -> None:
    assert user_path(tmp_path / ("é" * 127)).name == "é" * 127
    for look_up in (user_path, is_local, resolve_folder):
        with pytest.raises(InvalidSettingError, match="256 bytes: a name of a file or folder has at most 255"):
            look_up("é" * 128)


def test_a_home_that_nobody_has_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSettingError, match="no home folder is known for '~nobody-of-this-name/x'"):
        user_path("~nobody-of-this-name/x")

    def homeless(_: str) -> str:
        return "~"  # what the standard library gives a user without an entry, in a container for example

    monkeypatch.setattr("os.path.expanduser", homeless)
    monkeypatch.delenv("EVO_HPO_CACHE", raising=False)
    with pytest.raises(InvalidSettingError, match="set EVO_HPO_CACHE to a folder"):
        cache_folder()
    monkeypatch.setenv("EVO_HPO_CACHE", "relative")
    assert cache_folder() == Path("relative")


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", "")
    assert cache_folder() == Path("~/.cache/evo_hpo").expanduser()


@pytest.mark.parametrize("spec", ["", "whole:"])
def test_no_name_is_not_the_folder_that_one_is_in(spec: str) -> None:
    assert not is_local(spec)


def test_a_folder_that_is_there_and_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert writable_folder(tmp_path / "new").is_dir()
    monkeypatch.setattr("os.access", lambda *_: False)  # whatever who runs the tests may do
    with pytest.raises(InvalidSettingError, match="cannot write into the folder"):
        writable_folder(tmp_path)
