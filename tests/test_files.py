"""Files and folders that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from evo_hpo.files import as_readable_as, made_whole, write_whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_whole(tmp_path / "file", "old")

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, "new" * 1000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_they_may_read_beside_it(tmp_path: Path) -> None:
    config, weights = tmp_path / "config.json", tmp_path / "weights"
    for path, mode in ((config, 0o640), (weights, 0o600)):
        path.touch()
        path.chmod(mode)
    as_readable_as(config, [weights])
    assert weights.stat().st_mode & 0o777 == 0o640


def half(target: Path) -> None:
    with made_whole(target) as growing:
        growing.mkdir()
        (growing / "part").write_text("half")
        raise RuntimeError("killed")


def test_a_folder_takes_its_place_when_all_of_it_is_there(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with pytest.raises(RuntimeError, match="killed"):
        half(target)
    assert list(tmp_path.iterdir()) == []
    with made_whole(target) as growing:
        growing.mkdir()
        (growing / "part").write_bytes(b"whole")
        assert not target.exists()
    assert [p.read_bytes() for p in target.iterdir()] == [b"whole"]
    assert list(tmp_path.iterdir()) == [target]
