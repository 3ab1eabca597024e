"""The record that the build of the compiled extensions left, and why one cannot be imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


def build_info() -> dict[str, Any]:
    """What the build of the extension left on record; empty when nothing was ever built.

    Keys: version, built, reason (why not, else ""), python, platform, and where it was built
    compiler, flags, isas (name -> lanes, flags) and omitted (name -> why); cuda, the same of the
    CUDA extension: built, reason, omitted, and compiler, flags, architectures and kernels.
    """
    try:
        info = json.loads((PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def why_absent(module: str, what: str, error: Exception, info: dict[str, Any]) -> str:
    """One line for an extension that cannot be imported: what its build said, and the import.

    Args:
        info: what `build_info` has of it.
    """
    causes = [f"convmixer_fast.{module}: {error}"]
    if info.get("reason"):
        causes.insert(0, f"the {what} extension was not built: {info['reason']}")
    elif not info:
        causes.append("the package was never built here: pip install .")
    return "; ".join(" ".join(cause.split()) for cause in causes)
