"""Where is ptxsim, the simulator that runs compiled GPU kernels on CPU tensors?

In the folder that ``CONVMIXER_FAST_PTXSIM`` names, else in a folder of its name beside the checkout
or in another folder beside it. Tests that need it skip with the reason where it is absent.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ENVIRONMENT = "CONVMIXER_FAST_PTXSIM"
_CHECKOUT = Path(__file__).resolve().parents[2]


def _holds_it(folder: Path) -> bool:
    return (folder / "ptxsim" / "__init__.py").is_file()


def folder() -> Path | None:
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named) if _holds_it(Path(named)) else None
    beside = _CHECKOUT.parent
    places = (beside / "ptxsim", *sorted(beside.glob("*/ptxsim")))
    return next((place for place in places if _holds_it(place)), None)


def ptxsim() -> ModuleType:
    """The simulator; skips the calling test where it or Triton is absent."""
    pytest.importorskip("triton", reason="Triton is not installed")
    place = folder()
    if place is None:
        pytest.skip(f"ptxsim is not here: name its folder in {ENVIRONMENT}")
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
    return importlib.import_module("ptxsim")
