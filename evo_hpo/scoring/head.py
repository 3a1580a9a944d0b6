"""The output head: log-normalisers over the vocabulary, never more than a chunk of logits at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evo_hpo.errors import ModelError
from evo_hpo.models.gates import GatedModel
from evo_hpo.scoring.kernels import Kernels, Part, logits_of
from evo_hpo.scoring.prepacking import Prepacked, linear


@dataclass(frozen=True, slots=True)
class Chunk:
    """Logits that exist at one time: tokens x vocabulary entries."""

    tokens: int = 512
    vocabulary: int = 1024


_CAPS = ("final_logit_softcapping", "output_logit_soft_cap")  # how configurations call the soft cap of logits


class OutputHead:
    """logits = cap(scale x (W h + b)), with cap(z) = c tanh(z / c) where the architecture has one.

    Scale and cap are recognised by comparing the model's own logits with those of the bare weight matrix.

    Args:
        gated: the model, whose head's weight (vocabulary x hidden) and bias are used.
        ids: token ids of a short pass, sequences x length.
        packed_bytes: memory for a packed copy of the weight (see :mod:`evo_hpo.scoring.prepacking`).

    Attributes:
        searched: candidates have heads of their own, see :meth:`of`.
        dtype: of final hidden states.

    Raises:
        ModelError: the logits are neither a multiple of W h + b nor a soft-capped one.
    """

    def __init__(self, gated: GatedModel, ids: Tensor, packed_bytes: int = 0) -> None:
        weight, bias = gated.head.weight, getattr(gated.head, "bias", None)
        assert isinstance(weight, Tensor)
        self.weight = weight.data
        self.bias = None if bias is None else bias.data
        self.searched = False
        self.chunk = Chunk()
        self.kernels = Kernels()
        self.packed = Prepacked(packed_bytes)
        config = getattr(gated.model, "config", None)
        text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
        self.cap: float | None = next((c for c in (getattr(text, n, None) for n in _CAPS) if c), None)
        with torch.inference_mode():
            logits = gated.logits(ids).float()
            final = gated.final_hidden(ids)[0]
            raw = linear(final, self.weight, self.bias).float()
        self.dtype = final.dtype
        uncapped = (
            logits if self.cap is None else self.cap * torch.atanh((logits / self.cap).clamp(-0.999999, 0.999999))
        )
        self.scale = float((raw * uncapped).sum().double() / raw.square().sum().double())
        self.scale = 1.0 if abs(self.scale - 1) < 1e-4 else self.scale
        worst = float((self._activate(raw * self.scale) - logits).abs().max())
        limit = (1e-4 if self.weight.dtype == torch.float32 else 5e-2) * max(1.0, float(logits.abs().max()))
        if not worst <= limit:
            raise ModelError(
                f"{type(gated.model).__name__}: its logits differ by {worst:.2g} from scale x head (soft cap"
                f" {self.cap}): this output head is not supported"
            )

    @property
    def linear(self) -> bool:
        """Whether logits are one linear map of the hidden state: no soft cap, not rounded to 16 bits, not searched."""
        return self.cap is None and self.weight.dtype == torch.float32 and not self.searched

    def of(self, weight: Tensor) -> OutputHead:
        """The head of a candidate that has this weight, vocabulary x hidden; itself where it is its own."""
        if weight.data_ptr() == self.weight.data_ptr():
            return self
        found = copy.copy(self)
        found.weight = weight
        return found

    def expect(self, positions: int) -> None:
        """Packs the weight for so many final hidden states at a time (at most a chunk of them)."""
        if self.packed.expect(min(positions, self.chunk.tokens)):
            for entries in self.entries():
                self.packed.keep(str(entries.start), self.weight[entries])

    def logits(self, hidden: Tensor, entries: slice) -> Tensor:
        """Logits of some vocabulary entries (tokens x entries), float32. ``hidden`` comes from :meth:`scaled`."""
        return logits_of(hidden, self.part(entries))

    def part(self, entries: slice) -> Part:
        """The rows of the head for some vocabulary entries."""
        return self.weight[entries], None if self.bias is None else self.bias[entries] * self.scale, self.cap

    def scaled(self, hidden: Tensor) -> Tensor:
        """Hidden states with the architecture's logit scale multiplied in, as the head's weights are rounded."""
        return (hidden if self.scale == 1.0 else hidden * self.scale).to(self.weight.dtype)

    def parts(self) -> Iterator[Part]:
        """The head in chunks of the vocabulary."""
        for entries in self.entries():
            yield self.part(entries)

    def entries(self, tokens: int = 0) -> Iterator[slice]:
        """The vocabulary in chunks; of fewer entries where so many tokens are more than a chunk has."""
        size = self.weight.shape[0]
        step = max(1, self.chunk.vocabulary * self.chunk.tokens // max(tokens, self.chunk.tokens))
        for first in range(0, size, step):
            yield slice(first, min(first + step, size))

    def log_normaliser(self, hidden: Tensor) -> Tensor:
        """log sum exp of the logits (tokens), float32."""
        parts = [self._log_normaliser(part) for part in torch.split(hidden, self.chunk.tokens)]
        return torch.cat(parts)

    def _log_normaliser(self, hidden: Tensor) -> Tensor:
        total = hidden.new_zeros(len(hidden), dtype=torch.float32)
        if hidden.device.type == "cpu":  # logits rarely need a shift, and finding out costs no wait on a CPU
            for part in self.parts():
                total += self.kernels.exp_sums(hidden, part)
            usable = in_range(total)
            if bool(usable.all()):
                return total.log_()
            return torch.where(usable, total.log(), self._with_shift(hidden))
        return self._with_shift(hidden)

    def _with_shift(self, hidden: Tensor) -> Tensor:
        """The same, of logits of any size."""
        total = hidden.new_zeros(len(hidden), dtype=torch.float32)
        top = torch.full_like(total, -1e30)
        for part in self.parts():
            top, total = self.kernels.running_sums(hidden, part, top, total)
        return top + total.log()

    def selected(self, hidden: Tensor, entries: Tensor) -> Tensor:
        """Logits of chosen entries (tokens x k) for entry numbers (tokens x k)."""
        step = max(1, 4_000_000 // (entries.shape[1] * hidden.shape[1]))
        parts = []
        for h, e in zip(torch.split(hidden, step), torch.split(entries, step), strict=True):
            logits = torch.einsum("tkh,th->tk", self.weight[e].float(), h.float())
            parts.append(logits if self.bias is None else logits + self.bias[e] * self.scale)
        return self._activate(torch.cat(parts))

    def _activate(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else (logits / self.cap).tanh_().mul_(self.cap)


def in_range(total: Tensor) -> Tensor:
    """Which sums of exponentials are neither too large nor too small for single precision."""
    return torch.isfinite(total) & (total > 1e-20)
