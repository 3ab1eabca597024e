"""The pointwise half of a block on a GPU: our kernels, cuBLAS alone, and separate operators.

For each published width, batch and dtype, milliseconds and TFLOP/s of: Triton's kernel, the CUDA
extension's, PyTorch's GEMM with one kernel after it, PyTorch's operators one by one in both
layouts, and cuBLAS's GEMM alone, which no fused kernel can be expected to beat by much. Every one
of ours is checked against float64 first; L2 is cold, as in a network.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from convmixer_fast.diagnostics import gpu_report
from convmixer_fast.diagnostics.timing import gpu_seconds
from convmixer_fast.ops import execution

PROBLEMS = [p for p in gpu_report.problems() if p.op == "pointwise_mix"]


def _name(problem: gpu_report.Problem) -> str:
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{problem.variant.replace('/', '_')}-{dtype}-batch{problem.shape[0]}"


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True], ids=["exact", "tf32"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=_name)
def test_channel_half(benchmark: Any, problem: gpu_report.Problem, tf32: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    if tf32 and problem.dtype != torch.float32:
        pytest.skip("TF32 is a way to multiply float32")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        row = benchmark.pedantic(_measure, args=(problem, device), rounds=1)
    finally:
        torch.set_float32_matmul_precision(before)
    seconds = row["seconds"]
    benchmark.extra_info.update(
        {name: {"ms": 1e3 * t, "tflops": 2e-12 * row["macs"] / t} for name, t in seconds.items()}
    )
    print(f"\n{gpu_report.line(row)}")
    assert row["ok"], gpu_report.line(row)
    assert not row["others"], row["others"]


def _measure(problem: gpu_report.Problem, device: torch.device) -> dict[str, Any]:
    (row,) = gpu_report.report(device, which=[problem])["rows"]
    x, weight, *_ = execution.sample(problem.case(device), problem.shape)
    rows, matrix = x.permute(0, 2, 3, 1).flatten(0, 2), weight.flatten(1)
    row["seconds"]["cuBLAS alone"] = gpu_seconds(lambda: F.linear(rows, matrix))
    return row
