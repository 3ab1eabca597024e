"""What the package costs besides computing: its import, and its look at packed copies."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from convmixer_fast import create_model
from convmixer_fast.timing import interleaved_times, spread


def _process(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import(benchmark: Any, add_row: Any) -> None:
    runs = {
        "import torch": lambda: _process("import torch"),
        "import torch, convmixer_fast": lambda: _process("import torch, convmixer_fast"),
    }
    times = benchmark.pedantic(interleaved_times, args=(runs, 7), rounds=1)
    plain, ours = (spread(times[name])["median"] for name in runs)
    benchmark.extra_info["added seconds"] = ours - plain
    add_row(
        system="import convmixer_fast, added to import torch",
        ms=f"{1e3 * (ours - plain):.0f}",
    )


@pytest.mark.parametrize(("name", "size"), [("1024/20", 224), ("256/8", 32)])
def test_cache_check(name: str, size: int, benchmark: Any, add_row: Any) -> None:
    model = create_model(name).eval()
    x = torch.randn(1, 3, size, size)
    features = torch.randn(1, model.num_features, 4, 4)

    def check() -> None:
        for block in model.blocks:
            assert block._whole(features) is not None

    with torch.no_grad():
        runs = {"forward": lambda: model(x), "check": check}
        times = benchmark.pedantic(interleaved_times, args=(runs, 20, 3), rounds=1)
    forward, checking = (spread(times[name])["median"] for name in runs)
    benchmark.extra_info.update(forward=forward, check=checking)
    add_row(
        model=name,
        batch=1,
        system="asking whether blocks may run whole and packed copies are stale",
        ms=f"{1e3 * checking:.3f}",
        **{"% of forward": f"{100 * checking / forward:.2f}"},
    )
