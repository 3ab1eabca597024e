"""Static bars of the CUDA 1x1 convolution: every kernel, compiled without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import ptxsim
import pytest
from triton_modes import compiler, skip_code_without_loops

pytest.importorskip("triton", reason="Triton is not installed")

from gpu_static import cuda_pointwise

SOME = {
    80: ("bf16-gelu-large", "tf32-gelu-large", "fp16-relu-small", "bf16-silu-by_4"),
    89: ("fp16-silu-large", "bf16-gelu-by_2", "tf32-silu-small"),
    120: ("bf16-gelu-large", "fp16-gelu-small", "tf32-hardswish-by_4"),
}

pytestmark = compiler


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = ptxsim.cuda.nvcc()
    if found is None:
        pytest.skip("nvcc is not on PATH")
    if ptxsim.sass.tool("cuobjdump") is None:
        pytest.skip("cuobjdump is neither in Triton nor on PATH")
    return found


def broken(reports: dict[Any, Any]) -> dict[str, list[str]]:
    for report in reports.values():
        skip_code_without_loops(report)
    found = {str(k): cuda_pointwise.broken_bars(report, k) for k, report in reports.items()}
    return {name: bars for name, bars in found.items() if bars}


@pytest.mark.parametrize("architecture", SOME)
def test_some_kernels_meet_the_bars(nvcc: str, architecture: int) -> None:
    kernels = [cuda_pointwise.named(name) for name in SOME[architecture]]
    assert broken(cuda_pointwise.build(architecture, kernels)) == {}


def test_every_exception_is_needed() -> None:
    bar, traffic = cuda_pointwise.MOST_PER_MMA, cuda_pointwise.MOST_TRAFFIC
    table = cuda_pointwise.EXCEPTIONS
    assert all(max(e.per_mma) > bar or e.traffic > traffic for e in table), table
    assert len({(e.half, e.way) for e in table}) == len(table)


@pytest.mark.parametrize("architecture", cuda_pointwise.ARCHITECTURES)
def test_stages_are_those_of_the_source(architecture: int) -> None:
    text = (cuda_pointwise.SOURCES / "pointwise_mma.cuh").read_text()
    condition = re.search(r"return (architecture == .*?) \? 3 : 4;", text)
    assert condition is not None
    three = eval(condition.group(1).replace("||", "or"), {"architecture": architecture})
    assert cuda_pointwise.stages(architecture) == (3 if three else 4)


def test_a_kernel_that_spills_is_an_error(
    nvcc: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = tmp_path / "cuda"
    shutil.copytree(cuda_pointwise.SOURCES, sources)
    shutil.copytree(cuda_pointwise.SOURCES.parent / "common", tmp_path / "common")
    file = sources / "pointwise_mma.cuh"
    # Registers for eight blocks on a multiprocessor instead of two.
    bounds = "__launch_bounds__(kThreads, {})"
    file.write_text(file.read_text().replace(bounds.format(2), bounds.format(8)))
    monkeypatch.setattr(cuda_pointwise, "SOURCES", sources)
    with pytest.raises(cuda_pointwise.CompileError, match="spilled"):
        cuda_pointwise.build(80, [cuda_pointwise.named("bf16-identity-small")])


ROUNDED = """
__device__ unsigned rounded(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
__global__ void kept(unsigned* to, const float* x) { *to = rounded(*x); }
__global__ void multiplied(float* to, const float* x) {
  float s[4] = {};
  unsigned r = rounded(*x);
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %4, %4, %4},"
      " {%4, %4}, {%0, %1, %2, %3};" : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]) : "r"(r));
  *to = s[0] + s[1] + s[2] + s[3];
}
"""


@pytest.mark.parametrize("architecture", cuda_pointwise.ARCHITECTURES)
def test_nvcc_relies_on_the_machine_to_truncate_tf32(
    nvcc: str, tmp_path: Path, architecture: int
) -> None:
    # As prepared_for_tf32 does: the rounding clears the truncated bits, but not before an mma.
    source, cubin = tmp_path / "rounded.cu", tmp_path / "rounded.cubin"
    source.write_text(ROUNDED)
    command = [nvcc, "-O3", f"-arch=sm_{architecture}", "-cubin"]
    subprocess.run([*command, str(source), "-o", str(cubin)], check=True)
    cleared = {
        name: any(s.base == "LOP3" for s in report.sass)
        for report in ptxsim.sass.analyse(cubin)
        for name in ("kept", "multiplied")
        if name in report.name
    }
    assert cleared == {"kept": True, "multiplied": False}


@pytest.mark.gpu_static_full
@pytest.mark.parametrize("architecture", cuda_pointwise.ARCHITECTURES)
def test_every_kernel_meets_the_bars(nvcc: str, architecture: int) -> None:
    assert broken(cuda_pointwise.build(architecture)) == {}
