"""The peak resident memory of a whole process: weights, packed weights, activations and all."""

from __future__ import annotations

import json
import sys
from typing import Any

import fresh_python
import pytest
from presets import THREADS
from recording import BenchmarkRecorder

# Both systems import the same modules: the difference is the model's. The peak is that of the whole
# process, temporary memory of building and of the first forward included.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
import convmixer_fast as cf
from convmixer_fast.reference import ReferenceConvMixer

def resident(field):  # "VmRSS" now, "VmHWM" at its highest; MiB
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

which, name, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(int(sys.argv[4]))
before = resident("VmRSS")
variant = cf.arch.find_variant(name)
model = (cf.create_model(name) if which == "ours" else ReferenceConvMixer(variant.arch)).eval()
x = torch.randn(batch, *variant.input_size)
with torch.inference_mode():
    for _ in range(2):
        model(x)
peak = resident("VmHWM")
print(json.dumps({"MiB": peak, "MiB above imports": peak - before}))
"""

SYSTEMS = {"ours": "ours", "eager NCHW": "eager"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_of_a_whole_process(
    variant: str, memory_batch: int, benchmark: Any, record: BenchmarkRecorder
) -> None:
    group = f"{variant}, batch {memory_batch}"
    record.wanted("memory", group)

    def peak(which: str) -> dict[str, float]:
        arguments = ("-c", SCRIPT, which, variant, str(memory_batch), str(THREADS))
        result = fresh_python.run(*arguments, timeout=1800)
        assert result.returncode == 0, result.stderr
        return {name: round(mib) for name, mib in json.loads(result.stdout).items()}

    peaks = benchmark.pedantic(lambda: {s: peak(which) for s, which in SYSTEMS.items()}, rounds=1)
    place = {"model": variant, "batch": memory_batch, "threads": THREADS}
    record("memory", group, [{**place, "system": s, **columns} for s, columns in peaks.items()])
