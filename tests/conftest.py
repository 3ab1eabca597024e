"""What every test starts from: no backend asked for, seeded generators, quiet known warnings."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _clean_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVMIXER_FAST_BACKEND", raising=False)
    torch.manual_seed(0)
