"""Turns recorded rows into data files: `python -m benchmarks.measurements.landscapes.pack pairs --rows FOLDER`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measurements.landscapes.exploring import Exploration
from benchmarks.measurements.landscapes.fitting import fit, optimise
from benchmarks.measurements.landscapes.validation import NEAR, ahead, cross_validated, errors
from benchmarks.problems.bits import bits_space
from benchmarks.problems.depth import ways_to_drop
from benchmarks.problems.surrogate import Array, Features
from evo_hpo.errors import JournalError
from evo_hpo.record.environment import machine
from evo_hpo.space.compression_space import Assignment

BLOCKS, LENGTH = 30, 64
DATA = Path(__file__).parents[2] / "problems" / "data"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the file of each landscape that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("landscapes", nargs="+", choices=["pairs", "blocks", "bits"])
    parser.add_argument("--rows", type=Path, required=True, help="folder of the recorded rows")
    parser.add_argument("--to", type=Path, default=DATA, help="folder of the data files")
    options = parser.parse_args(arguments)
    for landscape in options.landscapes:
        path = options.rows / f"{landscape}.jsonl"
        arrays = pack_bits(path) if landscape == "bits" else pack_depth(path, landscape)
        options.to.mkdir(parents=True, exist_ok=True)
        target = options.to / f"smollm2-{landscape}.npz"
        np.savez_compressed(target, **arrays)
        print(f"{target.name}: {target.stat().st_size / 1e3:.0f} kB, {arrays['about']}")


def read_rows(path: Path) -> tuple[list[Assignment], NDArray[np.float32], str]:
    """Assignments in the order of measurement, their losses (assignments x sequences), and the context."""
    context, *lines = path.read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    losses = np.array([entry["losses"] for entry in entries], dtype=np.float32)
    return [tuple(map(int, entry["levels"])) for entry in entries], losses, json.loads(context)["context"]


def pack_depth(path: Path, landscape: str) -> dict[str, Any]:
    """``kept`` (assignments x units, 0 dropped) and ``losses`` (assignments x sequences, nats a token).

    Raises:
        JournalError: not every assignment has been measured.
    """
    assignments, losses, context = read_rows(path)
    units, counts = (BLOCKS // 2, range(3, 6)) if landscape == "pairs" else (BLOCKS, range(3, 4))
    wanted = ways_to_drop(units, counts)
    index = {assignment: number for number, assignment in enumerate(assignments)}
    missing = [a for a in wanted if a not in index]
    if missing:
        raise JournalError(f"{str(path)!r} lacks {len(missing)} of {len(wanted)} assignments: record them first")
    about = {**_about(context, losses.shape[1]), "rows": len(wanted), "blocks": BLOCKS}
    return {
        "kept": np.array(wanted, dtype=np.int8),
        "losses": losses[[index[a] for a in wanted]],
        "about": json.dumps(about),
    }


def pack_bits(path: Path) -> dict[str, Any]:
    """Every measured row, and the surrogate as a quadratic form with its error on rows it has not seen."""
    assignments, losses, context = read_rows(path)
    means = losses.astype(np.float64).mean(axis=1)
    levels = np.array(assignments, dtype=np.int8)
    origin = _origins(assignments, means)
    features = Features.of(bits_space())
    settings = optimise(features, levels, means, steps=30)
    found = fit(features, levels, means, settings)
    full = found.quadratic + found.quadratic.T
    np.fill_diagonal(full, np.diag(found.quadratic))
    about = {
        **_about(context, losses.shape[1]),
        "rows": len(assignments),
        "error": _error(features, levels, means, settings, origin),
    }
    return {
        "levels": levels,
        "losses": losses,
        "origin": origin,
        "settings": settings,
        "constant": np.array(found.constant),
        "linear": found.linear.astype(np.float32),
        "quadratic": full[np.triu_indices(len(full))].astype(np.float32),
        "about": json.dumps(about),
    }


def _error(
    features: Features, levels: NDArray[np.int8], losses: Array, settings: Array, origin: NDArray[np.int8]
) -> dict[str, dict[str, float]]:
    uniform = np.array(bits_space().uniform())
    told = cross_validated(features, levels, losses, settings)
    additive = optimise(features, levels, losses, steps=15, interactions=False)
    plain = cross_validated(features, levels, losses, additive, interactions=False)
    fitted = np.flatnonzero(origin == 2)
    later = ahead(features, levels, losses, settings, int(fitted[len(fitted) // 2]), 80)
    every = np.ones(len(losses), dtype=bool)
    return {
        "all": errors(told, losses, every),
        "near": errors(told, losses, (levels != uniform).sum(axis=1) <= NEAR),
        "best": errors(told, losses, losses <= np.quantile(losses, 0.1)),
        "design": errors(told, losses, origin == 0),
        "additive": errors(plain, losses, every),
        "ahead": errors(later, losses, ~np.isnan(later)),
    }


def _origins(assignments: Sequence[Assignment], means: Array) -> NDArray[np.int8]:
    """What each was measured for: 0 the design, 1 searches on the model, 2 what searches on fits found."""
    known = {a: (float(mean),) for a, mean in zip(assignments, means, strict=True)}
    replay = Exploration(bits_space(), lambda wanted: [known[a] for a in wanted])
    replay.run(rounds=0)
    return np.array([("design", "search", "fit").index(replay.origin.get(a, "fit")) for a in assignments], np.int8)


def _about(context: str, sequences: int) -> dict[str, Any]:
    return {
        "model": "SmolLM2-135M-Instruct",
        "text": f"pydoc, held-out documents, {sequences} sequences of {LENGTH} tokens",
        "tokens": sequences * LENGTH,
        "loss": "KL(dense || compressed), nats a token, mean of each sequence",
        "context": context,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine()["processor"],
    }


if __name__ == "__main__":
    main()
