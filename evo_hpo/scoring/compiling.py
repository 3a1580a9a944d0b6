"""torch.compile of the decoder blocks and of the steps on a chunk of logits: kept where faster, never needed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evo_hpo.levels.levels import Levels
from evo_hpo.models.experts import LinearExperts
from evo_hpo.scoring.attention import compile_with_attention
from evo_hpo.scoring.compile_lock import COMPILE_LOCK, GUARD_LOCK
from evo_hpo.scoring.dense import DenseSide
from evo_hpo.scoring.divergence import divergences
from evo_hpo.scoring.kernels import Kernels
from evo_hpo.scoring.pool import ReplicaPool
from evo_hpo.scoring.replica import Replica

_log = logging.getLogger(__name__)

GAIN = 1.02
"""What is compiled must be this much faster than eager."""

REPEATS = 3
"""Turns of either, of which the best counts."""

SHAPES = 64
"""Shapes of a pass that are compiled, each for itself; torch stops at 8: then history decides what runs compiled."""


@dataclass(frozen=True)
class Compiled:
    """What runs compiled.

    Attributes:
        parts: of "blocks" and "chunk".
        rows: (what was tried, tokens a second).
    """

    parts: tuple[str, ...] = ()
    rows: tuple[tuple[str, float], ...] = ()


def compile_parts(pool: ReplicaPool, levels: Levels, ids: Tensor, known: Mapping[str, int]) -> Compiled:
    """Compiles every replica's blocks and its steps on logits for batches of the shape of ``ids``.

    Weights are inputs of the compiled code, so switching levels does not compile again, and blocks that are alike share
    one compilation; a minibatch whose sequences do not fill a batch has another shape, and takes another. Dropped
    modules inside a block change the code itself: such a store's blocks stay eager. What stays eager is logged, with
    the reason, in one line.

    Args:
        known: earlier decisions ("compiled_blocks", "compiled_chunk": 0 or 1), which are followed without measuring.
    """

    def blocks(compiler: Callable[..., Any] | None) -> None:
        for replica in pool.replicas:
            replica.gated.compile_blocks(compiler)

    def chunk(compiler: Callable[..., Any] | None) -> None:
        for replica in pool.replicas:
            replica.head.kernels = Kernels() if compiler is None else Kernels.compiled(compiler)

    rows: list[tuple[str, float]] = []
    faster = {
        "blocks": _obstacle(pool, levels) or _try(pool, "blocks", blocks, _body, ids, known, rows),
        "chunk": _try(pool, "chunk", chunk, _chunk, ids, known, rows),
    }
    for part, reason in faster.items():
        if reason:
            _log.warning(
                "%s not compiled: %s", "decoder blocks are" if part == "blocks" else "chunks of logits are", reason
            )
    return Compiled(tuple(part for part, reason in faster.items() if not reason), tuple(rows))


def _compiler(code: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(code, dynamic=False, backend=compile_with_attention)
    known: set[object] = set()

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch._dynamo.config.recompile_limit < SHAPES:  # every thread has its own
            torch._dynamo.config.recompile_limit = SHAPES
        COMPILE_LOCK.let_pass()
        if (inputs := _layout((args, kwargs))) in known:
            with GUARD_LOCK.looking():
                return compiled(*args, **kwargs)
        with COMPILE_LOCK.alone():
            result = compiled(*args, **kwargs)
        known.add(inputs)
        return result

    return run


def _layout(value: object) -> object:
    """What inputs of compiled code must have in common, weights apart (which are alike in blocks that are)."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad, value.is_inference()
    if isinstance(value, tuple | list):
        return tuple(map(_layout, value))
    if isinstance(value, dict):
        return tuple((key, _layout(each)) for key, each in value.items())
    return value if isinstance(value, bool | int | float | str | None) else type(value)


def _try(
    pool: ReplicaPool,
    part: str,
    install: Callable[[Callable[..., Any] | None], None],
    work: Callable[[Replica, Tensor], object],
    ids: Tensor,
    known: Mapping[str, int],
    rows: list[tuple[str, float]],
) -> str:
    """Installs compiled code if that is faster; otherwise the reason why it stays eager."""
    decided = known.get(f"compiled_{part}")
    if decided == 0:
        return "an earlier measurement found eager as fast"
    rates = {"eager": 0.0, "compiled": 0.0}
    try:
        for _ in range(1 if decided else REPEATS):  # in turns: a machine's speed drifts
            for kind in ("compiled",) if decided else rates:
                install(_compiler if kind == "compiled" else None)
                rates[kind] = max(rates[kind], _rate(pool, work, ids))
    except Exception as error:  # no compiler, or code that cannot be traced: whatever it is, eager works
        install(None)
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    rows += [(f"{part} {kind}", rate) for kind, rate in rates.items() if rate]
    if rates["compiled"] < GAIN * rates["eager"]:
        install(None)
        return f"{rates['compiled']:.0f} tokens/s compiled, {rates['eager']:.0f} eager"
    return ""


def _rate(pool: ReplicaPool, work: Callable[[Replica, Tensor], object], ids: Tensor) -> float:
    """Tokens a second, after a run that is not counted; on a CPU of its own time."""

    def task(replica: Replica) -> float:
        with torch.inference_mode():
            for _ in range(2):
                replica.place(None, ids)
            work(replica, ids)
            return _seconds(replica, work, ids)

    return ids.numel() / pool.map([task])[0]


def _seconds(replica: Replica, work: Callable[[Replica, Tensor], object], ids: Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    clock = time.perf_counter if ids.is_cuda else time.thread_time  # other processes must not decide
    start = clock()
    work(replica, ids)
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return clock() - start


def _body(replica: Replica, ids: Tensor) -> object:
    return replica.gated.final_hidden(ids)


def _chunk(replica: Replica, ids: Tensor) -> object:
    """The divergence of a candidate from made-up vectors: what they hold does not matter for its speed."""
    size, dtype = replica.head.weight.shape[1], replica.head.dtype
    count = ids.shape[0] * (ids.shape[1] - 1)
    hidden = torch.linspace(-1, 1, size, device=ids.device).expand(count, size).contiguous()
    constants = hidden.new_zeros(count, dtype=torch.float64) if replica.head.linear else None
    return divergences(replica.head, [hidden.to(dtype)], DenseSide(hidden, constants))


def _obstacle(pool: ReplicaPool, levels: Levels) -> str:
    if pool.replicas[0].switch.rounding is not None:
        return "the inputs of their layers are rounded, at each level in its own way"
    if any(isinstance(module, LinearExperts) for module in pool.replicas[0].gated.model.modules()):
        return "experts see another number of tokens in every pass"
    blocks = pool.replicas[0].gated.blocks
    for number in range(len(levels.units)):
        dropped = [name for name, weight in levels.weights(number, 0).items() if weight is None]
        inside = [name for name in dropped if name not in blocks]
        if inside:
            return f"levels may drop {inside[0]}, a part of a block"
    return ""
