"""The backend ``triton``: one kernel an operator, on GPUs of NVIDIA and AMD."""

from __future__ import annotations

import torch

from ...ops.registry import Backend
from . import depthwise, pointwise, stem, support

BACKEND = Backend(
    name="triton",
    unavailable_here=lambda: support.why_not_here(),
    unavailable=lambda device: support.why_not(device),
    is_automatic=lambda device: device.type != "cpu",
    layout=torch.channels_last,
)

#: The files with its implementations.
IMPLEMENTATIONS = (depthwise, pointwise, stem)
