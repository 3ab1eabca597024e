"""Identity of a model to the last bit, so that a run continues only one with the same model."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def model_digest(model: nn.Module, *more: object) -> str:
    """A digest of a model in 32 hexadecimal digits.

    Covers its modules and their settings, name, shape, dtype and bits of every parameter and
    buffer, and ``more``.
    """
    digest = hashlib.blake2b(repr((model, more)).encode(), digest_size=16)
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
