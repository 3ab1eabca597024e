"""setup.py as a module for tests: an import builds nothing."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def setup_file() -> ModuleType:
    """setup.py; skips the calling test where there is no source tree or no setuptools."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not run from a source tree")
    pytest.importorskip("setuptools", minversion="77")
    spec = importlib.util.spec_from_file_location("convmixer_fast_setup_file", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
