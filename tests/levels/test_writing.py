"""Writing a store: by one process at a time, of one plan, and again where a file is lost or is not what was written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evo_hpo.errors import StoreError
from evo_hpo.files import file_lock
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.drop import build_drop_store
from evo_hpo.levels.manifest import Recipe, checksum
from evo_hpo.levels.pruners import Magnitude
from evo_hpo.levels.quantizers import RTN
from evo_hpo.levels.store import open_store
from evo_hpo.levels.writing import StoreWriter
from evo_hpo.models.loading import LoadedModel
from tests.tiny import tiny_model

UMASK = os.umask(0)
os.umask(UMASK)

FLOAT32, BFLOAT16 = {"dtype": "float32"}, {"dtype": "bfloat16"}


class Killed(Exception):
    """The build ends here."""


def made(folder: Path, compressor: Any = None, **settings: Any) -> Path:
    build_store(LoadedModel.from_model(tiny_model("llama")), folder, compressor or RTN([3, 4]), **settings)
    return folder


def begun(folder: Path, units: int, **settings: Any) -> Path:
    """A build that was killed after so many of its 21 units."""

    def killer(done: int, total: int, what: str) -> None:
        if done == units:
            raise Killed

    with pytest.raises(Killed):
        made(folder, progress=killer, **settings)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "units").iterdir()}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "units").iterdir()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)


def test_two_builds_of_one_store_do_not_meet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second waits for the first, and finds the store built."""
    folder, waits = tmp_path / "s", threading.Event()
    heard: list[int] = []

    def second() -> None:
        made(folder, progress=lambda done, total, what: heard.append(done))

    other = threading.Thread(target=second)

    def first(done: int, total: int, what: str) -> None:
        if done == 3:
            other.start()
            while "another process builds" not in caplog.text:
                waits.wait(0.01)
            assert len(times(folder)) == 3

    made(folder, progress=first)
    other.join()
    assert heard == []
    assert contents(folder) == contents(made(tmp_path / "alone"))
    assert sorted(path.name for path in folder.iterdir()) == ["build.json", "manifest.json", "units"]


def test_who_waited_for_a_build_that_was_killed_goes_on_with_it(tmp_path: Path) -> None:
    folder = begun(tmp_path / "s", 8)
    kept = times(folder)
    other = threading.Thread(target=made, args=(folder,))
    with file_lock(folder / "build.lock"):
        other.start()
        other.join(0.2)
        assert other.is_alive()
        assert times(folder) == kept
    other.join()
    assert kept.items() <= times(folder).items()
    assert len(times(folder)) == 21


def test_a_copied_store_without_the_record_of_its_build_is_known_by_its_manifest(tmp_path: Path) -> None:
    folder = made(tmp_path / "s")
    (folder / "build.json").unlink()
    written = times(folder)
    made(folder)
    assert times(folder) == written
    for other in (RTN([3, 8]), Magnitude([0.5])):
        with pytest.raises(StoreError, match="holds a store with other .*settings"):
            made(folder, other)
    (folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match="neither manifest.json nor build.json"):
        made(folder)


