"""What is done when memory runs out: something is given up, and the work begins anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def until_it_fits(work: Callable[[], T], give_up: Callable[[], bool], device: torch.device) -> T:
    """Runs the work, each time that memory runs out with less.

    Args:
        give_up: makes the work need less memory; False: there is nothing more to give up.
        device: where it runs; of a GPU, memory that is kept for later is freed before the work begins anew.

    Raises:
        MemoryError: there was too little memory to the end.
    """
    while True:
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if not give_up():
                raise MemoryError(str(error)) from error
        if device.type == "cuda":  # not before: the error holds what the failed work had made
            torch.cuda.empty_cache()


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in text or "allocate memory" in text
    )
