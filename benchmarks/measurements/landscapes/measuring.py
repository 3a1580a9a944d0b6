"""Losses of a landscape's assignments: the project's own evaluator on a fixed small text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measurements.landscapes.kept_losses import KeptLosses, Losses
from evo_hpo.levels.levels import Levels
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.search.problem import Minibatch
from evo_hpo.space.compression_space import Assignment


class LandscapeRecorder:
    """Measures assignments that the file does not have yet, a batch at a time.

    Args:
        model: the uncompressed model, float32.
        levels: weights of every unit's levels.
        tokens: the fixed text, sequences x length; all of it is read for each assignment.
        path: file of rows.
        threads: replicas that work side by side, a core each; changes no loss.
        batch: assignments of one call of the evaluator: they share the runs of equal leading blocks.
        say: told about progress.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: Levels,
        tokens: Tensor,
        path: Path,
        *,
        threads: int = 1,
        batch: int = 32,
        say: Callable[[str], None] = print,
    ) -> None:
        self.batch, self.say = batch, say
        self.minibatch = Minibatch(0, tokens.numel())
        self.evaluator = Evaluator(
            model, levels, tokens, threads=threads, batch_size=len(tokens), reference_bytes=0, early_stopping=False
        )
        self.rows = KeptLosses(path, self.evaluator.context())

    def losses(self, assignments: Sequence[Assignment]) -> list[Losses]:
        """Losses of each sequence for every assignment, measured now or found in the file."""
        todo = self.rows.missing(assignments)
        begin, threads = time.perf_counter(), torch.get_num_threads()
        for first in range(0, len(todo), self.batch):
            self._measure(todo[first : first + self.batch])
            done = min(first + self.batch, len(todo))
            each = (time.perf_counter() - begin) / done
            self.say(f"{done} of {len(todo)}, {each:.2f} s each, {each * (len(todo) - done) / 60:.1f} min left")
        torch.set_num_threads(threads)
        return [self.rows.found[a] for a in assignments]

    def _measure(self, batch: Sequence[Assignment]) -> None:
        scores = self.evaluator.score(batch, self.minibatch)
        self.rows.add({a: list(s.by_sequence or ()) for a, s in zip(batch, scores, strict=True)})
