"""The backend ``cpu``: the C++ engine."""

from __future__ import annotations

import torch

from ...ops.registry import Backend
from . import depthwise, native, pointwise, stack


def _unavailable_here() -> str:
    return "" if native.load() else native.why_unavailable()


def _unavailable(device: torch.device) -> str:
    return _unavailable_here() if device.type == "cpu" else f"the tensors are on {device.type}"


BACKEND = Backend(
    name="cpu",
    unavailable_here=_unavailable_here,
    unavailable=_unavailable,
    is_automatic=lambda device: device.type == "cpu",
)

#: The files with its implementations.
IMPLEMENTATIONS = (depthwise, pointwise, stack)
