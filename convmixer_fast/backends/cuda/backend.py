"""The backend ``cuda``: the 1x1 convolutions in CUDA C++, the rest as ``triton``."""

from __future__ import annotations

import torch

from ...ops.registry import Backend
from . import native, pointwise

BACKEND = Backend(
    name="cuda",
    unavailable_here=lambda: native.why_not_here(),
    unavailable=lambda device: native.why_not(device),
    is_automatic=lambda device: device.type != "cpu",
    layout=torch.channels_last,
    extends="triton",
)

#: The files with its implementations.
IMPLEMENTATIONS = (pointwise,)
