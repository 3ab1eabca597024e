"""What every test starts from: no backend asked for, seeded generators, quiet known warnings."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# On CI the same examples every time: a change fails by its own fault. Elsewhere, new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _clean_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVMIXER_FAST_BACKEND", raising=False)
    torch.manual_seed(0)
