"""torch.compile of the decoder blocks: an option, never needed."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from evo_hpo.compression.levels import Levels
from evo_hpo.language_model.pool import WorkerPool

__all__ = ["compile_blocks"]

_log = logging.getLogger(__name__)


def compile_blocks(pool: WorkerPool, levels: Levels, ids: Tensor) -> bool:
    """Compiles every replica's blocks for batches of the shape of ``ids``; False: they stay eager, and a line says why.

    Weights are inputs of the compiled code, so switching levels does not compile again. Dropped modules inside a block
    change the code itself: such a store stays eager.
    """
    reason = _obstacle(pool, levels)
    if not reason:
        try:
            for worker in pool.workers:
                worker.gated.compile_blocks(lambda forward: torch.compile(forward, dynamic=False))
            for worker in pool.workers:
                with torch.inference_mode():
                    worker.gated.final_hidden(ids)
        except Exception as error:  # no compiler, or code that cannot be traced: whatever it is, eager works
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            for worker in pool.workers:
                worker.gated.compile_blocks(None)
    if reason:
        _log.warning("decoder blocks are not compiled: %s", reason)
    return not reason


def _obstacle(pool: WorkerPool, levels: Levels) -> str:
    blocks = pool.workers[0].gated.blocks
    for number in range(len(levels.units)):
        dropped = [name for name, weight in levels.weights(number, 0).items() if weight is None]
        inside = [name for name in dropped if name not in blocks]
        if inside:
            return f"levels may drop {inside[0]}, a part of a block"
    return ""
