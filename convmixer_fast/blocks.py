"""The path of the fused modules in 0.1.0, which pickled models name."""

import warnings
from typing import Any

from .modules import blocks, fused, halves, stack, stem

_MOVED = (halves, stem, blocks, stack, fused)


def __getattr__(name: str) -> Any:
    for module in _MOVED:
        if hasattr(module, name):
            if not name.startswith("__"):
                warnings.warn(
                    f"convmixer_fast.blocks.{name} is now {module.__name__}.{name}",
                    DeprecationWarning,
                    stacklevel=2,
                )
            return getattr(module, name)
    raise AttributeError(f"module 'convmixer_fast.blocks' has no attribute {name!r}")