def test_a_store_on_a_medium_that_cannot_be_written_is_only_read(tmp_path: Path, monkeypatch: Any) -> None:
    folder = made(tmp_path / "s")

    def refused(*arguments: Any, **settings: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(Path, "mkdir", refused)
    assert len(build_store(LoadedModel.from_model(tiny_model("llama")), folder, RTN([3, 4])).units) == 21


def test_the_dtype_of_the_weights_is_in_the_plan_of_a_method_without_data(tmp_path: Path) -> None:
    folder = begun(tmp_path / "s", 8, text=BFLOAT16)
    for _ in range(2):
        with pytest.raises(StoreError, match="other dtype"):
            made(folder, text=FLOAT32)
        made(folder, text=BFLOAT16)
    earlier = made(tmp_path / "earlier")  # says no dtype, as all did
    assert json.loads((earlier / "manifest.json").read_text())["plan"]["calibration"] == {}
    made(earlier, text=BFLOAT16)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_units_that_are_not_what_was_written_are_written_again(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    whole = contents(made(tmp_path / "whole"))
    folder = begun(tmp_path / "s", 10)
    kept = times(folder)
    name = sorted(kept)[4]
    damage(folder / "units" / name)
    del kept[name]
    made(folder)
    assert contents(folder) == whole
    assert kept.items() <= times(folder).items()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_whole_store_that_lost_a_file_gets_it_again(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = made(tmp_path / "s")
    whole, manifest, kept = contents(folder), (folder / "manifest.json").read_bytes(), times(folder)
    name = sorted(whole)[7]
    damage(folder / "units" / name)
    with pytest.raises(StoreError, match=f"{name}.* build it again"):
        open_store(folder)
    del kept[name]
    made(folder)
    assert contents(folder) == whole
    assert (folder / "manifest.json").read_bytes() == manifest
    assert kept.items() <= times(folder).items()


def test_while_a_lost_file_is_written_other_damage_is_mended_too(tmp_path: Path) -> None:
    folder = made(tmp_path / "s")
    whole = contents(folder)
    first, second = sorted(whole)[:2]
    (folder / "units" / first).unlink()
    flip(folder / "units" / second)
    made(folder)
    assert contents(folder) == whole


def test_a_build_that_an_earlier_version_began_goes_on(tmp_path: Path) -> None:
    folder = begun(tmp_path / "s", 10)
    kept = times(folder)
    (folder / "built.jsonl").unlink()
    with StoreWriter(folder, Recipe.from_json(json.loads((folder / "build.json").read_text()))):
        pass  # killed before it asked for any
    made(folder)
    assert kept.items() <= times(folder).items()


def test_a_build_that_fails_at_its_begin_lets_go_of_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evo_hpo.levels.writing.write_whole", full)
    with pytest.raises(OSError, match="No space") as kept:
        made(tmp_path / "s")
    assert kept.tb is not None  # as a notebook keeps it
    with file_lock(tmp_path / "s" / "build.lock", wait=False) as free:
        assert free


def test_two_builds_where_a_file_system_has_no_locks_do_each_other_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    folder = tmp_path / "s"
    half = threading.Event()
    other = threading.Thread(target=made, args=(folder,))

    def first(done: int, total: int, what: str) -> None:
        if done == 3:
            other.start()
            half.wait(0.05)

    made(folder, progress=first)
    other.join()
    assert contents(folder) == contents(made(tmp_path / "alone"))
    assert len(open_store(folder).units) == 21


def test_a_lock_that_may_not_be_opened_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(tmp_path / "s", 3)
    assert (folder / "build.lock").stat().st_mode & 0o777 == 0o666 & ~UMASK

    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("evo_hpo.files.os.open", refused)
    with pytest.raises(StoreError, match=r"build.lock.*Permission denied.*another folder"):
        made(folder)


def test_sparsities_that_were_recorded_as_they_were_given_are_the_same_store(tmp_path: Path) -> None:
    folder = made(tmp_path / "s", Magnitude([0.3, 0.5, 0.7]))
    for name in ("build.json", "manifest.json"):
        data = json.loads((folder / name).read_text())
        data.get("plan", data)["settings"]["sparsities"] = ["0.70", ".5", "0.3"]
        (folder / name).write_text(json.dumps(data))
    kept = times(folder)
    made(folder, Magnitude([0.7, 0.5, 0.3]))
    assert times(folder) == kept
    with pytest.raises(StoreError, match="other settings"):
        made(folder, Magnitude([0.7, 0.5]))


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from tests.levels.test_writing import made
count, sync = 0, os.fsync
def killing(descriptor):
    global count
    count += 1
    if count == 9:
        os.kill(os.getpid(), 9)
    sync(descriptor)
os.fsync = killing
made(Path(sys.argv[1]))
"""
    folder = tmp_path / "s"
    assert subprocess.run([sys.executable, "-c", script, str(folder)], check=False).returncode == -9
    (left,) = (path for path in (folder / "units").iterdir() if path.name.startswith("."))
    other = folder / "units" / ".0123abcd.growing"  # of a process that is still at it, where there are no locks
    other.touch()
    os.utime(left, (0, 0))
    made(folder)
    other.unlink()
    assert contents(folder) == contents(made(tmp_path / "alone"))


def test_the_last_line_of_the_log_may_be_cut_off(tmp_path: Path) -> None:
    folder = begun(tmp_path / "s", 10)
    log = folder / "built.jsonl"
    lines = log.read_text().splitlines()
    assert [json.loads(line)[1:] for line in lines] == [
        [path.stat().st_size, checksum(path)]
        for path in (folder / "units" / f"{json.loads(line)[0]}.safetensors" for line in lines)
    ]
    log.write_text("\n".join(lines)[:-7])
    kept = times(folder)
    made(folder)
    assert len(set(kept.items()) - set(times(folder).items())) == 1


def test_stores_of_dropped_modules_are_known_by_their_manifest_too(tmp_path: Path) -> None:
    loaded = LoadedModel.from_model(tiny_model("llama"))
    build_drop_store(loaded, tmp_path / "s", ["mlp"])
    (tmp_path / "s" / "build.json").unlink()
    build_drop_store(loaded, tmp_path / "s", ["mlp"])
    with pytest.raises(StoreError, match="other settings, units"):
        build_drop_store(loaded, tmp_path / "s", ["attention"])
    shutil.rmtree(tmp_path / "s")
    build_drop_store(loaded, tmp_path / "s", ["attention"])
