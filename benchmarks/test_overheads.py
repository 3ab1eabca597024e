"""What the package costs besides computing: its import, its look at packed copies, its memory."""

from __future__ import annotations

import sys
from typing import Any

import fresh_python
import pytest
import torch

from convmixer_fast import create_model
from convmixer_fast.timing import interleaved_times, spread


def _process(code: str) -> None:
    fresh_python.run("-c", code, check=True)


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


PEAK = """
import sys
from pathlib import Path
import torch
import convmixer_fast as cf
from convmixer_fast.reference import ReferenceConvMixer

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1024

which, name, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
before = resident("VmRSS")
arch = cf.arch.find_variant(name).arch
model = (cf.create_model(name) if which == "ours" else ReferenceConvMixer(arch)).eval()
x = torch.randn(batch, 3, 224, 224)
with torch.inference_mode():
    for _ in range(2):
        model(x)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["1024/20", "1536/20"])
def test_whole_process_peak(name: str, benchmark: Any, add_row: Any) -> None:
    """Weights, packed weights, activations and all: MiB above the imports, batch 4."""

    def peak(which: str) -> int:
        return int(fresh_python.run("-c", PEAK, which, name, "4", check=True, timeout=600).stdout)

    peaks = benchmark.pedantic(lambda: {w: peak(w) for w in ("ours", "eager")}, rounds=1)
    benchmark.extra_info.update(peaks)
    for which, mib in peaks.items():
        add_row(model=name, batch=4, system=f"whole process, {which}", MiB=mib)


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
