"""The CUDA 1x1 convolution's PTX in the simulator: results, races and memory traffic.

The default run has some of the kernels; ``-m gpu_static_full`` has all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ptxsim
import pytest
import torch
import torch.nn.functional as F
from gpu_cases import CUDA_CASES, MatrixCase, check
from triton_modes import compiler

pytest.importorskip("triton", reason="Triton is not installed")

from gpu_static import cuda_pointwise

#: Way of a kernel (the alignment of its rows) -> a case for it.
CASES_OF_WAY = {
    "large": "many_steps",
    "small": "channels_by_8",
    "by_4": "even_channels",
    "by_2": "odd_channels",
}
SOME = (
    ("bf16-gelu-large", "many_steps"),
    ("tf32-gelu-large", "several_tiles_and_steps"),
    ("fp16-relu-small", "channels_by_8"),
    ("fp16-relu-small", "channel_slice"),
    ("bf16-silu-by_4", "even_channels"),
    ("tf32-hardswish-by_4", "channels_by_4"),
    ("tf32-identity-by_4", "one_channel"),
    ("bf16-gelu-by_2", "odd_channels"),
    ("bf16-gelu-by_2", "odd_channel_slice"),
    ("fp16-identity-by_2", "one_channel"),
)

pytestmark = compiler


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = ptxsim.cuda.nvcc()
    if found is None:
        pytest.skip("nvcc is not on PATH")
    return found


@pytest.fixture(scope="module", name="module")
def _module(nvcc: str) -> Any:
    names = dict.fromkeys(name for name, _ in SOME)
    return cuda_pointwise.ptx([cuda_pointwise.named(name) for name in names])


def named(name: str) -> MatrixCase:
    return next(c for c in CUDA_CASES if c.name == name)


def simulate(module: Any, name: str, case: MatrixCase, **settings: Any) -> Any:
    """Run a kernel on a case; results, races, bounds, bytes never written, conflicts, mma count."""
    kernel, log = cuda_pointwise.named(name), []

    def run(*operands: Any, out: torch.Tensor) -> torch.Tensor:
        log.append(
            cuda_pointwise.launch(module, kernel, *operands, out=out, strict=True, **settings)
        )
        return out

    case = dataclasses.replace(case, act=kernel.act)
    check(run, case, kernel.dtype, tf32=kernel.type == "tf32")
    (stats,) = log
    for kind, (took, ideal) in stats.bank_conflicts().items():
        assert took == ideal, (kind, took, ideal)
    step = cuda_pointwise.SETS_BYTES[kernel.tile] // kernel.size
    m, n, k = (
        -(-count // unit) * unit
        for count, unit in (
            (case.n * case.h * case.w, kernel.tile),
            (case.d, kernel.tile),
            (case.c, step),
        )
    )
    assert stats.counters["mma_flops"] == 2 * m * n * k
    return stats


@pytest.mark.parametrize(("name", "case"), SOME)
def test_simulated(module: Any, name: str, case: str) -> None:
    simulate(module, name, named(case))


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_with_warps_out_of_step(module: Any, order: str) -> None:
    # A barrier that is missing gives a wrong result in these orders.
    simulate(module, "fp16-relu-small", named("many_steps"), order=order, seed=1)
    simulate(module, "bf16-gelu-by_2", named("odd_channels"), order=order, seed=2)


def test_large_tiles_with_warps_out_of_step(module: Any) -> None:
    case = dataclasses.replace(named("many_steps"), h=12, w=10, d=120)
    simulate(module, "bf16-gelu-large", case, order="random", seed=3)


def test_three_stages(nvcc: str) -> None:
    kernel = cuda_pointwise.named("bf16-relu-small")
    module = cuda_pointwise.ptx([kernel], architecture=86)
    simulate(module, str(kernel), named("many_steps"), order="random", architecture=86)


def test_no_bias_no_channels_in(module: Any) -> None:
    simulate(module, "fp16-relu-small", named("no_bias"))
    kernel, shift = cuda_pointwise.named("fp16-relu-small"), torch.randn(8)
    x, weight = torch.empty(1, 0, 2, 3).half(), torch.empty(8, 0, 1, 1).half()
    out = torch.empty(1, 2, 3, 8).half().permute(0, 3, 1, 2)
    rest = (shift.relu() + 1, torch.full((8,), 2.0), shift, "relu")
    cuda_pointwise.launch(module, kernel, x, weight, *rest, out=out, strict=True)
    right = 2 * (shift.relu() + 1) + shift
    torch.testing.assert_close(
        out.float(), right.view(1, -1, 1, 1).expand(out.shape), atol=4e-3, rtol=1e-3
    )


def test_gelu_is_right_to_the_error_stated_in_the_source(module: Any) -> None:
    # The values are biases of a sum over no channels. The simulator's ex2 is exact.
    values = torch.linspace(-12, 12, 8000)
    n = len(values)
    x, weight, out = torch.empty(1, 0, 1, 1), torch.empty(n, 0, 1, 1), torch.empty(1, n, 1, 1)
    rest = (values, torch.ones(n), torch.zeros(n), "gelu")
    kernel = cuda_pointwise.named("tf32-gelu-large")
    settings = {"strict": True, "counters": False, "exact_fma": True}
    cuda_pointwise.launch(module, kernel, x, weight, *rest, out=out, **settings)
    error = (out.flatten().double() - F.gelu(values.double())).abs()
    assert error.max() <= 3.9e-7
    assert error[values < -1.5].max() <= 4.0e-8


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in SOME))
def test_memory_traffic_is_the_tilings(nvcc: str, module: Any, name: str) -> None:
    kernel = cuda_pointwise.named(name)
    asked = cuda_pointwise.traffic(module, kernel)
    assert asked["bytes_over_ideal"] <= cuda_pointwise.most_traffic(kernel), asked


def as_tf32(module: Any, values: torch.Tensor) -> torch.Tensor:
    """float32 values as the kernels multiply them: their products with 1."""
    n = len(values)
    x, weight = values.view(1, n, 1, 1).permute(0, 2, 1, 3), torch.ones(1, 1, 1, 1)
    out = torch.empty(1, n, 1, 1).permute(0, 3, 1, 2)
    rest = (None, torch.ones(1), torch.zeros(1), "identity")
    kernel = cuda_pointwise.named("tf32-identity-by_4")
    cuda_pointwise.launch(module, kernel, x, weight, *rest, out=out, counters=False)
    return out.flatten()


def test_tf32_is_as_near_as_the_source_states(module: Any) -> None:
    # Fractions all over, and the first and last ones.
    bits = torch.arange(0x3F800000, 0x40000000, 1021, dtype=torch.int32)
    ends = torch.arange(8192, dtype=torch.int32)[::64] + torch.tensor([[0x3F800000], [0x3FFFE03F]])
    values = torch.cat([bits, ends.flatten().int()]).view(torch.float32)
    error = (as_tf32(module, values).double() - values.double()) * 2**10
    assert error.abs().max() <= 0.694
    assert error.max() >= 0.6, "to the nearest, or cut off: not what the source says"
    # Logarithms that spread evenly.
    even = torch.linspace(0, 1, 10008, dtype=torch.float64)[:-1].exp2().float()
    error = (as_tf32(module, even).double() - even.double()) * 2**10
    assert error.mean().abs() <= 5e-3
    # Rounding to the nearest: 0.289; cut off as they are: 0.577.
    assert error.square().mean().sqrt() <= 0.31


def test_tf32_numbers_stay_as_they_are(module: Any) -> None:
    fractions = torch.arange(0, 1 << 23, 1 << 13, dtype=torch.int32)
    exponents = torch.tensor([1, 2, 100, 127, 200, 254], dtype=torch.int32) << 23
    values = (exponents[:, None] + fractions).flatten().view(torch.float32)
    values = torch.cat([values, -values, torch.tensor([0.0, float("inf"), -float("inf")])])
    torch.testing.assert_close(as_tf32(module, values), values, rtol=0, atol=0)
    # The last has nothing in the upper bits.
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32)
    assert as_tf32(module, nans.view(torch.float32)).isnan().all()
    # As rounding does, past the largest.
    assert as_tf32(module, torch.tensor([torch.finfo(torch.float32).max])).isinf().all()


@pytest.fixture(scope="module", name="all_kernels")
def _all_kernels(nvcc: str) -> Any:
    return cuda_pointwise.ptx(cuda_pointwise.KERNELS)


@pytest.mark.gpu_static_full
@pytest.mark.parametrize("order", ["lockstep", "reverse", "random"])
@pytest.mark.parametrize("kernel", cuda_pointwise.KERNELS, ids=str)
def test_every_kernel_in_every_order(all_kernels: Any, kernel: Any, order: str) -> None:
    simulate(all_kernels, str(kernel), named(CASES_OF_WAY[kernel.way]), order=order, seed=1)


@pytest.mark.gpu_static_full
@pytest.mark.parametrize("case", [c for c in CUDA_CASES if not c.large], ids=str)
@pytest.mark.parametrize("type_", ["bf16", "tf32"])
def test_every_shape(all_kernels: Any, case: MatrixCase, type_: str) -> None:
    # The widest copies that every layout of the case allows.
    size = cuda_pointwise.TYPES[type_].itemsize
    counts = [case.c, case.d, *([3] if case.layout == "odd_channel_slice" else [])]
    way = next(
        w
        for w, b in (("small", 16), ("by_4", 4), ("by_2", size))
        if all(v * size % b == 0 for v in counts)
    )
    simulate(all_kernels, f"{type_}-{case.act}-{way}", case)
