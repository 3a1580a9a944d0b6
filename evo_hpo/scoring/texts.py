"""The texts of a task: what a search reads, and what its results are judged on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from evo_hpo.models.corpora import Spec, Split, shares_of
from evo_hpo.models.text import load_tokens


@dataclass(frozen=True)
class Texts:
    """Which texts, and how much of them.

    Attributes:
        calibration, calibration_tokens: what searches read.
        held_out, held_out_tokens: by name, the one that names the winner first; "" where there is one. Tokens of each.
        built_on, built_on_tokens: what the level store was calibrated on, which is not held out either.
        sequence_length: tokens a sequence.
        seed: of the draw.
    """

    calibration: Spec
    calibration_tokens: int
    held_out: Mapping[str, Spec]
    held_out_tokens: int
    built_on: Spec
    built_on_tokens: int
    sequence_length: int
    seed: int

    def pool(self, tokenizer: Any, model: torch.nn.Module | None = None) -> torch.Tensor:
        """Calibration tokens (sequences x length).

        Raises:
            TextError: missing, too short, or of sequences longer than the model can read.
        """
        return self._read(self.calibration, "calibration", self.calibration_tokens, tokenizer, model)

    def judged(self, tokenizer: Any, model: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
        """Held-out tokens (sequences x length) by name; raises as :meth:`pool`."""
        return {
            name: self._read(text, "held_out", self.held_out_tokens, tokenizer, model)
            for name, text in self.held_out.items()
        }

    def check(self, tokenizer: Any) -> None:
        """Raises TextError where a text is missing or too short: before a store is built, which can take hours."""
        if "self" not in {name for spec in (self.calibration, *self.held_out.values()) for name in shares_of(spec)}:
            self.pool(tokenizer)
            self.judged(tokenizer)  # what the model writes itself is as long as is asked for

    def _read(
        self, spec: Spec, split: Split, tokens: int, tokenizer: Any, model: torch.nn.Module | None
    ) -> torch.Tensor:
        built_on = [self.built_on] if isinstance(self.built_on, str) else self.built_on  # of several stores: no mix
        read = dict.fromkeys([*shares_of(self.calibration), *built_on])
        return load_tokens(
            spec,
            tokenizer,
            self.sequence_length,
            tokens,
            self.seed,
            split,
            model,
            apart_from=read if split == "held_out" else (),
            drawn=max(self.calibration_tokens, self.built_on_tokens),
        )
