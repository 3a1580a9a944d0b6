"""What a cached loss belongs to."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn

__all__ = ["context_hash", "model_hash"]


def model_hash(model: nn.Module) -> str:
    """Names, shapes, and up to 64 values of each weight."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        digest.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def context_hash(model: str, levels: str, settings: tuple[object, ...], tokens: Tensor) -> str:
    """Hash of everything a loss depends on besides assignment and minibatch."""
    digest = hashlib.sha256("|".join([model, levels, *map(str, settings)]).encode())
    digest.update(tokens.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
