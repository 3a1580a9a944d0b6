"""The ways to score candidates, each in its own process, so that none profits from another's memory or settings."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from benchmarks.measurements.performance.evaluator_parts import RoundedLevels, Straightforward, bare, offspring
from evo_hpo.models.loading import load_model
from evo_hpo.models.mixed import mix
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.sampling import sequences_of
from evo_hpo.search.problem import Minibatch
from evo_hpo.space.compression_space import Assignment

KINDS = (
    "straightforward",
    "bare, batch 1",
    "bare, batch 4",
    "evaluator",
    "evaluator, compiled",
    "evaluator, mixed",
    "evaluator, mixed, compiled",
)


@dataclass(frozen=True)
class Setup:
    """What every process starts from.

    Attributes:
        tokens: pool, sequences x length.
        folder: where the straightforward way's weights lie.
        candidates: offspring of one parent.
    """

    model: str
    device: str
    dtype: str
    threads: int
    clock: str
    tokens: Tensor
    folder: Path
    candidates: int


@dataclass(frozen=True)
class Job:
    """Some of the candidates, by number, on one minibatch."""

    candidates: tuple[int, ...]
    minibatch: Minibatch


@dataclass
class Way(AbstractContextManager["Way"]):
    """A process that scores on demand; one at a time, the others wait.

    Attributes:
        report: what the evaluator says about itself.
        losses: of the last job; elapsed: its wall-clock seconds, whatever the clock.
    """

    kind: str
    setup: Setup
    report: Mapping[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    elapsed: float = 0.0

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.kind, self.setup), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()
        return self

    def run(self, job: Job) -> float:
        """Seconds a candidate."""
        self._pipe.send(job)
        return self._answer() / len(job.candidates)

    def _answer(self) -> float:
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"{self.kind}: {answer}")
        seconds, self.elapsed, self.losses, self.report = answer
        return float(seconds)

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(timeout=30)


def _serve(pipe: Connection, kind: str, setup: Setup) -> None:
    try:
        torch.set_num_threads(setup.threads)
        start = time.perf_counter()
        work, report = _prepare(kind, setup)
        pipe.send((0.0, time.perf_counter() - start, [], report()))
        while True:
            try:
                job = pipe.recv()
            except EOFError:
                return
            clock = time.process_time if setup.clock == "cpu" else time.perf_counter
            start, wall = clock(), time.perf_counter()
            losses = work(job)
            if setup.device == "cuda":
                torch.cuda.synchronize()
            pipe.send((clock() - start, time.perf_counter() - wall, losses, report()))
    except Exception:
        pipe.send(traceback.format_exc())


def _prepare(kind: str, setup: Setup) -> tuple[Callable[[Job], list[float]], Callable[[], Mapping[str, Any]]]:
    model = load_model(setup.model, getattr(torch, setup.dtype), setup.device).model
    levels = RoundedLevels(model)
    _, candidates = offspring(levels.units, setup.candidates, seed=1)
    tokens = setup.tokens.to(setup.device)
    if "mixed" in kind:
        levels.rounded_to(torch.bfloat16)
        mix(model)
    if kind.startswith("evaluator"):
        evaluator = Evaluator(model, levels, tokens, threads=setup.threads, compile=kind.endswith("compiled"))
        evaluator.prepare()  # every batch but a search's first finds the dense side made
        return lambda job: _score(evaluator, candidates, job), lambda: dict(evaluator.report())

    def rows(job: Job) -> Tensor:
        return tokens[list(sequences_of(job.minibatch, len(tokens), tokens.shape[1]))]

    def plainly(job: Job) -> list[float]:
        for _ in job.candidates:
            bare(model, rows(job), size)
        return []

    if kind.startswith("bare"):
        size = int(kind.split()[-1])
        bare(model, tokens[:size], size)
        return plainly, dict
    plain = Straightforward(model, levels.units, setup.folder, tokens)
    plain.load((2,) * len(levels.units))

    def straightforward(job: Job) -> list[float]:
        plain.choose(sequences_of(job.minibatch, len(tokens), tokens.shape[1]))
        return [plain.loss(candidates[i]) for i in job.candidates]

    return straightforward, dict


def _score(evaluator: Evaluator, candidates: Sequence[Assignment], job: Job) -> list[float]:
    return [s.loss for s in evaluator.score([candidates[i] for i in job.candidates], job.minibatch)]
