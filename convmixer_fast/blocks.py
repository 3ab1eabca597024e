"""The path of `convmixer_fast.modules.blocks` in 0.1.0, which pickled models name."""

import warnings
from typing import Any

from .modules import blocks as _moved


def __getattr__(name: str) -> Any:
    value = getattr(_moved, name)
    if not name.startswith("__"):
        warnings.warn(
            f"convmixer_fast.blocks is now convmixer_fast.modules.blocks: import {name} from there",
            DeprecationWarning,
            stacklevel=2,
        )
    return value
