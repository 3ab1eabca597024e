"""Autocast set by the caller's arguments, independent of the context of the call."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


def autocast(device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Autocast to ``dtype`` on ``device``; None turns it off."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
