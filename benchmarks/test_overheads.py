"""What the package costs besides computing: its import, and its look at packed copies."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from convmixer_fast import create_model
from convmixer_fast.blocks import _Fused
from convmixer_fast.ops.packing import sources_of
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


@pytest.mark.parametrize(("variant", "size"), [("1024/20", 224), ("256/8", 32)])
def test_cache_check(variant: str, size: int, benchmark: Any, add_row: Any) -> None:
    model = create_model(variant).eval()
    x = torch.randn(1, 3, size, size)
    fused = [m for m in model.modules() if isinstance(m, _Fused)]

    def check() -> None:
        for module in fused:
            entry = module._packed._entry
            assert entry is not None
            module._packed.get(entry.key, sources_of(*_conv_and_norm(module)), _never)

    with torch.no_grad():
        runs = {"forward": lambda: model(x), "check": check}
        times = benchmark.pedantic(interleaved_times, args=(runs, 20, 3), rounds=1)
    forward, checking = (spread(times[name])["median"] for name in runs)
    benchmark.extra_info.update(forward=forward, check=checking)
    add_row(
        model=variant,
        batch=1,
        system="asking whether packed copies are stale",
        ms=f"{1e3 * checking:.3f}",
        **{"% of forward": f"{100 * checking / forward:.2f}"},
    )


def _conv_and_norm(module: _Fused) -> tuple[Any, Any]:
    parts: Any = getattr(module, "fn", module)
    return parts[-3], parts[-1]


def _never() -> Any:
    raise AssertionError("a copy was stale although nothing changed")
