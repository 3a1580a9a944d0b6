"""What a search ran on: package versions, git state, machine. Kept with every journal; changes no result."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "evo-hpo", "numpy", "scipy", "torch", "transformers", "safetensors", "optuna", "cmaes", "nevergrad", "mlflow",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, git state and machine, ready for a journal's header; the first two as they were when first asked for.

    What is imported does not change with them, and to ask takes as long as many a search.
    """
    return {"versions": versions(), "git": git_state(), "machine": machine()}


@cache
def versions() -> dict[str, str]:
    """Python and the packages that can change a result; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def git_state() -> dict[str, Any]:
    """Commit, branch and whether tracked files are changed; empty outside a git checkout."""
    folder = Path(__file__).resolve().parent
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {}
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    branch = _git(folder, "rev-parse", "--abbrev-ref", "HEAD")
    return {"commit": commit, "branch": branch or "", "changed": bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    return _output("git", "-C", str(folder), *arguments)


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not installed, fails, or takes long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Processor, cores and GPUs (where there are any) that this process may use, memory in GiB, system."""
    gpus = _visible(_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return {
        "processor": _processor(),
        "cores": cores(),
        **({"gpus": gpus} if gpus else {}),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "executable": f"{sys.implementation.name} {platform.python_version()}",
    }


@cache
def _gpus() -> tuple[str, ...]:
    """Names of NVIDIA's, as its driver tells them: to ask torch would take memory on each."""
    return tuple((_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines())


def _visible(names: tuple[str, ...], chosen: str | None) -> list[str]:
    """Of GPUs those that a list of their numbers leaves; all where it is none or names them otherwise."""
    numbers = None if chosen is None else [part.strip() for part in chosen.split(",") if part.strip()]
    if numbers is None or not all(number.lstrip("-").isdecimal() for number in numbers):
        return list(names)
    return [names[int(number)] for number in numbers if 0 <= int(number) < len(names)]


@cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
