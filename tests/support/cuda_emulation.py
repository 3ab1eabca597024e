"""The CUDA code of csrc/cuda without a GPU: compiled by g++, run on the CPU.

tools/ptxsim/shim holds the header that emulates threads; tests/cuda/emulated has the GPU's
instructions and the part of the CUDA runtime that the code calls. Under sanitizers a bad access is
an error that names the line.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import ptxsim
import pytest
import torch
from torch import Tensor

from convmixer_fast.backends.triton.kernels.operands import pixel_rows

_ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(ptxsim.__file__).parent / "shim"
SOURCES, HERE = _ROOT / "csrc" / "cuda", _ROOT / "tests" / "cuda" / "emulated"
TYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS = ("gelu", "relu", "silu", "hardswish", "identity")
# AddressSanitizer and the header cover what the disabled checks would find.
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-sanitize=null,alignment,object-size,vptr",
    "--param=asan-instrumentation-with-call-threshold=0",
)


class EmulationError(AssertionError):
    """The emulated kernel failed; the message is the sanitizer's or the emulation's."""


def build(folder: Path, architecture: int = 80, sanitize: bool = True) -> Path:
    """Compile all kernels as for sm_``architecture``; skips without g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    program = folder / "pointwise_emulated"
    command = [compiler, "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-DCUDA_EMU", f"-D__CUDA_ARCH__={10 * architecture}"]
    command += [f"-I{SHIM}", f"-I{HERE}", f"-I{SOURCES}"]
    command += [*(SANITIZERS if sanitize else ()), "-o", str(program)]
    done = subprocess.run(
        [*command, str(HERE / "pointwise_emulated.cpp")], capture_output=True, text=True
    )
    if done.returncode:
        raise EmulationError(f"g++ failed:\n{done.stderr}")
    return program


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def run(
    program: Path,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    *,
    out: Tensor,
    seed: int = 1,
    rows_before: int = 0,
    fails: str = "",
) -> Tensor:
    """A 1x1 convolution of x (N, C, H, W) by the program, into ``out``; float32 as TF32.

    Args:
        rows_before: rows in front of x and out, none of which may be accessed.
        fails: the call of the CUDA runtime that fails.

    Raises:
        EmulationError: the program failed.
    """
    n, k = weight.shape[:2]
    m = x.shape[0] * x.shape[2] * x.shape[3]
    x, stride = pixel_rows(x, m)
    a = x.as_strided(((m - 1) * stride + k,), (1,)) if m else x.flatten()
    per_16 = 16 // x.element_size()
    offsets = (t.data_ptr() // t.element_size() % per_16 for t in (x, out))
    numbers = (TYPES.index(x.dtype), ACTIVATIONS.index(act), m, n, k, stride, *offsets)
    arguments = [str(v) for v in (*numbers, int(bias is not None), seed, rows_before)]
    vectors = [v.float() for v in (bias, scale, shift) if v is not None]
    done = subprocess.run(
        [str(program), *arguments],
        input=b"".join(_bytes(t) for t in (a, weight, *vectors)),
        capture_output=True,
        # The operands are not freed before the program ends.
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "EMULATED_FAILURE": fails},
        timeout=600,
    )
    if done.returncode:
        raise EmulationError(done.stderr.decode(errors="replace")[-4000:])
    y = torch.frombuffer(bytearray(done.stdout), dtype=x.dtype) if done.stdout else out.new_empty(0)
    out.permute(0, 2, 3, 1).copy_(y.view(out.shape[0], *out.shape[2:], n))
    return out
