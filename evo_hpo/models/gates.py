"""A gate on each decoder block, so that a forward pass can start in the middle of the model.

Works for any decoder-only model whose blocks hand one hidden state on: blocks before the start pass their input
through, the first block that runs is given the stored state, and the output head is replaced by a tap that takes its
input (the final hidden state) and multiplies nothing. Embeddings, masks, positions and the final norm are the model's
own code. The gates live on a replica that shares every weight with the model; the caller's model is not touched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from evo_hpo.errors import EvoHpoError, ModelError
from evo_hpo.models.streaming import BlockStream
from evo_hpo.models.structure import decoder_blocks


def replicate(model: nn.Module) -> nn.Module:
    """A copy with its own module objects and parameters that share the memory of the model's weights."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo).eval()


def example_tokens(model: nn.Module, length: int = 12) -> Tensor:
    """Token ids for checks of a model, 1 x length, spread over its vocabulary."""
    getter: Any = model.get_input_embeddings
    weight = getter().weight
    return ((7 + 13 * torch.arange(length)) % len(weight))[None].to(weight.device)


class GatedModel:
    """A causal language model that can start at any block and gives final hidden states instead of logits.

    Args:
        model: decoder-only Hugging Face model; it is replicated, never changed.
        example: token ids (at least 1 x 2) for the self-check.
        stream: device that each block's weights come to for its turn; None: they are where they run.

    Attributes:
        model: the replica.
        blocks: name -> decoder block of the replica, in running order.
        head: the output head of the replica (weight: vocabulary x hidden).
        dropped: numbers of the blocks that pass their input through.
        stream: where weights come from, if they are brought.

    Raises:
        ModelError: no decoder blocks, no output head, a model that looks at later tokens, or one whose gated pass fails
            or differs from the plain one.
    """

    def __init__(self, model: nn.Module, example: Tensor, stream: torch.device | None = None) -> None:
        self.model = replicate(model)
        self.blocks: dict[str, nn.Module] = decoder_blocks(self.model)
        self.head = output_head(self.model)
        self.dropped: set[int] = set()
        self._returns: dict[int, int] = {}  # length of the tuple that a block returns; 0: a bare tensor
        self._start = 0
        self._state: Tensor | None = None
        self._keep: Collection[int] = ()
        self._kept: dict[int, Tensor] = {}
        self._final: Tensor | None = None
        self.stream = None if stream is None else BlockStream(list(self.blocks.values()), stream)
        self._originals = [block.forward for block in self.blocks.values()]
        self.compile_blocks(None)
        try:
            with torch.inference_mode():
                for block, forward in zip(self.blocks.values(), self._forwards, strict=True):
                    block.forward = forward
                plain = self._plain_hidden(example)
                for number, block in enumerate(self.blocks.values()):
                    block.forward = self._gate(number)
                self.head.forward = self._tap
                self._check(example, plain)
        except (EvoHpoError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever an architecture's own code says when it is not run in one piece
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ModelError(
                f"{type(model).__name__} is not supported: its blocks cannot be run one by one ({reason})"
            ) from error

    def __len__(self) -> int:
        return len(self.blocks)

    def final_hidden(
        self, ids: Tensor, start: int = 0, state: Tensor | None = None, keep: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Runs the blocks from ``start`` and the final norm.

        Args:
            ids: token ids, sequences x length.
            start: first block that runs; the ones before it are skipped.
            state: its input (sequences x length x hidden); needed unless ``start`` is 0.
            keep: numbers of blocks (>= start) whose input is wanted.

        Returns:
            The input of the output head (sequences x length x hidden), and block number -> its input.
        """
        self._start, self._state, self._keep, self._kept = start, state, keep, {}
        try:
            self.model(input_ids=ids, use_cache=False)
            assert self._final is not None
            return self._final, self._kept
        finally:
            self._state, self._final, self._kept = None, None, {}

    def logits(self, ids: Tensor) -> Tensor:
        """What the model says of these sequences, by its own head."""
        tap, self._start = self.head.__dict__.pop("forward"), 0
        try:
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return found
        finally:
            self.head.forward = tap

    def compile_blocks(self, compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None) -> None:
        """Runs each block's own code as ``compiler(code)``, the gates outside of it; None: as it was."""
        forwards = list(self._originals) if compiler is None else [compiler(f) for f in self._originals]
        stream = self.stream
        self._forwards = [stream.wrapped(n, f) for n, f in enumerate(forwards)] if stream else forwards

    def _gate(self, number: int) -> Callable[..., Any]:
        def gate(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if number < self._start:
                return self._wrap(number, hidden)
            if number == self._start and self._state is not None:
                hidden = self._state
            if number in self._keep:
                self._kept[number] = hidden
            if number in self.dropped:
                return self._wrap(number, hidden)
            if args:
                args = (hidden, *args[1:])
            else:
                kwargs["hidden_states"] = hidden
            return self._forwards[number](*args, **kwargs)

        return gate

    def _wrap(self, number: int, hidden: Tensor) -> Any:
        length = self._returns.get(number, 0)
        return (hidden, *[None] * (length - 1)) if length else hidden

    def _tap(self, hidden: Tensor) -> Tensor:
        self._final = hidden
        return hidden[..., :1]

    def _plain_hidden(self, ids: Tensor) -> Tensor:
        """The head's input in an ordinary forward pass; notes what each block returns."""
        seen: list[Tensor] = []
        hooks = [self.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
        for number, block in enumerate(self.blocks.values()):
            hooks.append(block.register_forward_hook(self._note(number)))
        versions = [parameter._version for parameter in self.model.parameters()]
        try:
            self.model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        if versions != [parameter._version for parameter in self.model.parameters()]:
            raise ModelError(f"{type(self.model).__name__} is not supported: it changes its weights in a forward pass")
        if len(seen) != 1 or len(self._returns) != len(self.blocks):
            raise ModelError(
                f"{type(self.model).__name__}: {len(self._returns)} of {len(self.blocks)} blocks and {len(seen)} heads"
                " ran in a forward pass; one head and every block once are needed"
            )
        return seen[0]

    def _note(self, number: int) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            self._returns[number] = len(output) if isinstance(output, tuple | list) else 0

        return note

    def _check(self, ids: Tensor, plain: Tensor) -> None:
        numbers = range(len(self))
        exact = all(parameter.dtype == torch.float32 for parameter in self.model.parameters())
        tolerance = 1e-5 if exact else 2e-2  # a product in 16 bits may depend on how many rows it has
        whole, kept = self.final_hidden(ids, keep=numbers)
        other = ids.clone()
        other[:, -1] = ids[:, 0]
        changed = float((self.final_hidden(other)[0] - plain)[:, :-1].abs().max())
        if not changed <= 10 * tolerance * float(plain.abs().max()):
            raise ModelError(
                f"{type(self.model).__name__} is no causal language model: what it says of a token depends on later"
                " ones"
            )
        for start in sorted({0, 1 % len(self), len(self) // 2, len(self) - 1}):
            resumed, _ = self.final_hidden(ids, start, kept[start])
            scale = float(plain.abs().max())
            if not math.isfinite(scale):
                raise ModelError(
                    f"the hidden states of {type(self.model).__name__} are not finite in {plain.dtype}: use a dtype of"
                    " wider range (float32, bfloat16)"
                )
            worst = max(float((x - plain).abs().max()) for x in (whole, resumed))
            if not worst <= tolerance * scale:
                raise ModelError(
                    f"{type(self.model).__name__}: a pass resumed at block {start} differs from the plain pass by"
                    f" {worst:.2g} (largest value {scale:.2g}): its blocks exchange more than one hidden state"
                )


def output_head(model: nn.Module) -> nn.Module:
    """The module that makes logits of final hidden states.

    Raises:
        ModelError: there is none that holds a weight matrix.
    """
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if getter else None
    weight = getattr(head, "weight", None)
    if not isinstance(head, nn.Module) or not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ModelError(f"{type(model).__name__} has no output head with a weight matrix: is it a causal model?")
    return head
