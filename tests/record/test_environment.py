"""What a search ran on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from evo_hpo.record import environment


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    environment._gpus.cache_clear()
    yield
    environment._gpus.cache_clear()


def test_gpus_are_named_where_the_driver_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho NVIDIA H200\necho NVIDIA L4\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment.machine()["gpus"] == ["NVIDIA H200", "NVIDIA L4"]
    for chosen, expected in (("1", ["NVIDIA L4"]), ("1,0", ["NVIDIA L4", "NVIDIA H200"]), ("GPU-8f", None)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert environment.machine()["gpus"] == (expected or ["NVIDIA H200", "NVIDIA L4"])
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert "gpus" not in environment.machine()


@pytest.mark.parametrize("script", [None, "#!/bin/sh\necho 'no devices were found'\nexit 6\n"])
def test_a_machine_without_says_nothing_of_gpus(
    script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script:
        (tmp_path / "nvidia-smi").write_text(script)
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    if script is None and any((Path(d) / "nvidia-smi").exists() for d in ("/usr/bin", "/bin")):
        pytest.skip("this machine has a driver")
    assert "gpus" not in environment.machine()
