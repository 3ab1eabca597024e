"""The fused operators, and the choice between backends.

`torch.library` operators ``convmixer_fast::depthwise_mix``, ``convmixer_fast::pointwise_mix``
(schema, kernels, fake, autograd), ``convmixer_fast::patch_embed_uint8`` and
``convmixer_fast::mixer_stack`` (inference).
"""

from .depthwise import depthwise_mix
from .dispatch import BackendError, available_backends, use_backend
from .mixer import mixer_stack
from .pointwise import pointwise_mix
from .stem import patch_embed_uint8

__all__ = [
    "BackendError",
    "available_backends",
    "depthwise_mix",
    "mixer_stack",
    "patch_embed_uint8",
    "pointwise_mix",
    "use_backend",
]
