"""What can be computed as one operator, and by whom?

`torch.library` operators ``convmixer_fast::depthwise_mix`` and ``convmixer_fast::pointwise_mix``
(schema, kernels, fake, autograd) and the choice between backends.
"""

from .backends import BackendError, available_backends, use_backend
from .depthwise import depthwise_mix
from .pointwise import pointwise_mix

__all__ = [
    "BackendError",
    "available_backends",
    "depthwise_mix",
    "pointwise_mix",
    "use_backend",
]
