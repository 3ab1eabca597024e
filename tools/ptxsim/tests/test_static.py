"""SASS analysis, ahead-of-time compilation, the bound model and the command line."""

import json
import subprocess
import sys
from pathlib import Path

import ptxsim
import pytest

pytest.importorskip("triton")
kernels = pytest.importorskip("kernels")
ROOT = Path(__file__).resolve().parent.parent
MATMUL = {
    "a": "*bf16",
    "b": "*bf16",
    "c": "*bf16",
    "M": "i32",
    "N": "i32",
    "K": "i32",
    "sam": "i32",
    "sbk": "i32",
    "scm": "i32",
}
DEPTHWISE = {"x": "*bf16", "w": "*bf16", "y": "*bf16", "H": "i32", "W": "i32", "C": "i32"}


@pytest.fixture(scope="module", autouse=True)
def disassembler():
    if ptxsim.sass.tool("cuobjdump") is None:
        pytest.skip("cuobjdump not found")


@pytest.mark.parametrize(
    ("arch", "matrix", "load"),
    [
        (80, "HMMA.16816.F32", "LDGSTS"),
        (86, "HMMA.16816.F32", "LDGSTS"),
        (89, "HMMA.16816.F32", "LDGSTS"),
        (90, "HGMMA", "LDGSTS"),
        (100, "UTCHMMA", "LDGSTS"),
        (120, "HMMA.16816.F32", "LDGSTS"),
    ],
)
def test_matmul_uses_the_tensor_cores_of_its_target(arch, matrix, load):
    built = ptxsim.sass.aot(
        kernels.matmul,
        MATMUL,
        {"BM": 128, "BN": 64, "BK": 32},
        arch,
        divisible=("M", "N", "K", "sam", "sbk", "scm"),
    )
    report = built.report
    assert report.arch == arch
    assert report.has(matrix)
    assert report.has(load)
    assert report.features
    assert 32 <= report.registers <= 255
    assert built.shared > 0
    assert set(report.widths("STG")) == {128}
    assert set(report.widths("LDGSTS")) == {128}
    hot = report.hot_loop
    assert hot.innermost
    assert any(i.opcode.startswith(matrix.split(".")[0]) for i in hot.instructions)


def test_depthwise_hot_loop_counts_the_taps():
    built = ptxsim.sass.aot(
        kernels.depthwise_row, DEPTHWISE, {"K": 7, "BR": 4, "BC": 64}, 80, divisible=("C",)
    )
    hot = built.report.hot_loop
    # 8 columns x 7 taps x 4 x 64 elements over 128 threads
    assert hot.histogram["FFMA"] == 8 * 7 * 4 * 64 // 128
    assert hot.mix()["fp32_fma"] == pytest.approx(hot.histogram["FFMA"] / hot.size)
    assert built.report.spills == 0
    assert built.report.stack == 0
    assert built.report.widths("LDG") == {32: 21}  # 14 input columns + 7 weight loads, bf16 pairs


def test_sixteen_bit_accesses_are_seen():
    report = ptxsim.sass.aot(
        kernels.depthwise_row, DEPTHWISE, {"K": 3, "BR": 4, "BC": 32}, 80
    ).report
    assert report.widths("LDG")[16] > 0
    assert report.widths("STG")[16] > 0


SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) many(const float* x, float* y) {
    float v[96];
    for (int k = 0; k < 96; k++) v[k] = x[threadIdx.x + k * 1024];
    for (int r = 0; r < 3; r++)
#pragma unroll
        for (int k = 0; k < 96; k++) v[k] = v[k] * v[(k * 7 + 1) % 96] + 1.f;
    float s = 0;
    for (int k = 0; k < 96; k++) s += v[k] * (k + 1);
    y[threadIdx.x] = s;
}
"""


def test_spills_are_seen(nvcc, tmp_path):
    (tmp_path / "many.cu").write_text(SPILLS)
    subprocess.run(
        [ptxsim.cuda.nvcc(), "-arch=sm_80", "-cubin", "many.cu", "-o", "many.cubin"],
        cwd=tmp_path,
        check=True,
    )
    (report,) = ptxsim.sass.analyse(tmp_path / "many.cubin")
    assert report.registers == 32
    assert report.spill_loads > 0
    assert report.spill_stores > 0
    assert report.stack > 0


def test_missing_types_are_named():
    with pytest.raises(ValueError, match=r"\['n'\]"):
        ptxsim.sass.aot(kernels.vadd, {"a": "*fp32", "b": "*fp32", "c": "*fp32"}, {"B": 128})


def test_command_line(tmp_path):
    built = ptxsim.sass.aot(kernels.depthwise_row, DEPTHWISE, {"K": 3, "BR": 4, "BC": 32}, 86)
    (tmp_path / "k.cubin").write_bytes(built.cubin)
    (tmp_path / "k.ptx").write_text(built.ptx)

    def run(*args):
        return subprocess.run(
            [sys.executable, "-m", "ptxsim", *map(str, args)],
            cwd=ROOT.parent,
            capture_output=True,
            text=True,
        )

    assert "depthwise_row sm_86" in run("sass", tmp_path / "k.cubin").stdout
    assert (
        json.loads(run("sass", "--json", tmp_path / "k.cubin").stdout)[0]["registers"]
        == built.report.registers
    )
    assert "depthwise_row:" in run("ptx", tmp_path / "k.ptx").stdout
    (row,) = json.loads(run("ptx", "--json", tmp_path / "k.ptx").stdout)
    assert row["unsupported"] == []
    assert row["by_op"]["fma"] > 0
    missing = run("ptx", tmp_path / "none.ptx")
    assert missing.returncode == 1
    assert "none.ptx" in missing.stderr


def test_bound_of_a_copy_is_dram():
    torch = pytest.importorskip("torch")
    n = 1 << 16
    a, b, c = torch.randn(3, n)
    with ptxsim.triton_on_cpu(80) as log:
        kernels.vadd[(n // 1024,)](a, b, c, n, B=1024)
    for name, gpu in ptxsim.model.GPUS.items():
        result = ptxsim.model.bound(log[0], name)
        assert result.limit == "dram"
        assert result.seconds == pytest.approx(3 * 4 * n / (gpu.dram_gbs * 1e9))
        assert result.fractions["dram"] == 1
        assert result.flops == n
    assert "limited by dram" in ptxsim.model.table(log[0])


def test_bound_of_a_matmul_and_of_a_sample():
    torch = pytest.importorskip("torch")
    a, b, c = (torch.randn(256, 256).bfloat16() for _ in range(3))
    times = {}
    for sample in (None, 4):
        with ptxsim.triton_on_cpu(80, max_ctas=sample, race=False) as log:
            kernels.matmul[(4, 4)](a, b, c, 256, 256, 256, 256, 256, 256, BM=64, BN=64, BK=32)
        result = ptxsim.model.bound(log[0], "A100")
        assert result.scale == 16 / log[0].ctas
        assert result.times["tensor"] == pytest.approx(2 * 256**3 / 312e12)
        times[sample] = result.times["issue"]
    assert times[4] == pytest.approx(times[None], rel=0.01)


def test_model_needs_counters():
    torch = pytest.importorskip("torch")
    a, b, c = torch.randn(3, 64)
    with ptxsim.triton_on_cpu(80, counters=False) as log:
        kernels.vadd[(1,)](a, b, c, 64, B=64)
    with pytest.raises(ValueError, match="counters=False"):
        ptxsim.model.bound(log[0], "H100")
