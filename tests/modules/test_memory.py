"""Inference needs no more memory than eager PyTorch: peak resident size, each per process."""

from __future__ import annotations

import functools
import sys

import fresh_python
import pytest

SCRIPT = """
import sys
from pathlib import Path
import torch
import convmixer_fast as cf
from convmixer_fast.reference import ReferenceConvMixer

which, layout, dtype, size = sys.argv[1:]
dtype, size = getattr(torch, dtype), int(size)
torch.manual_seed(0)
arch = cf.Arch(96, 3, kernel_size=7, patch_size=2, num_classes=10)
plain = ReferenceConvMixer(arch)
model = plain
if which == "ours":
    model = cf.ConvMixer(96, 3, 7, 2, num_classes=10)
    model.load_state_dict(plain.state_dict())
model.eval().to(dtype)
x = torch.randn(2, 3, size, size).to(dtype)
if layout == "channels_last":
    x = x.contiguous(memory_format=torch.channels_last)

def resident(field):  # "VmRSS" now, "VmHWM" at its highest since the last reset; MiB
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1024

with torch.no_grad():
    model(x[:, :, :64, :64])
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest mark
    before = resident("VmRSS")
    model(x)
print(resident("VmHWM") - before)
"""


@functools.cache
def peak_mib(
    which: str, layout: str, dtype: str = "float32", size: int = 512, **environment: str
) -> int:
    # A fixed threshold: every tensor is mapped by itself and given back when freed. glibc's moving
    # one keeps what is freed in a heap, and how much of it is chance: twice the live tensors in one
    # process, none in the next.
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    arguments = (which, layout, dtype, str(size))
    result = fresh_python.run("-c", SCRIPT, *arguments, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("disabled", ["0", "1"], ids=["engine", "no engine"])
def test_inference_peak_is_not_above_eager_pytorch(disabled, layout):
    activation = 2 * 96 * 256 * 256 * 4 // 2**20
    eager = peak_mib("eager", layout)
    ours = peak_mib("ours", layout, CONVMIXER_FAST_DISABLE_NATIVE=disabled)
    assert eager >= 2 * activation, "the measurement does not see the activations"
    # A tenth of an activation is far below any copy of one, and above the noise of pages of code.
    assert ours <= eager + activation // 10, f"ours {ours} MiB, eager {eager} MiB"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bfloat16_peak_is_not_above_eager_pytorch():
    # Blocks compute in float32: a few images at a time, so that no batch is ever twice its size.
    # A smaller image: PyTorch's bfloat16 convolutions are slow where the processor has none.
    activation = 2 * 96 * 192 * 192 * 2 // 2**20
    eager = peak_mib("eager", "contiguous", "bfloat16", 384)
    ours = peak_mib("ours", "contiguous", "bfloat16", 384)
    assert eager >= 2 * activation, "the measurement does not see the activations"
    assert ours <= eager + activation // 10, f"ours {ours} MiB, eager {eager} MiB"
