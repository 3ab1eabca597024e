"""The CUDA 1x1 convolution on every shape: host and device code on a CPU, under sanitizers.

g++ compiles csrc/cuda/pointwise_mma.cu; warps run in random order.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import CUDA_CASES, MatrixCase, check, draw, enough_draws
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

import cuda_emulation

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
SMALL = [c for c in CUDA_CASES if not c.large]


@pytest.fixture(scope="module", name="program")
def _program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cuda_emulation.build(tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize(
    ("case", "type_"),
    [
        # Large tiles of the other types take as long: in test_every_shape_of_other_stages.
        pytest.param(case, type_, id=f"{case}-{type_}")
        for case in SMALL
        for type_ in TYPES
        if case.name != "many_tiles" or type_ == "bf16"
    ],
)
def test_every_shape(program: Path, case: MatrixCase, type_: str) -> None:
    draws = enough_draws(case.n, case.d, case.h, case.w)
    kernel = partial(cuda_emulation.run, program)
    check(kernel, case, TYPES[type_], draws=draws, tf32=type_ == "tf32")


@pytest.mark.parametrize("seed", range(4))
def test_every_order_of_warps_gives_the_same_bits(program: Path, seed: int) -> None:
    case = next(c for c in SMALL if c.name == "many_steps")
    o = draw(case, torch.bfloat16)
    results = []
    for order in (0, seed + 1):
        out = torch.full((1, 10, 13, 136), float("nan"), dtype=torch.bfloat16).permute(0, 3, 1, 2)
        rest = (o.x, o.weight, o.bias, o.scale, o.shift, case.act)
        results.append(cuda_emulation.run(program, *rest, out=out, seed=order))
    assert torch.equal(*results)


@settings(max_examples=25, deadline=None)
@given(
    c=st.integers(1, 150),
    h=st.integers(1, 12),
    w=st.integers(1, 12),
    d=st.integers(1, 150),
    layout=st.sampled_from(["nhwc", "nchw", "channel_slice", "odd_channel_slice", "image_slice"]),
    act=st.sampled_from(cuda_emulation.ACTIVATIONS),
    type_=st.sampled_from(sorted(TYPES)),
)
def test_drawn_shapes(
    program: Path, c: int, h: int, w: int, d: int, layout: str, act: str, type_: str
) -> None:
    case = MatrixCase("drawn", 1, c, h, w, d, layout=layout, act=act)
    kernel = partial(cuda_emulation.run, program)
    check(kernel, case, TYPES[type_], draws=enough_draws(d, h, w), tf32=type_ == "tf32")


@pytest.mark.parametrize("channels", [(40, 24), (39, 23)], ids=["by_8", "odd"])
def test_tensors_past_two_to_the_31_elements(program: Path, channels: tuple[int, int]) -> None:
    # Rows so far on that the elements of x and of the result before them are beyond int32.
    c, d = channels
    o = draw(MatrixCase("far", 1, c, 7, 11, d), torch.bfloat16)
    rest = (o.x, o.weight, o.bias, o.scale, o.shift, "gelu")
    results = []
    for before in (0, 2**31 // d + 64 - 2**31 // d % 64):
        out = torch.full((1, 7, 11, d), float("nan"), dtype=torch.bfloat16).permute(0, 3, 1, 2)
        results.append(cuda_emulation.run(program, *rest, out=out, rows_before=before))
    assert torch.equal(*results)


def activated(program: Path, values: torch.Tensor, act: str) -> torch.Tensor:
    """act of float32 values: as the biases of a sum over no channels."""
    n = len(values)
    x, weight = torch.empty(1, 0, 1, 1), torch.empty(n, 0, 1, 1)
    out = torch.full((1, n, 1, 1), 7.0)
    rest = (values, torch.ones(n), torch.zeros(n), act)
    return cuda_emulation.run(program, x, weight, *rest, out=out).flatten()


ACTIVATE = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "identity": lambda h: h,
}


@pytest.mark.parametrize("act", ACTIVATE)
def test_nan_and_infinity_match_pytorch(program: Path, act: str) -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1e30])
    # In float64: oneDNN's float32 GELU of infinity is NaN on CPUs with AVX-512, and nowhere else.
    expected = ACTIVATE[act](values.double()).float()
    torch.testing.assert_close(
        activated(program, values, act), expected, equal_nan=True, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("act", "most"), [("gelu", 3e-7), ("silu", 3e-7), ("hardswish", 2e-7), ("relu", 0)]
)
def test_activations_are_right_relative_to_their_argument(
    program: Path, act: str, most: float
) -> None:
    values = torch.linspace(-30, 30, 20001)
    error = (activated(program, values, act).double() - ACTIVATE[act](values.double())).abs()
    assert (error / values.double().abs().clamp(min=1)).max() <= most


@pytest.mark.parametrize(
    ("fails", "what"),
    [
        ("cudaGetDevice", "preparing the kernel"),
        ("cudaFuncGetAttributes", "preparing the kernel"),
        ("cudaFuncSetAttribute", "preparing the kernel"),
        ("cudaLaunchKernel", "cudaLaunchKernel"),
    ],
)
@pytest.mark.parametrize(
    ("channels", "type_", "kernel"),
    [
        (72, "bf16", "pointwise_mma 64x64, copies of 16 bytes"),
        (38, "fp16", "pointwise_mma 64x64, copies of 4 bytes"),
        (37, "tf32", "pointwise_mma 64x64, copies of 4 bytes"),
        (37, "bf16", "pointwise_mma 64x64, copies of 2 bytes"),
    ],
)
def test_every_call_of_the_runtime_that_fails_is_reported(
    program: Path, fails: str, what: str, channels: int, type_: str, kernel: str
) -> None:
    o = draw(MatrixCase("block", 2, channels, 5, 3, channels), TYPES[type_])
    out = torch.empty(2, 5, 3, channels, dtype=TYPES[type_]).permute(0, 3, 1, 2)
    rest = (o.x, o.weight, o.bias, o.scale, o.shift, "silu")
    with pytest.raises(cuda_emulation.EmulationError) as raised:
        cuda_emulation.run(program, *rest, out=out, fails=fails)
    name = {"bf16": "bfloat16", "fp16": "float16"}.get(type_, type_)
    assert (
        f"{kernel} (30 x {channels} -> {channels} {name} silu, sm_80): {what} failed with "
        "cudaErrorNotPermitted (operation not permitted)"
    ) in str(raised.value)


def test_empty_problems_launch_nothing(program: Path) -> None:
    for pixels, channels in ((0, 8), (8, 0)):
        x, weight = torch.empty(1, 8, 1, pixels), torch.empty(channels, 8, 1, 1)
        out = torch.empty(1, channels, 1, pixels)
        rest = (None, torch.empty(channels), torch.empty(channels), "gelu")
        assert cuda_emulation.run(program, x, weight, *rest, out=out).numel() == 0


@pytest.mark.gpu_static_full
@pytest.mark.parametrize("architecture", [80, 86])
def test_every_shape_of_other_stages(tmp_path: Path, architecture: int) -> None:
    kernel = partial(cuda_emulation.run, cuda_emulation.build(tmp_path, architecture))
    for case in SMALL:
        for type_, dtype in TYPES.items():
            draws = enough_draws(case.n, case.d, case.h, case.w)
            check(kernel, case, dtype, draws=draws, tf32=type_ == "tf32")
