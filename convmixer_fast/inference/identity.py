"""Is a run that goes on the one that was cut off? Its model has to be the same, to the last bit."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def model_digest(model: nn.Module, *more: object) -> str:
    """32 hexadecimal digits that tell one model from another: of its modules and their
    settings, of every parameter's and buffer's name, shape, dtype and bits, and of ``more``."""
    digest = hashlib.blake2b(repr((model, more)).encode(), digest_size=16)
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
