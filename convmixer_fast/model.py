"""The path of `convmixer_fast.modules.model` in 0.1.0, which pickled models name."""

import warnings
from typing import Any

from .modules import model as _moved


def __getattr__(name: str) -> Any:
    value = getattr(_moved, name)
    if not name.startswith("__"):
        warnings.warn(
            f"convmixer_fast.model is now convmixer_fast.modules.model: import {name} from there",
            DeprecationWarning,
            stacklevel=2,
        )
    return value
