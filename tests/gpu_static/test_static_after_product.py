"""Static bars of the epilogue behind PyTorch's GEMM, compiled without a GPU."""

from __future__ import annotations

from typing import Any

import ptxsim
import pytest
from triton_modes import assert_bars, compiler

pytest.importorskip("triton", reason="Triton is not installed")

from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.backends.triton.kernels.after_product import (
    TILE,
    TILE_FLOAT64,
    after_product_kernel,
)

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
#: Triton's name of a type -> bytes.
TYPES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
#: With that many registers two blocks of 16 warps share a multiprocessor.
MOST_REGISTERS = 128

pytestmark = compiler


def build(architecture: int, kind: str, act: str) -> Any:
    tile = TILE_FLOAT64 if kind == "fp64" else TILE
    vectors = "*fp64" if kind == "fp64" else "*fp32"
    signature = {
        **{"h": f"*{kind}", "bias": f"*{kind}", "scale": vectors, "shift": vectors},
        **{"M": "i64", "n_vectors": "i32"},
    }
    constants = {"ACT": act, "VECTOR_N": 16, "BLOCK_M": tile[0], "BLOCK_N": tile[1]}
    return ptxsim.sass.aot(after_product_kernel, signature, constants, architecture, num_warps=4)


def broken(architecture: int, kind: str, act: str) -> list[str]:
    """The missed bars: no spills, accesses of 16 bytes, float64 arithmetic for float64 only."""
    report = build(architecture, kind, act).report
    elements = 32 if kind != "fp64" else 8
    moves = elements * TYPES[kind] // 16
    double = sum(report.histogram[name] for name in ("DADD", "DMUL", "DFMA"))
    bars = {
        f"{report.spills} values spilled, {report.stack} bytes of stack": (
            report.spills == report.stack == 0
        ),
        f"{report.registers} registers": report.registers <= MOST_REGISTERS,
        f"stores of {dict(report.widths('STG'))} bits": report.widths("STG") == {128: moves},
        f"loads of {dict(report.widths('LDG'))} bits": report.widths("LDG")[128] >= moves,
        f"{double} instructions in float64": (double >= 2 * elements) == (kind == "fp64"),
    }
    return [text for text, holds in bars.items() if not holds]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_float64_meets_the_bars(architecture: int, act: str) -> None:
    assert_bars(broken(architecture, "fp64", act))


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_gelu_of_the_other_types_meets_the_bars(kind: str) -> None:
    assert_bars(broken(80, kind, "gelu"))


@pytest.mark.gpu_static_full
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_form(architecture: int, kind: str, act: str) -> None:
    assert_bars(broken(architecture, kind, act))
