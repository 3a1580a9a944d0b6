"""Which calibration sequences a minibatch holds."""

from __future__ import annotations

import numpy as np

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.problem import Minibatch


def check_tokens(tokens: int, pool_sequences: int, length: int) -> None:
    """Raises InvalidSettingError unless the pool can give exactly this many tokens in whole sequences."""
    if tokens < length or tokens % length:
        below = max(tokens // length, 1) * length
        raise InvalidSettingError(
            f"{tokens} tokens are not a whole number of sequences of {length}: use a multiple, for example {below}"
        )
    if tokens > pool_sequences * length:
        raise InvalidSettingError(
            f"{tokens} tokens are more than the pool's {pool_sequences * length}: ask for fewer or load more"
        )


def sequences_of(minibatch: Minibatch, pool_sequences: int, length: int) -> tuple[int, ...]:
    """Numbers of the minibatch's sequences: the first tokens / length of the pool's permutation by the seed.

    So a minibatch of more tokens with the same seed begins with the same sequences (nested).

    Raises:
        InvalidSettingError: not a multiple of the sequence length, or more than the pool holds.
    """
    check_tokens(minibatch.tokens, pool_sequences, length)
    order = np.random.default_rng([minibatch.seed, 0x6D6261]).permutation(pool_sequences)
    return tuple(int(i) for i in order[: minibatch.tokens // length])
